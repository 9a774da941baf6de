//! The shape of FCM's SendMessageRequest (discovery document of revision 20261023) and a checker for it, with the rules
//! of Google's proto3 JSON parser: camelCase and snake_case names, null is absent, unknown names are errors, integers
//! may be strings, enums may be numbers.

use serde_json::{Map, Value};

/// What a field may hold.
pub(super) enum Kind {
    Text,
    Bool,
    Int32,
    Float,
    /// Decimal seconds and `s`, 0 to the bound in seconds.
    Duration(u64),
    /// RFC 3339.
    DateTime,
    Enum(&'static [&'static str]),
    TextMap,
    /// Free JSON.
    AnyMap,
    TextList,
    DurationList,
    Message(&'static [Field]),
}

/// A field by its snake_case name.
pub(super) type Field = (&'static str, Kind);

/// `ttl`'s bound: 28 days.
pub(super) const MAX_TTL_SECS: u64 = 2_419_200;

/// protobuf's own bound of a Duration.
const MAX_DURATION_SECS: u64 = 315_576_000_000;

pub(super) const REQUEST: &[Field] = &[("message", Kind::Message(MESSAGE)), ("validate_only", Kind::Bool)];

const MESSAGE: &[Field] = &[
    ("name", Kind::Text),
    ("token", Kind::Text),
    ("fid", Kind::Text),
    ("topic", Kind::Text),
    ("condition", Kind::Text),
    ("data", Kind::TextMap),
    ("notification", Kind::Message(&[("title", Kind::Text), ("body", Kind::Text), ("image", Kind::Text)])),
    ("android", Kind::Message(ANDROID)),
    ("android_v2", Kind::Message(ANDROID_V2)),
    ("webpush", Kind::Message(WEBPUSH)),
    ("apns", Kind::Message(APNS)),
    ("fcm_options", Kind::Message(LABEL)),
];

const LABEL: &[Field] = &[("analytics_label", Kind::Text)];

const ANDROID: &[Field] = &[
    ("collapse_key", Kind::Text),
    ("priority", Kind::Enum(&["NORMAL", "HIGH", "normal", "high"])),
    ("ttl", Kind::Duration(MAX_TTL_SECS)),
    ("restricted_package_name", Kind::Text),
    ("data", Kind::TextMap),
    ("notification", Kind::Message(ANDROID_NOTIFICATION)),
    ("fcm_options", Kind::Message(LABEL)),
    ("direct_boot_ok", Kind::Bool),
    ("bandwidth_constrained_ok", Kind::Bool),
    ("restricted_satellite_ok", Kind::Bool),
];

const ANDROID_V2: &[Field] = &[
    ("collapse_key", Kind::Text),
    ("ttl", Kind::Duration(MAX_TTL_SECS)),
    ("restricted_package_name", Kind::Text),
    ("data", Kind::TextMap),
    ("fcm_options", Kind::Message(LABEL)),
    ("direct_boot_ok", Kind::Bool),
    ("bandwidth_constrained_ok", Kind::Bool),
    ("restricted_satellite_ok", Kind::Bool),
    ("background_sync", Kind::Message(&[])),
    (
        "remote_notification",
        Kind::Message(&[
            ("mutable_content", Kind::Bool),
            ("use_as_v1_data_message", Kind::Bool),
            ("notification", Kind::Message(ANDROID_NOTIFICATION_V2)),
        ]),
    ),
];

/// The fields AndroidNotification and AndroidNotificationV2 share, then those of one of them.
macro_rules! android_notification {
    ($($own:expr),* $(,)?) => {
        &[
            ("title", Kind::Text),
            ("body", Kind::Text),
            ("icon", Kind::Text),
            ("color", Kind::Text),
            ("sound", Kind::Text),
            ("tag", Kind::Text),
            ("click_action", Kind::Text),
            ("body_loc_key", Kind::Text),
            ("body_loc_args", Kind::TextList),
            ("title_loc_key", Kind::Text),
            ("title_loc_args", Kind::TextList),
            ("channel_id", Kind::Text),
            ("ticker", Kind::Text),
            ("sticky", Kind::Bool),
            ("event_time", Kind::DateTime),
            ("local_only", Kind::Bool),
            (
                "notification_priority",
                Kind::Enum(&[
                    "PRIORITY_UNSPECIFIED",
                    "PRIORITY_MIN",
                    "PRIORITY_LOW",
                    "PRIORITY_DEFAULT",
                    "PRIORITY_HIGH",
                    "PRIORITY_MAX",
                ]),
            ),
            ("default_sound", Kind::Bool),
            ("default_vibrate_timings", Kind::Bool),
            ("default_light_settings", Kind::Bool),
            ("vibrate_timings", Kind::DurationList),
            ("visibility", Kind::Enum(&["VISIBILITY_UNSPECIFIED", "PRIVATE", "PUBLIC", "SECRET"])),
            ("notification_count", Kind::Int32),
            ("light_settings", Kind::Message(LIGHT_SETTINGS)),
            ("image", Kind::Text),
            $($own),*
        ]
    };
}

const ANDROID_NOTIFICATION: &[Field] = android_notification![
    ("bypass_proxy_notification", Kind::Bool),
    ("proxy", Kind::Enum(&["PROXY_UNSPECIFIED", "ALLOW", "DENY", "IF_PRIORITY_LOWERED"])),
];

const ANDROID_NOTIFICATION_V2: &[Field] = android_notification![("id", Kind::Int32)];

const LIGHT_SETTINGS: &[Field] = &[
    (
        "color",
        Kind::Message(&[("red", Kind::Float), ("green", Kind::Float), ("blue", Kind::Float), ("alpha", Kind::Float)]),
    ),
    ("light_on_duration", Kind::Duration(MAX_DURATION_SECS)),
    ("light_off_duration", Kind::Duration(MAX_DURATION_SECS)),
];

const WEBPUSH: &[Field] = &[
    ("headers", Kind::TextMap),
    ("data", Kind::TextMap),
    ("notification", Kind::AnyMap),
    ("fcm_options", Kind::Message(&[("link", Kind::Text), ("analytics_label", Kind::Text)])),
];

const APNS: &[Field] = &[
    ("headers", Kind::TextMap),
    ("payload", Kind::AnyMap),
    ("live_activity_token", Kind::Text),
    ("fcm_options", Kind::Message(&[("analytics_label", Kind::Text), ("image", Kind::Text)])),
];

/// One thing wrong with a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Violation {
    /// Path of the field in snake_case.
    pub field: String,
    pub description: String,
}

