//! What providers answer: decided for every status, header and body, and never believed beyond reason.

use std::time::Duration;

use http::header::RETRY_AFTER;
use http::{HeaderMap, HeaderValue, StatusCode};
use serde_json::Value;

use crate::domain::retry::RetryPolicy;
use crate::domain::sending::{FaultScope, ProviderAnswer, RetryCause, SendOutcome};
use crate::domain::time::UnixMs;
use crate::fuzzing::shape;
use crate::senders::{apns, fcm};

use super::{halves, text};

pub const WORDS: &[&str] = &[
    "200 ",
    "400 ",
    "403 ",
    "404 ",
    "410 ",
    "429 ",
    "500 ",
    "503 ",
    "120",
    "18446744073709551615",
    "Tue, 24 Nov 2026 00:01:30 GMT",
    "{\"reason\":\"",
    "BadDeviceToken",
    "Unregistered",
    "ExpiredProviderToken",
    "TooManyRequests",
    "\"timestamp\":",
    "1795478400000",
    "\"error\":{",
    "\"status\":\"",
    "\"details\":[",
    "\"@type\":\"",
    "type.googleapis.com/google.firebase.fcm.v1.FcmError",
    "type.googleapis.com/google.rpc.RetryInfo",
    "type.googleapis.com/google.rpc.QuotaFailure",
    "\"errorCode\":\"UNREGISTERED\"",
    "\"errorCode\":\"QUOTA_EXCEEDED\"",
    "\"retryDelay\":\"3.5s\"",
    "\"access_token\":\"",
    "\"expires_in\":",
    "invalid_grant",
    "null",
    "\\u0000",
];

const NOW: UnixMs = UnixMs(1_795_478_400_000);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// The first line: a status, and what `Retry-After` says; the rest: the body.
fn answer(input: &[u8]) -> (StatusCode, HeaderMap, &[u8]) {
    let (head, body) = halves(input);
    let (status, hint) = head.split_at(head.len().min(3));
    let status = text(status).parse().ok().and_then(|status: u16| StatusCode::from_u16(status).ok());
    let mut headers = HeaderMap::new();
    if let Some(hint) = hint.get(1..).and_then(|hint| HeaderValue::from_bytes(hint).ok()) {
        headers.insert("apns-unique-id", hint.clone());
        headers.insert(RETRY_AFTER, hint);
    }
    (status.unwrap_or(StatusCode::BAD_GATEWAY), headers, body)
}

