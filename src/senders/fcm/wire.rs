//! The request: `POST /v1/projects/<project>/messages:send` with one JSON message for one device.
//!
//! A message is encoded once into a template; a push fills in the token, the id and the seconds that are left.

use std::task::Context;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap};
use http::uri::{PathAndQuery, Uri};
use http::{HeaderValue, Method, Request};
use serde_json::{Map, Value, json};
use uuid::fmt::Hyphenated;

use super::auth::AccessTokens;
use super::classify;
use super::template::{Hole, Template};
use crate::domain::content::as_string_value;
use crate::domain::sending::{Priority, SendOptions, SendOutcome};
use crate::domain::time::UnixMs;
use crate::runtime::Runtime;
use crate::senders::http2::Endpoint;
use crate::senders::http2::wire::{Answer, AuthState, Verdict, Wire, unsendable};
use crate::senders::{Batch, EXAMPLE_ID, EXAMPLE_TOKEN, EncodeError, Encoded, Inspection, Message, SendTarget};

/// Google's limit, in bytes ("About FCM messages", read 2026-11: 4096 bytes of payload). What counts are keys and values,
/// not the JSON around them, of what a platform gets: `notification`, `android.notification` and `data` with `nudged_id`
/// for Android; Apple's block (as JSON, for it is passed on) and `data` for iOS. A token does not say which platform
/// it belongs to, so both must fit.
pub const MAX_PAYLOAD_BYTES: usize = 4096;

/// The longest TTL FCM takes: 28 days.
const MAX_TTL: Duration = Duration::from_secs(2_419_200);

const PUSH_ID: &str = "nudged_id";
const TAG: &str = "tag";

/// A message, ready but for the device.
pub(super) struct Prepared {
    template: Template,
    /// In bytes, as FCM counts.
    size: usize,
}

/// Example values where devices differ.
pub(super) fn inspect(prepared: &Prepared, ttl: Duration) -> Inspection {
    let id = EXAMPLE_ID.hyphenated().to_string();
    let body = prepared.template.fill(EXAMPLE_TOKEN, &id, ttl.min(MAX_TTL).as_secs());
    Inspection { headers: Vec::new(), body: String::from_utf8_lossy(&body).into_owned(), size: prepared.size }
}

/// The body for one device.
pub(super) fn fill(prepared: &Prepared, token: &str, nudged_id: uuid::Uuid, ttl: Duration) -> Bytes {
    let mut id = [0; Hyphenated::LENGTH];
    let id = nudged_id.hyphenated().encode_lower(&mut id);
    prepared.template.fill(token, id, ttl.min(MAX_TTL).as_secs())
}

/// A JSON object of texts (and numbers, in Android's block).
type Texts = Map<String, Value>;

