//! `[apps.<app_id>]`: one mobile product with its credentials.

use std::collections::{BTreeMap, BTreeSet};

use super::apns::{self, ApnsCredential};
use super::fcm::{self, FcmCredential};
use super::section::Section;
use crate::domain::device::MAX_LABEL_BYTES;
use crate::domain::ids::{AppId, Locale, UserId};

/// The credential that `[apps.x.apns]` itself stands for.
pub const DEFAULT_CREDENTIAL: &str = "default";

#[derive(Clone, Debug)]
pub struct App {
    /// Whether `nudged_id` is put into payloads. Default true.
    pub push_id: bool,
    /// Whether undeclared event types are taken even when the app has declared some. Default false.
    pub allow_undeclared_types: bool,
    /// The language of devices for which an event type has no words and names no default: a BCP 47 tag. Default: the
    /// type's first entry.
    pub default_locale: Option<Locale>,
    /// Nobody else is ever sent to: these people, and devices with one of `only_labels`. Empty, both: everybody.
    pub only_users: BTreeSet<UserId>,
    /// Label keys, with the value where one was given (`key=value`).
    pub only_labels: Vec<(String, Option<String>)>,
    /// Events taken a second. Default: no limit.
    pub max_events_per_second: Option<u32>,
    /// No event is taken while more deliveries are open. Default: no limit.
    pub max_open_targets: Option<u64>,
    /// By credential name.
    pub apns: BTreeMap<String, ApnsCredential>,
    /// By credential name.
    pub fcm: BTreeMap<String, FcmCredential>,
}

pub(super) fn read(mut section: Section<'_>) -> BTreeMap<AppId, App> {
    let mut apps = BTreeMap::new();
    for (name, mut section) in section.tables(&[]) {
        let app = App {
            push_id: section.flag("push_id", true),
            allow_undeclared_types: section.flag("allow_undeclared_types", false),
            default_locale: section.parsed("default_locale", "write a language tag such as `ko` or `ko-KR`", |text| {
                Locale::parse("", text).map_err(|violation| violation.description)
            }),
            only_users: section.items("only_users", "write user ids as in RegisterDevice", |text| {
                UserId::parse("", text).map_err(|violation| violation.description)
            }),
            only_labels: section.items("only_labels", "write `key` or `key=value`", label),
            max_events_per_second: section
                .optional_number("max_events_per_second", 1..=1_000_000)
                .and_then(|number| u32::try_from(number).ok()),
            max_open_targets: section.optional_number("max_open_targets", 1..=1_000_000_000),
            apns: credentials(section.table("apns"), apns::KEYS, apns::read),
            fcm: credentials(section.table("fcm"), fcm::KEYS, fcm::read),
        };
        match AppId::parse("", &name) {
            Ok(id) => {
                apps.insert(id, app);
            }
            Err(violation) => section.about_itself(
                &format!("`{name}` is not an app id: {}", violation.description),
                "use a short slug such as `ifriendspet`",
            ),
        }
        section.finish();
    }
    section.finish();
    apps
}

fn label(text: &str) -> Result<(String, Option<String>), String> {
    let (key, value) = text.split_once('=').map_or((text, None), |(key, value)| (key, Some(value)));
    if key.is_empty() || text.len() > 2 * MAX_LABEL_BYTES {
        return Err(format!("`{text}` is not a label"));
    }
    Ok((key.to_owned(), value.map(str::to_owned)))
}

/// A platform's table holds the default credential's own keys, and tables that are further credentials.
fn credentials<T>(
    mut section: Section<'_>,
    known: &[&str],
    read: impl Fn(&mut Section<'_>) -> Option<T>,
) -> BTreeMap<String, T> {
    let mut credentials = BTreeMap::new();
    for (name, mut named) in section.tables(known) {
        // The same slug rule as an app's: it appears in metric labels and in RegisterDevice.
        if let Err(violation) = AppId::parse("", &name) {
            let wrong = format!("`{name}` is not a credential name: {}", violation.description);
            named.about_itself(&wrong, "use a short slug such as `watch`");
        } else if name == DEFAULT_CREDENTIAL {
            named.about_itself("the default credential stands in the section above", "move its keys one level up");
        }
        if let Some(credential) = read(&mut named) {
            credentials.insert(name, credential);
        }
        named.finish();
    }
    if !section.is_empty() {
        if let Some(credential) = read(&mut section) {
            credentials.insert(DEFAULT_CREDENTIAL.to_owned(), credential);
        }
        section.finish();
    }
    credentials
}
