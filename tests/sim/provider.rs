//! Scripted providers: a real `h2` server at the other end of a pipe, that does to every request what a seed says.
//!
//! It outlives crashes of the process that sends to it. Its own clock is true.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::header::HeaderMap;
use http::{Request, Response};
use nudged::domain::identity::IdentityKey;
use nudged::runtime::Runtime;
use nudged::senders::fcm::{TokenEndpoint, TokenFuture, TokenReply};
use nudged::senders::http2::{Connect, ConnectError, ConnectFuture};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;

use super::clock::Clock;
use super::facts::{Fact, Facts, Named, Push, Reply};

/// How providers behave for a while.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Mood {
    /// Of a hundred requests.
    pub faults: u32,
    /// Of a hundred connections.
    pub broken_connections: u32,
    /// The slowest ordinary answer.
    pub slowest_ms: u32,
    /// Streams it allows on a connection.
    pub streams: u32,
    /// Of a hundred exchanges of a credential.
    pub refused_tokens: u32,
}

impl Mood {
    pub const CALM: Self = Self { faults: 0, broken_connections: 0, slowest_ms: 20, streams: 100, refused_tokens: 0 };
}

/// Which of the servers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Endpoint {
    ApnsProduction,
    ApnsSandbox,
    Fcm,
}

pub struct Provider {
    facts: Arc<Facts>,
    clock: Arc<Clock>,
    state: Mutex<State>,
}

struct State {
    rng: SmallRng,
    mood: Mood,
    identity: Option<IdentityKey>,
    pushes: u32,
    connections: u32,
    /// Dead tokens, and since when by the true wall clock.
    dead: BTreeMap<String, i64>,
    /// Tokens of Apple's sandbox; all others are of production.
    sandbox: BTreeSet<String>,
}