/// Every text in a JSON body.
fn texts(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::String(text) => found.push(text.clone()),
        Value::Array(items) => items.iter().for_each(|item| texts(item, found)),
        Value::Object(map) => map.values().for_each(|item| texts(item, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn says(body: &[u8], words: &[&str]) -> bool {
    let mut found = Vec::new();
    texts(&serde_json::from_slice(body).unwrap_or_default(), &mut found);
    found.iter().any(|text| words.contains(&text.as_str()))
}

/// What holds of every outcome, and a word for it.
fn check(outcome: &SendOutcome) -> String {
    let bounded = |answer: &ProviderAnswer| {
        assert!(answer.reason.len() <= ProviderAnswer::MAX_REASON_BYTES);
        assert!(!answer.reason.chars().any(char::is_control));
    };
    match outcome {
        SendOutcome::Sent { provider_id } => {
            assert!(provider_id.as_ref().is_none_or(|id| id.len() <= ProviderAnswer::MAX_REASON_BYTES));
            format!("sent {}", provider_id.is_some())
        }
        SendOutcome::RetryLater { cause, after, answer } => {
            bounded(answer);
            assert!(after.is_none_or(|after| after <= DAY), "a day is the longest that is believed");
            let policy = RetryPolicy {
                transport_floor: Duration::from_secs(1),
                throttled_floor: Duration::from_secs(60),
                server_error_floor: Duration::from_secs(10),
                base: Duration::from_secs(5),
                cap: Duration::from_secs(600),
                give_up_after: DAY,
            };
            let delay = policy.delay(*cause, *after, u32::MAX, 1.0);
            assert!(delay >= after.unwrap_or_default() && delay <= DAY + policy.cap + policy.transport_floor);
            assert!(NOW.plus(delay) > NOW);
            format!("{cause:?} {}", after.is_some())
        }
        SendOutcome::TokenGone { since, elsewhere, answer } => {
            bounded(answer);
            assert!(since.is_none_or(|since| (1..=UnixMs::MAX.0).contains(&since.0)));
            assert!(!elsewhere || since.is_none());
            format!("gone {elsewhere} {}", since.is_some())
        }
        SendOutcome::Rejected { answer } | SendOutcome::MaybeSent { answer } => {
            bounded(answer);
            "refused".to_owned()
        }
        SendOutcome::SenderBroken { scope, answer } => {
            bounded(answer);
            assert!(matches!(scope, FaultScope::Credential | FaultScope::Route | FaultScope::Target));
            format!("broken {scope:?}")
        }
        SendOutcome::Held | SendOutcome::NotAttempted => panic!("an answer came: {outcome:?}"),
    }
}

pub fn apns(input: &[u8]) -> u64 {
    let (status, headers, body) = answer(input);
    let (outcome, then) = apns::fuzzing::classify(status, &headers, body, NOW);
    assert_eq!(apns::fuzzing::classify(status, &headers, body, NOW), (outcome.clone(), then.clone()), "the same again");
    let word = check(&outcome);
    match &outcome {
        SendOutcome::Sent { .. } => assert_eq!(status, StatusCode::OK),
        // Apple's words, or the time since when it knows.
        SendOutcome::TokenGone { since, .. } => assert!(
            since.is_some()
                || says(body, &["BadDeviceToken", "DeviceTokenNotForTopic", "Unregistered", "ExpiredToken"]),
            "no token is given up for less"
        ),
        _ => assert_ne!(status, StatusCode::OK),
    }
    shape(&(word, then))
}

pub fn fcm(input: &[u8]) -> u64 {
    let (status, headers, body) = answer(input);
    let (outcome, then) = fcm::fuzzing::classify(status, &headers, body, NOW);
    let word = check(&outcome);
    match &outcome {
        SendOutcome::Sent { .. } => assert_eq!(status, StatusCode::OK),
        SendOutcome::TokenGone { .. } => assert!(
            says(body, &["UNREGISTERED", "SENDER_ID_MISMATCH", "INVALID_ARGUMENT"]),
            "no token is given up for less"
        ),
        _ => assert_ne!(status, StatusCode::OK),
    }
    shape(&(word, then))
}

/// The header alone: seconds, or a date.
pub fn retry_after(input: &[u8]) -> u64 {
    let Ok(value) = HeaderValue::from_bytes(input) else { return 0 };
    let headers = HeaderMap::from_iter([(RETRY_AFTER, value)]);
    let read = apns::fuzzing::retry_after(&headers, NOW);
    assert!(read.is_none_or(|after| after <= DAY));
    let said = text(input);
    let digits = said.trim();
    if said.is_ascii() && !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        let secs = digits.parse().unwrap_or(u64::MAX);
        assert_eq!(read, Some(Duration::from_secs(secs).min(DAY)), "{digits:?}");
    }
    for now in [UnixMs(0), UnixMs::MAX, UnixMs(i64::MIN), UnixMs(i64::MAX)] {
        assert!(apns::fuzzing::retry_after(&headers, now).is_none_or(|after| after <= DAY));
    }
    shape(&(read.map(|after| after.as_secs().min(3)), said.len().min(40)))
}

/// The token endpoint's.
pub fn oauth(input: &[u8]) -> u64 {
    let (status, headers, body) = answer(input);
    match fcm::fuzzing::read_grant(status.as_u16(), headers, body.to_vec(), NOW) {
        Ok((token, life)) => {
            assert_eq!(status, StatusCode::OK);
            assert!(!token.is_empty() && token.len() <= body.len());
            assert!((Duration::from_secs(1)..=DAY).contains(&life));
            shape(&("granted", life.as_secs().ilog2()))
        }
        Err(outcome) => {
            if let SendOutcome::RetryLater { cause, .. } = &outcome {
                assert!(matches!(cause, RetryCause::Throttled | RetryCause::ServerError));
            }
            shape(&check(&outcome))
        }
    }
}
