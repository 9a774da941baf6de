//! Fake APNs and FCM: real HTTP/2-over-TLS servers that validate as strictly as the vendors, record what they receive
//! and misbehave on demand. Used by tests, the demo and the benchmark in-process, and by anybody as `nudged sandbox`.
//!
//! What it is: the providers' *wire*. It checks everything a request shows (tokens, headers, JSON, signatures, order
//! on the connection) and answers as the vendor's documents say. What it is not: the providers' judgement. It knows
//! neither quotas nor whether a phone exists; a token is valid until [`Sandbox::set_token_state`] says otherwise.
//!
//! It shares no code with the senders, so that a misreading of a specification cannot hide on both sides.

mod apns;
mod apns_validate;
mod config_file;
mod control;
mod credentials;
mod faults;
mod fcm;
mod fcm_schema;
mod fcm_validate;
mod frame_io;
mod h2_server;
mod jwt;
mod oauth;
mod options;
mod pipes;
mod play;
mod record;
mod tally;
mod tls;

#[cfg(test)]
mod tests;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

pub use credentials::{Credentials, KEY_ID, TEAM_ID};
pub use faults::{Action, Fault, MAX_FAULTS, MAX_TOKEN_STATES, Target, TokenState};
pub use options::Options;
pub use pipes::{Keys, Pipes};
pub use record::{AuthKind, Platform, Received, Totals};
pub use tally::token_hash;

use self::h2_server::{Counters, Host, Server};
use crate::runtime::Runtime;

/// How long [`Sandbox::shutdown`] waits for open control requests.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a sandbox does not start, or refuses an order.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("sandbox options: {0}")]
    Options(String),
    #[error("listening on {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("writing or reading {}", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{what} cannot be read{}; delete it to get a new one", path.as_ref().map(|path| format!(" from {}", path.display())).unwrap_or_default())]
    Key { what: &'static str, path: Option<PathBuf> },
    #[error("making a certificate")]
    Certificate(#[source] rcgen::Error),
    #[error("setting up TLS")]
    Tls(#[source] rustls::Error),
    #[error("the operating system provides no randomness for a key")]
    Random,
    #[error("fault refused: {0}")]
    Fault(String),
    #[error("token state refused: {MAX_TOKEN_STATES} tokens have one already")]
    TokenStates,
}

/// Connections of one listener.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct ConnectionCounts {
    pub opened: u64,
    pub open: u64,
    /// Streams refused because more were open than the limit then in force.
    pub refused_streams: u64,
}

/// Connections of both providers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Connections {
    pub apns: ConnectionCounts,
    pub fcm: ConnectionCounts,
}

/// What servers, control port and owner all look at.
struct Shared {
    runtime: Runtime,
    options: Options,
    record: record::Record,
    tally: Option<tally::Tally>,
    faults: faults::Faults,
    tokens: faults::TokenStates,
    access_tokens: oauth::AccessTokens,
    apns: Arc<Counters>,
    fcm: Arc<Counters>,
}

impl Shared {
    fn new(runtime: &Runtime, options: Options) -> Arc<Self> {
        Arc::new(Self {
            runtime: runtime.clone(),
            record: record::Record::new(options.record_limit),
            tally: options.tally.then(tally::Tally::default),
            faults: faults::Faults::default(),
            tokens: faults::TokenStates::default(),
            access_tokens: oauth::AccessTokens::default(),
            apns: Arc::default(),
            fcm: Arc::default(),
            options,
        })
    }

    /// APNs tokens are hex and mean the same in both cases; FCM's are not and do not.
    fn token_key(token: &str) -> std::borrow::Cow<'_, str> {
        let hex = token.bytes().all(|byte| byte.is_ascii_hexdigit());
        if hex && token.bytes().any(|byte| byte.is_ascii_uppercase()) {
            token.to_ascii_lowercase().into()
        } else {
            token.into()
        }
    }

    fn token_state(&self, token: &str) -> Option<TokenState> {
        self.tokens.get(&Self::token_key(token))
    }

    fn set_token_state(&self, token: &str, state: TokenState) -> Result<(), SandboxError> {
        self.tokens.set(&Self::token_key(token), state, self.runtime.now())
    }

    /// A UUID that need not be hard to guess.
    fn cheap_uuid(&self) -> String {
        let [high, low] = [self.runtime.random_u64(), self.runtime.random_u64()];
        let bits = u128::from(high) << 64 | u128::from(low);
        uuid::Builder::from_random_bytes(bits.to_be_bytes()).into_uuid().to_string()
    }

    /// Into the record and the tally.
    fn note(&self, mut received: Received) {
        if let Some(tally) = &self.tally {
            received.at_us = self.runtime.now_us();
            tally.count(&received);
        }
        match &self.options.keep_prefix {
            Some(prefix) if !received.token.starts_with(prefix) => self.record.count(&received),
            _ => self.record.push(received),
        }
    }

    fn clear(&self) {
        self.record.clear();
        if let Some(tally) = &self.tally {
            tally.clear();
        }
    }

    fn body_to_keep(&self, body: &Bytes) -> Bytes {
        // Copied, for it is a slice of a whole read buffer.
        if self.options.record_bodies { Bytes::copy_from_slice(body) } else { Bytes::new() }
    }

    fn oauth_exchanges(&self) -> u64 {
        self.access_tokens.exchanges.load(Ordering::Relaxed)
    }

    fn connections(&self) -> Connections {
        let counts = |counters: &Counters| ConnectionCounts {
            opened: counters.opened.load(Ordering::Relaxed),
            open: counters.open.load(Ordering::Relaxed),
            refused_streams: counters.refused_streams.load(Ordering::Relaxed),
        };
        Connections { apns: counts(&self.apns), fcm: counts(&self.fcm) }
    }
}

