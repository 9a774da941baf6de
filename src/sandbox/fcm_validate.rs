//! What FCM refuses beyond names and types: targets, reserved keys, exclusive blocks, patterns, sizes.

use serde_json::{Map, Value};

use super::fcm_schema::{self as schema, Violation, get, wrong};

/// Payload (keys and values) of a message to one device.
pub(super) const MAX_PAYLOAD_BYTES: usize = 4096;

/// The same for a message to a topic or condition.
pub(super) const MAX_TOPIC_PAYLOAD_BYTES: usize = 2048;

/// Topics one condition may name.
const MAX_CONDITION_TOPICS: usize = 5;

/// Conditions nest no deeper than this; far beyond what five topics need.
const MAX_CONDITION_DEPTH: usize = 16;

const MAX_TOKEN_BYTES: usize = 4096;

/// Whom a message is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Audience<'a> {
    Token(&'a str),
    Fid(&'a str),
    Topic(&'a str),
    Condition(&'a str),
}

/// The message's audience, or everything that is wrong.
pub(super) fn check(request: &Map<String, Value>) -> Result<Audience<'_>, Vec<Violation>> {
    let mut violations = Vec::new();
    schema::check(request, schema::REQUEST, "", &mut violations);
    let Some(Value::Object(message)) = get(request, "message") else {
        if violations.is_empty() {
            violations.push(wrong("message", "is required"));
        }
        return Err(violations);
    };
    if !violations.is_empty() {
        // The rules below take names and types for granted.
        return Err(violations);
    }
    let mut rules = Rules { violations };
    let audience = rules.audience(message);
    rules.data(object(message, "data"), "message.data");
    rules.android(message);
    rules.webpush(message);
    rules.apns(message);
    rules.label(object(message, "fcm_options"), "message.fcm_options");
    if let Some(audience) = audience {
        rules.size(message, audience);
    }
    match audience {
        Some(audience) if rules.violations.is_empty() => Ok(audience),
        _ => Err(rules.violations),
    }
}

/// Whether this can be a registration token or installation id at all.
pub(super) fn is_token(text: &str) -> bool {
    (1..=MAX_TOKEN_BYTES).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

pub(super) fn object<'a>(parent: &'a Map<String, Value>, name: &str) -> Option<&'a Map<String, Value>> {
    get(parent, name).and_then(Value::as_object)
}

pub(super) fn text<'a>(parent: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    get(parent, name).and_then(Value::as_str)
}

struct Rules {
    violations: Vec<Violation>,
}

impl Rules {
    fn add(&mut self, field: &str, why: &str) {
        self.violations.push(wrong(field, why));
    }

