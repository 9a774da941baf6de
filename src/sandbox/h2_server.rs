//! The HTTP/2 server that both fake providers share: accept loop over TLS, one task per connection, answers and faults.
//!
//! One task owns one connection and everything on it. A request is handled where it was read, synchronously, as soon as
//! its body is complete; only delays and slow bodies become futures. So the answers of all requests that arrived
//! together leave in one TLS write, and nothing of a connection needs a lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::Response;
use http::request::Parts;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::frame_io::{FrameIo, Wire};
use crate::runtime::{Instant, Runtime};

/// Of a request body only this much is read; the largest limit of a provider is 5 120 bytes.
pub(super) const MAX_BODY_BYTES: usize = 64 * 1024;

/// Connections open at once per listener; one more is closed at once.
const MAX_CONNECTIONS: u64 = 4096;

/// Streams that are never answered and kept open on one connection; one more is reset.
const MAX_PARKED: usize = 10_000;

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long after the last answer a connection that said GOAWAY waits for the client to hang up.
const GOAWAY_LINGER: Duration = Duration::from_secs(1);

/// How long a connection that stands still is kept.
const FROZEN_FOR: Duration = Duration::from_secs(10 * 60);

/// How long a connection that is cut after its GOAWAY stays, so that the frame is read before the socket dies.
const CUT_LINGER: Duration = Duration::from_millis(20);

/// One provider's side of every connection to it.
pub(super) trait Service: Send + Sync + 'static {
    /// What the provider knows about one connection.
    type Peer: Send + 'static;

    fn peer(&self, connection: u64, client_certificate: Option<&[u8]>) -> Self::Peer;

    /// The concurrency the first SETTINGS frame allows.
    fn initial_streams(&self, peer: &Self::Peer) -> u32;

    /// `ordinal` counts the streams of the connection from 1; `body` is at most [`MAX_BODY_BYTES`] long.
    fn answer(&self, peer: &mut Self::Peer, ordinal: u64, head: &Parts, body: Bytes) -> Reply;
}

/// What to do with one request.
pub(super) struct Reply {
    /// Before the verdict is carried out.
    pub delay: Duration,
    /// A new limit of concurrent streams, announced and enforced from now on.
    pub max_streams: Option<u32>,
    pub goaway: Option<Goaway>,
    pub verdict: Verdict,
}

pub(super) enum Verdict {
    Respond(Response<Bytes>),
    /// RST_STREAM with this code.
    Reset(u32),
    /// Never answer.
    Stall,
    /// Cut the connection now.
    Close,
    /// Neither read nor write on this connection any more.
    Freeze,
    /// Write what is no frame.
    InvalidFrames,
}

pub(super) struct Goaway {
    /// This stream and later ones are above last-stream-id: surely not processed. Otherwise they are still answered.
    pub refuse: bool,
    /// Cut the connection right after the frame.
    pub close: bool,
    pub debug: Bytes,
}

impl Reply {
    pub(super) fn now(verdict: Verdict) -> Self {
        Self { delay: Duration::ZERO, max_streams: None, goaway: None, verdict }
    }
}

/// Counters of one listener.
#[derive(Default)]
pub(super) struct Counters {
    pub opened: AtomicU64,
    pub open: AtomicU64,
    /// Streams refused because they were more than the limit then in force.
    pub refused_streams: AtomicU64,
}

/// Counts a connection as open for as long as it lives, panics included.
struct Open(Arc<Counters>);

