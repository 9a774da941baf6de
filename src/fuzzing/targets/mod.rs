//! The targets, by what they read.

mod answers;
mod events;
mod files;
mod ids;
mod keys;
mod requests;
mod stored;

use super::Target;

const fn target(name: &'static str, run: fn(&[u8]) -> u64, words: &'static [&'static str]) -> Target {
    Target { name, run, words }
}

pub const ALL: &[Target] = &[
    target("apns_answer", answers::apns, answers::WORDS),
    target("apns_key", keys::apns, keys::WORDS),
    target("catalogue", files::catalogue, files::CATALOGUE_WORDS),
    target("config", files::config, files::CONFIG_WORDS),
    target("config_env", files::config_env, files::CONFIG_WORDS),
    target("data", events::data, events::WORDS),
    target("device_token", ids::device_token, ids::WORDS),
    target("event_type", events::event_type, events::WORDS),
    target("fcm_answer", answers::fcm, answers::WORDS),
    target("identity", ids::identity, ids::WORDS),
    target("import_csv", files::import_csv, files::IMPORT_WORDS),
    target("import_ndjson", files::import_ndjson, files::IMPORT_WORDS),
    target("names", ids::names, ids::WORDS),
    target("notify_event", requests::notify_event, requests::WORDS),
    target("oauth_answer", answers::oauth, answers::WORDS),
    target("outcome_block", stored::outcome_block, &[]),
    target("page_token", stored::page_token, stored::WORDS),
    target("payload", events::payload, events::WORDS),
    target("reach", stored::reach, &[]),
    target("register_device", requests::register_device, requests::WORDS),
    target("retry_after", answers::retry_after, answers::WORDS),
    target("service_account", keys::service_account, keys::WORDS),
    target("set_opt_in", requests::set_opt_in, requests::WORDS),
    target("targets", stored::targets, &[]),
    target("template", events::template, events::WORDS),
    target("watch_cursor", stored::watch_cursor, stored::WORDS),
];

/// Equal but for the last digits of a fraction, which reading JSON may change.
fn same(a: &serde_json::Value, b: &serde_json::Value) -> bool {
    use serde_json::Value;
    match (a, b) {
        (Value::Number(a), Value::Number(b)) if a.is_f64() && b.is_f64() => {
            let (a, b) = (a.as_f64().unwrap_or_default(), b.as_f64().unwrap_or_default());
            (a - b).abs() <= (a.abs() * 1e-14).max(f64::MIN_POSITIVE)
        }
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| same(a, b)))
        }
        (a, b) => a == b,
    }
}

/// The input as text; what is not UTF-8 is replaced.
fn text(input: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(input)
}

/// The input in two, at the first line feed.
fn halves(input: &[u8]) -> (&[u8], &[u8]) {
    let at = input.iter().position(|byte| *byte == b'\n').unwrap_or(input.len());
    (&input[..at], input.get(at + 1..).unwrap_or_default())
}