/// A running sandbox. Dropping it stops its tasks; [`Sandbox::shutdown`] also waits for them.
pub struct Sandbox {
    shared: Arc<Shared>,
    credentials: Credentials,
    ca_pem: String,
    apns_endpoint: String,
    fcm_endpoint: String,
    token_endpoint: String,
    control_addr: SocketAddr,
    tracker: TaskTracker,
    cancel: DropGuard,
}

impl Sandbox {
    /// Binds the ports, makes or loads the credentials, writes the files, and serves.
    pub async fn start(runtime: &Runtime, options: Options) -> Result<Self, SandboxError> {
        options.check()?;
        let (apns_listener, apns_addr) = bind(options.apns_listen).await?;
        let (fcm_listener, fcm_addr) = bind(options.fcm_listen).await?;
        let (token_listener, token_addr) = bind(options.token_listen).await?;
        let (control_listener, control_addr) = bind(options.control_listen).await?;
        let apns_endpoint = endpoint(apns_addr, &options);
        let fcm_endpoint = endpoint(fcm_addr, &options);
        let token_endpoint = endpoint(token_addr, &options) + oauth::PATH;
        // Key generation takes tenths of a second of computing.
        let (for_keys, key_options, token_uri) = (runtime.clone(), options.clone(), token_endpoint.clone());
        let identity = runtime.blocking(move || credentials::prepare(&for_keys, &key_options, &token_uri)).await?;

        let shared = Shared::new(runtime, options);
        let tracker = TaskTracker::new();
        let cancel = CancellationToken::new();
        let (apns, fcm) = hosts(&shared, &identity);
        let apns = Server { host: apns, tls: tls::apns(&identity)?, tracker: tracker.clone(), cancel: cancel.clone() };
        let fcm = Server {
            host: fcm,
            tls: tls::google(&identity, &["h2"])?,
            tracker: tracker.clone(),
            cancel: cancel.clone(),
        };
        let oauth = Arc::new(oauth::Oauth::new(&shared, &identity, token_endpoint.clone()));
        let token_tls = tls::google(&identity, &["h2", "http/1.1"])?;
        let control = axum::serve(control_listener, control::router(Arc::clone(&shared)))
            .with_graceful_shutdown(cancel.clone().cancelled_owned());

        let sandbox = Self {
            credentials: identity.credentials,
            ca_pem: identity.ca_pem,
            apns_endpoint,
            fcm_endpoint,
            token_endpoint,
            control_addr,
            tracker: tracker.clone(),
            cancel: cancel.clone().drop_guard(),
            shared,
        };
        if let Some(dir) = sandbox.dir() {
            config_file::write(dir, &sandbox)?;
        }
        runtime.spawn(tracker.track_future(apns.run(apns_listener)));
        runtime.spawn(tracker.track_future(fcm.run(fcm_listener)));
        runtime.spawn(tracker.track_future(oauth.run(token_listener, token_tls, tracker.clone(), cancel)));
        // Serving ends with the cancellation; an accept error is retried inside.
        runtime.spawn(tracker.track_future(async move { control.await.unwrap_or_default() }));
        tracker.close();
        Ok(sandbox)
    }

    /// `https://127.0.0.1:PORT`
    pub fn apns_endpoint(&self) -> &str {
        &self.apns_endpoint
    }

    /// `https://127.0.0.1:PORT`
    pub fn fcm_endpoint(&self) -> &str {
        &self.fcm_endpoint
    }

    /// `https://127.0.0.1:PORT/token`, the service account's `token_uri`.
    pub fn token_endpoint(&self) -> &str {
        &self.token_endpoint
    }

    pub fn control_addr(&self) -> SocketAddr {
        self.control_addr
    }

