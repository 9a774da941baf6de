//! What Google's answers mean: first the FCM error code, then the RPC status, then HTTP's (bodies can be a proxy's
//! HTML), as Google's own libraries read them.

use std::borrow::Cow;
use std::time::Duration;

use http::StatusCode;
use serde::Deserialize;
use serde_json::Value;

use crate::domain::sending::{FaultScope, ProviderAnswer, RetryCause, SendOutcome};
use crate::domain::time::UnixMs;
use crate::planted;
use crate::senders::http2::wire::{Answer, Then, Verdict, retry_after};

const FCM_ERROR: &str = "type.googleapis.com/google.firebase.fcm.v1.FcmError";
const ERROR_INFO: &str = "type.googleapis.com/google.rpc.ErrorInfo";
const BAD_REQUEST: &str = "type.googleapis.com/google.rpc.BadRequest";
const QUOTA_FAILURE: &str = "type.googleapis.com/google.rpc.QuotaFailure";
const RETRY_INFO: &str = "type.googleapis.com/google.rpc.RetryInfo";

/// The answer to a message that was taken.
#[derive(Deserialize)]
struct Taken<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
}

/// What of an error body matters.
#[derive(Default)]
struct Said<'a> {
    /// `FcmError.errorCode`.
    code: &'a str,
    /// The RPC status.
    status: &'a str,
    /// `ErrorInfo.reason`.
    reason: &'a str,
    /// The first field Google complains about.
    field: &'a str,
    message: &'a str,
    /// Which limit, where Google names it: `quota_limit` of ErrorInfo, subject or description of QuotaFailure.
    quota: &'a str,
    delay: Option<Duration>,
}

impl<'a> Said<'a> {
    fn read(body: &'a Value) -> Self {
        let error = &body["error"];
        let text = |value: &'a Value| value.as_str().unwrap_or_default();
        let mut said = Self { status: text(&error["status"]), message: text(&error["message"]), ..Self::default() };
        for detail in error["details"].as_array().into_iter().flatten() {
            match text(&detail["@type"]) {
                FCM_ERROR => said.code = text(&detail["errorCode"]),
                ERROR_INFO => {
                    said.reason = text(&detail["reason"]);
                    said.quota = text(&detail["metadata"]["quota_limit"]);
                }
                QUOTA_FAILURE => {
                    let violation = &detail["violations"][0];
                    let subject = text(&violation["subject"]);
                    said.quota = if subject.is_empty() { text(&violation["description"]) } else { subject };
                }
                BAD_REQUEST => said.field = text(&detail["fieldViolations"][0]["field"]),
                RETRY_INFO => said.delay = seconds(text(&detail["retryDelay"])),
                _ => {}
            }
        }
        said
    }

    /// What there was too much of. Google's texts are not documented: what names neither may be either.
    fn throttled(&self) -> RetryCause {
        let names = |word: &str| [self.quota, self.message].iter().any(|text| text.to_ascii_lowercase().contains(word));
        if names("device") {
            RetryCause::DeviceThrottled
        } else if names("project") {
            RetryCause::ProviderThrottled
        } else {
            RetryCause::Throttled
        }
    }

    /// For people. Google's message is left out: it may quote the token.
    fn words(&self) -> String {
        let parts = [self.status, self.code, self.reason, self.field];
        let mut words: Vec<&str> = Vec::with_capacity(parts.len());
        for part in parts {
            if !part.is_empty() && !words.contains(&part) {
                words.push(part);
            }
        }
        if words.is_empty() { "without a reason".to_owned() } else { words.join(" ") }
    }
}

/// Protobuf's JSON duration, `3.5s`.
fn seconds(text: &str) -> Option<Duration> {
    let secs: f64 = text.strip_suffix('s')?.parse().ok()?;
    Duration::try_from_secs_f64(secs).ok().filter(|delay| *delay <= Duration::from_secs(24 * 3600))
}

