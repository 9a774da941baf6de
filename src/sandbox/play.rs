//! Faults carried out: what they do to the answer and what the record says of it.

use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, Response, StatusCode};

use super::faults::Action;
use super::h2_server::{Goaway, Reply, Verdict};
use super::record::Received;

/// The body of [`Action::Garbage`].
pub(super) const GARBAGE: &str =
    "<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head><body>upstream</body></html>";

/// How a platform words the answers to one push.
pub(super) trait Answers {
    fn success(&self) -> Response<Bytes>;

    /// `status` was checked when the fault was added. `timestamp` in milliseconds, for APNs' 410.
    fn failure(&self, status: u16, reason: Option<&str>, timestamp: Option<i64>) -> Response<Bytes>;

    fn goaway_debug(&self, reason: &str) -> String;
}

/// The reply that plays `action`; `received` is what the record will show of it.
pub(super) fn play(action: Action, received: &mut Received, answers: &impl Answers) -> Reply {
    let mut silent = |reason: &str, accepted: bool| {
        received.accepted = accepted;
        received.status = 0;
        received.reason = Some(reason.to_owned());
    };
    match action {
        Action::Status { status, reason, retry_after, body, timestamp } => {
            received.accepted = status == 200;
            received.status = status;
            let mut response = answers.failure(status, reason.as_deref(), timestamp);
            received.reason = reason;
            if let Some(body) = body {
                *response.body_mut() = body.into();
            }
            set_retry_after(&mut response, retry_after.as_deref());
            Reply::now(Verdict::Respond(response))
        }
        Action::Goaway { refuse, close, reason } => {
            if refuse || close {
                silent("goaway", !refuse);
            } else {
                received.reason = Some("goaway".to_owned());
            }
            let debug = reason.map(|reason| answers.goaway_debug(&reason)).unwrap_or_default();
            let goaway = Some(Goaway { refuse, close, debug: debug.into() });
            Reply { goaway, ..Reply::now(Verdict::Respond(answers.success())) }
        }
        Action::RefuseStream {} => {
            silent("refuse_stream", false);
            Reply::now(Verdict::Reset(h2::Reason::REFUSED_STREAM.into()))
        }
        Action::Reset { code } => {
            silent("reset", false);
            Reply::now(Verdict::Reset(code))
        }
        Action::AcceptThenDrop {} => {
            silent("accept_then_drop", true);
            Reply::now(Verdict::Reset(h2::Reason::INTERNAL_ERROR.into()))
        }
        Action::Stall {} => {
            silent("stall", false);
            Reply::now(Verdict::Stall)
        }
        Action::CloseConnection {} => {
            silent("close_connection", false);
            Reply::now(Verdict::Close)
        }
        Action::Freeze {} => {
            silent("freeze", false);
            Reply::now(Verdict::Freeze)
        }
        Action::InvalidFrames {} => {
            silent("invalid_frames", false);
            Reply::now(Verdict::InvalidFrames)
        }
        Action::Delay { ms } => {
            Reply { delay: Duration::from_millis(ms), ..Reply::now(Verdict::Respond(answers.success())) }
        }
        Action::MaxStreams { streams } => {
            Reply { max_streams: Some(streams), ..Reply::now(Verdict::Respond(answers.success())) }
        }
        Action::Garbage { status } => {
            received.accepted = status == 200;
            received.status = status;
            received.reason = Some("garbage".to_owned());
            let mut response = answers.success();
            *response.status_mut() = StatusCode::from_u16(status).expect("faults are checked when they are added");
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/html"));
            *response.body_mut() = Bytes::from_static(GARBAGE.as_bytes());
            Reply::now(Verdict::Respond(response))
        }
    }
}

pub(super) fn set_retry_after<B>(response: &mut Response<B>, retry_after: Option<&str>) {
    if let Some(value) = retry_after.and_then(|after| HeaderValue::from_str(after).ok()) {
        response.headers_mut().insert(RETRY_AFTER, value);
    }
}
