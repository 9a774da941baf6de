//! The request: `POST /3/device/<token>` with Apple's headers and a JSON body.
//!
//! A message is encoded once: its body up to the last value, which is the only thing that differs between devices, and
//! its headers with place holders. A push then costs one buffer, cut into path, id and body, and a copy of the headers.

use std::sync::Arc;
use std::task::Context;

use a2::request::notification::{
    CollapseId, DefaultNotificationBuilder, NotificationBuilder, NotificationOptions, Priority as ApnsPriority,
    PushType,
};
use a2::request::payload::Payload;
use bytes::{Bytes, BytesMut};
use http::header::{AUTHORIZATION, HeaderMap, HeaderName};
use http::uri::{PathAndQuery, Uri};
use http::{HeaderValue, Method, Request};
use serde::Serialize;
use uuid::fmt::Hyphenated;

use super::auth::ProviderTokens;
use super::classify;
use crate::domain::ids::CollapseKey;
use crate::domain::sending::{Priority, SendOptions, SendOutcome};
use crate::domain::time::UnixMs;
use crate::planted;
use crate::senders::http2::Endpoint;
use crate::senders::http2::wire::{Answer, AuthState, Verdict, Wire, unsendable};
use crate::senders::{Batch, EXAMPLE_ID, EncodeError, Encoded, Inspection, Message, SendTarget};

/// Apple's limit of a notification's JSON, in bytes of UTF-8, `nudged_id` included.
pub const MAX_PAYLOAD_BYTES: usize = 4096;

const APNS_ID: HeaderName = HeaderName::from_static("apns-id");
const APNS_TOPIC: HeaderName = HeaderName::from_static("apns-topic");
const APNS_PUSH_TYPE: HeaderName = HeaderName::from_static("apns-push-type");
const APNS_PRIORITY: HeaderName = HeaderName::from_static("apns-priority");
const APNS_EXPIRATION: HeaderName = HeaderName::from_static("apns-expiration");
const APNS_COLLAPSE_ID: HeaderName = HeaderName::from_static("apns-collapse-id");

const PATH: &[u8] = b"/3/device/";
/// Most bodies fit, so that theirs is one allocation.
const BODY_ROOM: usize = 512;

/// A message, ready but for the device.
pub(super) struct Prepared {
    /// The whole body, or up to where `nudged_id` goes.
    prefix: Bytes,
    suffix: &'static [u8],
    /// Complete but for the values of `apns-id`, of `authorization`, and of `apns-collapse-id` when it is the id.
    headers: HeaderMap,
    collapses_by_id: bool,
}

impl Prepared {
    pub(super) fn body_len(&self) -> usize {
        self.prefix.len() + self.suffix.len() + if self.suffix.is_empty() { 0 } else { Hyphenated::LENGTH }
    }

    /// Path, id and body in one buffer.
    fn fill(&self, target: &SendTarget) -> (Bytes, Bytes, Bytes) {
        let token = target.token.expose().as_bytes();
        let path_len = PATH.len() + token.len();
        let mut buffer = BytesMut::with_capacity(path_len + Hyphenated::LENGTH + self.body_len());
        buffer.extend_from_slice(PATH);
        buffer.extend_from_slice(token);
        let mut id = [0; Hyphenated::LENGTH];
        let id = target.nudged_id.hyphenated().encode_lower(&mut id).as_bytes();
        buffer.extend_from_slice(id);
        buffer.extend_from_slice(&self.prefix);
        if !self.suffix.is_empty() {
            buffer.extend_from_slice(id);
            buffer.extend_from_slice(self.suffix);
        }
        let mut rest = buffer.freeze();
        let path = rest.split_to(path_len);
        let id = rest.split_to(Hyphenated::LENGTH);
        (path, id, rest)
    }
}

/// Builds what all devices share. `with_token`: the connection wants an `authorization` header.
pub(super) fn prepare(
    bundle: &str,
    message: &Message,
    options: &SendOptions,
    with_token: bool,
) -> Result<Prepared, EncodeError> {
    let collapse_key = options.collapse_key.as_ref().map(CollapseKey::as_str);
    let apns_options = apns_options(bundle, message, options, collapse_key)?;
    let headers = headers(&apns_options, with_token)?;
    let mut text = body(message, apns_options)?;
    let suffix: &'static [u8] = if options.push_id {
        // The body is an object with at least `aps`: its last brace makes room for one more key.
        text.pop();
        text.extend_from_slice(br#","nudged_id":""#);
        br#""}"#
    } else {
        b""
    };
    let prepared = Prepared { prefix: text.into(), suffix, headers, collapses_by_id: collapse_key.is_none() };
    let size = prepared.body_len();
    if size > MAX_PAYLOAD_BYTES {
        return Err(EncodeError::TooLarge { size, limit: MAX_PAYLOAD_BYTES });
    }
    Ok(prepared)
}