pub(super) fn classify(answer: &Answer<'_>, now: UnixMs) -> Verdict {
    let keep = |outcome| Verdict { outcome, then: Then::Keep, credential_accepted: true };
    if answer.status == StatusCode::OK {
        let taken = serde_json::from_slice::<Taken<'_>>(answer.body);
        let provider_id = taken.ok().map(|taken| ProviderAnswer::new(200, &taken.name).reason);
        return keep(SendOutcome::Sent { provider_id });
    }
    let body = serde_json::from_slice::<Value>(answer.body).unwrap_or_default();
    let said = Said::read(&body);
    let status = answer.status.as_u16();
    let text = ProviderAnswer::new(status, &said.words());
    let after = retry_after(answer.headers, now).or(said.delay);
    let later = |cause, answer| keep(SendOutcome::RetryLater { cause, after, answer });
    let gone = |answer| keep(SendOutcome::TokenGone { since: None, elsewhere: false, answer });
    let broken = |answer| keep(SendOutcome::SenderBroken { scope: FaultScope::Credential, answer });
    let rejected = |answer| keep(SendOutcome::Rejected { answer });
    match said.code {
        "UNREGISTERED" | "SENDER_ID_MISMATCH" => return gone(text),
        code if planted::is("unregistered-by-prefix") && code.starts_with("UNREGISTERED") => return gone(text),
        // APNs or web push credentials in the Firebase project.
        // Android devices of the same project are none the worse for it.
        "THIRD_PARTY_AUTH_ERROR" | "APNS_AUTH_ERROR" => {
            let all = planted::is("third-party-fault-stops-all");
            let scope = if all { FaultScope::Credential } else { FaultScope::Target };
            return keep(SendOutcome::SenderBroken { scope, answer: text });
        }
        "QUOTA_EXCEEDED" => return later(said.throttled(), text),
        "UNAVAILABLE" | "INTERNAL" => return later(RetryCause::ServerError, text),
        "INVALID_ARGUMENT" if names_the_token(said.message) => return gone(text),
        "INVALID_ARGUMENT" => return rejected(text),
        // UNSPECIFIED_ERROR, none, or one that is new: by status.
        _ => {}
    }
    match (said.status, status) {
        ("UNAUTHENTICATED", _) | (_, 401) => {
            let outcome = SendOutcome::SenderBroken { scope: FaultScope::Credential, answer: text };
            Verdict { outcome, then: Then::Reauth, credential_accepted: false }
        }
        // Without an FCM code it is the project or the address that is forbidden or not found, not the token.
        ("PERMISSION_DENIED" | "NOT_FOUND", _) | (_, 403 | 404) => broken(text),
        ("RESOURCE_EXHAUSTED", _) | (_, 429) => later(said.throttled(), text),
        ("INVALID_ARGUMENT", _) if names_the_token(said.message) => gone(text),
        ("INTERNAL" | "UNAVAILABLE", _) | (_, 500..) => later(RetryCause::ServerError, text),
        _ => rejected(text),
    }
}

