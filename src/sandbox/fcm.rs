//! The fake FCM (HTTP v1): access tokens, projects, messages, Google's error shape.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::request::Parts;
use http::{Method, Response, StatusCode};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Shared;
use super::faults::{Target, TokenState};
use super::fcm_schema::{Violation, get};
use super::fcm_validate::{self as validate, Audience, object, text};
use super::h2_server::{Reply, Service, Verdict};
use super::jwt;
use super::play::{self, Answers};
use super::record::{AuthKind, Platform, Received};
use super::tally::SENT_AT_KEY;

const FCM_ERROR: &str = "type.googleapis.com/google.firebase.fcm.v1.FcmError";
const BAD_REQUEST: &str = "type.googleapis.com/google.rpc.BadRequest";

/// Field violations in one answer; the rest is cut.
const MAX_VIOLATIONS: usize = 50;

pub(super) struct Fcm {
    pub shared: Arc<Shared>,
}

/// A refusal as Google words it.
struct Refusal {
    status: u16,
    message: String,
    /// FcmError's errorCode.
    error_code: Option<&'static str>,
    violations: Vec<Violation>,
    /// A web page instead of JSON: an address no Google service has.
    html: bool,
}

fn refuse(status: u16, message: &str) -> Refusal {
    Refusal { status, message: message.to_owned(), error_code: None, violations: Vec::new(), html: false }
}

/// The number of a connection and the access token last seen there, whose hash is not worth computing again.
pub(super) struct Peer {
    connection: u64,
    known: Option<(String, Arc<str>)>,
}

/// As much of a request as is read when nothing is validated.
#[derive(Deserialize)]
struct Glimpse<'a> {
    #[serde(borrow)]
    message: GlimpseMessage<'a>,
}

#[derive(Deserialize)]
struct GlimpseMessage<'a> {
    #[serde(borrow)]
    token: std::borrow::Cow<'a, str>,
    data: Option<GlimpseData>,
}

#[derive(Deserialize)]
struct GlimpseData {
    nudged_id: Option<String>,
}

impl Service for Fcm {
    type Peer = Peer;

    fn peer(&self, connection: u64, _client_certificate: Option<&[u8]>) -> Peer {
        Peer { connection, known: None }
    }

    fn initial_streams(&self, _peer: &Peer) -> u32 {
        self.shared.options.max_concurrent_streams
    }

    fn answer(&self, peer: &mut Peer, ordinal: u64, head: &Parts, body: Bytes) -> Reply {
        let shared = &*self.shared;
        let mut received = Received {
            body: shared.body_to_keep(&body),
            ..Received::new(Platform::Fcm, shared.runtime.now(), peer.connection, ordinal)
        };
        let verdict = if shared.options.validate {
            self.check(peer, head, &body, &mut received)
        } else {
            if let Ok(glimpse) = serde_json::from_slice::<Glimpse<'_>>(&body) {
                received.token = glimpse.message.token.into_owned();
                received.nudged_id = glimpse.message.data.and_then(|data| data.nudged_id);
            }
            Ok(())
        };
        let wording = Wording { shared, validate_only: received.validate_only };
        let mut reply = match verdict {
            Err(refusal) => {
                received.accepted = false;
                received.status = refusal.status;
                received.reason = Some(refusal.error_code.unwrap_or_else(|| grpc_status(refusal.status)).to_owned());
                Reply::now(Verdict::Respond(refusal.response()))
            }
            Ok(()) => match shared.faults.take(Target::Fcm, &received.token) {
                Some(action) => play::play(action, &mut received, &wording),
                None => Reply::now(Verdict::Respond(wording.success())),
            },
        };
        reply.delay += shared.options.latency;
        shared.note(received);
        reply
    }
}

impl Fcm {
    fn check(&self, peer: &mut Peer, head: &Parts, body: &[u8], received: &mut Received) -> Result<(), Refusal> {
        let path = head.uri.path();
        let project = path.strip_prefix("/v1/projects/").and_then(|rest| rest.strip_suffix("/messages:send"));
        let Some(project) = project.filter(|project| !project.contains('/') && head.method == Method::POST) else {
            return Err(Refusal { html: true, ..refuse(404, "") });
        };
        self.authenticate(peer, head, received)?;
        if project != self.shared.options.project_id {
            return Err(refuse(404, "Requested entity was not found."));
        }
        let request: Map<String, Value> = serde_json::from_slice(body)
            .map_err(|_| refuse(400, "Invalid JSON payload received. Unexpected token."))?;
        remember(&request, received);
        let audience = validate::check(&request).map_err(|violations| {
            let first = violations.first().map_or("", |violation| violation.description.as_str());
            Refusal { violations: violations.clone(), ..refuse(400, first) }
        })?;
        if let Audience::Token(token) | Audience::Fid(token) = audience {
            self.check_token(token)?;
        }
        Ok(())
    }

    fn check_token(&self, token: &str) -> Result<(), Refusal> {
        let malformed = || Refusal {
            error_code: Some("INVALID_ARGUMENT"),
            ..refuse(400, "The registration token is not a valid FCM registration token")
        };
        if !validate::is_token(token) {
            return Err(malformed());
        }
        match self.shared.token_state(token) {
            Some(TokenState::Unregistered { .. } | TokenState::Expired { .. }) => {
                Err(Refusal { error_code: Some("UNREGISTERED"), ..refuse(404, "Requested entity was not found.") })
            }
            Some(TokenState::Bad {}) => Err(malformed()),
            Some(TokenState::OtherApp {}) => {
                Err(Refusal { error_code: Some("SENDER_ID_MISMATCH"), ..refuse(403, "SenderId mismatch") })
            }
            Some(TokenState::Valid {}) | None => Ok(()),
        }
    }