/// Example values where devices differ, and no credential.
pub(super) fn inspect(prepared: &Prepared) -> Inspection {
    let id = EXAMPLE_ID.hyphenated().to_string();
    let headers = prepared
        .headers
        .iter()
        .filter(|(name, _)| **name != AUTHORIZATION)
        .map(|(name, value)| {
            let by_device = *name == APNS_ID || (prepared.collapses_by_id && *name == APNS_COLLAPSE_ID);
            let value = if by_device { id.clone() } else { String::from_utf8_lossy(value.as_bytes()).into_owned() };
            (name.as_str().to_owned(), value)
        })
        .collect();
    let mut body = String::from_utf8_lossy(&prepared.prefix).into_owned();
    if !prepared.suffix.is_empty() {
        body.push_str(&id);
        body.push_str(&String::from_utf8_lossy(prepared.suffix));
    }
    Inspection { headers, body, size: prepared.body_len() }
}

fn apns_options<'a>(
    bundle: &'a str,
    message: &Message,
    options: &SendOptions,
    collapse_key: Option<&'a str>,
) -> Result<NotificationOptions<'a>, EncodeError> {
    // Apple: a background push with priority 10 is an error.
    let (push_type, priority) = match (message.silent, options.priority) {
        (true, _) => (PushType::Background, ApnsPriority::Normal),
        (false, Priority::High) => (PushType::Alert, ApnsPriority::High),
        (false, Priority::Normal) => (PushType::Alert, ApnsPriority::Normal),
    };
    let collapse_id = collapse_key.map(CollapseId::new).transpose();
    Ok(NotificationOptions {
        apns_id: None,
        apns_push_type: Some(push_type),
        apns_expiration: Some(u64::try_from(options.expires_at.secs()).unwrap_or(0)),
        apns_priority: Some(priority),
        apns_topic: Some(bundle),
        apns_collapse_id: collapse_id
            .map_err(|_| EncodeError::Invalid("the collapse key is longer than 64 bytes".to_owned()))?,
    })
}

/// Apple's names for a2's options. The values that differ by device are place holders.
fn headers(options: &NotificationOptions<'_>, with_token: bool) -> Result<HeaderMap, EncodeError> {
    let value = |name: &str, text: &str| {
        HeaderValue::from_bytes(text.as_bytes())
            .map_err(|_| EncodeError::Invalid(format!("{name} holds a character that a header cannot carry")))
    };
    let held = HeaderValue::from_static("");
    let mut headers = HeaderMap::with_capacity(8);
    if let Some(topic) = options.apns_topic {
        headers.insert(APNS_TOPIC, value("the bundle", topic)?);
    }
    if let Some(push_type) = options.apns_push_type {
        headers.insert(APNS_PUSH_TYPE, value("the push type", &push_type.to_string())?);
    }
    if let Some(priority) = &options.apns_priority {
        headers.insert(APNS_PRIORITY, value("the priority", &priority.to_string())?);
    }
    if let Some(expiration) = options.apns_expiration {
        headers.insert(APNS_EXPIRATION, HeaderValue::from(expiration));
    }
    let collapse_id = match &options.apns_collapse_id {
        Some(collapse_id) => value("the collapse key", collapse_id.value)?,
        None => held.clone(),
    };
    if options.apns_collapse_id.is_some() || !planted::is("collapse-id-missing") {
        headers.insert(APNS_COLLAPSE_ID, collapse_id);
    }
    headers.insert(APNS_ID, held.clone());
    if with_token {
        headers.insert(AUTHORIZATION, held);
    }
    Ok(headers)
}

