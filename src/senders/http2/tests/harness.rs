//! A wire that says little, and a server that speaks raw frames, so that tests decide what goes over the wire and when.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::domain::deny::DenyFeed;
use crate::domain::ids::{AppKey, DeviceId, NotificationId, RouteId, UserKey};
use crate::domain::platform::{DeviceToken, Environment, Lane, Platform, Route, RouteSpec};
use crate::domain::sending::{FaultScope, ProviderAnswer, RetryCause, SendOutcome};
use crate::domain::time::UnixMs;
use crate::runtime::Runtime;
use crate::senders::http2::connect::{Connect, ConnectError, ConnectFuture};
use crate::senders::http2::wire::{Answer, AuthState, Then, Verdict, Wire};
use crate::senders::http2::{Driver, Parts, SendingThreads, Settings};
use crate::senders::{Batch, Outcomes, SendTarget, Sink};

pub(super) const START: UnixMs = UnixMs(1_800_000_000_000);

/// The body is the target's user, so that the server sees who is meant.
#[derive(Default)]
pub(super) struct TestWire {
    pub(super) first_alone: bool,
    pub(super) generation: u32,
    /// The user whose request panics.
    pub(super) panics_at: Option<i64>,
    pub(super) padding: usize,
}

impl Wire for TestWire {
    fn first_request_alone(&self) -> bool {
        self.first_alone
    }

    fn poll_auth(&mut self, _now: UnixMs, _cx: &mut Context<'_>) -> AuthState {
        AuthState::Ready
    }

    fn credential_generation(&self) -> u32 {
        self.generation
    }

    fn credential_rejected(&mut self, generation: u32, _now: UnixMs) {
        if generation == self.generation {
            self.generation += 1;
        }
    }

    fn request(&mut self, _: &Batch, target: &SendTarget, _: UnixMs) -> Result<(Request<()>, Bytes), SendOutcome> {
        assert!(self.panics_at != Some(target.user.0), "as the test asked");
        let request = Request::builder().method(Method::POST).uri("https://provider.test/send").body(());
        let body = format!("{:0width$}", target.user.0, width = self.padding);
        Ok((request.expect("valid"), body.into()))
    }

    fn classify(&mut self, answer: &Answer<'_>, _now: UnixMs) -> Verdict {
        let said = ProviderAnswer::new(answer.status.as_u16(), "");
        let keep = |outcome| Verdict { outcome, then: Then::Keep, credential_accepted: true };
        match answer.status {
            StatusCode::OK => keep(SendOutcome::Sent { provider_id: None }),
            StatusCode::BAD_REQUEST => Verdict {
                outcome: SendOutcome::SenderBroken { scope: FaultScope::Credential, answer: said },
                then: Then::ReauthOnNewConnection,
                credential_accepted: false,
            },
            _ => keep(SendOutcome::RetryLater { cause: RetryCause::ServerError, after: None, answer: said }),
        }
    }
}

/// Gives the driver pipes and the test their other ends.
pub(super) struct Pipes {
    peers: mpsc::UnboundedSender<DuplexStream>,
    pub(super) attempts: AtomicUsize,
    /// Writes the driver made, over all connections.
    pub(super) writes: Arc<AtomicUsize>,
    /// The next attempts that fail.
    pub(super) failing: AtomicUsize,
    buffer: usize,
}

impl Connect for Pipes {
    fn connect(&self) -> ConnectFuture {
        self.attempts.fetch_add(1, Ordering::SeqCst);
        if self.failing.load(Ordering::SeqCst) > 0 {
            self.failing.fetch_sub(1, Ordering::SeqCst);
            return Box::pin(std::future::ready(Err(ConnectError::NoAddress { host: "provider.test".into() })));
        }
        let (ours, theirs) = tokio::io::duplex(self.buffer);
        let _ = self.peers.send(theirs);
        let counted = CountedWrites { inner: ours, writes: Arc::clone(&self.writes) };
        Box::pin(async move { Ok(Box::new(counted) as _) })
    }
}

struct CountedWrites {
    inner: DuplexStream,
    writes: Arc<AtomicUsize>,
}

impl AsyncRead for CountedWrites {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, into)
    }
}

impl AsyncWrite for CountedWrites {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<std::io::Result<usize>> {
        self.writes.fetch_add(1, Ordering::SeqCst);
        Pin::new(&mut self.inner).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// A driver on a simulated runtime, with everything around it.
pub(super) struct Bench {
    pub(super) runtime: Runtime,
    pub(super) deny: Arc<DenyFeed>,
    pub(super) driver: Driver,
    pub(super) threads: SendingThreads,
    pub(super) pipes: Arc<Pipes>,
    peers: mpsc::UnboundedReceiver<DuplexStream>,
    sink: mpsc::UnboundedSender<Outcomes>,
    outcomes: mpsc::UnboundedReceiver<Outcomes>,
    seen: Mutex<HashMap<(u64, u32), SendOutcome>>,
}

impl Bench {
    pub(super) fn new(settings: Settings) -> Self {
        Self::with_wire(settings, 64 * 1024, TestWire::default)
    }