    fn authenticate(&self, peer: &mut Peer, head: &Parts, received: &mut Received) -> Result<(), Refusal> {
        let unauthenticated = || {
            refuse(
                401,
                "Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or other \
                 valid authentication credential.",
            )
        };
        let value = head.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let (scheme, token) = value.and_then(|value| value.split_once(' ')).ok_or_else(unauthenticated)?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(unauthenticated());
        }
        received.auth = AuthKind::Bearer;
        let hash = match &peer.known {
            Some((known, hash)) if known == token => Arc::clone(hash),
            _ => {
                let hash: Arc<str> = jwt::token_hash(token.as_bytes()).into();
                peer.known = Some((token.to_owned(), Arc::clone(&hash)));
                hash
            }
        };
        received.auth_hash = Some(hash);
        if self.shared.access_tokens.is_good(token, received.at) { Ok(()) } else { Err(unauthenticated()) }
    }
}

/// The answers to one message.
struct Wording<'a> {
    shared: &'a Shared,
    validate_only: bool,
}

impl Answers for Wording<'_> {
    fn success(&self) -> Response<Bytes> {
        let project = &self.shared.options.project_id;
        let body = if self.validate_only {
            format!("{{\"name\":\"projects/{project}/messages/fake_message_id\"}}")
        } else {
            let id = self.shared.runtime.random_u64();
            let millis = self.shared.runtime.now().0;
            format!("{{\"name\":\"projects/{project}/messages/0:{millis}000%{id:016x}\"}}")
        };
        json_response(200, body)
    }

    fn failure(&self, status: u16, reason: Option<&str>, _timestamp: Option<i64>) -> Response<Bytes> {
        let details = reason.map(|code| json!({ "@type": FCM_ERROR, "errorCode": code }));
        json_response(status, error_body(status, "played by a fault", details))
    }

    fn goaway_debug(&self, reason: &str) -> String {
        reason.to_owned()
    }
}

/// What the record shows of a message, valid or not.
fn remember(request: &Map<String, Value>, received: &mut Received) {
    received.sent_us = object(request, "message")
        .and_then(|message| object(message, "data"))
        .and_then(|data| text(data, SENT_AT_KEY)?.parse().ok());
    received.validate_only = get(request, "validate_only") == Some(&Value::Bool(true));
    let Some(message) = object(request, "message") else { return };
    let target = ["token", "fid", "topic", "condition"].into_iter().find_map(|name| text(message, name));
    target.unwrap_or_default().clone_into(&mut received.token);
    received.nudged_id = object(message, "data").and_then(|data| text(data, "nudged_id")).map(str::to_owned);
    let Some(android) = object(message, "android").or_else(|| object(message, "android_v2")) else { return };
    received.nudged_id = received
        .nudged_id
        .take()
        .or_else(|| object(android, "data").and_then(|data| text(data, "nudged_id")).map(str::to_owned));
    received.priority = text(android, "priority").map(str::to_owned);
    received.expiration = text(android, "ttl").map(str::to_owned);
    let tag = object(android, "notification").and_then(|notification| text(notification, "tag"));
    received.collapse_id = tag.or_else(|| text(android, "collapse_key")).map(str::to_owned);
}

impl Refusal {
    fn response(self) -> Response<Bytes> {
        if self.html {
            let page = "<!DOCTYPE html>\n<html lang=en>\n<title>Error 404 (Not Found)!!1</title>\n";
            let mut response = json_response(self.status, page.to_owned());
            response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("text/html; charset=UTF-8"));
            return response;
        }
        let fcm_error = self.error_code.map(|code| json!({ "@type": FCM_ERROR, "errorCode": code }));
        let shown = self.violations.iter().take(MAX_VIOLATIONS);
        let violations: Vec<Value> =
            shown.map(|one| json!({ "field": one.field, "description": one.description })).collect();
        let bad_request =
            (!violations.is_empty()).then(|| json!({ "@type": BAD_REQUEST, "fieldViolations": violations }));
        json_response(self.status, error_body(self.status, &self.message, fcm_error.into_iter().chain(bad_request)))
    }
}

fn error_body(status: u16, message: &str, details: impl IntoIterator<Item = Value>) -> String {
    let mut error = json!({ "code": status, "message": message, "status": grpc_status(status) });
    let details: Vec<Value> = details.into_iter().collect();
    if !details.is_empty() {
        error["details"] = Value::Array(details);
    }
    json!({ "error": error }).to_string()
}

fn json_response(status: u16, body: String) -> Response<Bytes> {
    Response::builder()
        .status(StatusCode::from_u16(status).expect("faults are checked when they are added"))
        .header(CONTENT_TYPE, "application/json; charset=UTF-8")
        .body(body.into())
        .expect("static headers")
}

/// The google.rpc code that belongs to an HTTP status.
fn grpc_status(status: u16) -> &'static str {
    match status {
        400 => "INVALID_ARGUMENT",
        401 => "UNAUTHENTICATED",
        403 => "PERMISSION_DENIED",
        404 => "NOT_FOUND",
        409 => "ALREADY_EXISTS",
        429 => "RESOURCE_EXHAUSTED",
        500 => "INTERNAL",
        501 => "UNIMPLEMENTED",
        503 => "UNAVAILABLE",
        504 => "DEADLINE_EXCEEDED",
        _ => "UNKNOWN",
    }
}
