//! Templates and data, up to the payload: bounded, never silent by mistake, and data arrive as they were given.

use prost::Message as _;
use serde_json::Value;

use crate::api::{fuzzing as convert, proto};
use crate::domain::content::{
    self, Data, MAX_DATA_BYTES, MAX_DATA_DEPTH, MAX_OPTION_BYTES, MAX_URL_BYTES, as_string_value,
};
use crate::domain::event_type::{Definition, LocaleTemplate};
use crate::domain::ids::{CollapseKey, Locale};
use crate::domain::notification::Body;
use crate::domain::sending::{Priority, SendOptions};
use crate::domain::time::UnixMs;
use crate::domain::violation::Violations;
use crate::fuzzing::shape;
use crate::render::{self, MAX_BODY_BYTES, MAX_TITLE_BYTES, Templates, Variables};
use crate::senders::{EncodeError, apns, fcm};

use super::{halves, same, text};

pub const WORDS: &[&str] = &[
    "{{ ",
    " }}",
    "{% if ",
    "{% endif %}",
    "{% for x in ",
    "{% endfor %}",
    "{% set l=",
    " %}",
    "{% with ",
    "{% endwith %}",
    "{% else %}",
    "data.name",
    "data.list",
    "data",
    "actor",
    "subject",
    "locale",
    "loop.index",
    "|josa('이/가')",
    "|upper",
    "|join(', ')",
    "|truncate(5)",
    "|replace('a','b')",
    "|default('x')",
    "|round(2)",
    "|int",
    "|thousands",
    "|urlencode",
    "|length",
    "|first",
    "|last",
    "|trim",
    " is defined",
    " ~ ",
    " == ",
    " in ",
    "[l,l]",
    "[data,data]",
    "x * 9",
    "1/0",
    "{\"name\":\"초코\"}",
    "{\"list\":[1,2,3]}",
    "\\u0000",
    "1e308",
    "9007199254740993",
];

const NOW: UnixMs = UnixMs(1_795_478_400_000);

/// Data as JSON in the first line, a template in the rest.
pub fn template(input: &[u8]) -> u64 {
    let (data, source) = halves(input);
    let source = text(source).into_owned();
    let mut given: Data = serde_json::from_slice(data).unwrap_or_default();
    let mut violations = Violations::default();
    content::check_data("data", &given, &mut violations);
    if !violations.is_empty() {
        given = Data::new();
    }
    let entry = |locale: &str| LocaleTemplate {
        locale: locale.to_owned(),
        title: Some(source.clone()),
        body: Some(source.clone()),
        link: (source.len() <= MAX_URL_BYTES).then(|| source.clone()),
        badge: (source.len() <= 512).then(|| source.clone()),
        ..LocaleTemplate::default()
    };
    let definition = Definition {
        name: "comment.created".to_owned(),
        collapse_key: (source.len() <= 512).then(|| source.clone()),
        templates: vec![entry("ko"), entry("en")],
        ..Definition::default()
    };
    let templates = match Templates::compile("event_type", definition) {
        Ok(templates) => templates,
        Err(violations) => {
            let mut words: Vec<String> = violations
                .iter()
                .map(|one| one.description.chars().filter(|c| c.is_ascii_lowercase() || *c == ' ').take(40).collect())
                .collect();
            words.sort();
            words.dedup();
            return shape(&words);
        }
    };
    let body = Body { data: given, subject: Some("s".to_owned()), actor: Some("초코".to_owned()), ..Body::default() };
    let locale = Locale::trusted("ko-KR");
    let variant = render::choose(&body.content, Some(&templates), Some(&locale), None);
    assert_eq!(variant.entry, Some(0), "ko-KR is ko");
    let rendered = render::render(&body, "comment.created", Some(&templates), variant, None);
    let message = &rendered.message;
    assert!(!message.silent, "a type with words shows something");
    assert!(message.title.is_some() || message.body.is_some());
    let fits = |text: &Option<String>, max: usize| {
        let Some(text) = text else { return };
        assert!(!text.is_empty() && text.len() <= max && !text.contains('\0'), "{} bytes", text.len());
        assert_eq!(text.trim(), text);
    };
    fits(&message.title, MAX_TITLE_BYTES);
    fits(&message.body, MAX_BODY_BYTES);
    fits(&message.link, MAX_URL_BYTES);
    assert!(message.badge.is_none_or(|badge| badge <= 99_999));
    for problem in &rendered.problems {
        assert!(problem.detail.len() < 1_024, "a problem of {} bytes", problem.detail.len());
    }
    assert_eq!(render::render(&body, "comment.created", Some(&templates), variant, None), rendered, "the same again");
    let variables = Variables::new(&body.data, body.actor.as_deref(), body.subject.as_deref(), "comment.created");
    let key = templates.collapse_key(&variables);
    if let Ok(Some(key)) = &key {
        assert!(key.as_str().len() <= CollapseKey::MAX_BYTES);
    }
    shape(&(
        rendered.problems.iter().map(|one| (one.field.clone(), one.detail.len().min(40))).take(4).collect::<Vec<_>>(),
        [message.title.is_some(), message.link.is_some(), message.badge.is_some(), key.is_ok()],
        message.body.as_ref().map_or(0, String::len).next_power_of_two(),
    ))
}

