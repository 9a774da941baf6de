//! What Apple's answers mean. Status and reason strings as in "Handling error responses from Apple Push Notification
//! service" (read 2026-11) and what was seen beyond it.

use http::StatusCode;
use serde_json::Value;

use crate::domain::sending::{FaultScope, ProviderAnswer, RetryCause, SendOutcome};
use crate::domain::time::UnixMs;
use crate::planted;
use crate::senders::http2::wire::{Answer, Then, Verdict, retry_after};

/// What to do about a reason; the outcome follows from it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Meaning {
    /// Our or the caller's mistake in this message.
    Drop,
    TokenGone,
    /// … in this environment: it may be the other one's.
    WrongHere,
    /// The credential.
    Broken,
    /// The certificate, which belongs to the connection: no request over it will be taken.
    BadCertificate,
    /// The credential is good, but not for this bundle or environment.
    NotForRoute,
    /// The same of a certificate, and its connection.
    CertificateNotForRoute,
    StaleCredential,
    TooManyCredentials,
    Throttled,
    DeviceThrottled,
    /// The connection is no good any more.
    Reconnect,
    /// The same, and Apple says it failed.
    ShuttingDown,
    ServerError,
}

/// `has_time`: it came with the time since when Apple knows, as only its own 410 does.
fn meaning(status: StatusCode, reason: &str, has_time: bool) -> Meaning {
    match reason {
        "BadDeviceToken" => Meaning::WrongHere,
        "DeviceTokenNotForTopic" | "Unregistered" | "ExpiredToken" => Meaning::TokenGone,
        "TopicDisallowed" | "BadEnvironmentKeyIdInToken" | "BadEnvironmentKeyInToken" => Meaning::NotForRoute,
        "BadCertificateEnvironment" => Meaning::CertificateNotForRoute,
        "BadCertificate" => Meaning::BadCertificate,
        "Forbidden" | "InvalidProviderToken" | "MissingProviderToken" | "UnrelatedKeyIdInToken" => Meaning::Broken,
        "ExpiredProviderToken" => Meaning::StaleCredential,
        "TooManyProviderTokenUpdates" => Meaning::TooManyCredentials,
        "TooManyRequests" => Meaning::DeviceThrottled,
        "IdleTimeout" => Meaning::Reconnect,
        "Shutdown" => Meaning::ShuttingDown,
        "InternalServerError" | "ServiceUnavailable" | "Service Unavailable" => Meaning::ServerError,
        "BadCollapseId" | "BadExpirationDate" | "BadMessageId" | "BadPriority" | "BadTopic" | "DuplicateHeaders"
        | "InvalidPushType" | "MissingDeviceToken" | "MissingTopic" | "PayloadEmpty" | "BadPath"
        | "MethodNotAllowed" | "PayloadTooLarge" => Meaning::Drop,
        // Reasons may grow, and bodies may be missing or a proxy's: the status decides, and no token is given up on it. A
        // 410 with Apple's time is about the token, whatever its reason is called; without one it may be anybody's.
        _ => match status.as_u16() {
            410 if has_time || planted::is("gone-by-status") => Meaning::TokenGone,
            429 => Meaning::Throttled,
            500.. => Meaning::ServerError,
            _ => Meaning::Drop,
        },
    }
}