/// `The registration token is not a valid FCM registration token`: a malformed token, which no retry will mend.
fn names_the_token(message: &str) -> bool {
    message.to_ascii_lowercase().contains("registration token")
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderValue};

    use super::*;

    const NOW: UnixMs = UnixMs(1_800_000_000_000);

    fn verdict(status: u16, body: &str) -> Verdict {
        let status = StatusCode::from_u16(status).expect("a status");
        classify(&Answer { status, headers: &HeaderMap::new(), body: body.as_bytes() }, NOW)
    }

    fn error(code: u16, status: &str, message: &str, details: &str) -> String {
        format!(r#"{{"error":{{"code":{code},"message":"{message}","status":"{status}","details":[{details}]}}}}"#)
    }

    fn fcm(code: &str) -> String {
        format!(r#"{{"@type":"{FCM_ERROR}","errorCode":"{code}"}}"#)
    }

    fn word(verdict: &Verdict) -> &'static str {
        match (&verdict.outcome, verdict.then) {
            (SendOutcome::SenderBroken { scope: FaultScope::Target, .. }, _) => "target",
            (SendOutcome::SenderBroken { .. }, Then::Reauth) => "reauth",
            (SendOutcome::SenderBroken { .. }, _) => "broken",
            (SendOutcome::Sent { .. }, _) => "sent",
            (SendOutcome::RetryLater { cause: RetryCause::Throttled, .. }, _) => "throttled",
            (SendOutcome::RetryLater { cause: RetryCause::DeviceThrottled, .. }, _) => "device",
            (SendOutcome::RetryLater { cause: RetryCause::ProviderThrottled, .. }, _) => "provider",
            (SendOutcome::RetryLater { cause: RetryCause::ServerError, .. }, _) => "server",
            (SendOutcome::TokenGone { since: None, .. }, _) => "gone",
            (SendOutcome::Rejected { .. }, _) => "rejected",
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_row_of_the_table() {
        let info = format!(r#"{{"@type":"{ERROR_INFO}","reason":"RATE_LIMIT_EXCEEDED","metadata":{{}}}}"#);
        let limit = "SendsPerMinutePerProject";
        let project = format!(
            r#"{{"@type":"{ERROR_INFO}","reason":"RATE_LIMIT_EXCEEDED","metadata":{{"quota_limit":"{limit}"}}}}"#
        );
        let quota =
            format!(r#"{{"@type":"{QUOTA_FAILURE}","violations":[{{"subject":"device:x","description":"y"}}]}}"#);
        let disabled = format!(r#"{{"@type":"{ERROR_INFO}","reason":"SERVICE_DISABLED"}}"#);
        let field = format!(r#"{{"@type":"{BAD_REQUEST}","fieldViolations":[{{"field":"message.android.ttl"}}]}}"#);
        let token = "The registration token is not a valid FCM registration token";
        let invalid = "INVALID_ARGUMENT";
        let table: Vec<(u16, &str, &str, String, &str)> = vec![
            (400, invalid, token, fcm(invalid), "gone"),
            (400, invalid, token, String::new(), "gone"),
            (400, invalid, "Invalid value at 'message.android.ttl'", field.clone(), "rejected"),
            (400, invalid, "Request contains an invalid argument.", fcm(invalid), "rejected"),
            (400, "FAILED_PRECONDITION", "", String::new(), "rejected"),
            (401, "UNAUTHENTICATED", "", String::new(), "reauth"),
            (401, "UNAUTHENTICATED", "", fcm("THIRD_PARTY_AUTH_ERROR"), "target"),
            (401, "UNAUTHENTICATED", "", fcm("APNS_AUTH_ERROR"), "target"),
            (403, "PERMISSION_DENIED", "", fcm("SENDER_ID_MISMATCH"), "gone"),
            (403, "PERMISSION_DENIED", "", disabled, "broken"),
            (404, "NOT_FOUND", "Requested entity was not found.", fcm("UNREGISTERED"), "gone"),
            (404, "NOT_FOUND", "Requested entity was not found.", String::new(), "broken"),
            (429, "RESOURCE_EXHAUSTED", "", fcm("QUOTA_EXCEEDED"), "throttled"),
            (429, "RESOURCE_EXHAUSTED", "", info, "throttled"),
            (429, "RESOURCE_EXHAUSTED", "Quota exceeded.", project, "provider"),
            (429, "RESOURCE_EXHAUSTED", "Device message rate exceeded.", fcm("QUOTA_EXCEEDED"), "device"),
            (429, "RESOURCE_EXHAUSTED", "", quota, "device"),
            (500, "INTERNAL", "", fcm("INTERNAL"), "server"),
            (503, "UNAVAILABLE", "", fcm("UNAVAILABLE"), "server"),
            (500, "INTERNAL", "", fcm("UNSPECIFIED_ERROR"), "server"),
            (400, "INVALID_ARGUMENT", "", fcm("UNSPECIFIED_ERROR"), "rejected"),
            (404, "NOT_FOUND", "", fcm("SOMETHING_NEW"), "broken"),
            (504, "DEADLINE_EXCEEDED", "", String::new(), "server"),
        ];
        for (code, status, message, details, expected) in table {
            let body = error(code, status, message, &details);
            assert_eq!(word(&verdict(code, &body)), expected, "{body}");
        }
    }

    /// Google's own libraries look at the FCM code first, whatever the status; codes that are new are no codes.
    #[test]
    fn an_fcm_code_outweighs_the_status() {
        let statuses = [400, 401, 403, 404, 409, 412, 429, 500, 502, 503, 504];
        for status in statuses {
            for (code, expected) in [
                ("UNREGISTERED", "gone"),
                ("SENDER_ID_MISMATCH", "gone"),
                ("THIRD_PARTY_AUTH_ERROR", "target"),
                ("QUOTA_EXCEEDED", "throttled"),
                ("UNAVAILABLE", "server"),
                ("INTERNAL", "server"),
                ("INVALID_ARGUMENT", "rejected"),
            ] {
                let body = error(status, "UNKNOWN", "", &fcm(code));
                assert_eq!(word(&verdict(status, &body)), expected, "{status} {code}");
            }
            // Only the exact code retires a token.
            for code in ["unregistered", "NOT_REGISTERED", "Unregistered", "UNREGISTERED ", "NotRegistered"] {
                let body = error(status, "UNKNOWN", "", &fcm(code));
                assert_ne!(word(&verdict(status, &body)), "gone", "{status} {code}");
            }
        }
    }

    #[test]
    fn bodies_that_are_none_are_judged_by_status() {
        for body in ["", "<html>502</html>", "{", "[]", r#"{"error":"text"}"#] {
            for (status, expected) in [
                (400, "rejected"),
                (401, "reauth"),
                (403, "broken"),
                (404, "broken"),
                (429, "throttled"),
                (500, "server"),
                (502, "server"),
                (302, "rejected"),
            ] {
                assert_eq!(word(&verdict(status, body)), expected, "{status} {body:?}");
            }
        }
    }

    #[test]
    fn the_message_id_comes_back() {
        let sent = verdict(200, r#"{"name":"projects/p/messages/0:123"}"#).outcome;
        assert_eq!(sent, SendOutcome::Sent { provider_id: Some("projects/p/messages/0:123".into()) });
        assert_eq!(verdict(200, "garbage").outcome, SendOutcome::Sent { provider_id: None });
    }

    #[test]
    fn hints_come_from_the_header_or_the_body() {
        let info = format!(r#"{{"@type":"{RETRY_INFO}","retryDelay":"30.5s"}}"#);
        let body = error(429, "RESOURCE_EXHAUSTED", "", &info);
        let after = |verdict: Verdict| match verdict.outcome {
            SendOutcome::RetryLater { after, .. } => after,
            other => panic!("{other:?}"),
        };
        assert_eq!(after(verdict(429, &body)), Some(Duration::from_millis(30_500)));
        assert_eq!(after(verdict(429, "")), None);
        let headers = HeaderMap::from_iter([(http::header::RETRY_AFTER, HeaderValue::from_static("7"))]);
        let answer = Answer { status: StatusCode::SERVICE_UNAVAILABLE, headers: &headers, body: body.as_bytes() };
        assert_eq!(after(classify(&answer, NOW)), Some(Duration::from_secs(7)), "the header wins");
    }

    #[test]
    fn words_hold_codes_and_fields_but_no_message() {
        let field = format!(r#"{{"@type":"{BAD_REQUEST}","fieldViolations":[{{"field":"message.data"}}]}}"#);
        let SendOutcome::Rejected { answer } =
            verdict(400, &error(400, "INVALID_ARGUMENT", "secret-token", &field)).outcome
        else {
            panic!("rejected")
        };
        assert_eq!(&*answer.reason, "INVALID_ARGUMENT message.data");
    }
}
