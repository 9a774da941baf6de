//! The fake APNs (development host): who may push, what is answered, what is recorded.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::request::Parts;
use http::{Method, Response, StatusCode};
use serde_json::{Value, json};

use super::apns_validate::{self as validate, Headers, Refusal, refuse};
use super::faults::{Target, TokenState};
use super::h2_server::{Reply, Service, Verdict};
use super::jwt::{self, Jws};
use super::play::{self, Answers};
use super::record::{AuthKind, Platform, Received};
use super::tally::SENT_AT_KEY;
use super::{Shared, credentials, tls};
use crate::domain::time::UnixMs;

/// A provider token is good for an hour.
const MAX_TOKEN_AGE: Duration = Duration::from_secs(3600);

/// A connection may show a new provider token this often.
const TOKEN_UPDATE_INTERVAL: Duration = Duration::from_secs(20 * 60);

/// Clocks of provider and sender may differ by this much.
const MAX_CLOCK_SKEW: Duration = Duration::from_secs(300);

pub(super) struct Apns {
    pub shared: Arc<Shared>,
    /// Uncompressed point of the key [`credentials::KEY_ID`].
    pub public_key: Vec<u8>,
    /// Bundle ids that key may push to.
    pub bundles: Vec<String>,
}

/// What APNs remembers of one connection.
pub(super) struct Peer {
    connection: u64,
    /// Topics of the client certificate; none on a token connection.
    certificate: Option<Vec<String>>,
    /// The provider token that was verified here last.
    known: Option<KnownToken>,
    /// An expired token was shown: this connection refuses every token from then on, as Apple's does.
    wedged: bool,
    /// A request with a valid token succeeded, so more than one stream is allowed.
    proven: bool,
}

struct KnownToken {
    bytes: String,
    hash: Arc<str>,
    issued_at: UnixMs,
    first_seen: UnixMs,
}

impl Service for Apns {
    type Peer = Peer;

    fn peer(&self, connection: u64, client_certificate: Option<&[u8]>) -> Peer {
        let certificate = client_certificate.map(tls::certificate_topics).filter(|topics| !topics.is_empty());
        Peer { connection, certificate, known: None, wedged: false, proven: false }
    }

    fn initial_streams(&self, peer: &Peer) -> u32 {
        let alone = self.shared.options.first_stream_alone && self.shared.options.validate;
        if alone && peer.certificate.is_none() { 1 } else { self.shared.options.max_concurrent_streams }
    }

    fn answer(&self, peer: &mut Peer, ordinal: u64, head: &Parts, body: Bytes) -> Reply {
        let shared = &*self.shared;
        let now = shared.runtime.now();
        let (headers, duplicate) = Headers::read(&head.headers);
        let id = headers.id.filter(|_| headers.check_id().is_ok()).map_or_else(|| shared.cheap_uuid(), str::to_owned);
        let mut received = Received {
            token: validate::token_of(head.uri.path()).unwrap_or_default().to_owned(),
            apns_id: headers.id.map(str::to_owned),
            nudged_id: headers.id.map(str::to_owned),
            apns_topic: headers.topic.map(str::to_owned),
            push_type: headers.push_type.map(str::to_owned),
            priority: headers.priority.map(str::to_owned),
            expiration: headers.expiration.map(str::to_owned),
            collapse_id: headers.collapse_id.map(str::to_owned),
            body: shared.body_to_keep(&body),
            ..Received::new(Platform::Apns, now, peer.connection, ordinal)
        };
        let verdict = if shared.options.validate {
            self.check(peer, head, &headers, duplicate, &body, &mut received)
        } else {
            Ok(())
        };
        let wording = Wording { shared, id: &id, now };
        let mut reply = match verdict {
            Err(refusal) => {
                received.accepted = false;
                received.status = refusal.status;
                received.reason = Some(refusal.reason.to_owned());
                Reply::now(Verdict::Respond(error(&id, refusal.status, refusal.reason, refusal.timestamp)))
            }
            Ok(()) => match shared.faults.take(Target::Apns, &received.token) {
                Some(action) => play::play(action, &mut received, &wording),
                None => Reply::now(Verdict::Respond(wording.success())),
            },
        };
        if received.status == 200 && received.accepted && !peer.proven {
            peer.proven = true;
            reply.max_streams = reply.max_streams.or(Some(shared.options.max_concurrent_streams));
        }
        reply.delay += shared.options.latency;
        shared.note(received);
        reply
    }
}