/// What becomes of one request.
enum Script {
    Answer {
        status: u16,
        reason: &'static str,
        headers: Vec<(&'static str, String)>,
        reply: Reply,
    },
    /// An answer that is none.
    Garbage,
    Reset(Reason, Reply),
    /// No answer at all.
    Stall(Reply),
    /// The connection ends, with a word or without.
    End(End, Reply),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Cut,
    GoAway(Reason),
    /// It goes on until what is open is answered.
    Drain,
    /// Nothing more is read or written.
    Freeze,
}

impl Provider {
    pub fn new(seed: u64, mood: Mood, facts: Arc<Facts>, clock: Arc<Clock>) -> Self {
        let state = State {
            rng: SmallRng::seed_from_u64(seed ^ 0x9e37_79b9_7f4a_7c15),
            mood,
            identity: None,
            pushes: 0,
            connections: 0,
            dead: BTreeMap::new(),
            sandbox: BTreeSet::new(),
        };
        Self { facts, clock, state: Mutex::new(state) }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Whoever reads facts must know what a `nudged_id` stands for; the key is the installation's.
    pub fn learn_identity(&self, key: &IdentityKey) {
        self.state().identity = Some(key.clone());
    }

    pub fn set_mood(&self, mood: Mood) {
        self.state().mood = mood;
    }

    /// The app is installed (again): its token works.
    pub fn install(&self, token: &str, is_sandbox: bool) {
        let mut state = self.state();
        state.dead.remove(token);
        if is_sandbox {
            state.sandbox.insert(token.to_owned());
        }
    }

    pub fn uninstall(&self, token: &str) {
        let since = self.clock.true_wall();
        self.state().dead.entry(token.to_owned()).or_insert(since);
    }

    fn received(&self, endpoint: Endpoint, connection: u32, head: &http::request::Parts, body: &[u8]) -> (u32, String) {
        let header = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let json: Value = serde_json::from_slice(body).unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (token, nudged_id, header_id, collapse_id, tag) = match endpoint {
            Endpoint::ApnsProduction | Endpoint::ApnsSandbox => (
                head.uri.path().rsplit('/').next().unwrap_or_default().to_owned(),
                text(&json["nudged_id"]),
                header("apns-id"),
                header("apns-collapse-id"),
                json["event_no"].clone(),
            ),
            Endpoint::Fcm => {
                let message = &json["message"];
                let tag = &message["android"]["notification"]["tag"];
                let data = &message["data"];
                let no = data["event_no"].as_str().and_then(|text| text.parse::<u32>().ok());
                (
                    text(&message["token"]),
                    text(&data["nudged_id"]),
                    None,
                    tag.as_str().map(str::to_owned),
                    no.map_or(Value::Null, Value::from),
                )
            }
        };
        let mut state = self.state();
        let named = uuid::Uuid::parse_str(&nudged_id).ok();
        let names = named.zip(state.identity.as_ref()).and_then(|(id, key)| {
            let (notification, device) = key.read_nudged_id(id)?;
            Some(Named { notification: key.public_notification(notification).to_string(), device: device.public() })
        });
        state.pushes += 1;
        let push = state.pushes;
        drop(state);
        let tag = tag.as_u64().and_then(|tag| u32::try_from(tag).ok()).unwrap_or(u32::MAX);
        let at = self.clock.now();
        let fact =
            Push { number: push, connection, at, token: token.clone(), nudged_id, header_id, collapse_id, tag, names };
        self.facts.add(Fact::Pushed(fact));
        (push, token)
    }

    fn replied(&self, push: u32, reply: Reply) {
        self.facts.add(Fact::Replied { push, at: self.clock.now(), reply });
    }

    /// How long it takes, and what comes then.
    fn script(&self, endpoint: Endpoint, token: &str) -> (Duration, Script) {
        let mut state = self.state();
        let State { rng, mood, dead, sandbox, .. } = &mut *state;
        let delay = Duration::from_millis(u64::from(rng.random_range(0..=mood.slowest_ms)));
        let is_apns = endpoint != Endpoint::Fcm;
        if rng.random_range(0..100) < mood.faults {
            let fault = fault(rng, is_apns);
            return (delay, fault);
        }
        if let Some(since) = dead.get(token) {
            let said_since = is_apns && rng.random_bool(0.5);
            let reason = match (is_apns, said_since) {
                (true, true) => return (delay, gone_since(*since)),
                (true, false) => "Unregistered",
                (false, _) => "UNREGISTERED",
            };
            let status = if is_apns { 410 } else { 404 };
            return (delay, answer(status, reason, Reply::Gone { since: false }));
        }
        if is_apns && (endpoint == Endpoint::ApnsSandbox) != sandbox.contains(token) {
            return (delay, answer(400, "BadDeviceToken", Reply::Gone { since: true }));
        }
        (delay, answer(200, "", Reply::Taken { told: true }))
    }
}

fn answer(status: u16, reason: &'static str, reply: Reply) -> Script {
    Script::Answer { status, reason, headers: Vec::new(), reply }
}

fn gone_since(since: i64) -> Script {
    let headers = vec![("x-since", since.to_string())];
    Script::Answer { status: 410, reason: "Unregistered", headers, reply: Reply::Gone { since: true } }
}

/// Any of what goes wrong.
fn fault(rng: &mut SmallRng, is_apns: bool) -> Script {
    let taken = Reply::Taken { told: false };
    let either = |rng: &mut SmallRng| if rng.random_bool(0.5) { taken } else { Reply::Silent };
    let hint = |rng: &mut SmallRng| rng.random_range(1..20u32);
    match rng.random_range(0..16u32) {
        0 => answer(
            if is_apns { 500 } else { 503 },
            if is_apns { "InternalServerError" } else { "UNAVAILABLE" },
            Reply::Later { hint_ms: None },
        ),
        1 => {
            let secs = hint(rng);
            Script::Answer {
                status: 503,
                reason: if is_apns { "ServiceUnavailable" } else { "UNAVAILABLE" },
                headers: vec![("retry-after", secs.to_string())],
                reply: Reply::Later { hint_ms: Some(i64::from(secs) * 1_000) },
            }
        }
        2 => {
            let secs = hint(rng);
            Script::Answer {
                status: 429,
                reason: if is_apns { "TooManyRequests" } else { "QUOTA_EXCEEDED" },
                headers: vec![("retry-after", secs.to_string())],
                reply: Reply::Later { hint_ms: Some(i64::from(secs) * 1_000) },
            }
        }
        3 => answer(429, if is_apns { "TooManyRequests" } else { "QUOTA_EXCEEDED" }, Reply::Later { hint_ms: None }),
        4 => answer(400, if is_apns { "PayloadEmpty" } else { "INVALID_ARGUMENT" }, Reply::Rejected),
        5 => Script::Garbage,
        6 | 7 => Script::Reset(Reason::REFUSED_STREAM, Reply::NotProcessed),
        8 => {
            let reply = either(rng);
            Script::Reset(Reason::INTERNAL_ERROR, reply)
        }
        9 | 10 => {
            let reply = either(rng);
            Script::Stall(reply)
        }
        11 => {
            let reply = either(rng);
            Script::End(End::Cut, reply)
        }
        12 => {
            let reply = either(rng);
            Script::End(End::GoAway(Reason::INTERNAL_ERROR), reply)
        }
        13 => Script::End(End::Drain, Reply::Taken { told: true }),
        14 => {
            let reply = either(rng);
            Script::End(End::Freeze, reply)
        }
        _ => answer(
            if is_apns { 403 } else { 401 },
            if is_apns { "ExpiredProviderToken" } else { "UNAUTHENTICATED" },
            Reply::Broken,
        ),
    }
}

/// One process' way to one server.
pub struct Connector {
    pub provider: Arc<Provider>,
    pub runtime: Runtime,
    pub endpoint: Endpoint,
}

impl Connect for Connector {
    fn connect(&self) -> ConnectFuture {
        let (provider, runtime, endpoint) = (Arc::clone(&self.provider), self.runtime.clone(), self.endpoint);
        Box::pin(async move {
            let (delay, fate, streams) = {
                let mut state = provider.state();
                let State { rng, mood, .. } = &mut *state;
                let delay = Duration::from_millis(u64::from(rng.random_range(0..50u32)));
                let broken = rng.random_range(0..100) < mood.broken_connections;
                (delay, broken.then(|| rng.random_range(0..4u32)), mood.streams)
            };
            runtime.sleep(delay).await;
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
            match fate {
                Some(0) => {
                    let source = io::Error::from(io::ErrorKind::ConnectionRefused);
                    return Err(ConnectError::Tcp { address, source });
                }
                Some(1) => {
                    let after = Duration::from_secs(10);
                    runtime.sleep(after).await;
                    return Err(ConnectError::Timeout { after });
                }
                _ => {}
            }
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            match fate {
                Some(2) => drop(runtime.spawn(babble(theirs, provider.state().rng.next_u64()))),
                // Never a byte.
                Some(_) => drop(runtime.spawn({
                    let runtime = runtime.clone();
                    async move {
                        runtime.sleep(Duration::from_secs(60)).await;
                        drop(theirs);
                    }
                })),
                None => drop(runtime.spawn(serve(provider, runtime.clone(), endpoint, theirs, streams))),
            }
            Ok(Box::new(ours) as _)
        })
    }
}

/// Bytes that are no HTTP/2.
async fn babble(mut io: DuplexStream, seed: u64) {
    let mut bytes = [0; 64];
    SmallRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    let _ = io.write_all(&bytes).await;
}

async fn serve(provider: Arc<Provider>, runtime: Runtime, endpoint: Endpoint, io: DuplexStream, streams: u32) {
    let number = {
        let mut state = provider.state();
        state.connections += 1;
        state.connections
    };
    let handshake = h2::server::Builder::new().max_concurrent_streams(streams.max(1)).handshake(io).await;
    let Ok(mut connection): Result<Connection<DuplexStream, Bytes>, _> = handshake else { return };
    let (ends, mut ended) = mpsc::unbounded_channel();
    let cut = || provider.facts.add(Fact::Cut { connection: number, at: provider.clock.now() });
    loop {
        tokio::select! {
            biased;
            Some(end) = ended.recv() => match end {
                End::Drain => connection.graceful_shutdown(),
                End::GoAway(reason) => {
                    cut();
                    connection.abrupt_shutdown(reason);
                }
                End::Cut => break,
                End::Freeze => {
                    cut();
                    runtime.sleep(Duration::from_secs(30)).await;
                    break;
                }
            },
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    let (provider, theirs, ends) = (Arc::clone(&provider), runtime.clone(), ends.clone());
                    drop(runtime.spawn(async move {
                        // What is lost with its connection was told by whoever ended it.
                        let _ = exchange(&provider, &theirs, endpoint, number, request, respond, &ends).await;
                    }));
                }
                Some(Err(_)) | None => break,
            },
        }
    }
    cut();
}