/// A definition as the API gets it; what is taken is the same in each of its written forms.
pub fn event_type(input: &[u8]) -> u64 {
    let Ok(message) = proto::EventType::decode(input) else { return 1 };
    let mut violations = Violations::default();
    let definition = convert::definition(&mut violations, message);
    let readable = violations.is_empty();
    let templates = match Templates::compile("event_type", definition.clone()) {
        Ok(templates) if readable => templates,
        Ok(_) => return shape(&"unknown numbers"),
        Err(violations) => {
            let mut fields: Vec<String> = violations.into_iter().map(|one| one.field).take(8).collect();
            fields.dedup();
            return shape(&fields);
        }
    };
    let mut violations = Violations::default();
    assert_eq!(convert::definition(&mut violations, convert::declared(&definition)), definition);
    let json = serde_json::to_string(&definition).expect("JSON");
    assert_eq!(serde_json::from_str::<Definition>(&json).expect("our own JSON"), definition);
    let written = toml::to_string(&definition).expect("TOML");
    assert_eq!(toml::from_str::<Definition>(&written).expect("our own TOML"), definition);
    let body = Body::default();
    for locale in ["ko", "en-US", "zh-Hant-TW"] {
        let locale = Locale::trusted(locale);
        let variant = render::choose(&body.content, Some(&templates), Some(&locale), None);
        let rendered = render::render(&body, &definition.name, Some(&templates), variant, None);
        assert_eq!(rendered.message.silent, !definition.has_words());
    }
    shape(&(
        definition.templates.len().min(4),
        definition.has_words(),
        definition.collapse_key.is_some(),
        definition.purpose,
    ))
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => 0,
    }
}

/// A `google.protobuf.Struct`.
pub fn data(input: &[u8]) -> u64 {
    let Ok(message) = prost_types::Struct::decode(input) else { return 1 };
    let mut violations = Violations::default();
    let read = convert::read_data(&mut violations, "data", Some(message));
    if violations.is_empty() {
        content::check_data("data", &read, &mut violations);
    }
    // What is deeper is left empty there.
    assert!(depth(&Value::Object(read.clone())) <= MAX_DATA_DEPTH + 1, "cut before any recursion");
    if !violations.is_empty() {
        let mut told: Vec<String> = violations.into_inner().into_iter().map(|one| one.description).collect();
        for one in &mut told {
            one.retain(|c| !c.is_ascii_digit());
        }
        told.truncate(4);
        return shape(&told);
    }
    assert!(serde_json::to_vec(&read).expect("JSON").len() <= MAX_DATA_BYTES);
    let again = convert::read_data(&mut violations, "data", Some(convert::data(&read)));
    assert_eq!(again, read, "as it is shown, so it was");
    shape(&(depth(&Value::Object(read.clone())), read.len().min(4)))
}

