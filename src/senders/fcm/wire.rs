//! The request: `POST /v1/projects/<project>/messages:send` with one JSON message for one device.
//!
//! A message is encoded once into a template; a push fills in the token, the id and the seconds that are left.

use std::borrow::Cow;
use std::task::Context;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap};
use http::uri::{PathAndQuery, Uri};
use http::{HeaderValue, Method, Request};
use serde::Serialize;
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
/// Most bodies fit, so that theirs is one allocation.
const BODY_ROOM: usize = 768;

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

/// Members of a JSON object, in their order.
type Texts<'a> = Vec<(&'a str, Cow<'a, str>)>;

/// Builds what all devices share. Written as it goes out, without a tree in between: for a single person's event this is
/// done for every push.
pub(super) fn prepare(message: &Message, options: &SendOptions) -> Result<Prepared, EncodeError> {
    let notification = notification(message);
    let data = data(message);
    let on_android = AndroidNotification::of(message);
    let mut aps = Template::default();
    aps.json(&Aps::of(message));
    let id_size = if options.push_id { PUSH_ID.len() + Hyphenated::LENGTH } else { 0 };
    let data_size = size_of(&data) + id_size;
    let tag_size = TAG.len() + options.collapse_key.as_ref().map_or(Hyphenated::LENGTH, |key| key.as_str().len());
    let android = size_of(&notification) + on_android.size() + data_size + if message.silent { 0 } else { tag_size };
    let ios = r#"{"aps":}"#.len() + aps.len() + data_size;
    let size = android.max(ios);
    if size > MAX_PAYLOAD_BYTES {
        return Err(EncodeError::TooLarge { size, limit: MAX_PAYLOAD_BYTES });
    }
    let mut template = Template::with_room(BODY_ROOM);
    template.raw(r#"{"message":{"token":""#).hole(Hole::Token).raw("\"");
    if !notification.is_empty() {
        template.raw(r#","notification":{"#);
        write_texts(&mut template, &notification);
        template.raw("}");
    }
    write_data(&mut template, &data, options.push_id);
    write_android(&mut template, message.silent, &on_android, options);
    write_apns(&mut template, message, &aps, options);
    template.raw("}}");
    Ok(Prepared { template, size })
}

/// Those of the texts that are there.
fn given<'a, const N: usize>(
    texts: [(&'a str, &'a Option<String>); N],
) -> impl Iterator<Item = (&'a str, Cow<'a, str>)> {
    texts.into_iter().filter_map(|(key, value)| Some((key, Cow::Borrowed(value.as_deref()?))))
}

fn notification<'a>(message: &'a Message<'_>) -> Texts<'a> {
    if message.silent {
        return Texts::new();
    }
    given([("title", &message.title), ("body", &message.body), ("image", &message.image)]).collect()
}

fn data<'a>(message: &'a Message<'_>) -> Texts<'a> {
    let ours = [("link", &message.link), ("image", &message.image)];
    let mut texts = Texts::with_capacity(message.data.len() + ours.len());
    for (key, value) in &*message.data {
        // Our own keys win, whatever came in.
        let is_ours = ours.iter().any(|(name, value)| name == key && value.is_some());
        if !is_ours && key != PUSH_ID {
            texts.push((key, as_string_value(value)));
        }
    }
    texts.extend(given(ours));
    texts
}

fn size_of(texts: &Texts<'_>) -> usize {
    texts.iter().map(|(key, value)| key.len() + value.len()).sum()
}

fn write_texts(template: &mut Template, texts: &Texts<'_>) {
    for (at, (key, value)) in texts.iter().enumerate() {
        template.raw(if at == 0 { "" } else { "," }).json(key).raw(":").json(&**value);
    }
}

fn write_data(template: &mut Template, data: &Texts<'_>, push_id: bool) {
    if data.is_empty() && !push_id {
        return;
    }
    template.raw(r#","data":{"#);
    write_texts(template, data);
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

/// Android's block without the tag, which may differ by device.
#[derive(Default)]
struct AndroidNotification<'a> {
    texts: Texts<'a>,
    count: Option<u32>,
}

impl<'a> AndroidNotification<'a> {
    const COUNT: &'static str = "notification_count";

    fn of(message: &'a Message) -> Self {
        if message.silent {
            return Self::default();
        }
        let texts = given([("sound", &message.sound), ("click_action", &message.category)]).collect();
        Self { texts, count: message.badge.filter(|badge| *badge > 0) }
    }

    fn size(&self) -> usize {
        let count = self.count.map_or(0, |count| Self::COUNT.len() + count.to_string().len());
        size_of(&self.texts) + count
    }
}

/// No `collapse_key`: FCM keeps only four of them per device. The `tag` does the replacing, on the screen.
fn write_android(template: &mut Template, silent: bool, notification: &AndroidNotification<'_>, options: &SendOptions) {
    let priority = match options.priority {
        Priority::High => "HIGH",
        Priority::Normal => "NORMAL",
    };
    template.raw(r#","android":{"priority":""#).raw(priority);
    template.raw(r#"","ttl":""#).hole(Hole::TtlSecs).raw("s\"");
    if !silent {
        template.raw(r#","notification":{""#).raw(TAG).raw("\":");
        write_collapse_identity(template, options);
        for (key, value) in &notification.texts {
            template.raw(",").json(key).raw(":").json(&**value);
        }
        if let Some(count) = notification.count {
            template.raw(",").json(AndroidNotification::COUNT).raw(":").json(&count);
        }
        template.raw("}");
    }
    template.raw("}");
}

/// For iPhones behind FCM. What Apple's block leaves out, FCM fills in from `notification`.
fn write_apns(template: &mut Template, message: &Message, aps: &Template, options: &SendOptions) {
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
    template.raw(r#"},"payload":{"aps":"#).append(aps).raw("}");
    if !message.silent
        && let Some(image) = &message.image
    {
        template.raw(r#","fcm_options":{"image":"#).json(image).raw("}");
    }
    template.raw("}");
}

/// Apple's block.
#[derive(Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Aps<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    content_available: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    alert: Option<Alert<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    badge: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sound: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    category: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    thread_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mutable_content: Option<u8>,
}

#[derive(Serialize)]
struct Alert<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    title: Option<&'a str>,
    subtitle: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<&'a str>,
}

impl<'a> Aps<'a> {
    fn of(message: &'a Message) -> Self {
        if message.silent {
            return Self { content_available: Some(1), ..Self::default() };
        }
        // FCM knows no subtitle, and takes the whole alert from here once there is one.
        let alert = message.subtitle.as_deref().map(|subtitle| Alert {
            title: message.title.as_deref(),
            subtitle,
            body: message.body.as_deref(),
        });
        Self {
            content_available: None,
            alert,
            badge: message.badge,
            sound: message.sound.as_deref(),
            category: message.category.as_deref(),
            thread_id: message.thread_id.as_deref(),
            mutable_content: message.image.as_ref().map(|_| 1),
        }
    }
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
