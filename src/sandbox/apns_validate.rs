//! What APNs refuses, in the order in which it is found out. Pure: no clock, no state of a connection.
//!
//! Apple documents the reasons, not always which mistake gets which. Where it is silent, the choices here are: a topic
//! whose suffix does not fit the push type is BadTopic; content that does not fit the push type is InvalidPushType; a
//! body that is no JSON object with `aps` is PayloadEmpty.

use http::HeaderMap;
use serde_json::{Map, Value};

use crate::domain::time::UnixMs;

/// Largest payload, bytes; a VoIP push may carry [`MAX_VOIP_PAYLOAD_BYTES`].
pub(super) const MAX_PAYLOAD_BYTES: usize = 4096;
pub(super) const MAX_VOIP_PAYLOAD_BYTES: usize = 5120;

const MAX_COLLAPSE_ID_BYTES: usize = 64;

/// Device tokens have no documented length; longer than this is no token of any kind known.
const MAX_TOKEN_BYTES: usize = 400;

/// A refusal as APNs words it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Refusal {
    pub status: u16,
    pub reason: &'static str,
    /// With 410: since when the token is dead.
    pub timestamp: Option<UnixMs>,
}

pub(super) fn refuse(status: u16, reason: &'static str) -> Refusal {
    Refusal { status, reason, timestamp: None }
}

/// `apns-push-type`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct PushType {
    pub name: &'static str,
    /// What the topic has after the bundle id.
    suffix: &'static str,
}

const PUSH_TYPES: [PushType; 11] = [
    PushType { name: "alert", suffix: "" },
    PushType { name: "background", suffix: "" },
    PushType { name: "voip", suffix: ".voip" },
    PushType { name: "complication", suffix: ".complication" },
    PushType { name: "fileprovider", suffix: ".pushkit.fileprovider" },
    PushType { name: "mdm", suffix: "" },
    PushType { name: "location", suffix: ".location-query" },
    PushType { name: "liveactivity", suffix: ".push-type.liveactivity" },
    PushType { name: "pushtotalk", suffix: ".voip-ptt" },
    PushType { name: "widgets", suffix: ".push-type.widgets" },
    PushType { name: "controls", suffix: ".push-type.controls" },
];

/// The headers of a push, each at most once.
#[derive(Default)]
pub(super) struct Headers<'a> {
    pub authorization: Option<&'a str>,
    pub id: Option<&'a str>,
    pub topic: Option<&'a str>,
    pub push_type: Option<&'a str>,
    pub priority: Option<&'a str>,
    pub expiration: Option<&'a str>,
    pub collapse_id: Option<&'a str>,
}

impl<'a> Headers<'a> {
    /// The headers, and whether one of them stands there twice.
    pub(super) fn read(map: &'a HeaderMap) -> (Self, bool) {
        let mut headers = Self::default();
        let mut duplicate = false;
        for (name, value) in map {
            let place = match name.as_str() {
                "authorization" => &mut headers.authorization,
                "apns-id" => &mut headers.id,
                "apns-topic" => &mut headers.topic,
                "apns-push-type" => &mut headers.push_type,
                "apns-priority" => &mut headers.priority,
                "apns-expiration" => &mut headers.expiration,
                "apns-collapse-id" => &mut headers.collapse_id,
                _ => continue,
            };
            // A value that is no text is wrong for every one of them; the empty one is too.
            duplicate |= place.replace(std::str::from_utf8(value.as_bytes()).unwrap_or("")).is_some();
        }
        (headers, duplicate)
    }

    pub(super) fn check_id(&self) -> Result<(), Refusal> {
        if self.id.is_some_and(|id| !is_canonical_uuid(id)) { Err(refuse(400, "BadMessageId")) } else { Ok(()) }
    }

    pub(super) fn check_collapse_id(&self) -> Result<(), Refusal> {
        match self.collapse_id {
            Some(id) if id.is_empty() || id.len() > MAX_COLLAPSE_ID_BYTES => Err(refuse(400, "BadCollapseId")),
            _ => Ok(()),
        }
    }

    pub(super) fn check_priority(&self) -> Result<(), Refusal> {
        match self.priority {
            None | Some("1" | "5" | "10") => Ok(()),
            Some(_) => Err(refuse(400, "BadPriority")),
        }
    }

    pub(super) fn check_expiration(&self) -> Result<(), Refusal> {
        let fine = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()) && text.parse::<i64>().is_ok();
        if self.expiration.is_some_and(|text| !fine(text)) { Err(refuse(400, "BadExpirationDate")) } else { Ok(()) }
    }

    /// Absent is allowed: only watchOS needs it.
    pub(super) fn known_push_type(&self) -> Result<Option<PushType>, Refusal> {
        let Some(name) = self.push_type else { return Ok(None) };
        let known = PUSH_TYPES.into_iter().find(|known| known.name == name);
        known.map(Some).ok_or_else(|| refuse(400, "InvalidPushType"))
    }
}