pub(super) fn classify(answer: &Answer<'_>, now: UnixMs) -> Verdict {
    let status = answer.status;
    if status == StatusCode::OK {
        let unique_id = answer.headers.get("apns-unique-id").and_then(|id| id.to_str().ok());
        let provider_id = unique_id.map(|id| ProviderAnswer::new(200, id).reason);
        return Verdict { outcome: SendOutcome::Sent { provider_id }, then: Then::Keep, credential_accepted: true };
    }
    let body = serde_json::from_slice::<Value>(answer.body).unwrap_or_default();
    let reason = body["reason"].as_str().unwrap_or_default();
    let since = since(status, &body);
    let meaning = meaning(status, reason, since.is_some());
    let said = ProviderAnswer::new(status.as_u16(), if reason.is_empty() { "without a reason" } else { reason });
    let later =
        |cause| SendOutcome::RetryLater { cause, after: retry_after(answer.headers, now), answer: said.clone() };
    let (outcome, then) = match meaning {
        Meaning::Drop => (SendOutcome::Rejected { answer: said }, Then::Keep),
        Meaning::TokenGone => (SendOutcome::TokenGone { since, elsewhere: false, answer: said }, Then::Keep),
        Meaning::WrongHere => (SendOutcome::TokenGone { since: None, elsewhere: true, answer: said }, Then::Keep),
        Meaning::Broken => (SendOutcome::SenderBroken { scope: FaultScope::Credential, answer: said }, Then::Keep),
        Meaning::BadCertificate => {
            (SendOutcome::SenderBroken { scope: FaultScope::Credential, answer: said }, Then::Retire)
        }
        Meaning::CertificateNotForRoute => {
            (SendOutcome::SenderBroken { scope: FaultScope::Route, answer: said }, Then::Retire)
        }
        Meaning::NotForRoute => (SendOutcome::SenderBroken { scope: FaultScope::Route, answer: said }, Then::Keep),
        Meaning::StaleCredential => {
            (SendOutcome::SenderBroken { scope: FaultScope::Credential, answer: said }, Then::ReauthOnNewConnection)
        }
        Meaning::TooManyCredentials => (later(RetryCause::Throttled), Then::Retire),
        Meaning::Throttled => (later(RetryCause::Throttled), Then::Keep),
        Meaning::DeviceThrottled => (later(RetryCause::DeviceThrottled), Then::Keep),
        Meaning::Reconnect => (later(RetryCause::Transport), Then::Retire),
        Meaning::ShuttingDown => (later(RetryCause::ServerError), Then::Retire),
        Meaning::ServerError => (later(RetryCause::ServerError), Then::Keep),
    };
    // Apple looks at the credential before the message, and at some headers before the credential; only answers about
    // the token or the topic, and throttling of a token, come from behind it.
    let credential_accepted = matches!(
        meaning,
        Meaning::TokenGone | Meaning::WrongHere | Meaning::Drop | Meaning::Throttled | Meaning::DeviceThrottled
    );
    Verdict { outcome, then, credential_accepted }
}

/// The 410's `timestamp`: milliseconds. A value that can only be seconds is read as such, for a relay's sake.
fn since(status: StatusCode, body: &Value) -> Option<UnixMs> {
    const FIRST_PLAUSIBLE_MS: i64 = 100_000_000_000;
    if status != StatusCode::GONE {
        return None;
    }
    let timestamp = body["timestamp"].as_i64().filter(|timestamp| *timestamp > 0)?;
    let is_secs = timestamp < FIRST_PLAUSIBLE_MS || planted::is("gone-time-in-seconds");
    let millis = if is_secs { timestamp.saturating_mul(1000) } else { timestamp };
    Some(UnixMs(millis.min(UnixMs::MAX.0)))
}

