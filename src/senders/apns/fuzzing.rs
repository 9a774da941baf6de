//! What Apple's files and answers are read by, and what is sent, for [`crate::fuzzing`].

use std::time::Duration;

use http::{HeaderMap, StatusCode};

use super::auth::ProviderTokens;
use super::{classify, wire};
use crate::domain::sending::{SendOptions, SendOutcome};
use crate::domain::time::UnixMs;
use crate::senders::http2::wire::Answer;
use crate::senders::{EncodeError, Inspection, Message, Secret};

/// The outcome, and what else follows, in a word.
#[must_use]
pub fn classify(status: StatusCode, headers: &HeaderMap, body: &[u8], now: UnixMs) -> (SendOutcome, String) {
    let verdict = classify::classify(&Answer { status, headers, body }, now);
    (verdict.outcome, format!("{:?} {}", verdict.then, verdict.credential_accepted))
}

#[must_use]
pub fn retry_after(headers: &HeaderMap, now: UnixMs) -> Option<Duration> {
    crate::senders::http2::wire::retry_after(headers, now)
}

/// The `authorization` header that a `.p8` file makes.
#[must_use]
pub fn provider_token(p8_pem: &Secret, now: UnixMs) -> Option<Vec<u8>> {
    let tokens = ProviderTokens::new(p8_pem, "ABC123DEFG", "DEF123GHIJ")?;
    Some(tokens.header(now).0.as_bytes().to_vec())
}

pub fn push(bundle: &str, message: &Message, options: &SendOptions) -> Result<Inspection, EncodeError> {
    wire::prepare(bundle, message, options, true).map(|prepared| wire::inspect(&prepared))
}