/// The JSON, written as it goes out: for a single person's event this is done for every push.
fn body(message: &Message, options: NotificationOptions<'_>) -> Result<Vec<u8>, EncodeError> {
    let builder = if message.silent { silent() } else { alert(message) };
    let payload: Payload<'_> = builder.build("", options);
    let mut aps = payload.aps;
    // a2 says 0 where leaving out says the same.
    aps.mutable_content = aps.mutable_content.filter(|mutable| *mutable != 0);
    let mut text = Vec::with_capacity(BODY_ROOM);
    text.extend_from_slice(br#"{"aps":"#);
    json(&mut text, &aps)?;
    // Beyond a2.
    if !message.silent
        && let Some(thread_id) = &message.thread_id
    {
        text.pop();
        text.extend_from_slice(if text.ends_with(b"{") { br#""thread-id":"# } else { br#","thread-id":"# });
        json(&mut text, thread_id)?;
        text.push(b'}');
    }
    let ours = [("link", &message.link), ("image", &message.image)];
    for (key, value) in &*message.data {
        // Our own keys win, whatever came in.
        let is_ours = ours.iter().any(|(name, value)| name == key && value.is_some());
        if !is_ours && !matches!(key.as_str(), "aps" | "nudged_id") {
            member(&mut text, key, value)?;
        }
    }
    for (key, value) in ours {
        if let Some(value) = value {
            member(&mut text, key, value)?;
        }
    }
    text.push(b'}');
    Ok(text)
}

fn member(text: &mut Vec<u8>, key: &str, value: &impl Serialize) -> Result<(), EncodeError> {
    text.push(b',');
    json(text, key)?;
    text.push(b':');
    json(text, value)
}

fn json(text: &mut Vec<u8>, value: &(impl Serialize + ?Sized)) -> Result<(), EncodeError> {
    serde_json::to_writer(text, value).map_err(|_| EncodeError::Invalid("the payload cannot be serialized".to_owned()))
}

/// Nothing but `content-available`: Apple may hold back or refuse a background push with more.
fn silent<'a>() -> DefaultNotificationBuilder<'a> {
    DefaultNotificationBuilder::new().set_content_available()
}

fn alert<'a>(message: &'a Message<'_>) -> DefaultNotificationBuilder<'a> {
    let mut builder = DefaultNotificationBuilder::new();
    if let Some(title) = &message.title {
        builder = builder.set_title(title);
    }
    if let Some(subtitle) = &message.subtitle {
        builder = builder.set_subtitle(subtitle);
    }
    if let Some(text) = &message.body {
        builder = builder.set_body(text);
    }
    if let Some(badge) = message.badge {
        builder = builder.set_badge(badge);
    }
    if let Some(sound) = &message.sound {
        builder = builder.set_sound(sound);
    }
    if let Some(category) = &message.category {
        builder = builder.set_category(category);
    }
    if message.image.is_some() {
        // The app's service extension fetches the picture.
        builder = builder.set_mutable_content();
    }
    builder
}

/// One credential on one of Apple's two hosts.
pub(super) struct ApnsWire {
    endpoint: Endpoint,
    /// `None`: the connection's certificate is the credential.
    tokens: Option<Arc<ProviderTokens>>,
    authorization: Option<HeaderValue>,
    generation: u32,
}

impl ApnsWire {
    pub(super) fn new(endpoint: Endpoint, tokens: Option<Arc<ProviderTokens>>) -> Self {
        let generation = tokens.as_ref().map_or(0, |tokens| tokens.generation());
        Self { endpoint, tokens, authorization: None, generation }
    }
}

impl Wire for ApnsWire {
    /// Apple: one stream until the first request with a valid token succeeded.
    fn first_request_alone(&self) -> bool {
        self.tokens.is_some()
    }

    fn poll_auth(&mut self, now: UnixMs, _cx: &mut Context<'_>) -> AuthState {
        if let Some(tokens) = &self.tokens {
            let (header, generation) = tokens.header(now);
            self.authorization = Some(header);
            self.generation = generation;
        }
        AuthState::Ready
    }

    fn credential_generation(&self) -> u32 {
        self.generation
    }

    fn credential_rejected(&mut self, generation: u32, now: UnixMs) {
        if let Some(tokens) = &self.tokens {
            tokens.rejected(generation, now);
            self.generation = tokens.generation();
        }
    }

    fn request(
        &mut self,
        batch: &Batch,
        target: &SendTarget,
        _now: UnixMs,
    ) -> Result<(Request<()>, Bytes), SendOutcome> {
        let prepared = batch
            .encoded
            .get(usize::from(target.variant))
            .and_then(Encoded::get::<Prepared>)
            .ok_or_else(|| unsendable("the message was not encoded for APNs"))?;
        let (path, id, body) = prepared.fill(target);
        let path = PathAndQuery::from_maybe_shared(path).map_err(|_| unsendable("the token is no part of a path"))?;
        let mut id = HeaderValue::from_maybe_shared(id).map_err(|_| unsendable("the id is no header value"))?;
        // Never indexed: it would push everything else out of the table.
        id.set_sensitive(true);
        let mut headers = prepared.headers.clone();
        for (name, value) in &mut headers {
            if *name == APNS_ID || (prepared.collapses_by_id && *name == APNS_COLLAPSE_ID) {
                *value = id.clone();
            } else if *name == AUTHORIZATION
                && let Some(authorization) = &self.authorization
            {
                *value = authorization.clone();
            }
        }
        let uri = Uri::builder()
            .scheme(self.endpoint.scheme.clone())
            .authority(self.endpoint.authority.clone())
            .path_and_query(path)
            .build()
            .map_err(|_| unsendable("the request has no valid address"))?;
        let mut request = Request::new(());
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri;
        *request.headers_mut() = headers;
        Ok((request, body))
    }

    fn classify(&mut self, answer: &Answer<'_>, now: UnixMs) -> Verdict {
        let verdict = classify::classify(answer, now);
        if let Some(tokens) = &self.tokens
            && classify::is_too_many_updates(&verdict.outcome)
        {
            tokens.too_many(now);
        }
        verdict
    }
}