    /// The CA of all TLS endpoints.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    pub fn credentials(&self) -> &Credentials {
        &self.credentials
    }

    pub fn dir(&self) -> Option<&Path> {
        self.shared.options.dir.as_deref()
    }

    pub fn options(&self) -> &Options {
        &self.shared.options
    }

    /// The pushes still in the record, oldest first.
    pub fn received(&self) -> Vec<Arc<Received>> {
        self.shared.record.all()
    }

    /// Push requests since the start or the last clear, accepted or not, in the record or dropped from it.
    pub fn received_count(&self) -> u64 {
        self.shared.record.totals().received
    }

    pub fn totals(&self) -> Totals {
        self.shared.record.totals()
    }

    /// The oldest `limit` pushes numbered above `seq`.
    pub fn received_since(&self, seq: u64, limit: usize) -> Vec<Arc<Received>> {
        self.shared.record.since(seq, limit)
    }

    /// Waits until a push numbered above `seq` is there. Cancel safe.
    pub async fn wait_beyond(&self, seq: u64) {
        self.shared.record.until(|record| record.last_seq() > seq).await;
    }

    /// Empties the record and its totals; sequence numbers go on.
    pub fn clear(&self) {
        self.shared.clear();
    }

    /// Waits until [`Sandbox::received_count`] is at least `count`; false when `timeout` passed first.
    pub async fn wait_for(&self, count: u64, timeout: Duration) -> bool {
        self.wait_totals(timeout, |totals| totals.received >= count).await
    }

    /// The same for pushes that were accepted.
    pub async fn wait_for_accepted(&self, count: u64, timeout: Duration) -> bool {
        self.wait_totals(timeout, |totals| totals.accepted >= count).await
    }

    async fn wait_totals(&self, timeout: Duration, done: impl Fn(Totals) -> bool) -> bool {
        let waiting = self.shared.record.until(|record| done(record.totals()));
        self.shared.runtime.timeout(timeout, waiting).await.is_some()
    }

    /// Refused when it makes no sense, or when [`MAX_FAULTS`] wait already.
    pub fn add_fault(&self, fault: Fault) -> Result<(), SandboxError> {
        self.shared.faults.add(fault)
    }

    /// The faults that still wait, with what is left of their counts.
    pub fn faults(&self) -> Vec<Fault> {
        self.shared.faults.list()
    }

    pub fn clear_faults(&self) {
        self.shared.faults.clear();
    }

    /// What both platforms think of this token from now on.
    pub fn set_token_state(&self, token: &str, state: TokenState) -> Result<(), SandboxError> {
        self.shared.set_token_state(token, state)
    }

    /// Access tokens handed out.
    pub fn oauth_exchanges(&self) -> u64 {
        self.shared.oauth_exchanges()
    }

    /// Makes every access token handed out so far worthless: FCM answers 401 until a new one is fetched.
    pub fn revoke_access_tokens(&self) {
        self.shared.access_tokens.revoke();
    }

    pub fn connections(&self) -> Connections {
        self.shared.connections()
    }

    /// Stops listening, cuts the connections, and waits for every task.
    pub async fn shutdown(self) {
        let Self { cancel, tracker, shared, .. } = self;
        cancel.disarm().cancel();
        // Only a control request in the middle of its body can take longer, and it is not worth waiting for.
        let _ = shared.runtime.timeout(SHUTDOWN_TIMEOUT, tracker.wait()).await;
    }
}

/// Both providers, which number their connections together.
fn hosts(shared: &Arc<Shared>, identity: &credentials::Identity) -> (Host<apns::Apns>, Host<fcm::Fcm>) {
    let next_connection = Arc::new(AtomicU64::new(0));
    let max_streams = shared.options.max_concurrent_streams;
    let apns = apns::Apns {
        shared: Arc::clone(shared),
        public_key: identity.apns_public_key.clone(),
        bundles: shared.options.bundles(),
    };
    let apns = Host {
        runtime: shared.runtime.clone(),
        service: Arc::new(apns),
        counters: Arc::clone(&shared.apns),
        next_connection: Arc::clone(&next_connection),
        max_streams,
    };
    let fcm = Host {
        runtime: shared.runtime.clone(),
        service: Arc::new(fcm::Fcm { shared: Arc::clone(shared) }),
        counters: Arc::clone(&shared.fcm),
        next_connection,
        max_streams,
    };
    (apns, fcm)
}

async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), SandboxError> {
    let failed = |source| SandboxError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

fn endpoint(bound: SocketAddr, options: &Options) -> String {
    let port = bound.port();
    match (&options.public_host, bound.ip()) {
        (Some(host), _) if host.contains(':') => format!("https://[{host}]:{port}"),
        (Some(host), _) => format!("https://{host}:{port}"),
        (None, IpAddr::V4(ip)) if ip.is_unspecified() => format!("https://127.0.0.1:{port}"),
        (None, IpAddr::V6(ip)) if ip.is_unspecified() => format!("https://[::1]:{port}"),
        (None, _) => format!("https://{bound}"),
    }
}
