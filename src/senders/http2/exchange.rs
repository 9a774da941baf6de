//! One request in flight, from its hand-over to the end of its answer.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use h2::client::ResponseFuture;
use h2::{Reason, RecvStream};
use http::StatusCode;
use http::header::HeaderMap;
use tokio::time::Instant;

use super::MAX_ANSWER_BYTES;
use super::lanes::Pick;
use crate::domain::platform::Lane;
use crate::planted;

pub(super) struct Exchange {
    pub(super) pick: Pick,
    pub(super) lane: Lane,
    pub(super) link: usize,
    /// Of the credential it carried.
    pub(super) generation: u32,
    pub(super) deadline: Instant,
    pub(super) body_len: usize,
    /// Where its body ends in the connection's sequence of bodies.
    pub(super) body_end: u64,
    pub(super) stage: Stage,
}

pub(super) enum Stage {
    Head(ResponseFuture),
    Body { head: Head, body: RecvStream, read: Body },
}

pub(super) struct Head {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
}

/// Most answers are one frame and need no copy.
#[derive(Default)]
pub(super) struct Body {
    first: Bytes,
    more: BytesMut,
}

impl Body {
    fn len(&self) -> usize {
        self.first.len().max(self.more.len())
    }

    fn push(&mut self, data: Bytes) {
        if self.len() == 0 {
            self.first = data;
            self.first.truncate(MAX_ANSWER_BYTES);
            return;
        }
        if self.more.is_empty() {
            self.more.extend_from_slice(&self.first);
        }
        let room = MAX_ANSWER_BYTES.saturating_sub(self.more.len());
        self.more.extend_from_slice(&data[..data.len().min(room)]);
    }

    pub(super) fn bytes(&self) -> &[u8] {
        if self.more.is_empty() { &self.first } else { &self.more }
    }
}

pub(super) enum End {
    /// What was read of the answer; the status counts even when the body broke off.
    Answer(Head, Body),
    Failed(h2::Error),
}

/// What a failure without an answer means for the request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Failure {
    /// The peer refused the stream: surely not processed.
    Refused,
    /// The stream was above the GOAWAY's last id: surely not processed.
    GoneAway,
    /// It may have been processed.
    Unknown(Box<str>),
}

impl Failure {
    /// RFC 9113 sections 6.8 and 8.7. h2 reports a remote GOAWAY only to the streams above its last id; the others end
    /// with an answer or with the connection's own error.
    pub(super) fn of(error: &h2::Error) -> Self {
        if error.is_remote() && error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM) {
            return Self::Refused;
        }
        if planted::is("goaway-resends-what-is-in-doubt") && !error.is_reset() {
            return Self::GoneAway;
        }
        if error.is_remote() && error.is_go_away() {
            return Self::GoneAway;
        }
        Self::Unknown(match error.reason() {
            Some(reason) if error.is_reset() => format!("stream reset: {reason:?}").into(),
            Some(reason) => format!("connection ended: {reason:?}").into(),
            None => "connection lost".into(),
        })
    }
}

impl Exchange {
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        loop {
            match &mut self.stage {
                Stage::Head(response) => match ready!(Pin::new(response).poll(cx)) {
                    Ok(response) => {
                        let (parts, body) = response.into_parts();
                        let head = Head { status: parts.status, headers: parts.headers };
                        if body.is_end_stream() {
                            return Poll::Ready(End::Answer(head, Body::default()));
                        }
                        self.stage = Stage::Body { head, body, read: Body::default() };
                    }
                    Err(error) => return Poll::Ready(End::Failed(error)),
                },
                Stage::Body { head, body, read } => {
                    if let Some(Ok(data)) = ready!(body.poll_data(cx)) {
                        // A failure shows in the next poll of the same stream.
                        let _ = body.flow_control().release_capacity(data.len());
                        read.push(data);
                        if !body.is_end_stream() && read.len() < MAX_ANSWER_BYTES {
                            continue;
                        }
                    }
                    let headers = std::mem::take(&mut head.headers);
                    return Poll::Ready(End::Answer(Head { status: head.status, headers }, std::mem::take(read)));
                }
            }
        }
    }

    /// Its time is over: what is known by now. Dropping the rest resets the stream.
    pub(super) fn give_up(self) -> Option<End> {
        match self.stage {
            Stage::Head(_) => None,
            Stage::Body { head, read, .. } => Some(End::Answer(head, read)),
        }
    }
}