async fn exchange(
    provider: &Provider,
    runtime: &Runtime,
    endpoint: Endpoint,
    connection: u32,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    ends: &mpsc::UnboundedSender<End>,
) -> Result<(), h2::Error> {
    let (head, mut stream) = request.into_parts();
    let mut body = Vec::new();
    while let Some(chunk) = stream.data().await {
        let chunk = chunk?;
        let _ = stream.flow_control().release_capacity(chunk.len());
        body.extend_from_slice(&chunk);
    }
    let (push, token) = provider.received(endpoint, connection, &head, &body);
    let (delay, script) = provider.script(endpoint, &token);
    runtime.sleep(delay).await;
    match script {
        Script::Answer { status, reason, headers, reply } => {
            provider.replied(push, reply);
            send(endpoint, &mut respond, status, reason, &headers)?;
        }
        Script::Garbage => {
            // The status can be read, and says enough.
            provider.replied(push, Reply::Later { hint_ms: None });
            let head = Response::builder().status(500).body(()).expect("a status alone");
            respond.send_response(head, false)?.send_data(Bytes::from_static(b"<html>\xff{\"reason\":"), true)?;
        }
        Script::Reset(reason, reply) => {
            provider.replied(push, reply);
            respond.send_reset(reason);
        }
        Script::Stall(reply) => {
            provider.replied(push, reply);
            // Longer than anybody waits; the stream stays open.
            runtime.sleep(Duration::from_secs(120)).await;
        }
        Script::End(end, reply) => {
            provider.replied(push, reply);
            let _ = ends.send(end);
            if end == End::Drain {
                send(endpoint, &mut respond, 200, "", &[])?;
            } else {
                // Until the connection is gone, or its peer gives up.
                runtime.sleep(Duration::from_secs(60)).await;
            }
        }
    }
    Ok(())
}

