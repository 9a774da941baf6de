//! What Google's answers are read by, and what is sent, for [`crate::fuzzing`].

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, StatusCode};

use super::auth::{self, TokenReply};
use super::{classify, wire};
use crate::domain::sending::{SendOptions, SendOutcome};
use crate::domain::time::UnixMs;
use crate::senders::http2::wire::Answer;
use crate::senders::{EXAMPLE_ID, EncodeError, Message};

/// The outcome, and what else follows, in a word.
#[must_use]
pub fn classify(status: StatusCode, headers: &HeaderMap, body: &[u8], now: UnixMs) -> (SendOutcome, String) {
    let verdict = classify::classify(&Answer { status, headers, body }, now);
    (verdict.outcome, format!("{:?} {}", verdict.then, verdict.credential_accepted))
}

/// The access token and how long it lasts, from the token endpoint's answer.
pub fn read_grant(
    status: u16,
    headers: HeaderMap,
    body: Vec<u8>,
    now: UnixMs,
) -> Result<(String, Duration), SendOutcome> {
    let grant = auth::read(&TokenReply { status, headers, body }, now).map_err(|refused| refused.outcome)?;
    Ok((grant.access_token, grant.life))
}

/// The request's body for one device.
pub fn push(message: &Message, options: &SendOptions, token: &str, ttl: Duration) -> Result<Bytes, EncodeError> {
    wire::prepare(message, options).map(|prepared| wire::fill(&prepared, token, EXAMPLE_ID, ttl))
}
