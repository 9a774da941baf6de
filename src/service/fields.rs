//! The checks of fields that several requests share.

use std::collections::BTreeMap;

use crate::domain::device::{Labels, MAX_LABEL_BYTES, MAX_LABELS};
use crate::domain::ids::{DeviceId, EventType, UserId};
use crate::domain::time::UnixMs;
use crate::domain::violation::{Violations, text_rule};

use super::MAX_CLOCK_AHEAD_MS;

pub(super) fn user_id(violations: &mut Violations, text: &str) -> Option<UserId> {
    violations.take(UserId::parse("user_id", text))
}

/// Empty means absent.
pub(super) fn optional_user(violations: &mut Violations, field: &str, text: &str) -> Option<UserId> {
    if text.is_empty() { None } else { violations.take(UserId::parse(field, text)) }
}

/// Empty means absent.
pub(super) fn optional_event_type(violations: &mut Violations, text: &str) -> Option<EventType> {
    if text.is_empty() { None } else { violations.take(EventType::parse("event_type", text)) }
}

/// Empty means absent.
pub(super) fn optional_device(violations: &mut Violations, text: &str) -> Option<DeviceId> {
    if text.is_empty() { None } else { device(violations, "device_id", text) }
}

pub(super) fn device(violations: &mut Violations, field: &str, text: &str) -> Option<DeviceId> {
    let id = DeviceId::parse_public(text);
    if id.is_none() {
        violations.add(field, "is not a device_id");
    }
    id
}

/// One line of text; empty means absent.
pub(super) fn optional_line(
    violations: &mut Violations,
    field: &str,
    text: String,
    max_bytes: usize,
) -> Option<String> {
    let no_control = |text: &str| {
        if text.chars().any(char::is_control) { Err("must have no control characters") } else { Ok(()) }
    };
    optional(violations, field, text, max_bytes, no_control)
}

/// Any text but U+0000; empty means absent.
pub(super) fn optional_text(
    violations: &mut Violations,
    field: &str,
    text: String,
    max_bytes: usize,
) -> Option<String> {
    optional(violations, field, text, max_bytes, |_| Ok(()))
}

fn optional(
    violations: &mut Violations,
    field: &str,
    text: String,
    max_bytes: usize,
    shape: impl Fn(&str) -> Result<(), &'static str>,
) -> Option<String> {
    if text.is_empty() {
        return None;
    }
    violations.take(text_rule(field, &text, max_bytes, shape)).map(|()| text)
}

pub(super) fn labels(violations: &mut Violations, labels: BTreeMap<String, String>) -> Labels {
    if labels.len() > MAX_LABELS {
        violations.add("labels", format!("has {} entries, at most {MAX_LABELS} are allowed", labels.len()));
    }
    for (key, value) in labels.iter().take(MAX_LABELS) {
        violations.take(text_rule("labels", key, MAX_LABEL_BYTES, |_| Ok(())).map_err(|mut violation| {
            violation.description = format!("a key {}", violation.description);
            violation
        }));
        if !value.is_empty() {
            violations.take(text_rule(&format!("labels[{key:?}]"), value, MAX_LABEL_BYTES, |_| Ok(())));
        }
    }
    labels
}

/// Absent means now; a clock may run ahead a little.
pub(super) fn observed_at(violations: &mut Violations, given: Option<UnixMs>, now: UnixMs) -> UnixMs {
    let Some(at) = given else { return now };
    if at.0 > now.0.saturating_add(MAX_CLOCK_AHEAD_MS) {
        violations.add("observed_at", "is more than five minutes ahead of now");
    }
    at
}

/// Absent (0) means the default; more than the most allowed means the most allowed.
pub(super) fn page_size(violations: &mut Violations, given: i32, default: usize, max: usize) -> usize {
    match usize::try_from(given) {
        Ok(0) => default,
        Ok(size) => size.min(max),
        Err(_) => {
            violations.add("page_size", "must not be negative");
            default
        }
    }
}
