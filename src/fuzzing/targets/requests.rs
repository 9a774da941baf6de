//! What callers send, up to the store: a bad request is refused with bounded words, a good one has one meaning.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use prost::Message as _;

use crate::api::status::{ApiError, status};
use crate::api::{fuzzing as convert, proto};
use crate::domain::content::{MAX_DATA_BYTES, MAX_DATA_DEPTH};
use crate::domain::event_type::{Definition, LocaleTemplate};
use crate::domain::ids::{AppId, AppKey, RouteId};
use crate::domain::notification::{Body, MAX_AHEAD_MS, MAX_DEVICE_IDS, MAX_TOPICS, MAX_TTL_MS, MAX_USER_IDS, NewEvent};
use crate::domain::platform::{Environment, Platform, Route, RouteSpec};
use crate::domain::time::UnixMs;
use crate::fuzzing::shape;
use crate::render::Templates;
use crate::runtime::Runtime;
use crate::service::{self, App, AppDirectory, AppLimits, AppSetup, Call, CredentialSetup, ServiceError};

pub const WORDS: &[&str] = &[
    "pets",
    "choco",
    "comment.created",
    "dev_0a1b2c3d4e5f",
    "news",
    "\u{1}",
    "\u{a}\u{4}pets",
    "\u{12}",
    "\u{2a}",
    "https://",
    "ko",
    "ko-KR",
    "Asia/Seoul",
    "0123456789abcdef",
    "title",
    "aps",
    "nudged_id",
    "com.example.pets",
    "default",
];

const NOW: UnixMs = UnixMs(1_795_478_400_000);

/// An app with both platforms.
fn app() -> &'static Arc<App> {
    static APP: OnceLock<Arc<App>> = OnceLock::new();
    APP.get_or_init(|| {
        let spec = |platform, environment, bundle: &str| RouteSpec {
            app: AppKey(1),
            platform,
            credential: Arc::from("default"),
            environment,
            bundle: Arc::from(bundle),
        };
        let routes = [
            spec(Platform::Apns, Environment::Production, "com.example.pets"),
            spec(Platform::Apns, Environment::Sandbox, "com.example.pets"),
            spec(Platform::Fcm, Environment::None, ""),
        ];
        let credential = |platform, default_environment, bundle: &str| CredentialSetup {
            platform,
            name: Arc::from("default"),
            default_environment,
            default_bundle: Arc::from(bundle),
        };
        let setup = AppSetup {
            id: AppId::trusted("pets"),
            key: AppKey(1),
            allow_undeclared_types: true,
            limits: AppLimits::default(),
            credentials: vec![
                credential(Platform::Apns, Environment::Production, "com.example.pets"),
                credential(Platform::Fcm, Environment::None, ""),
            ],
            routes: (1..).map(RouteId).zip(routes).map(|(id, spec)| Route { id, spec }).collect(),
        };
        let directory = AppDirectory::new(vec![setup], None);
        Arc::clone(directory.get("pets").expect("just made"))
    })
}

fn declared() -> &'static Templates {
    static TYPE: OnceLock<Templates> = OnceLock::new();
    TYPE.get_or_init(|| {
        let definition = Definition {
            name: "comment.created".to_owned(),
            collapse_key: Some("comments:{{ subject }}:{{ data.post }}".to_owned()),
            templates: vec![LocaleTemplate {
                title: Some("{{ actor }}: {{ data.text|truncate(20) }}".to_owned()),
                ..LocaleTemplate::default()
            }],
            ..Definition::default()
        };
        Templates::compile("event_type", definition).expect("a good type")
    })
}

/// A refusal as it goes over the wire: many clients take 8 KiB of trailers and no more.
fn refused(error: ServiceError) -> u64 {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    let fields: BTreeSet<String> = match &error {
        ServiceError::Invalid(violations) => {
            assert!(!violations.is_empty(), "a refusal says of what");
            // Positions and names of the caller's own are left out: they are endless.
            violations
                .iter()
                .map(|one| one.field.split(['[', '.']).next().unwrap_or_default().to_owned())
                .take(64)
                .collect()
        }
        other => BTreeSet::from([other.to_string()]),
    };
    let status = status(&ApiError::Service(error), RUNTIME.get_or_init(Runtime::production));
    let size = STANDARD_NO_PAD.encode(status.details()).len() + 3 * status.message().len();
    assert!(size < 8 * 1024, "{size} bytes of trailers");
    shape(&fields)
}

/// The first byte: whether the type is declared.
pub fn notify_event(input: &[u8]) -> u64 {
    let Some((mode, bytes)) = input.split_first() else { return 0 };
    let Ok(message) = proto::NotifyEventRequest::decode(bytes) else { return 1 };
    let templates = (mode & 1 == 1).then(declared);
    let read = |message: proto::NotifyEventRequest| {
        let mut call = Call::new(app()).may_broadcast(true);
        let event = convert::notify_event(call.violations(), message);
        service::fuzzing::event(call, event, templates, NOW)
    };
    let event = match read(message.clone()) {
        Ok(event) => event,
        Err(error) => return refused(error),
    };
    accepted(&event);
    // Named twice or in another order, it is the same event.
    let mut other = proto::NotifyEventRequest::decode(message.encode_to_vec().as_slice()).expect("our own bytes");
    other.user_ids.reverse();
    other.topics.reverse();
    other.device_ids.reverse();
    if other.user_ids.len() < MAX_USER_IDS {
        other.user_ids.extend(other.user_ids.first().cloned());
    }
    let again = read(other).expect("as good as the first");
    assert_eq!(again, event, "one meaning, and so one hash for its idempotency key");
    if event.idempotency.is_some() {
        let other = proto::NotifyEventRequest { subject: format!("{}x", message.subject), ..message };
        if let Ok(other) = read(other) {
            assert_ne!(other.idempotency, event.idempotency, "another meaning");
        }
    }
    let NewEvent { audience, body, .. } = &event;
    shape(&(
        [audience.user_ids.len(), audience.topics.len(), audience.device_ids.len(), body.data.len()]
            .map(|len| len.min(2)),
        body.content.is_silent(),
        body.content.localized.len().min(2),
        [event.collapse_key.is_some(), event.not_before.is_some(), event.idempotency.is_some(), audience.everyone],
    ))
}

