//! One connection: how many requests it takes, whether it moves, when it has to go.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{Ping, PingPong};
use tokio::time::Instant;

use super::connect::{Connect, ConnectError, Io};
use super::gather::{GatherIo, Gathering, Gauge, Progress, gather};

/// A connection whose bytes do not move for so long gets nothing more: what enters it can no longer be held back.
pub(super) const STALL_AFTER: Duration = Duration::from_millis(500);
/// Requests are out and nothing was read for so long: ask the peer for a sign of life.
const PROBE_AFTER: Duration = Duration::from_millis(300);
/// Peers count PINGs as abuse when they come too often.
const PROBE_EVERY: Duration = Duration::from_secs(1);
/// A PING unanswered for so long ends the connection.
const DEAD_AFTER: Duration = Duration::from_secs(10);
/// How long an ended connection may take to say goodbye.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// After it refused a stream, a connection is left alone for so long.
const SHY_FOR: Duration = Duration::from_millis(100);

/// How long bytes that wait for the transport are given to leave once a "no" touches one of them. What makes up the promised
/// second with it: a shared deny feed goes untrusted after 600 ms, and it is looked at every 50 ms.
const RECALL_AFTER: Duration = Duration::from_millis(200);

/// The most body bytes that wait in h2 for the peer's window.
const HELD_BACK_LIMIT: u64 = 64 * 1024;

type Connection = h2::client::Connection<GatherIo<Io>, Bytes>;

/// A connection whose preface is on its way.
pub(super) struct Opened {
    sender: SendRequest<Bytes>,
    gathering: Gathering<Io, Connection>,
    gauge: Gauge<Io>,
    ping: Option<PingPong>,
}

pub(super) async fn open(connector: Arc<dyn Connect>) -> Result<Opened, ConnectError> {
    let (io, gauge) = gather(connector.connect().await?);
    let (sender, mut connection) = h2::client::Builder::new()
        .enable_push(false)
        // No request before the server's SETTINGS: only then is its limit known, and that it took our certificate.
        .initial_max_send_streams(0)
        // Our own resets after a timeout are no attack of the peer.
        .max_local_error_reset_streams(None)
        .max_concurrent_reset_streams(1024)
        .reset_stream_duration(Duration::from_secs(60))
        .handshake::<_, Bytes>(io)
        .await
        .map_err(ConnectError::Handshake)?;
    let ping = connection.ping_pong();
    let gathering = Gathering::new(connection, &gauge);
    Ok(Opened { sender, gathering, gauge, ping })
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum State {
    /// Waits for the server's SETTINGS.
    Settling,
    Open,
    /// Takes nothing more; its requests may still be answered.
    Draining,
    /// The connection is gone; its requests have their errors.
    Ended,
}

pub(super) struct Link {
    pub(super) state: State,
    pub(super) in_flight: usize,
    /// The peer's present limit, within ours.
    pub(super) limit: usize,
    /// A credential was accepted here, or none needs to be.
    pub(super) is_proven: bool,
    /// An answer came.
    pub(super) has_answered: bool,
    /// The credential when it was opened.
    pub(super) generation: u32,
    pub(super) opened_at: Instant,
    pub(super) is_stalled: bool,
    shy_until: Instant,
    used_at: Instant,
    sender: Option<SendRequest<Bytes>>,
    gathering: Option<Gathering<Io, Connection>>,
    gauge: Gauge<Io>,
    ping: Option<PingPong>,
    ping_sent_at: Option<Instant>,
    ping_last_at: Instant,
    progress: Progress,
    read_at: Instant,
    written_at: Instant,
    /// Body bytes given to h2, but for those of requests that ended before they left.
    body_bytes: u64,
    /// How far they have come, when last looked at.
    bodies: Progress,
    /// Since when one of those that wait for the transport is not to leave any more.
    recalled_at: Option<Instant>,
    closing_at: Option<Instant>,
}

/// How far a body has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Whereabouts {
    /// In h2, which forgets it when its stream is reset.
    Held,
    /// Perhaps among the bytes that wait for the transport, which only leave together.
    Gathered,
    /// With the kernel, or beyond it.
    Left,
}