    pub(super) fn with_wire(
        settings: Settings,
        buffer: usize,
        make_wire: impl Fn() -> TestWire + Send + 'static,
    ) -> Self {
        let runtime = Runtime::simulated(1, START);
        let threads = SendingThreads::new(&runtime, 1).expect("no threads in simulation");
        let deny = Arc::new(DenyFeed::default());
        let (peers_tx, peers) = mpsc::unbounded_channel();
        let pipes = Arc::new(Pipes {
            peers: peers_tx,
            attempts: AtomicUsize::new(0),
            writes: Arc::new(AtomicUsize::new(0)),
            failing: AtomicUsize::new(0),
            buffer,
        });
        let parts = Parts {
            name: "test".into(),
            runtime: runtime.clone(),
            settings,
            deny: Arc::clone(&deny),
            connector: Arc::clone(&pipes) as _,
        };
        let driver = Driver::start(&threads, parts, make_wire);
        let (sink, outcomes) = mpsc::unbounded_channel();
        Self { runtime, deny, driver, threads, pipes, peers, sink, outcomes, seen: Mutex::default() }
    }

    /// The other end of the next connection, its SETTINGS sent.
    pub(super) async fn accept(&mut self, max_streams: u32) -> Peer {
        let io = self.peers.recv().await.expect("the driver lives");
        Peer::new(io, max_streams).await
    }

    /// The same, answering everything until the driver leaves.
    pub(super) async fn serve(&mut self, max_streams: u32) -> JoinHandle<Peer> {
        let peer = self.accept(max_streams).await;
        self.runtime.spawn(peer.serve())
    }

    pub(super) async fn accept_silent(&mut self) -> DuplexStream {
        self.peers.recv().await.expect("the driver lives")
    }

    pub(super) fn batch(&self, ticket: u64, lane: Lane, users: impl IntoIterator<Item = i64>) -> Batch {
        let targets = users
            .into_iter()
            .enumerate()
            .map(|(at, user)| SendTarget {
                index: u32::try_from(at).expect("few"),
                user: UserKey(user),
                device: DeviceId(user),
                token: DeviceToken::trusted("aa"),
                nudged_id: Uuid::nil(),
                variant: 0,
            })
            .collect();
        Batch {
            route: route(1),
            lane,
            notification: NotificationId(1),
            encoded: Vec::new(),
            targets,
            expires_at: UnixMs::MAX,
            gated: self.deny.position(),
            gated_at: self.runtime.instant().into_std(),
            sink: Sink { ticket, outcomes: self.sink.clone() },
        }
    }

    pub(super) fn submit(&self, batch: Batch) {
        assert!(self.driver.submit(batch).is_ok(), "there is room");
    }

    /// Every outcome exactly once, as a sorted list of (ticket, index, outcome), once `count` are there.
    pub(super) async fn outcomes(&mut self, count: usize) -> Vec<SendOutcome> {
        while self.seen.lock().expect("lock").len() < count {
            let Outcomes { ticket, results } = self.outcomes.recv().await.expect("we hold a sender");
            for (index, outcome) in results {
                let before = self.seen.lock().expect("lock").insert((ticket, index), outcome);
                assert_eq!(before, None, "one outcome for a target");
            }
        }
        let seen = std::mem::take(&mut *self.seen.lock().expect("lock"));
        assert_eq!(seen.len(), count);
        let mut all: Vec<_> = seen.into_iter().collect();
        all.sort_by_key(|(key, _)| *key);
        all.into_iter().map(|(_, outcome)| outcome).collect()
    }