fn accepted(event: &NewEvent) {
    let NewEvent { audience, body, event_at, not_before, expires_at, .. } = event;
    assert!(audience.user_ids.len() <= MAX_USER_IDS && audience.user_ids.is_sorted_by(|a, b| a < b));
    assert!(audience.topics.len() <= MAX_TOPICS && audience.topics.is_sorted_by(|a, b| a < b));
    assert!(audience.device_ids.len() <= MAX_DEVICE_IDS && audience.device_ids.is_sorted_by(|a, b| a < b));
    let worth_from = not_before.map_or(*event_at, |at| at.max(*event_at));
    assert!(worth_from.0 <= NOW.0 + MAX_AHEAD_MS && (0..=UnixMs::MAX.0).contains(&expires_at.0));
    assert!(*expires_at > worth_from && expires_at.0 <= worth_from.0 + MAX_TTL_MS);
    assert!(*expires_at > NOW || event.idempotency.is_some(), "accepted only to expire");
    // As it is stored.
    let stored = serde_json::to_vec(&**body).expect("JSON");
    assert!(stored.len() < 1024 * 1024);
    let read: Body = serde_json::from_slice(&stored).expect("our own JSON");
    let data = |body: &Body| serde_json::Value::Object(body.data.clone());
    assert!(super::same(&data(&read), &data(body)));
    assert_eq!(Body { data: body.data.clone(), ..read }, **body);
    assert!(serde_json::to_vec(&body.data).expect("JSON").len() <= MAX_DATA_BYTES);
    assert!(depth(&serde_json::Value::Object(body.data.clone())) <= MAX_DATA_DEPTH);
}

fn depth(value: &serde_json::Value) -> usize {
    match value {
        serde_json::Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        serde_json::Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

pub fn register_device(input: &[u8]) -> u64 {
    let Ok(message) = proto::RegisterDeviceRequest::decode(input) else { return 1 };
    let mut call = Call::new(app());
    let device = convert::register_device(call.violations(), message.clone());
    let registration = match service::fuzzing::registration(call, device, NOW) {
        Ok(registration) => registration,
        Err(error) => return refused(error),
    };
    assert!(registration.token.expose().eq_ignore_ascii_case(&message.token));
    assert!(registration.observed_at.0 <= NOW.0 + service::MAX_CLOCK_AHEAD_MS);
    assert!((1..=3).contains(&registration.route.0));
    let details = &registration.details;
    assert!(details.labels.len() <= 32 && details.labels.iter().all(|(key, value)| key.len() + value.len() <= 256));
    for text in [&details.time_zone, &details.app_version, &details.os_version, &registration.installation_id] {
        assert!(text.as_ref().is_none_or(|text| !text.is_empty() && text.len() <= 128 && !text.contains(['\0', '\n'])));
    }
    assert_eq!(registration.device.map(crate::domain::ids::DeviceId::public).unwrap_or_default(), message.device_id);
    shape(&(
        registration.route.0,
        [registration.device.is_some(), details.locale.is_some(), details.time_zone.is_some()],
        details.labels.len().min(2),
    ))
}

/// The first byte: a choice, a subscription or an unregistration.
pub fn set_opt_in(input: &[u8]) -> u64 {
    let Some((which, bytes)) = input.split_first() else { return 0 };
    let mut call = Call::new(app()).by(Some("a key"));
    if which % 2 == 0 {
        let Ok(message) = proto::SetOptInRequest::decode(bytes) else { return 1 };
        let choice = convert::set_opt_in(call.violations(), message.clone());
        return match service::fuzzing::choice(call, choice, NOW) {
            Ok(choice) => {
                assert_eq!(Some(choice.opted_in), message.opted_in, "never guessed");
                assert_eq!(
                    choice.event_type.is_some(),
                    message.event_type.is_some(),
                    "the master switch by absence alone"
                );
                assert_eq!(choice.device.is_some(), !message.device_id.is_empty());
                assert!(choice.observed_at.0 <= NOW.0 + service::MAX_CLOCK_AHEAD_MS);
                assert!(choice.evidence.as_ref().is_none_or(|text| text.len() <= 4096 && !text.contains('\0')));
                shape(&(
                    choice.opted_in,
                    choice.event_type.is_some(),
                    choice.device.is_some(),
                    choice.evidence.is_some(),
                ))
            }
            Err(error) => refused(error),
        };
    }
    let Ok(message) = proto::SubscribeRequest::decode(bytes) else { return 1 };
    let at = message.observed_at;
    let subscription =
        convert::set_subscription(call.violations(), message.user_id, message.topic.clone(), which & 2 == 2, at);
    match service::fuzzing::subscription(call, &subscription, NOW) {
        Ok(subscription) => {
            assert_eq!(subscription.topic.as_str(), message.topic);
            shape(&("subscribed", subscription.active, at.is_some()))
        }
        Err(error) => refused(error),
    }
}