/// Whether the answer says that the team's token changed too often.
pub(super) fn is_too_many_updates(outcome: &SendOutcome) -> bool {
    matches!(outcome, SendOutcome::RetryLater { answer, .. } if &*answer.reason == "TooManyProviderTokenUpdates")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http::{HeaderMap, HeaderValue};

    use super::*;

    const NOW: UnixMs = UnixMs(1_800_000_000_000);

    fn verdict(status: u16, body: &str) -> Verdict {
        let status = StatusCode::from_u16(status).expect("a status");
        classify(&Answer { status, headers: &HeaderMap::new(), body: body.as_bytes() }, NOW)
    }

    fn word(verdict: &Verdict) -> &'static str {
        match &verdict.outcome {
            SendOutcome::Sent { .. } => "sent",
            SendOutcome::RetryLater { cause: RetryCause::Transport, .. } => "transport",
            SendOutcome::RetryLater { cause: RetryCause::Throttled, .. } => "throttled",
            SendOutcome::RetryLater { cause: RetryCause::ServerError, .. } => "server",
            SendOutcome::MaybeSent { .. } => "maybe",
            SendOutcome::RetryLater { cause: RetryCause::DeviceThrottled, .. } => "device",
            SendOutcome::RetryLater { cause: RetryCause::ProviderThrottled, .. } => "provider",
            SendOutcome::TokenGone { elsewhere: true, .. } => "wrong here",
            SendOutcome::TokenGone { .. } => "gone",
            SendOutcome::Rejected { .. } => "rejected",
            SendOutcome::SenderBroken { scope: FaultScope::Route, .. } => "route",
            SendOutcome::SenderBroken { .. } => "broken",
            SendOutcome::Held | SendOutcome::NotAttempted => "kept",
        }
    }

    #[test]
    fn every_reason_has_its_meaning() {
        let table = [
            (400, "BadCollapseId", "rejected", Then::Keep),
            (400, "BadExpirationDate", "rejected", Then::Keep),
            (400, "BadMessageId", "rejected", Then::Keep),
            (400, "BadPriority", "rejected", Then::Keep),
            (400, "BadTopic", "rejected", Then::Keep),
            (400, "DuplicateHeaders", "rejected", Then::Keep),
            (400, "InvalidPushType", "rejected", Then::Keep),
            (400, "MissingDeviceToken", "rejected", Then::Keep),
            (400, "MissingTopic", "rejected", Then::Keep),
            (400, "PayloadEmpty", "rejected", Then::Keep),
            (400, "BadDeviceToken", "wrong here", Then::Keep),
            (400, "DeviceTokenNotForTopic", "gone", Then::Keep),
            (400, "TopicDisallowed", "route", Then::Keep),
            (400, "IdleTimeout", "transport", Then::Retire),
            (403, "BadCertificate", "broken", Then::Retire),
            (403, "BadCertificateEnvironment", "route", Then::Retire),
            (403, "ExpiredProviderToken", "broken", Then::ReauthOnNewConnection),
            (403, "InvalidProviderToken", "broken", Then::Keep),
            (403, "MissingProviderToken", "broken", Then::Keep),
            (403, "Forbidden", "broken", Then::Keep),
            (403, "UnrelatedKeyIdInToken", "broken", Then::Keep),
            (403, "BadEnvironmentKeyIdInToken", "route", Then::Keep),
            (403, "BadEnvironmentKeyInToken", "route", Then::Keep),
            (404, "BadPath", "rejected", Then::Keep),
            (405, "MethodNotAllowed", "rejected", Then::Keep),
            (410, "Unregistered", "gone", Then::Keep),
            (410, "ExpiredToken", "gone", Then::Keep),
            (413, "PayloadTooLarge", "rejected", Then::Keep),
            (429, "TooManyProviderTokenUpdates", "throttled", Then::Retire),
            (429, "TooManyRequests", "device", Then::Keep),
            (500, "InternalServerError", "server", Then::Keep),
            (503, "ServiceUnavailable", "server", Then::Keep),
            (503, "Service Unavailable", "server", Then::Keep),
            (503, "Shutdown", "server", Then::Retire),
            (400, "SomethingNew", "rejected", Then::Keep),
            (403, "SomethingNew", "rejected", Then::Keep),
            (410, "SomethingNew", "rejected", Then::Keep),
            (429, "SomethingNew", "throttled", Then::Keep),
            (502, "SomethingNew", "server", Then::Keep),
            (302, "SomethingNew", "rejected", Then::Keep),
        ];
        for (status, reason, expected, then) in table {
            let verdict = verdict(status, &format!(r#"{{"reason":"{reason}"}}"#));
            assert_eq!((word(&verdict), verdict.then), (expected, then), "{status} {reason}");
            if let SendOutcome::Rejected { answer } = &verdict.outcome {
                assert_eq!(&*answer.reason, reason, "kept verbatim");
            }
        }
    }

    /// Apple's reasons mean the same whatever status a relay made of the answer; only success is a matter of status.
    #[test]
    fn a_reason_outweighs_the_status() {
        let statuses = [204, 301, 400, 401, 403, 404, 405, 408, 410, 413, 418, 421, 429, 500, 502, 503, 504, 599];
        for (reason, expected) in [
            ("BadDeviceToken", "wrong here"),
            ("Unregistered", "gone"),
            ("TopicDisallowed", "route"),
            ("InvalidProviderToken", "broken"),
            ("TooManyRequests", "device"),
            ("PayloadTooLarge", "rejected"),
            ("IdleTimeout", "transport"),
            ("InternalServerError", "server"),
        ] {
            for status in statuses {
                let body = format!(r#"{{"reason":"{reason}"}}"#);
                assert_eq!(word(&verdict(status, &body)), expected, "{status} {reason}");
            }
        }
        for status in statuses {
            let expected = match status {
                429 => "throttled",
                500.. => "server",
                _ => "rejected",
            };
            for body in [r#"{"reason":"NotYetInvented"}"#, "", "<html><body>Bad Gateway</body></html>", "\0\u{1}", "{}"]
            {
                assert_eq!(word(&verdict(status, body)), expected, "{status} {body}");
            }
        }
    }

    #[test]
    fn bodies_that_are_none_are_judged_by_status() {
        for body in ["", "<html>Bad Gateway</html>", "{", "[]", "null", r#"{"reason":7}"#, "\u{fffd}"] {
            for (status, expected) in [(400, "rejected"), (404, "rejected"), (429, "throttled"), (503, "server")] {
                assert_eq!(word(&verdict(status, body)), expected, "{status} {body:?}");
            }
        }
        assert_eq!(word(&verdict(200, "")), "sent");
    }

    /// A proxy's 410, or one that lost its body, is no word of Apple's about a token.
    #[test]
    fn a_410_retires_by_its_reason_or_its_time_and_never_by_its_status() {
        for (body, expected) in [
            ("", "rejected"),
            ("<html>Gone</html>", "rejected"),
            ("{}", "rejected"),
            (r#"{"reason":"SomethingNew"}"#, "rejected"),
            (r#"{"reason":"SomethingNew","timestamp":0}"#, "rejected"),
            (r#"{"reason":"SomethingNew","timestamp":1790000000123}"#, "gone"),
            (r#"{"timestamp":1790000000123}"#, "gone"),
            (r#"{"reason":"Unregistered"}"#, "gone"),
        ] {
            assert_eq!(word(&verdict(410, body)), expected, "{body}");
        }
    }

    #[test]
    fn the_timestamp_of_a_410_is_in_milliseconds() {
        let since = |body: &str| match verdict(410, body).outcome {
            SendOutcome::TokenGone { since, .. } => since,
            other => panic!("{other:?}"),
        };
        assert_eq!(since(r#"{"reason":"Unregistered","timestamp":1790000000123}"#), Some(UnixMs(1_790_000_000_123)));
        assert_eq!(since(r#"{"reason":"Unregistered","timestamp":1790000000}"#), Some(UnixMs(1_790_000_000_000)));
        assert_eq!(since(r#"{"reason":"Unregistered"}"#), None);
        assert_eq!(since(r#"{"reason":"Unregistered","timestamp":-5}"#), None);
        let bad = verdict(400, r#"{"reason":"BadDeviceToken","timestamp":1790000000123}"#);
        assert!(matches!(bad.outcome, SendOutcome::TokenGone { since: None, .. }));
    }

    #[test]
    fn a_retry_hint_is_honoured_and_the_sandbox_id_kept() {
        let headers = HeaderMap::from_iter([(http::header::RETRY_AFTER, HeaderValue::from_static("30"))]);
        let body = br#"{"reason":"TooManyRequests"}"#;
        let answer = Answer { status: StatusCode::TOO_MANY_REQUESTS, headers: &headers, body };
        let SendOutcome::RetryLater { after, .. } = classify(&answer, NOW).outcome else { panic!("retried") };
        assert_eq!(after, Some(Duration::from_secs(30)));
        let id = http::HeaderName::from_static("apns-unique-id");
        let headers = HeaderMap::from_iter([(id, HeaderValue::from_static("abc"))]);
        let verdict = classify(&Answer { status: StatusCode::OK, headers: &headers, body: b"" }, NOW);
        assert_eq!(verdict.outcome, SendOutcome::Sent { provider_id: Some("abc".into()) });
    }

    #[test]
    fn only_answers_from_behind_the_credential_prove_it() {
        assert!(verdict(200, "").credential_accepted);
        assert!(verdict(410, r#"{"reason":"Unregistered"}"#).credential_accepted);
        assert!(!verdict(403, r#"{"reason":"InvalidProviderToken"}"#).credential_accepted);
        assert!(!verdict(503, r#"{"reason":"Shutdown"}"#).credential_accepted);
    }
}