    pub(super) async fn pause(&self, millis: u64) {
        self.runtime.sleep(Duration::from_millis(millis)).await;
    }
}

pub(super) fn route(id: i64) -> Arc<Route> {
    let spec = RouteSpec {
        app: AppKey(1),
        platform: Platform::Apns,
        credential: "default".into(),
        environment: Environment::Production,
        bundle: "b".into(),
    };
    Arc::new(Route { id: RouteId(id), spec })
}

pub(super) fn sent() -> SendOutcome {
    SendOutcome::Sent { provider_id: None }
}

pub(super) fn is_transport(outcome: &SendOutcome) -> bool {
    matches!(outcome, SendOutcome::RetryLater { cause: RetryCause::Transport, .. })
}

pub(super) fn is_maybe(outcome: &SendOutcome) -> bool {
    matches!(outcome, SendOutcome::MaybeSent { .. })
}

/// The server's end: raw frames (RFC 9113 section 4.1), with just enough HPACK to say a status.
pub(super) struct Peer {
    io: DuplexStream,
    bodies: HashMap<u32, Vec<u8>>,
    ready: VecDeque<(u32, i64)>,
    /// Streams the driver reset.
    pub(super) resets: Vec<u32>,
    pub(super) got_goaway: bool,
    pub(super) pings: usize,
    pub(super) answers_pings: bool,
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;

impl Peer {
    pub(super) async fn new(mut io: DuplexStream, max_streams: u32) -> Self {
        let mut preface = [0; 24];
        io.read_exact(&mut preface).await.expect("a preface");
        let mut peer = Self {
            io,
            bodies: HashMap::new(),
            ready: VecDeque::new(),
            resets: Vec::new(),
            got_goaway: false,
            pings: 0,
            answers_pings: true,
        };
        peer.limit(max_streams).await;
        peer
    }

    async fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).expect("small").to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, flags];
        frame.extend_from_slice(&stream.to_be_bytes());
        frame.extend_from_slice(payload);
        // The driver may have left.
        let _ = self.io.write_all(&frame).await;
    }

    /// SETTINGS_MAX_CONCURRENT_STREAMS.
    pub(super) async fn limit(&mut self, max_streams: u32) {
        let mut payload = vec![0, 3];
        payload.extend_from_slice(&max_streams.to_be_bytes());
        self.frame(SETTINGS, 0, 0, &payload).await;
    }

    /// WINDOW_UPDATE of the connection.
    pub(super) async fn open_window(&mut self, by: u32) {
        self.frame(WINDOW_UPDATE, 0, 0, &by.to_be_bytes()).await;
    }

    pub(super) async fn answer(&mut self, stream: u32) {
        self.frame(HEADERS, 0x5, stream, &[0x88]).await;
    }

    pub(super) async fn answer_400(&mut self, stream: u32) {
        self.frame(HEADERS, 0x5, stream, &[0x8c]).await;
    }

    /// 200, and a body that never ends.
    pub(super) async fn answer_half(&mut self, stream: u32) {
        self.frame(HEADERS, 0x4, stream, &[0x88]).await;
        self.frame(DATA, 0, stream, b"{").await;
    }

    pub(super) async fn refuse(&mut self, stream: u32) {
        self.frame(RST_STREAM, 0, stream, &7_u32.to_be_bytes()).await;
    }

    pub(super) async fn goaway(&mut self, last: u32) {
        let mut payload = last.to_be_bytes().to_vec();
        payload.extend_from_slice(&0_u32.to_be_bytes());
        payload.extend_from_slice(br#"{"reason":"Shutdown"}"#);
        self.frame(GOAWAY, 0, 0, &payload).await;
    }

    /// The next whole request: its stream and its user. `None` when the driver has left.
    pub(super) async fn request(&mut self) -> Option<(u32, i64)> {
        loop {
            if let Some(request) = self.ready.pop_front() {
                return Some(request);
            }
            self.read().await?;
        }
    }

    /// The requests that come within `millis`.
    pub(super) async fn requests_within(&mut self, runtime: &Runtime, millis: u64) -> Vec<(u32, i64)> {
        let until = runtime.instant() + Duration::from_millis(millis);
        let mut requests = Vec::new();
        loop {
            tokio::select! {
                biased;
                request = self.request() => match request {
                    Some(request) => requests.push(request),
                    None => return requests,
                },
                () = runtime.sleep_until(until) => return requests,
            }
        }
    }

    /// Answers everything until the driver leaves.
    pub(super) async fn serve(mut self) -> Self {
        while let Some((stream, _)) = self.request().await {
            self.answer(stream).await;
        }
        self
    }

    async fn read(&mut self) -> Option<()> {
        let mut head = [0; 9];
        self.io.read_exact(&mut head).await.ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        let mut payload = vec![0; length];
        self.io.read_exact(&mut payload).await.ok()?;
        let (kind, flags) = (head[3], head[4]);
        match kind {
            SETTINGS if flags & 1 == 0 => self.frame(SETTINGS, 1, 0, &[]).await,
            PING if flags & 1 == 0 => {
                self.pings += 1;
                if self.answers_pings {
                    self.frame(PING, 1, 0, &payload).await;
                }
            }
            RST_STREAM => self.resets.push(stream),
            GOAWAY => self.got_goaway = true,
            DATA => {
                let body = self.bodies.entry(stream).or_default();
                body.extend_from_slice(&payload);
                if flags & 1 == 1 {
                    let user = std::str::from_utf8(body).expect("text").parse().expect("a user");
                    self.ready.push_back((stream, user));
                }
            }
            _ => {}
        }
        Some(())
    }
}