/// What a look at the clock asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Care {
    Nothing,
    /// It moved, or was asked to: poll it.
    Poll,
    /// No sign of life.
    Dead,
    /// Nobody needs it.
    Idle,
    /// It did not get ready in time.
    Late,
}

impl Link {
    pub(super) fn new(opened: Opened, generation: u32, is_proven: bool, now: Instant) -> Self {
        Self {
            state: State::Settling,
            in_flight: 0,
            limit: 0,
            is_proven,
            has_answered: false,
            generation,
            opened_at: now,
            is_stalled: false,
            shy_until: now,
            used_at: now,
            sender: Some(opened.sender),
            gathering: Some(opened.gathering),
            progress: opened.gauge.progress(),
            gauge: opened.gauge,
            ping: opened.ping,
            ping_sent_at: None,
            ping_last_at: now,
            read_at: now,
            written_at: now,
            body_bytes: 0,
            bodies: Progress::default(),
            recalled_at: None,
            closing_at: None,
        }
    }

    /// Whether it may be given requests, now or when others are answered.
    pub(super) fn is_usable(&self) -> bool {
        self.state == State::Open && !self.is_stalled && self.limit > 0
    }

    /// Requests it takes in all.
    pub(super) fn capacity(&self) -> usize {
        match (self.is_usable(), self.is_proven) {
            (false, _) => 0,
            (true, false) => 1,
            (true, true) => self.limit,
        }
    }

    /// Requests it takes now. None while h2 holds back bodies, for want of the peer's window, nor while the transport takes
    /// less than it was given: what is queued with us can be held back without a loss.
    pub(super) fn free(&self, now: Instant) -> usize {
        let is_clogged = self.body_bytes.saturating_sub(self.bodies.data_bytes) >= HELD_BACK_LIMIT;
        if is_clogged || self.bodies.waiting || self.shy_until > now {
            0
        } else {
            self.capacity().saturating_sub(self.in_flight)
        }
    }

    /// A request with so long a body is on its way. Returns where its body ends in the connection's sequence.
    pub(super) fn took(&mut self, body_len: usize) -> u64 {
        self.in_flight += 1;
        self.body_bytes += body_len as u64;
        self.body_bytes
    }

    /// A request is over; its body was `body_len` long and ended at `body_end`.
    pub(super) fn gave_back(&mut self, body_len: usize, body_end: u64) {
        self.in_flight -= 1;
        self.look_at_bodies();
        if self.in_flight == 0 {
            self.body_bytes = self.bodies.data_bytes;
        } else if body_end > self.bodies.data_bytes {
            // Reset or refused before it left: the rest of it never will.
            let rest = (body_len as u64).min(body_end - self.bodies.data_bytes);
            self.body_bytes = self.body_bytes.saturating_sub(rest).max(self.bodies.data_bytes);
        }
        self.release();
    }

    fn look_at_bodies(&mut self) {
        self.bodies = self.gauge.progress();
        if !self.bodies.waiting {
            self.recalled_at = None;
        }
    }

    /// Where a body that ends there is, as far as that is known: bodies leave in the order in which they came.
    pub(super) fn whereabouts(&self, body_end: u64) -> Whereabouts {
        if body_end <= self.bodies.data_bytes_left {
            Whereabouts::Left
        } else if self.bodies.waiting {
            Whereabouts::Gathered
        } else {
            Whereabouts::Held
        }
    }

    /// Something [`Whereabouts::Gathered`] is not to leave any more. True once it had time to leave all the same.
    pub(super) fn is_to_be_cut(&mut self, now: Instant) -> bool {
        now >= *self.recalled_at.get_or_insert(now) + RECALL_AFTER
    }