impl Open {
    fn new(counters: &Arc<Counters>) -> Self {
        counters.open.fetch_add(1, Ordering::Relaxed);
        counters.opened.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(counters))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One provider, whatever its connections come over.
pub(super) struct Host<S> {
    pub runtime: Runtime,
    pub service: Arc<S>,
    pub counters: Arc<Counters>,
    /// Numbers connections across listeners.
    pub next_connection: Arc<AtomicU64>,
    /// The most streams a connection can ever be allowed.
    pub max_streams: u32,
}

/// A listener with what its accept loop needs.
pub(super) struct Server<S> {
    pub host: Host<S>,
    pub tls: TlsAcceptor,
    pub tracker: TaskTracker,
    pub cancel: CancellationToken,
}

impl<S: Service> Server<S> {
    /// Accepts until cancelled. Cancelling ends its connections as well, wherever they are.
    pub(super) async fn run(self, listener: TcpListener) {
        let server = Arc::new(self);
        let Host { runtime, counters, .. } = &server.host;
        loop {
            let accepted = tokio::select! {
                biased;
                () = server.cancel.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let Ok((tcp, _)) = accepted else {
                // Out of file descriptors, most likely: accepting again at once would spin.
                runtime.sleep(Duration::from_millis(50)).await;
                continue;
            };
            if counters.open.load(Ordering::Relaxed) >= MAX_CONNECTIONS {
                continue;
            }
            let task = Arc::clone(&server).connection(tcp, Open::new(counters));
            runtime.spawn(server.tracker.track_future(task));
        }
    }

    async fn connection(self: Arc<Self>, tcp: TcpStream, _open: Open) {
        let cancel = self.cancel.clone();
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            () = self.converse(tcp) => {}
        }
    }

    async fn converse(&self, tcp: TcpStream) {
        // Answers are gathered here already; Nagle would only add the peer's delayed ACK.
        let _ = tcp.set_nodelay(true);
        let Some(Ok(tls)) = self.host.runtime.timeout(HANDSHAKE_TIMEOUT, self.tls.accept(tcp)).await else {
            return;
        };
        if tls.get_ref().1.alpn_protocol() != Some(b"h2") {
            return;
        }
        let certificate = tls.get_ref().1.peer_certificates().and_then(|chain| chain.first()).cloned();
        self.host.converse(tls, certificate.as_ref().map(AsRef::as_ref)).await;
    }
}

impl<S: Service> Host<S> {
    /// A connection over a byte stream that nobody else watches, to its end.
    pub(super) async fn serve<T: AsyncRead + AsyncWrite + Unpin + Send>(&self, io: T) {
        let _open = Open::new(&self.counters);
        self.converse(io, None).await;
    }

    async fn converse<T: AsyncRead + AsyncWrite + Unpin + Send>(&self, io: T, certificate: Option<&[u8]>) {
        let id = self.next_connection.fetch_add(1, Ordering::Relaxed) + 1;
        let peer = self.service.peer(id, certificate);
        let limit = self.service.initial_streams(&peer);
        let wire = Wire::new(limit);
        let handshake = h2::server::Builder::new()
            // Our own limit is enforced below; h2's is only the ceiling of what it may ever become.
            .max_concurrent_streams(self.max_streams.saturating_mul(2))
            .initial_window_size(256 * 1024)
            .initial_connection_window_size(16 * 1024 * 1024)
            .max_header_list_size(16 * 1024)
            // A sender that gives up on many streams at once is being tested, not attacking.
            .max_concurrent_reset_streams(10_000)
            .max_pending_accept_reset_streams(10_000)
            .handshake(FrameIo::new(io, Arc::clone(&wire)));
        let Some(Ok(h2)) = self.runtime.timeout(HANDSHAKE_TIMEOUT, handshake).await else {
            return;
        };
        let mut driver = Driver {
            runtime: &self.runtime,
            service: &*self.service,
            counters: &self.counters,
            peer,
            h2,
            wire,
            arrived: Vec::new(),
            waiting: FuturesUnordered::new(),
            parked: Vec::new(),
            beyond: Vec::new(),
            limit,
            settings_due: false,
            ordinal: 0,
            highest_handled: 0,
            highest_seen: 0,
            last_stream: None,
            end_at: None,
            closed: false,
        };
        loop {
            let end_at = driver.end_at;
            tokio::select! {
                biased;
                ended = std::future::poll_fn(|cx| driver.poll(cx)) => if ended { return },
                () = self.runtime.sleep_until(end_at.unwrap_or_else(|| self.runtime.instant())), if end_at.is_some() => return,
            }
        }
    }
}

struct Incoming {
    ordinal: u64,
    head: Parts,
    body: RecvStream,
    bytes: BytesMut,
    respond: SendResponse<Bytes>,
}

enum Event {
    /// The body is complete.
    Complete(Box<Incoming>),
    /// The client gave the stream up.
    Gone,
    /// The delay is over.
    Due(SendResponse<Bytes>, Verdict),
}

/// One connection. Generic over the transport only so that `h2`'s type can be named.
struct Driver<'a, S: Service, T> {
    runtime: &'a Runtime,
    service: &'a S,
    counters: &'a Counters,
    peer: S::Peer,
    h2: h2::server::Connection<FrameIo<T>, Bytes>,
    wire: Arc<Wire>,
    arrived: Vec<Incoming>,
    waiting: FuturesUnordered<BoxFuture<'static, Event>>,
    /// Streams that are never answered.
    parked: Vec<SendResponse<Bytes>>,
    /// Streams above a GOAWAY's last-stream-id, or of a connection that is done for; kept because dropping them would send
    /// a reset.
    beyond: Vec<SendResponse<Bytes>>,
    limit: u32,
    settings_due: bool,
    ordinal: u64,
    highest_handled: u32,
    highest_seen: u32,
    last_stream: Option<u32>,
    end_at: Option<Instant>,
    closed: bool,
}