    fn audience<'a>(&mut self, message: &'a Map<String, Value>) -> Option<Audience<'a>> {
        let candidates = [
            text(message, "token").map(Audience::Token),
            text(message, "fid").map(Audience::Fid),
            text(message, "topic").map(Audience::Topic),
            text(message, "condition").map(Audience::Condition),
        ];
        let mut named = candidates.into_iter().flatten();
        let (Some(audience), None) = (named.next(), named.next()) else {
            self.add("message", "exactly one of token, fid, topic and condition must be set");
            return None;
        };
        match audience {
            Audience::Topic(topic) if !is_topic(topic) => {
                self.add("message.topic", "must match [a-zA-Z0-9-_.~%]{1,900}, without /topics/");
            }
            Audience::Condition(condition) if !is_condition(condition) => {
                self.add("message.condition", "is no expression over at most five topics");
            }
            _ => {}
        }
        Some(audience)
    }

    fn data(&mut self, data: Option<&Map<String, Value>>, path: &str) {
        for key in data.into_iter().flat_map(Map::keys) {
            let reserved = matches!(key.as_str(), "from" | "message_type" | "gcm")
                || key.starts_with("google")
                || key.starts_with("gcm.notification.");
            if key.is_empty() || reserved {
                self.add(path, &format!("Invalid data payload key: {key}"));
            }
        }
    }

    fn android(&mut self, message: &Map<String, Value>) {
        let (v1, v2) = (object(message, "android"), object(message, "android_v2"));
        if v1.is_some() && v2.is_some() {
            self.add("message.android_v2", "android and android_v2 are mutually exclusive");
        }
        for (config, path) in [(v1, "message.android"), (v2, "message.android_v2")] {
            let Some(config) = config else { continue };
            self.data(object(config, "data"), &format!("{path}.data"));
            self.label(object(config, "fcm_options"), &format!("{path}.fcm_options"));
            let remote = object(config, "remote_notification");
            if remote.is_some() && get(config, "background_sync").is_some() {
                self.add(path, "remote_notification and background_sync are mutually exclusive");
            }
            let (holder, holder_path) = match remote {
                Some(remote) => (remote, format!("{path}.remote_notification")),
                None => (config, path.to_owned()),
            };
            if let Some(notification) = object(holder, "notification") {
                self.android_notification(notification, &format!("{holder_path}.notification"));
            }
        }
    }

    fn android_notification(&mut self, notification: &Map<String, Value>, path: &str) {
        if text(notification, "color").is_some_and(|color| !is_color(color)) {
            self.add(&format!("{path}.color"), "must be of the form #rrggbb");
        }
        for (args, key) in [("body_loc_args", "body_loc_key"), ("title_loc_args", "title_loc_key")] {
            if get(notification, args).is_some() && get(notification, key).is_none() {
                self.add(&format!("{path}.{args}"), &format!("needs {key}"));
            }
        }
        let color = object(notification, "light_settings").and_then(|light| object(light, "color"));
        for (part, value) in color.into_iter().flatten() {
            if value.as_f64().is_some_and(|share| !(0.0..=1.0).contains(&share)) {
                self.add(&format!("{path}.light_settings.color.{part}"), "must be from 0 to 1");
            }
        }
    }

    fn webpush(&mut self, message: &Map<String, Value>) {
        let Some(webpush) = object(message, "webpush") else { return };
        self.data(object(webpush, "data"), "message.webpush.data");
        let options = object(webpush, "fcm_options");
        self.label(options, "message.webpush.fcm_options");
        if options.and_then(|options| text(options, "link")).is_some_and(|link| !link.starts_with("https://")) {
            self.add("message.webpush.fcm_options.link", "must be an https URL");
        }
    }

    fn apns(&mut self, message: &Map<String, Value>) {
        let Some(apns) = object(message, "apns") else { return };
        self.label(object(apns, "fcm_options"), "message.apns.fcm_options");
        let aps = object(apns, "payload").and_then(|payload| payload.get("aps"));
        if aps.is_some_and(|aps| !aps.is_object()) {
            self.add("message.apns.payload.aps", "must be an object");
        }
        let priority = object(apns, "headers").and_then(|headers| headers.get("apns-priority")).and_then(Value::as_str);
        if priority.is_some_and(|priority| !matches!(priority, "1" | "5" | "10")) {
            self.add("message.apns.headers", "apns-priority must be 1, 5 or 10");
        }
        let shown = get(message, "notification").is_some()
            || ["alert", "badge", "sound"].iter().any(|key| aps.is_some_and(|aps| aps.get(key).is_some()));
        if priority == Some("10") && !shown {
            self.add("message.apns.headers", "a data-only message has apns-priority 5");
        }
    }

    fn label(&mut self, options: Option<&Map<String, Value>>, path: &str) {
        let label = options.and_then(|options| text(options, "analytics_label"));
        if label.is_some_and(|label| !of_topic_characters(label, 50)) {
            self.add(&format!("{path}.analytics_label"), "must match [a-zA-Z0-9-_.~%]{1,50}");
        }
    }

    /// Counts what each platform would get: its own block over the common one.
    fn size(&mut self, message: &Map<String, Value>, audience: Audience<'_>) {
        let limit = match audience {
            Audience::Token(_) | Audience::Fid(_) => MAX_PAYLOAD_BYTES,
            Audience::Topic(_) | Audience::Condition(_) => MAX_TOPIC_PAYLOAD_BYTES,
        };
        let common = entries(object(message, "notification"));
        let data = object(message, "data");
        let android = object(message, "android").or_else(|| object(message, "android_v2"));
        let own_notification = android
            .and_then(|android| object(object(android, "remote_notification").unwrap_or(android), "notification"));
        let android_data = android.and_then(|android| object(android, "data")).or(data);
        if common + entries(own_notification) + entries(android_data) > limit {
            self.add("message", "Android message is too big");
        }
        let apns = object(message, "apns").and_then(|apns| object(apns, "payload"));
        let apns_bytes = apns.map_or(0, |payload| serde_json::to_vec(payload).map_or(usize::MAX, |json| json.len()));
        if apns_bytes.saturating_add(if apns.is_some() { entries(data) } else { 0 }) > MAX_PAYLOAD_BYTES {
            self.add("message", "iOS message is too big");
        }
    }
}

/// Bytes of keys and values.
fn entries(object: Option<&Map<String, Value>>) -> usize {
    let value_bytes = |value: &Value| match value {
        Value::String(text) => text.len(),
        Value::Null => 0,
        other => serde_json::to_vec(other).map_or(usize::MAX, |json| json.len()),
    };
    object.into_iter().flatten().map(|(key, value)| key.len() + value_bytes(value)).sum()
}

fn is_color(text: &str) -> bool {
    text.len() == 7 && text.starts_with('#') && text[1..].bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn of_topic_characters(text: &str, most: usize) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~%".contains(&byte);
    (1..=most).contains(&text.len()) && text.bytes().all(allowed)
}

fn is_topic(text: &str) -> bool {
    of_topic_characters(text, 900)
}

/// `'a' in topics && ('b' in topics || !('c' in topics))`.
fn is_condition(text: &str) -> bool {
    let mut parser = Condition { rest: text, topics: 0 };
    parser.any(0) && parser.rest.trim().is_empty() && parser.topics <= MAX_CONDITION_TOPICS
}

struct Condition<'a> {
    rest: &'a str,
    topics: usize,
}

impl Condition<'_> {
    fn take(&mut self, symbol: &str) -> bool {
        match self.rest.trim_start().strip_prefix(symbol) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn any(&mut self, depth: usize) -> bool {
        loop {
            if !self.operand(depth) {
                return false;
            }
            if !self.take("&&") && !self.take("||") {
                return true;
            }
        }
    }

    fn operand(&mut self, depth: usize) -> bool {
        if depth > MAX_CONDITION_DEPTH {
            return false;
        }
        if self.take("!") {
            return self.operand(depth + 1);
        }
        if self.take("(") {
            return self.any(depth + 1) && self.take(")");
        }
        if !self.take("'") {
            return false;
        }
        let Some((topic, rest)) = self.rest.split_once('\'') else { return false };
        self.topics += 1;
        self.rest = rest;
        is_topic(topic) && self.take("in") && self.rest.starts_with(char::is_whitespace) && self.take("topics")
    }
}