fn send(
    endpoint: Endpoint,
    respond: &mut SendResponse<Bytes>,
    status: u16,
    reason: &str,
    headers: &[(&str, String)],
) -> Result<(), h2::Error> {
    let mut head = Response::builder().status(status);
    let mut since = String::new();
    for (name, value) in headers {
        if *name == "x-since" {
            since = format!(r#","timestamp":{value}"#);
        } else {
            head = head.header(*name, value);
        }
    }
    let body = match (endpoint, status) {
        (Endpoint::Fcm, 200) => r#"{"name":"projects/simulated/messages/1"}"#.to_owned(),
        (_, 200) => String::new(),
        (Endpoint::Fcm, _) => {
            let kind = "type.googleapis.com/google.firebase.fcm.v1.FcmError";
            format!(
                r#"{{"error":{{"code":{status},"status":"{reason}","details":[{{"@type":"{kind}","errorCode":"{reason}"}}]}}}}"#
            )
        }
        (_, _) => format!(r#"{{"reason":"{reason}"{since}}}"#),
    };
    let head = head.body(()).expect("well-formed headers");
    if body.is_empty() {
        respond.send_response(head, true)?;
    } else {
        respond.send_response(head, false)?.send_data(Bytes::from(body), true)?;
    }
    Ok(())
}

/// Where FCM's access tokens come from.
pub struct Exchange {
    pub provider: Arc<Provider>,
    pub runtime: Runtime,
}

impl TokenEndpoint for Exchange {
    fn post(&self, _form: Vec<(&'static str, String)>) -> TokenFuture {
        let (provider, runtime) = (Arc::clone(&self.provider), self.runtime.clone());
        Box::pin(async move {
            let (delay, refused) = {
                let mut state = provider.state();
                let State { rng, mood, .. } = &mut *state;
                let refused = (rng.random_range(0..100) < mood.refused_tokens).then(|| rng.random_range(0..3u32));
                (Duration::from_millis(u64::from(rng.random_range(0..100u32))), refused)
            };
            runtime.sleep(delay).await;
            let reply = |status, body: &str| TokenReply { status, headers: HeaderMap::new(), body: body.into() };
            match refused {
                None => Ok(reply(200, r#"{"access_token":"simulated","expires_in":600}"#)),
                Some(0) => Ok(reply(503, "")),
                Some(1) => Ok(reply(200, "<html>")),
                Some(_) => Err("the connection was lost".to_owned()),
            }
        })
    }
}