/// Builds what all devices share.
pub(super) fn prepare(message: &Message, options: &SendOptions) -> Result<Prepared, EncodeError> {
    let notification = notification(message);
    let data = data(message);
    let on_android = android_notification(message);
    let aps = aps(message);
    let id_size = if options.push_id { PUSH_ID.len() + Hyphenated::LENGTH } else { 0 };
    let data_size = size_of(&data) + id_size;
    let tag_size = TAG.len() + options.collapse_key.as_ref().map_or(Hyphenated::LENGTH, |key| key.as_str().len());
    let android = size_of(&notification) + size_of(&on_android) + data_size + if message.silent { 0 } else { tag_size };
    let ios = json!({ "aps": aps }).to_string().len() + data_size;
    let size = android.max(ios);
    if size > MAX_PAYLOAD_BYTES {
        return Err(EncodeError::TooLarge { size, limit: MAX_PAYLOAD_BYTES });
    }
    let mut template = Template::default();
    template.raw(r#"{"message":{"token":""#).hole(Hole::Token).raw("\"");
    if !notification.is_empty() {
        template.raw(r#","notification":"#).json(&notification);
    }
    write_data(&mut template, &data, options.push_id);
    write_android(&mut template, message.silent, &on_android, options);
    write_apns(&mut template, message, &aps, options);
    template.raw("}}");
    Ok(Prepared { template, size })
}

fn notification(message: &Message) -> Texts {
    let mut texts = Texts::new();
    if !message.silent {
        for (key, value) in [("title", &message.title), ("body", &message.body), ("image", &message.image)] {
            if let Some(value) = value {
                texts.insert(key.to_owned(), value.as_str().into());
            }
        }
    }
    texts
}

fn data(message: &Message) -> Texts {
    let mut texts = Texts::new();
    for (key, value) in &message.data {
        if key != PUSH_ID {
            texts.insert(key.clone(), as_string_value(value).into());
        }
    }
    for (key, value) in [("link", &message.link), ("image", &message.image)] {
        if let Some(value) = value {
            texts.insert(key.to_owned(), value.as_str().into());
        }
    }
    texts
}

fn size_of(texts: &Texts) -> usize {
    texts.iter().map(|(key, value)| key.len() + value.as_str().map_or_else(|| value.to_string().len(), str::len)).sum()
}

fn write_data(template: &mut Template, data: &Texts, push_id: bool) {
    if data.is_empty() && !push_id {
        return;
    }
    template.raw(r#","data":{"#);
    for (at, (key, value)) in data.iter().enumerate() {
        template.raw(if at == 0 { "" } else { "," }).json(key).raw(":").json(value);
    }
    if push_id {
        template.raw(if data.is_empty() { "\"" } else { ",\"" }).raw(PUSH_ID).raw("\":\"").hole(Hole::PushId).raw("\"");
    }
    template.raw("}");
}

/// The caller's collapse key as a JSON string, or the id.
fn write_collapse_identity(template: &mut Template, options: &SendOptions) {
    match &options.collapse_key {
        Some(key) => template.json(key.as_str()),
        None => template.raw("\"").hole(Hole::PushId).raw("\""),
    };
}

/// Without the tag, which may differ by device.
fn android_notification(message: &Message) -> Texts {
    let mut block = Texts::new();
    if !message.silent {
        for (key, value) in [("sound", &message.sound), ("click_action", &message.category)] {
            if let Some(value) = value {
                block.insert(key.to_owned(), value.as_str().into());
            }
        }
        if let Some(badge) = message.badge.filter(|badge| *badge > 0) {
            block.insert("notification_count".to_owned(), badge.into());
        }
    }
    block
}

/// No `collapse_key`: FCM keeps only four of them per device. The `tag` does the replacing, on the screen.
fn write_android(template: &mut Template, silent: bool, notification: &Texts, options: &SendOptions) {
    let priority = match options.priority {
        Priority::High => "HIGH",
        Priority::Normal => "NORMAL",
    };
    template.raw(r#","android":{"priority":""#).raw(priority);
    template.raw(r#"","ttl":""#).hole(Hole::TtlSecs).raw("s\"");
    if !silent {
        template.raw(r#","notification":{""#).raw(TAG).raw("\":");
        write_collapse_identity(template, options);
        for (key, value) in notification {
            template.raw(",").json(key).raw(":").json(value);
        }
        template.raw("}");
    }
    template.raw("}");
}

/// For iPhones behind FCM. What Apple's block leaves out, FCM fills in from `notification`.
fn write_apns(template: &mut Template, message: &Message, aps: &Value, options: &SendOptions) {
    let priority = match (message.silent, options.priority) {
        (false, Priority::High) => "10",
        (true, _) | (false, Priority::Normal) => "5",
    };
    let expiration = options.expires_at.secs().max(0).to_string();
    template.raw(r#","apns":{"headers":{"apns-priority":""#).raw(priority);
    template.raw(r#"","apns-expiration":""#).raw(&expiration).raw("\"");
    if message.silent {
        template.raw(r#","apns-push-type":"background""#);
    }
    template.raw(r#","apns-collapse-id":"#);
    write_collapse_identity(template, options);
    template.raw(r#"},"payload":{"aps":"#).json(aps).raw("}");
    if !message.silent
        && let Some(image) = &message.image
    {
        template.raw(r#","fcm_options":{"image":"#).json(image).raw("}");
    }
    template.raw("}");
}

fn aps(message: &Message) -> Value {
    if message.silent {
        return json!({ "content-available": 1 });
    }
    let mut aps = Map::new();
    if let Some(subtitle) = &message.subtitle {
        // FCM knows no subtitle, and takes the whole alert from here once there is one.
        let mut alert = Map::new();
        for (key, value) in [("title", &message.title), ("subtitle", &Some(subtitle.clone())), ("body", &message.body)]
        {
            if let Some(value) = value {
                alert.insert(key.to_owned(), value.as_str().into());
            }
        }
        aps.insert("alert".to_owned(), alert.into());
    }
    if let Some(badge) = message.badge {
        aps.insert("badge".to_owned(), badge.into());
    }
    for (key, value) in [("sound", &message.sound), ("category", &message.category), ("thread-id", &message.thread_id)]
    {
        if let Some(value) = value {
            aps.insert(key.to_owned(), value.as_str().into());
        }
    }
    if message.image.is_some() {
        aps.insert("mutable-content".to_owned(), 1.into());
    }
    aps.into()
}

/// One service account on FCM.
pub(super) struct FcmWire {
    runtime: Runtime,
    uri: Uri,
    tokens: AccessTokens,
    /// Complete but for the value of `authorization`.
    headers: HeaderMap,
    authorization: Option<HeaderValue>,
}

impl FcmWire {
    /// `None`: the project's name is no part of a path.
    pub(super) fn new(runtime: Runtime, endpoint: &Endpoint, project_id: &str, tokens: AccessTokens) -> Option<Self> {
        let path = PathAndQuery::try_from(format!("/v1/projects/{project_id}/messages:send")).ok()?;
        let uri = Uri::builder()
            .scheme(endpoint.scheme.clone())
            .authority(endpoint.authority.clone())
            .path_and_query(path)
            .build()
            .ok()?;
        let headers = HeaderMap::from_iter([
            (CONTENT_TYPE, HeaderValue::from_static("application/json")),
            (AUTHORIZATION, HeaderValue::from_static("")),
        ]);
        Some(Self { runtime, uri, tokens, headers, authorization: None })
    }
}

impl Wire for FcmWire {
    fn first_request_alone(&self) -> bool {
        false
    }

    fn poll_auth(&mut self, _now: UnixMs, cx: &mut Context<'_>) -> AuthState {
        let state = self.tokens.poll(self.runtime.instant(), cx);
        if matches!(state, AuthState::Ready) {
            self.authorization = self.tokens.header();
        }
        state
    }

    fn credential_generation(&self) -> u32 {
        self.tokens.generation()
    }

    fn credential_rejected(&mut self, generation: u32, _now: UnixMs) {
        self.tokens.rejected(generation);
    }

    fn request(
        &mut self,
        batch: &Batch,
        target: &SendTarget,
        now: UnixMs,
    ) -> Result<(Request<()>, Bytes), SendOutcome> {
        let prepared = batch
            .encoded
            .get(usize::from(target.variant))
            .and_then(Encoded::get::<Prepared>)
            .ok_or_else(|| unsendable("the message was not encoded for FCM"))?;
        // What is left of the TTL, in whole seconds; 0 is FCM's "now or never".
        let body = fill(prepared, target.token.expose(), target.nudged_id, batch.expires_at.since(now));
        let mut headers = self.headers.clone();
        for (name, value) in &mut headers {
            if *name == AUTHORIZATION
                && let Some(authorization) = &self.authorization
            {
                *value = authorization.clone();
            }
        }
        let mut request = Request::new(());
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.uri.clone();
        *request.headers_mut() = headers;
        Ok((request, body))
    }

    fn classify(&mut self, answer: &Answer<'_>, now: UnixMs) -> Verdict {
        classify::classify(answer, now)
    }
}