/// A field by its snake_case name, however it was spelled; null counts as absent.
pub(super) fn get<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    let found = object.get(name).or_else(|| {
        if name.contains('_') {
            object.iter().find(|(key, _)| is_camel_of(key, name)).map(|(_, value)| value)
        } else {
            None
        }
    });
    found.filter(|value| !value.is_null())
}

/// Checks names and types all the way down.
pub(super) fn check(object: &Map<String, Value>, fields: &[Field], path: &str, violations: &mut Vec<Violation>) {
    for (key, value) in object {
        let Some((name, kind)) = fields.iter().find(|(name, _)| key == name || is_camel_of(key, name)) else {
            violations.push(Violation {
                field: path.to_owned(),
                description: if path.is_empty() {
                    format!("Invalid JSON payload received. Unknown name \"{key}\": Cannot find field.")
                } else {
                    format!("Invalid JSON payload received. Unknown name \"{key}\" at '{path}': Cannot find field.")
                },
            });
            continue;
        };
        if key != name && object.get(*name).is_some() {
            violations.push(wrong(&join(path, name), "is set twice, in snake_case and in camelCase"));
        }
        if !value.is_null() {
            check_value(value, kind, path, name, violations);
        }
    }
}

fn check_value(value: &Value, kind: &Kind, parent: &str, name: &str, violations: &mut Vec<Violation>) {
    let mut mistyped = |what: &str| violations.push(invalid(&join(parent, name), what, value));
    match kind {
        Kind::Text if !value.is_string() => mistyped("TYPE_STRING"),
        Kind::Bool if !value.is_boolean() => mistyped("TYPE_BOOL"),
        Kind::Int32 if !is_int32(value) => mistyped("TYPE_INT32"),
        Kind::Float if !(value.is_number() || value.as_str().is_some_and(|text| text.parse::<f64>().is_ok())) => {
            mistyped("TYPE_FLOAT");
        }
        Kind::Duration(bound) if !value.as_str().is_some_and(|text| is_duration(text, *bound)) => {
            mistyped("type.googleapis.com/google.protobuf.Duration");
        }
        Kind::DateTime if value.as_str().is_none_or(|text| text.parse::<jiff::Timestamp>().is_err()) => {
            mistyped("type.googleapis.com/google.protobuf.Timestamp");
        }
        Kind::Enum(names) if !is_enum(value, names) => mistyped("TYPE_ENUM"),
        Kind::Text | Kind::Bool | Kind::Int32 | Kind::Float | Kind::Duration(_) | Kind::DateTime | Kind::Enum(_) => {}
        Kind::AnyMap if value.is_object() => {}
        Kind::TextMap if value.is_object() => {
            for (index, (_, entry)) in value.as_object().into_iter().flatten().enumerate() {
                if !entry.is_string() {
                    let field = format!("{}[{index}].value", join(parent, name));
                    violations.push(invalid(&field, "TYPE_STRING", entry));
                }
            }
        }
        Kind::TextList | Kind::DurationList if value.is_array() => {
            for (index, entry) in value.as_array().into_iter().flatten().enumerate() {
                let durations = matches!(kind, Kind::DurationList);
                let fine = entry.as_str().is_some_and(|text| !durations || is_duration(text, MAX_DURATION_SECS));
                if !fine {
                    let what = if durations { "type.googleapis.com/google.protobuf.Duration" } else { "TYPE_STRING" };
                    violations.push(invalid(&format!("{}[{index}]", join(parent, name)), what, entry));
                }
            }
        }
        Kind::Message(fields) => match value {
            Value::Object(object) => check(object, fields, &join(parent, name), violations),
            _ => mistyped("TYPE_MESSAGE"),
        },
        Kind::AnyMap | Kind::TextMap => mistyped("TYPE_MESSAGE"),
        Kind::TextList | Kind::DurationList => mistyped("TYPE_LIST"),
    }
}