impl Apns {
    fn check(
        &self,
        peer: &mut Peer,
        head: &Parts,
        headers: &Headers<'_>,
        duplicate: bool,
        body: &Bytes,
        received: &mut Received,
    ) -> Result<(), Refusal> {
        if duplicate {
            return Err(refuse(400, "DuplicateHeaders"));
        }
        headers.check_id()?;
        if head.method != Method::POST {
            return Err(refuse(405, "MethodNotAllowed"));
        }
        let topic = match (headers.topic, peer.certificate.as_deref()) {
            (Some(""), _) => return Err(refuse(400, "MissingTopic")),
            (Some(topic), _) => topic,
            (None, Some([only])) => only,
            (None, _) => return Err(refuse(400, "MissingTopic")),
        }
        .to_owned();
        headers.check_collapse_id()?;
        headers.check_priority()?;
        headers.check_expiration()?;
        let push_type = headers.known_push_type()?;
        let token = validate::token_of(head.uri.path())?;
        validate::check_token(token)?;
        match self.shared.token_state(token) {
            Some(TokenState::Unregistered { since }) => {
                return Err(Refusal { status: 410, reason: "Unregistered", timestamp: since });
            }
            Some(TokenState::Expired { since }) => {
                return Err(Refusal { status: 410, reason: "ExpiredToken", timestamp: since });
            }
            Some(TokenState::Bad {}) => return Err(refuse(400, "BadDeviceToken")),
            Some(TokenState::OtherApp {}) => return Err(refuse(400, "DeviceTokenNotForTopic")),
            Some(TokenState::Valid {}) | None => {}
        }
        if let Some(topics) = &peer.certificate {
            received.auth = AuthKind::Certificate;
            validate::check_certificate_topic(&topic, push_type, topics)?;
        } else {
            self.authenticate(peer, headers.authorization, received)?;
            validate::check_key_topic(&topic, push_type, &self.bundles)?;
        }
        let payload = validate::check_payload(body, push_type, headers.priority)?;
        received.sent_us = payload.get(SENT_AT_KEY).and_then(Value::as_i64);
        if let Some(id) = payload.get("nudged_id").and_then(Value::as_str) {
            received.nudged_id = Some(id.to_owned());
        }
        Ok(())
    }

    fn authenticate(
        &self,
        peer: &mut Peer,
        authorization: Option<&str>,
        received: &mut Received,
    ) -> Result<(), Refusal> {
        let now = received.at;
        let missing = || refuse(403, "MissingProviderToken");
        let (scheme, token) = authorization.and_then(|value| value.split_once(' ')).ok_or_else(missing)?;
        if !scheme.eq_ignore_ascii_case("bearer") || token.is_empty() {
            return Err(missing());
        }
        received.auth = AuthKind::Jwt;
        // The bytes of one token are verified once per connection: verifying costs more than all the rest.
        match &peer.known {
            Some(known) if known.bytes == token => received.auth_hash = Some(Arc::clone(&known.hash)),
            known => {
                let hash: Arc<str> = jwt::token_hash(token.as_bytes()).into();
                received.auth_hash = Some(Arc::clone(&hash));
                let issued_at = self.verify(token, now)?;
                if known.as_ref().is_some_and(|known| now.since(known.first_seen) < TOKEN_UPDATE_INTERVAL) {
                    return Err(refuse(429, "TooManyProviderTokenUpdates"));
                }
                peer.known = Some(KnownToken { bytes: token.to_owned(), hash, issued_at, first_seen: now });
            }
        }
        let issued_at = peer.known.as_ref().map_or(now, |known| known.issued_at);
        peer.wedged |= now.since(issued_at) > MAX_TOKEN_AGE;
        if peer.wedged { Err(refuse(403, "ExpiredProviderToken")) } else { Ok(()) }
    }