    /// Drives it. Ready with the reason once it is over.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, max_streams: usize) -> Poll<Box<str>> {
        let Some(gathering) = &mut self.gathering else { return Poll::Pending };
        if let Poll::Ready(result) = gathering.poll(cx) {
            let why = match result {
                // After a GOAWAY without an error only this handle still knows what the peer said.
                Ok(()) => match self.poll_ready(cx) {
                    Poll::Ready(Err(said)) => said,
                    Poll::Ready(Ok(())) | Poll::Pending => Box::from("closed by the peer"),
                },
                Err(error) => text_of(&error),
            };
            self.end();
            return Poll::Ready(why);
        }
        if let Some(ping) = &mut self.ping
            && self.ping_sent_at.is_some()
            && ping.poll_pong(cx).is_ready()
        {
            self.ping_sent_at = None;
            self.is_stalled = false;
        }
        self.look_at_bodies();
        if let Some(sender) = &self.sender {
            self.limit = sender.current_max_send_streams().min(max_streams);
            if self.state == State::Settling && self.limit > 0 {
                self.state = State::Open;
            }
        }
        Poll::Pending
    }

    /// Whether h2 takes a request at once. An error means that it never will again.
    pub(super) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Box<str>>> {
        match &mut self.sender {
            Some(sender) => sender.poll_ready(cx).map_err(|error| text_of(&error)),
            None => Poll::Ready(Err("closed".into())),
        }
    }

    /// To be called only after [`Link::poll_ready`] was fine.
    pub(super) fn sender(&mut self, now: Instant) -> Option<&mut SendRequest<Bytes>> {
        if self.in_flight == 0 {
            // Whatever was silent until now was silent for want of requests.
            (self.read_at, self.written_at) = (now, now);
        }
        self.used_at = now;
        self.sender.as_mut()
    }

    pub(super) fn refused_a_stream(&mut self, now: Instant) {
        self.shy_until = now + SHY_FOR;
    }

    /// Takes nothing more; ends by itself once its last request is answered.
    pub(super) fn retire(&mut self) {
        if self.state != State::Ended {
            self.state = State::Draining;
        }
        self.release();
    }

    /// Lets h2 close a connection that nobody waits for.
    pub(super) fn release(&mut self) {
        if self.state == State::Draining && self.in_flight == 0 {
            self.sender = None;
        }
    }

    /// Cuts it. Its requests get errors at once.
    pub(super) fn end(&mut self) {
        self.state = State::Ended;
        self.sender = None;
        self.ping = None;
        self.gathering = None;
    }

    /// A regular look, so that silence is noticed.
    pub(super) fn care(&mut self, now: Instant, settings: &super::Settings) -> Care {
        let progress = self.gauge.progress();
        if progress.bytes_read != self.progress.bytes_read {
            self.read_at = now;
            self.is_stalled = false;
        }
        let waits = progress.waiting || self.body_bytes > progress.data_bytes;
        if progress.bytes_written != self.progress.bytes_written || !waits {
            self.written_at = now;
        }
        self.progress = progress;
        match self.state {
            State::Ended => return Care::Nothing,
            State::Settling if now >= self.opened_at + settings.connect_timeout => return Care::Late,
            State::Draining if self.in_flight == 0 => {
                let since = *self.closing_at.get_or_insert(now);
                return if now >= since + CLOSE_TIMEOUT { Care::Dead } else { Care::Nothing };
            }
            State::Settling | State::Draining | State::Open => {}
        }
        let is_write_stalled = waits && now >= self.written_at + STALL_AFTER;
        let is_mute = self.ping_sent_at.is_some_and(|at| now >= at + STALL_AFTER && self.read_at < at);
        self.is_stalled = is_write_stalled || is_mute;
        if let Some(at) = self.ping_sent_at {
            return if now >= at + DEAD_AFTER && self.read_at < at { Care::Dead } else { Care::Nothing };
        }
        if self.state == State::Open && self.in_flight == 0 && now >= self.used_at + settings.idle_after {
            return Care::Idle;
        }
        let silence = if self.in_flight > 0 { PROBE_AFTER } else { settings.keep_alive };
        if now >= self.read_at + silence && now >= self.ping_last_at + PROBE_EVERY.min(silence.max(PROBE_EVERY)) {
            return self.probe(now);
        }
        Care::Nothing
    }

    fn probe(&mut self, now: Instant) -> Care {
        if let Some(ping) = &mut self.ping
            && ping.send_ping(Ping::opaque()).is_ok()
        {
            (self.ping_sent_at, self.ping_last_at) = (Some(now), now);
            return Care::Poll;
        }
        Care::Nothing
    }
}

/// h2's own words, among them a GOAWAY's debug data, which holds the provider's reason; bounded, for logs and answers.
fn text_of(error: &h2::Error) -> Box<str> {
    let mut text = error.to_string();
    if text.len() > 200 {
        let end = (0..=200).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
    }
    text.into()
}