pub(super) fn join(parent: &str, name: &str) -> String {
    if parent.is_empty() { name.to_owned() } else { format!("{parent}.{name}") }
}

pub(super) fn wrong(field: &str, why: &str) -> Violation {
    Violation { field: field.to_owned(), description: format!("Invalid value at '{field}': {why}") }
}

/// As Google words a value of the wrong type; the value is named by its kind only, for it may be a token.
fn invalid(field: &str, wanted: &str, value: &Value) -> Violation {
    let got = match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    Violation { field: field.to_owned(), description: format!("Invalid value at '{field}' ({wanted}), got {got}") }
}

fn is_camel_of(key: &str, snake: &str) -> bool {
    let mut wanted = snake.bytes();
    key.len() < snake.len()
        && key.bytes().all(|byte| match wanted.next() {
            Some(b'_') => wanted.next().is_some_and(|next| next.to_ascii_uppercase() == byte),
            next => next == Some(byte),
        })
        && wanted.next().is_none()
}

fn is_int32(value: &Value) -> bool {
    let integral = |number: f64| number.fract() == 0.0 && (f64::from(i32::MIN)..=f64::from(i32::MAX)).contains(&number);
    match value {
        Value::Number(number) => number.as_f64().is_some_and(integral),
        Value::String(text) => text.parse::<i32>().is_ok(),
        _ => false,
    }
}

fn is_enum(value: &Value, names: &[&str]) -> bool {
    match value {
        Value::String(text) => names.contains(&text.as_str()),
        Value::Number(_) => is_int32(value),
        _ => false,
    }
}

/// `3.5s`: digits, at most nine decimals, `s`; not negative, not above the bound.
fn is_duration(text: &str, bound_secs: u64) -> bool {
    let Some(number) = text.strip_suffix('s') else { return false };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(fraction) || fraction.len() > 9 {
        return false;
    }
    let is_whole = fraction.bytes().all(|byte| byte == b'0');
    whole.parse::<u64>().is_ok_and(|seconds| seconds < bound_secs || seconds == bound_secs && is_whole)
}