/// Two bytes of options, eight of a time, then a NotifyEvent whose content and data are sent.
pub fn payload(input: &[u8]) -> u64 {
    let Some((options, bytes)) = input.split_at_checked(10) else { return 0 };
    let Ok(request) = proto::NotifyEventRequest::decode(bytes) else { return 1 };
    let expires_at = UnixMs(i64::from_be_bytes(options[2..].try_into().expect("eight bytes")));
    let mut violations = Violations::default();
    let event = convert::notify_event(&mut violations, request);
    let content = event.content.unwrap_or_default();
    content.check("content", &mut violations);
    content::check_data("data", &event.data, &mut violations);
    let collapse_key = CollapseKey::parse("collapse_key", &event.collapse_key).ok();
    if !violations.is_empty() {
        return 2;
    }
    let body = Body { content, data: event.data, ..Body::default() };
    let locale = Locale::trusted("ko-KR");
    let variant = render::variant(&body.content, Some(&locale));
    let message = render::message(&body, variant);
    let options = SendOptions {
        priority: if options[0] & 1 == 1 { Priority::High } else { Priority::Normal },
        collapse_key,
        expires_at,
        push_id: options[0] & 2 == 2,
    };
    let kinds = [apple(&message, &options), google(&message, &options, expires_at)];
    shape(&(kinds, message.silent, body.data.len().min(3), options.collapse_key.is_some()))
}

fn refused(error: &EncodeError) -> usize {
    match error {
        EncodeError::TooLarge { size, limit } => assert!(size > limit),
        EncodeError::Invalid(why) => assert!(!why.is_empty()),
    }
    0
}

fn apple(message: &crate::senders::Message, options: &SendOptions) -> usize {
    let sent = match apns::fuzzing::push("com.example.pets", message, options) {
        Ok(sent) => sent,
        Err(error) => return refused(&error),
    };
    assert_eq!(sent.size, sent.body.len());
    assert!(sent.size <= apns::MAX_PAYLOAD_BYTES);
    let body: Value = serde_json::from_str(&sent.body).expect("JSON");
    assert_eq!(body.get("nudged_id").is_some(), options.push_id);
    assert!(body["aps"].is_object());
    for (key, value) in &*message.data {
        assert!(body.get(key).is_some_and(|sent| same(sent, value)), "{key} arrives as it was given: {value}");
    }
    let header = |name: &str| sent.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
    assert!(header("apns-collapse-id").is_some_and(|id| id.len() <= 64));
    if message.silent {
        assert_eq!((header("apns-push-type"), header("apns-priority")), (Some("background"), Some("5")));
    }
    1 + sent.size / 1024
}

fn google(message: &crate::senders::Message, options: &SendOptions, expires_at: UnixMs) -> usize {
    let token = "a\"b\\c:APA91b";
    let sent = match fcm::fuzzing::push(message, options, token, expires_at.since(NOW)) {
        Ok(sent) => sent,
        Err(error) => return refused(&error),
    };
    let body: Value = serde_json::from_slice(&sent).expect("JSON");
    let body = &body["message"];
    assert_eq!(body["token"], token);
    let data = &body["data"];
    assert_eq!(data.get("nudged_id").is_some(), options.push_id);
    for (key, value) in &*message.data {
        assert_eq!(data[key].as_str(), Some(&*as_string_value(value)), "{key} arrives as a text");
    }
    for value in data.as_object().into_iter().flat_map(serde_json::Map::values) {
        assert!(value.is_string(), "FCM takes texts only");
    }
    let ttl = body["android"]["ttl"].as_str().and_then(|ttl| ttl.strip_suffix('s')).expect("a TTL");
    assert!(ttl.parse::<u64>().is_ok_and(|secs| secs <= 2_419_200), "{ttl}");
    assert!(message.image.as_ref().is_none_or(|image| image.len() <= MAX_URL_BYTES));
    assert!(message.sound.as_ref().is_none_or(|sound| sound.len() <= MAX_OPTION_BYTES));
    1 + sent.len() / 1024
}
