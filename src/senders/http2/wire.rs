//! What differs between providers that are spoken to over HTTP/2: the request, the credential, the meaning of an
//! answer. Queues, connections, deadlines and the deny check are the driver's.

use std::task::Context;
use std::time::Duration;

use bytes::Bytes;
use http::header::{HeaderMap, RETRY_AFTER};
use http::{Request, StatusCode};

use crate::domain::sending::{ProviderAnswer, RetryCause, SendOutcome};
use crate::domain::time::UnixMs;
use crate::planted;
use crate::senders::{Batch, SendTarget};

/// The longest retry hint that is believed.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(24 * 3600);

/// Whether requests can carry a credential now.
pub(in crate::senders) enum AuthState {
    Ready,
    /// Being fetched; the driver is woken when it is there. Bounded by the wire.
    Waiting,
    /// Not to be had for now: the answer for everything that is queued.
    Failed(SendOutcome),
}

/// An answer as it came, headers and at most [`super::MAX_ANSWER_BYTES`] of its body.
pub(in crate::senders) struct Answer<'a> {
    pub status: StatusCode,
    pub headers: &'a HeaderMap,
    pub body: &'a [u8],
}

/// What to do beside reporting the outcome.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::senders) enum Then {
    Keep,
    /// The connection takes no more requests.
    Retire,
    /// The credential was stale: send once more with a new one, over the same connections.
    Reauth,
    /// The same, over a new connection. The outcome is reported only when this was the second time.
    ReauthOnNewConnection,
}

#[derive(Clone, PartialEq, Debug)]
pub(in crate::senders) struct Verdict {
    pub outcome: SendOutcome,
    pub then: Then,
    /// The provider looked past the credential, so it is good on this connection.
    pub credential_accepted: bool,
}

/// One credential on one provider.
pub(in crate::senders) trait Wire: Send + 'static {
    /// Whether a connection's first request must be answered before others follow.
    fn first_request_alone(&self) -> bool;

    /// Called before requests are made. `now` is the wall clock.
    fn poll_auth(&mut self, now: UnixMs, cx: &mut Context<'_>) -> AuthState;

    /// Counts the credentials; [`Wire::credential_rejected`] is told which one a request carried.
    fn credential_generation(&self) -> u32;

    /// A request with the credential of `generation` was answered with [`Then::Reauth`] or its like.
    fn credential_rejected(&mut self, generation: u32, now: UnixMs);

    /// The request, its path absolute, and its body. An error is the target's outcome.
    fn request(&mut self, batch: &Batch, target: &SendTarget, now: UnixMs)
    -> Result<(Request<()>, Bytes), SendOutcome>;

    fn classify(&mut self, answer: &Answer<'_>, now: UnixMs) -> Verdict;
}

/// `Retry-After` as seconds or as an HTTP date.
pub(in crate::senders) fn retry_after(headers: &HeaderMap, now: UnixMs) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // What does not fit is long all the same.
        let secs = text.parse().unwrap_or(u64::MAX);
        return Some(Duration::from_secs(secs).min(MAX_RETRY_AFTER));
    }
    if planted::is("retry-after-date-as-seconds") {
        return text.split(' ').find_map(|word| word.parse().ok()).map(Duration::from_secs);
    }
    // `GMT` is the only zone HTTP dates have; jiff's parser wants it as an offset.
    let numeric = format!("{} +0000", text.strip_suffix("GMT")?.trim_end());
    let at = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(&numeric).ok()?;
    Some(UnixMs(at.as_millisecond()).since(now).min(MAX_RETRY_AFTER))
}

/// Outcomes of attempts that got no answer. No provider's words are involved, so they are the same for all.
pub(super) fn maybe_sent(why: &str) -> SendOutcome {
    SendOutcome::MaybeSent { answer: ProviderAnswer::new(0, why) }
}

pub(super) fn not_sent(why: &str) -> SendOutcome {
    SendOutcome::RetryLater { cause: RetryCause::Transport, after: None, answer: ProviderAnswer::new(0, why) }
}

pub(in crate::senders) fn unsendable(why: &str) -> SendOutcome {
    SendOutcome::Rejected { answer: ProviderAnswer::new(0, why) }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        // 2026-11-24T00:00:00Z.
        let now = UnixMs(1_795_478_400_000);
        let parse = |text: &'static str| {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_static(text))]);
            retry_after(&headers, now)
        };
        assert_eq!(parse("120"), Some(Duration::from_secs(120)));
        assert_eq!(parse("Tue, 24 Nov 2026 00:01:30 GMT"), Some(Duration::from_secs(90)));
        assert_eq!(parse("Mon, 23 Nov 2026 00:00:00 GMT"), Some(Duration::ZERO), "the past");
        assert_eq!(parse("99999999"), Some(MAX_RETRY_AFTER));
        assert_eq!(parse("99999999999999999999999"), Some(MAX_RETRY_AFTER), "no number of ours holds it");
        assert_eq!(parse("+5"), None);
        assert_eq!(parse("soon"), None);
        assert_eq!(parse("-1"), None);
        assert_eq!(retry_after(&HeaderMap::new(), now), None);
    }
}
