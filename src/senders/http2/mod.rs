//! Many small requests over few HTTP/2 connections, for providers that take one push per request.
//!
//! One [`Driver`] serves one credential on one endpoint. It is a single task on a sending thread that owns everything:
//! its queues, its connections, its requests in flight. Each turn it polls the connections that were woken, settles the
//! requests they answered, hands over as many queued targets as there are free streams, and lets the connections write
//! all of it at once ([`gather`]). There is no task, no channel and no boxed future per push, and nothing to wake
//! across threads but the arrival of a batch.
//!
//! What it guarantees:
//! - Every target of an accepted batch gets exactly one outcome, also when a turn panics or the driver is dropped.
//! - A target is handed to h2 only with a free stream of the peer's current limit, after the deny feed, the age of its
//!   gate and its deadline were looked at, in the same call. What is queued is still ours to hold back.
//! - A target is sent again by itself only when the peer said that it was not processed (REFUSED_STREAM, a stream above
//!   a GOAWAY's last id) or that the credential was stale, at most [`MAX_RESENDS`] times.
//! - [`Lane::Bulk`](crate::domain::platform::Lane) never takes more than three quarters of the streams.
//! - What was handed over and has not left this process (h2 holds it for want of the peer's window, or its bytes wait for
//!   the transport) is called back when a "no" touches it: the stream is reset, or, where bytes do not leave within
//!   200 ms, the connection is cut. Its outcome is in doubt, so that a retry asks the gate.
//!
//! What it does not: bytes that the kernel took cannot be called back. They are at most what it holds unsent (64 KiB, and
//! the write that went beyond) and what is on its way. Nothing is handed to a connection while bytes wait for it, nor to
//! one that gives no sign of life for 500 ms.

pub(super) mod connect;
mod driver;
mod exchange;
pub(super) mod gather;
mod lanes;
mod link;
mod pool;
mod slots;
mod supervise;
#[cfg(test)]
mod tests;
mod thread;
pub(super) mod tls;
mod wake;
pub(super) mod wire;

use std::time::Duration;

pub use connect::{Connect, ConnectError, ConnectFuture, Endpoint, EndpointError, Io};
pub(super) use driver::Parts;
pub use gather::Transport;
pub(super) use supervise::Driver;
pub use thread::SendingThreads;
pub use tls::TlsError;

/// How often a target that was surely not processed is sent again before its failure is reported.
pub const MAX_RESENDS: u8 = 3;

/// The most of an answer's body that is read; providers' answers are below 2 KiB.
pub const MAX_ANSWER_BYTES: usize = 16 * 1024;

/// How a driver uses its connections. The defaults fit both providers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Connections to one endpoint with one credential, at least 1, at most 16. More are opened only when the ones
    /// there are busy and the sending thread is not.
    pub max_connections: usize,
    /// Requests in flight on one connection, where the peer allows more; at least 1. 100 to 400 cost the least CPU,
    /// 1 000 cost 25 to 50 % more, and help only when the provider takes long to answer.
    pub max_streams: usize,
    /// Targets queued and not handed over; a batch beyond is given back.
    pub max_queued_targets: usize,
    /// From hand-over to the end of the answer. FCM's own limit is 10 s.
    pub request_timeout: Duration,
    /// Look-up, TCP, TLS and the server's first frame.
    pub connect_timeout: Duration,
    /// The longest a target waits while there is no usable connection.
    pub queue_patience: Duration,
    /// A connection without a request for so long is closed.
    pub idle_after: Duration,
    /// A connection of this age is replaced: addresses change, and providers grow tired of old ones.
    pub max_age: Duration,
    /// An idle connection is asked for a sign of life so often.
    pub keep_alive: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            max_connections: 4,
            max_streams: 400,
            max_queued_targets: 20_000,
            request_timeout: Duration::from_secs(15),
            connect_timeout: Duration::from_secs(10),
            queue_patience: Duration::from_secs(5),
            idle_after: Duration::from_secs(15 * 60),
            max_age: Duration::from_secs(6 * 3600),
            keep_alive: Duration::from_secs(60),
        }
    }
}

impl Settings {
    /// The same, with every value in its range.
    fn clamped(mut self) -> Self {
        self.max_connections = self.max_connections.clamp(1, 16);
        self.max_streams = self.max_streams.max(1);
        self
    }
}
