//! What a notification says: inline content and the caller's data, checked at the edge.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::{fmt, io};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::ids::Locale;
use super::violation::Violations;

/// The caller's custom keys: a JSON object that obeys [`check_data`].
pub type Data = Map<String, Value>;

/// Texts and options of one notification. Nothing to show (no title, subtitle, body) makes it a silent push.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Content {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subtitle: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// https URL of a picture.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// What a tap opens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// A sound file of the app, or `default`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sound: Option<String>,
    /// The number on the app's icon; 0 clears it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub badge: Option<u32>,
    /// The app's action category (APNs) or click action (FCM).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub category: Option<String>,
    /// Groups notifications on the screen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thread_id: Option<String>,
    /// Texts for other languages by BCP 47 tag; what one leaves out comes from above.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub localized: BTreeMap<String, LocalizedText>,
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LocalizedText {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subtitle: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
}

/// A text variant of a notification, ready to be encoded for a platform. It borrows what all variants share.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Message<'a> {
    pub title: Option<String>,
    pub subtitle: Option<String>,
    pub body: Option<String>,
    pub image: Option<String>,
    pub link: Option<String>,
    pub sound: Option<String>,
    pub badge: Option<u32>,
    pub category: Option<String>,
    pub thread_id: Option<String>,
    /// The caller's custom keys.
    pub data: Cow<'a, Data>,
    /// Nothing to show: a background push on APNs, a data-only message on FCM.
    pub silent: bool,
}

impl Message<'_> {
    /// With everything of its own.
    #[must_use]
    pub fn into_owned(self) -> Message<'static> {
        Message { data: Cow::Owned(self.data.into_owned()), ..self }
    }
}

/// Title, subtitle or body, in bytes; the platforms' payload limit is 4 KiB for everything.
pub const MAX_TEXT_BYTES: usize = 4096;
/// Image and link, in bytes.
pub const MAX_URL_BYTES: usize = 2048;
/// Sound, category and thread id, in bytes.
pub const MAX_OPTION_BYTES: usize = 256;
/// Languages in `localized`.
pub const MAX_LOCALES: usize = 100;
/// `data` as compact JSON, in bytes.
pub const MAX_DATA_BYTES: usize = 3 * 1024;
/// Nesting of `data`; the object itself is depth 1.
pub const MAX_DATA_DEPTH: usize = 8;
/// Keys that platforms or nudged use themselves, in any case; also everything that starts with one of [`RESERVED_PREFIXES`].
pub const RESERVED_KEYS: [&str; 9] =
    ["nudged_id", "aps", "from", "message_type", "notification", "collapse_key", "link", "image", "fcm_options"];
/// In any case.
pub const RESERVED_PREFIXES: [&str; 2] = ["google", "gcm"];

impl Content {
    /// Nothing to show: a background push on APNs, a data-only message on FCM.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        self.title.is_none() && self.subtitle.is_none() && self.body.is_none() && self.localized.is_empty()
    }

    /// Adds a violation for every field that breaks a rule; paths start with `field`.
    pub fn check(&self, field: &str, violations: &mut Violations) {
        let text = |violations: &mut Violations, name: &str, value: &Option<String>, max: usize| {
            if let Some(value) = value {
                check_text(violations, format_args!("{field}.{name}"), value, max);
            }
        };
        text(violations, "title", &self.title, MAX_TEXT_BYTES);
        text(violations, "subtitle", &self.subtitle, MAX_TEXT_BYTES);
        text(violations, "body", &self.body, MAX_TEXT_BYTES);
        text(violations, "image", &self.image, MAX_URL_BYTES);
        text(violations, "link", &self.link, MAX_URL_BYTES);
        text(violations, "sound", &self.sound, MAX_OPTION_BYTES);
        text(violations, "category", &self.category, MAX_OPTION_BYTES);
        text(violations, "thread_id", &self.thread_id, MAX_OPTION_BYTES);
        if let Some(image) = &self.image
            && !image.starts_with("https://")
        {
            violations.add(format!("{field}.image"), "must be an https URL");
        }
        if self.localized.len() > MAX_LOCALES {
            violations.add(format!("{field}.localized"), format!("has more than {MAX_LOCALES} languages"));
        }
        for (locale, texts) in self.localized.iter().take(MAX_LOCALES) {
            let path = format!("{field}.localized[{locale:?}]");
            violations.take(Locale::parse(&path, locale));
            for (name, value) in [("title", &texts.title), ("subtitle", &texts.subtitle), ("body", &texts.body)] {
                if let Some(value) = value {
                    check_text(violations, format_args!("{path}.{name}"), value, MAX_TEXT_BYTES);
                }
            }
            if texts.title.is_none() && texts.subtitle.is_none() && texts.body.is_none() {
                violations.add(path, "must have a title, a subtitle or a body");
            }
        }
        if self.is_silent() && (self.image.is_some() || self.sound.is_some()) {
            violations.add(field, "image and sound need a title or a body to be shown with");
        }
    }
}