impl<S: Service, T: AsyncRead + AsyncWrite + Unpin> Driver<'_, S, T> {
    /// Ready with true when the connection is over, with false when `end_at` was set and has to be looked at.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let end_at = self.end_at;
        loop {
            let mut progress = false;
            loop {
                match self.h2.poll_accept(cx) {
                    Poll::Ready(Some(Ok((request, respond)))) => {
                        self.arrive(cx, request.into_parts(), respond);
                        progress = true;
                    }
                    Poll::Ready(Some(Err(_)) | None) => return Poll::Ready(true),
                    Poll::Pending => break,
                }
            }
            for incoming in std::mem::take(&mut self.arrived) {
                self.collect(cx, incoming);
                progress = true;
            }
            while let Poll::Ready(Some(event)) = self.waiting.poll_next_unpin(cx) {
                match event {
                    Event::Complete(incoming) => self.handle(*incoming),
                    Event::Gone => {}
                    Event::Due(respond, verdict) => self.carry_out(respond, verdict),
                }
                progress = true;
            }
            if self.closed {
                return Poll::Ready(true);
            }
            // Refused by h2 while the peer has not acknowledged the last one: its acknowledgement brings us back here.
            if self.settings_due && self.h2.enable_connect_protocol().is_ok() {
                self.settings_due = false;
                progress = true;
            }
            if progress {
                continue;
            }
            if self.last_stream.is_some() && self.end_at.is_none() && self.waiting.is_empty() && self.parked.is_empty()
            {
                self.end_at = Some(self.runtime.instant() + GOAWAY_LINGER);
            }
            return if self.end_at == end_at { Poll::Pending } else { Poll::Ready(false) };
        }
    }

    fn arrive(&mut self, cx: &mut Context<'_>, (head, body): (Parts, RecvStream), mut respond: SendResponse<Bytes>) {
        let id = respond.stream_id().as_u32();
        self.highest_seen = self.highest_seen.max(id);
        if self.last_stream.is_some_and(|last| id > last) {
            self.beyond.push(respond);
            self.beyond.truncate(MAX_PARKED);
            return;
        }
        let limit = usize::try_from(self.limit).unwrap_or(usize::MAX);
        if self.in_flight() >= limit {
            self.parked.retain_mut(|parked| parked.poll_reset(cx).is_pending());
        }
        if self.in_flight() >= limit {
            self.counters.refused_streams.fetch_add(1, Ordering::Relaxed);
            respond.send_reset(Reason::REFUSED_STREAM);
            return;
        }
        self.ordinal += 1;
        self.arrived.push(Incoming { ordinal: self.ordinal, head, body, bytes: BytesMut::new(), respond });
    }

    fn in_flight(&self) -> usize {
        self.arrived.len() + self.waiting.len() + self.parked.len()
    }

    /// Handles the request now when its body is here already, which it is unless the client is slow.
    fn collect(&mut self, cx: &mut Context<'_>, mut incoming: Incoming) {
        match poll_body(cx, &mut incoming) {
            Poll::Ready(true) => self.handle(incoming),
            Poll::Ready(false) => {}
            Poll::Pending => self.waiting.push(Box::pin(async move {
                let mut incoming = Box::new(incoming);
                if std::future::poll_fn(|cx| poll_body(cx, &mut incoming)).await {
                    Event::Complete(incoming)
                } else {
                    Event::Gone
                }
            })),
        }
    }

    fn handle(&mut self, incoming: Incoming) {
        let Incoming { ordinal, head, bytes, respond, .. } = incoming;
        let id = respond.stream_id().as_u32();
        if self.last_stream.is_some_and(|last| id > last) {
            // It arrived together with the stream that made us say GOAWAY.
            self.beyond.push(respond);
            return;
        }
        let Reply { delay, max_streams, goaway, verdict } =
            self.service.answer(&mut self.peer, ordinal, &head, bytes.freeze());
        if let Some(streams) = max_streams
            && streams != self.limit
        {
            self.limit = streams;
            self.wire.set_max_streams(streams);
            self.settings_due = true;
        }
        if let Some(goaway) = goaway {
            if goaway.close {
                self.end_at = Some(self.runtime.instant() + CUT_LINGER);
            }
            if goaway.refuse {
                // A later stream may have been handled before this one; then only a reset says the truth about this one.
                let last = self.highest_handled.max(id.saturating_sub(2));
                self.say_goaway(last, &goaway.debug);
                if id > last {
                    self.beyond.push(respond);
                } else {
                    self.carry_out(respond, Verdict::Reset(Reason::REFUSED_STREAM.into()));
                }
                return;
            }
            self.say_goaway(self.highest_seen, &goaway.debug);
            if goaway.close {
                self.beyond.push(respond);
                return;
            }
        }
        self.highest_handled = self.highest_handled.max(id);
        if delay.is_zero() {
            self.carry_out(respond, verdict);
        } else {
            let runtime = self.runtime.clone();
            self.waiting.push(Box::pin(async move {
                runtime.sleep(delay).await;
                Event::Due(respond, verdict)
            }));
        }
    }

    fn say_goaway(&mut self, last_stream: u32, debug: &[u8]) {
        self.last_stream = Some(self.last_stream.map_or(last_stream, |last| last.min(last_stream)));
        self.wire.send_goaway(last_stream, debug);
    }

    fn carry_out(&mut self, mut respond: SendResponse<Bytes>, verdict: Verdict) {
        match verdict {
            Verdict::Respond(response) => {
                let (head, body) = response.into_parts();
                // Failing means the client reset the stream or is gone: there is nobody left to answer.
                if let Ok(mut stream) = respond.send_response(Response::from_parts(head, ()), body.is_empty())
                    && !body.is_empty()
                {
                    let _ = stream.send_data(body, true);
                }
            }
            Verdict::Reset(code) => respond.send_reset(code.into()),
            Verdict::Stall if self.parked.len() < MAX_PARKED => self.parked.push(respond),
            Verdict::Stall => respond.send_reset(Reason::ENHANCE_YOUR_CALM),
            Verdict::Close => self.closed = true,
            Verdict::Freeze => {
                self.wire.freeze();
                self.end_at = Some(self.runtime.instant() + FROZEN_FOR);
                self.beyond.push(respond);
            }
            Verdict::InvalidFrames => {
                self.wire.send_invalid();
                self.beyond.push(respond);
            }
        }
    }
}

/// Ready with true when the body is complete (or longer than we read), with false when the client gave up.
fn poll_body(cx: &mut Context<'_>, incoming: &mut Incoming) -> Poll<bool> {
    loop {
        if incoming.body.is_end_stream() || incoming.bytes.len() > MAX_BODY_BYTES {
            return Poll::Ready(true);
        }
        match incoming.body.poll_data(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(None) => return Poll::Ready(true),
            Poll::Ready(Some(Err(_))) => return Poll::Ready(false),
            Poll::Ready(Some(Ok(data))) => {
                let _ = incoming.body.flow_control().release_capacity(data.len());
                incoming.bytes.extend_from_slice(&data);
            }
        }
    }
}