    /// When the token was issued, if it is ours.
    fn verify(&self, token: &str, now: UnixMs) -> Result<UnixMs, Refusal> {
        let invalid = || refuse(403, "InvalidProviderToken");
        let jws = Jws::parse(token).ok_or_else(invalid)?;
        // `typ` is no header Apple asks for, but common libraries write it and Apple lets it pass.
        let lenient = self.shared.options.lenient_jwt;
        let header_ok = jws.header.keys().all(|key| matches!(key.as_str(), "alg" | "kid") || lenient && key == "typ");
        let claims_ok = jws.claims.len() == 2 && jws.text("iss") == Some(credentials::TEAM_ID);
        if !header_ok || !claims_ok || jws.header_text("kid") != Some(credentials::KEY_ID) {
            return Err(invalid());
        }
        let issued_at = jws.seconds("iat").and_then(|iat| iat.checked_mul(1000)).map(UnixMs).ok_or_else(invalid)?;
        if issued_at > now.plus(MAX_CLOCK_SKEW) || !jws.verify_es256(&self.public_key) {
            return Err(invalid());
        }
        Ok(issued_at)
    }
}

/// The answers to the push with this `apns-id`.
struct Wording<'a> {
    shared: &'a Shared,
    id: &'a str,
    now: UnixMs,
}

impl Answers for Wording<'_> {
    /// 200 with the development host's delivery-log id.
    fn success(&self) -> Response<Bytes> {
        Response::builder()
            .header("apns-id", self.id)
            .header("apns-unique-id", self.shared.cheap_uuid())
            .body(Bytes::new())
            .expect("uuids are header values")
    }

    fn failure(&self, status: u16, reason: Option<&str>, timestamp: Option<i64>) -> Response<Bytes> {
        let since = (status == 410).then(|| timestamp.map_or(self.now, UnixMs));
        match reason {
            Some(reason) => error(self.id, status, reason, since),
            None => error(self.id, status, "", since).map(|_| Bytes::new()),
        }
    }

    fn goaway_debug(&self, reason: &str) -> String {
        json!({ "reason": reason }).to_string()
    }
}

fn error(id: &str, status: u16, reason: &str, timestamp: Option<UnixMs>) -> Response<Bytes> {
    let body = match timestamp {
        Some(at) => json!({ "reason": reason, "timestamp": at.0 }),
        None => json!({ "reason": reason }),
    };
    Response::builder()
        .status(StatusCode::from_u16(status).expect("faults are checked when they are added"))
        .header("apns-id", id)
        .body(body.to_string().into())
        .expect("uuids are header values")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::Runtime;
    use crate::sandbox::tests::provider_token;
    use crate::sandbox::{Options, Sandbox};

    /// The rules that run on the clock, with the clock in hand.
    #[tokio::test]
    async fn provider_tokens_age_on_their_connection() {
        let runtime = Runtime::production();
        let options = Options::default();
        let identity = credentials::prepare(&runtime, &options, "").unwrap();
        let sandbox = Sandbox::start(&runtime, options).await.unwrap();
        let apns =
            Apns { shared: Arc::clone(&sandbox.shared), public_key: identity.apns_public_key, bundles: Vec::new() };
        let token = |age_secs| format!("bearer {}", provider_token(&identity.credentials, age_secs));
        let start = runtime.now();
        let mut peer = apns.peer(1, None);
        let mut show = |token: &str, minutes: u64| {
            let at = start.plus(Duration::from_secs(minutes * 60));
            let mut received = Received::new(Platform::Apns, at, 1, 1);
            apns.authenticate(&mut peer, Some(token), &mut received).map_err(|refusal| refusal.reason)
        };
        let (first, second) = (token(60), token(0));
        assert_eq!(show(&first, 0), Ok(()));
        assert_eq!(show(&second, 19), Err("TooManyProviderTokenUpdates"));
        assert_eq!(show(&first, 19), Ok(()));
        assert_eq!(show(&second, 20), Ok(()));
        assert_eq!(show(&second, 59), Ok(()));
        assert_eq!(show(&second, 61), Err("ExpiredProviderToken"), "a token that was good here expires");
        assert_eq!(show(&token(-61 * 60 + 200), 61), Err("ExpiredProviderToken"), "and the connection stays wedged");
        sandbox.shutdown().await;
    }
}