/// `field` is put together only when something is wrong with it.
fn check_text(violations: &mut Violations, field: fmt::Arguments<'_>, value: &str, max: usize) {
    if value.is_empty() {
        violations.add(field.to_string(), "must not be empty; leave it out instead");
    } else if value.len() > max {
        violations.add(field.to_string(), format!("is {} bytes, at most {max} are allowed", value.len()));
    } else if value.contains('\0') {
        violations.add(field.to_string(), "must not contain U+0000");
    }
}

/// Checks the caller's `data`: size, depth, reserved keys, U+0000 anywhere, empty keys.
pub fn check_data(field: &str, data: &Data, violations: &mut Violations) {
    for key in data.keys() {
        if key.is_empty() {
            violations.add(field, "has an empty key");
        } else if is_reserved(key) {
            violations.add(format!("{field}.{key}"), "is a reserved key");
        }
    }
    check_value(field, data.values(), 1, data.keys(), violations);
    let mut size = Size(0);
    let size = serde_json::to_writer(&mut size, data).map_or(usize::MAX, |()| size.0);
    if size > MAX_DATA_BYTES {
        violations.add(field, format!("is {size} bytes as JSON, at most {MAX_DATA_BYTES} are allowed"));
    }
}

fn is_reserved(key: &str) -> bool {
    let begins = |prefix: &&str| {
        key.as_bytes().get(..prefix.len()).is_some_and(|head| head.eq_ignore_ascii_case(prefix.as_bytes()))
    };
    RESERVED_KEYS.iter().any(|reserved| key.eq_ignore_ascii_case(reserved)) || RESERVED_PREFIXES.iter().any(begins)
}

/// Counts what is written, and keeps nothing.
struct Size(usize);

impl io::Write for Size {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn check_value<'a>(
    field: &str,
    values: impl Iterator<Item = &'a Value>,
    depth: usize,
    keys: impl Iterator<Item = &'a String>,
    violations: &mut Violations,
) {
    if depth > MAX_DATA_DEPTH {
        violations.add(field, format!("is nested deeper than {MAX_DATA_DEPTH}"));
        return;
    }
    for key in keys {
        if key.contains('\0') {
            violations.add(field, "a key must not contain U+0000");
        }
    }
    for value in values {
        match value {
            Value::String(text) if text.contains('\0') => violations.add(field, "must not contain U+0000"),
            Value::Array(items) => check_value(field, items.iter(), depth + 1, std::iter::empty(), violations),
            Value::Object(map) => check_value(field, map.values(), depth + 1, map.keys(), violations),
            Value::String(_) | Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
}

/// A number as protobuf's Struct carries it: integral values up to 2^53 become integers again, so that an id does not
/// arrive as `42.0`. `None` for NaN and the infinities, which JSON has no word for.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "guarded by the bound of 2^53")]
pub fn number(value: f64) -> Option<Value> {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if value.fract() == 0.0 && value.abs() <= EXACT {
        return Some(Value::from(value as i64));
    }
    serde_json::Number::from_f64(value).map(Value::Number)
}

/// FCM and its relatives take strings only: a string stays as it is, everything else becomes compact JSON.
#[must_use]
pub fn as_string_value(value: &Value) -> Cow<'_, str> {
    match value {
        Value::String(text) => Cow::Borrowed(text),
        other => Cow::Owned(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn violations_of(data: &Value) -> Vec<String> {
        let mut violations = Violations::default();
        check_data("data", data.as_object().expect("an object"), &mut violations);
        violations.into_inner().into_iter().map(|v| v.to_string()).collect()
    }

    #[test]
    fn reserved_keys_depth_and_size_are_refused() {
        assert!(violations_of(&json!({"post": 42, "tags": ["a"]})).is_empty());
        assert_eq!(violations_of(&json!({"nudged_id": 1, "google.x": 1, "aps": {}})).len(), 3);
        let mut deep = json!(1);
        for _ in 0..7 {
            deep = json!([deep]);
        }
        assert!(violations_of(&json!({ "a": deep })).is_empty(), "depth 8");
        assert_eq!(violations_of(&json!({ "a": [deep] })).len(), 1, "depth 9");
        let fits = "x".repeat(MAX_DATA_BYTES - r#"{"a":""}"#.len());
        assert!(violations_of(&json!({ "a": fits })).is_empty());
        assert_eq!(violations_of(&json!({ "a": format!("{fits}x") })).len(), 1);
        assert_eq!(violations_of(&json!({ "a": ["b\u{0}"] })).len(), 1);
    }

    #[test]
    fn integers_survive_the_struct_type() {
        assert_eq!(number(42.0), Some(json!(42)));
        assert_eq!(number(9_007_199_254_740_992.0), Some(json!(9_007_199_254_740_992_i64)));
        assert_eq!(number(0.5), Some(json!(0.5)));
        assert_eq!(number(f64::NAN), None);
        assert_eq!(number(f64::INFINITY), None);
        assert_eq!(as_string_value(&json!({"a": 1})), r#"{"a":1}"#);
        assert_eq!(as_string_value(&json!("x")), "x");
    }
}