/// 8-4-4-4-12 lower-case hex digits.
fn is_canonical_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
        })
}

/// The device token in the path; not checked by [`check_token`] yet.
pub(super) fn token_of(path: &str) -> Result<&str, Refusal> {
    match path.strip_prefix("/3/device/") {
        Some("") => Err(refuse(400, "MissingDeviceToken")),
        Some(token) => Ok(token),
        None if path == "/3/device" => Err(refuse(400, "MissingDeviceToken")),
        None => Err(refuse(404, "BadPath")),
    }
}

pub(super) fn check_token(token: &str) -> Result<(), Refusal> {
    let hex = token.bytes().all(|byte| byte.is_ascii_hexdigit());
    if hex && token.len().is_multiple_of(2) && token.len() <= MAX_TOKEN_BYTES {
        Ok(())
    } else {
        Err(refuse(400, "BadDeviceToken"))
    }
}

/// Whether a key that may push to the bundles `allowed` may use this topic for this kind of push.
pub(super) fn check_key_topic(topic: &str, push_type: Option<PushType>, allowed: &[String]) -> Result<(), Refusal> {
    let is_allowed = |bundle: &str| allowed.iter().any(|known| known == bundle);
    if push_type.is_some_and(|kind| kind.name == "mdm") {
        // Its topic is the certificate's UID, unrelated to bundles.
        return if is_allowed(topic) { Ok(()) } else { Err(refuse(400, "TopicDisallowed")) };
    }
    // The longest suffix first does not matter: a bundle id that itself ends in a suffix is allowed by name.
    let fits = |kind: PushType| topic.strip_suffix(kind.suffix).is_some_and(is_allowed);
    let known = is_allowed(topic) || PUSH_TYPES.into_iter().any(fits);
    match push_type {
        _ if !known => Err(refuse(400, "TopicDisallowed")),
        Some(kind) if !fits(kind) => Err(refuse(400, "BadTopic")),
        _ => Ok(()),
    }
}

/// The same for a certificate that lists `topics` (suffixes included).
pub(super) fn check_certificate_topic(
    topic: &str,
    push_type: Option<PushType>,
    topics: &[String],
) -> Result<(), Refusal> {
    if !topics.iter().any(|known| known == topic) || push_type.is_some_and(|kind| kind.name == "location") {
        return Err(refuse(400, "TopicDisallowed"));
    }
    match push_type {
        Some(kind) if !topic.ends_with(kind.suffix) => Err(refuse(400, "BadTopic")),
        _ => Ok(()),
    }
}

/// The payload as JSON once it passed: not empty, not too large, an object with `aps`, right for the push type.
pub(super) fn check_payload(
    body: &[u8],
    push_type: Option<PushType>,
    priority: Option<&str>,
) -> Result<Map<String, Value>, Refusal> {
    if body.is_empty() {
        return Err(refuse(400, "PayloadEmpty"));
    }
    let name = push_type.map(|kind| kind.name);
    let limit = if name == Some("voip") { MAX_VOIP_PAYLOAD_BYTES } else { MAX_PAYLOAD_BYTES };
    if body.len() > limit {
        return Err(refuse(413, "PayloadTooLarge"));
    }
    let payload: Map<String, Value> = serde_json::from_slice(body).map_err(|_| refuse(400, "PayloadEmpty"))?;
    if name == Some("mdm") {
        return if payload.contains_key("mdm") { Ok(payload) } else { Err(refuse(400, "PayloadEmpty")) };
    }
    let Some(Value::Object(aps)) = payload.get("aps") else {
        return Err(refuse(400, "PayloadEmpty"));
    };
    match name {
        Some("background") => {
            // Absent means 10 (Apple: "if you omit this header, APNs sets the notification priority to 10").
            if matches!(priority, None | Some("10")) {
                return Err(refuse(400, "BadPriority"));
            }
            let silent = aps.len() == 1 && aps.get("content-available").and_then(Value::as_i64) == Some(1);
            if !silent {
                return Err(refuse(400, "InvalidPushType"));
            }
        }
        Some("alert") if !["alert", "badge", "sound"].iter().any(|key| aps.contains_key(*key)) => {
            return Err(refuse(400, "InvalidPushType"));
        }
        Some("widgets" | "controls") if aps.get("content-changed") != Some(&Value::Bool(true)) => {
            return Err(refuse(400, "InvalidPushType"));
        }
        _ => {}
    }
    Ok(payload)
}
