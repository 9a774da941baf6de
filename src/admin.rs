//! `/metrics`, `/livez`, `/readyz` on a listener of their own; nothing else, and never with a key.
//!
//! *Live* means that every runtime still runs tasks: each bumps a [`Heartbeat`], and one that is stuck is named. A
//! restart helps then. *Ready* means that requests can be served now: the [`Readiness`] checks pass. A restart does not
//! help there, so a database outage never makes a process look dead.
//!
//! Bounded: [`MAX_CONNECTIONS`] at once, each with a time limit for its request's head; a check that does not answer
//! within [`CHECK_TIMEOUT`] has failed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use futures_util::future::join_all;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use crate::runtime::{Instant, Runtime};
use crate::telemetry::Metrics;

/// Scrapers and probes at once; more wait to be accepted.
const MAX_CONNECTIONS: usize = 64;
/// For a readiness check, and for a collector before a scrape.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);
/// After an error of accept (out of file descriptors): long enough not to spin, short enough to go unnoticed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// One runtime's or thread's sign of life. Cheap to clone.
#[derive(Clone)]
pub struct Heartbeat {
    inner: Arc<Beat>,
}

struct Beat {
    name: String,
    max_silence: Duration,
    runtime: Runtime,
    origin: Instant,
    /// Milliseconds after `origin`.
    last: AtomicU64,
}

impl Heartbeat {
    /// Counts as having beaten now. Silent for longer than `max_silence`, it is stuck.
    #[must_use]
    pub fn new(runtime: &Runtime, name: impl Into<String>, max_silence: Duration) -> Self {
        let origin = runtime.instant();
        let runtime = runtime.clone();
        Self { inner: Arc::new(Beat { name: name.into(), max_silence, runtime, origin, last: AtomicU64::new(0) }) }
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    pub fn beat(&self) {
        self.inner.last.store(self.elapsed_ms(), Ordering::Relaxed);
    }

    /// Beats four times per `max_silence` until cancelled: to be spawned on the runtime it vouches for.
    pub async fn run(self, stop: CancellationToken) {
        let pause = self.inner.max_silence / 4;
        loop {
            self.beat();
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = self.inner.runtime.sleep(pause) => {}
            }
        }
    }

    /// How long it has been silent, when that is too long.
    #[must_use]
    pub fn stuck_for(&self) -> Option<Duration> {
        let silent = self.elapsed_ms().saturating_sub(self.inner.last.load(Ordering::Relaxed));
        let silent = Duration::from_millis(silent);
        (silent > self.inner.max_silence).then_some(silent)
    }

    fn elapsed_ms(&self) -> u64 {
        let elapsed = self.inner.runtime.instant().saturating_duration_since(self.inner.origin);
        u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
    }
}

/// Something that must hold before requests can be served.
#[async_trait::async_trait]
pub trait Readiness: Send + Sync {
    /// A short stable word: `database`, `migrations`, `shutdown`.
    fn name(&self) -> &'static str;

    /// The error says what is wrong; shown to whoever can reach the admin listener, so without secrets.
    async fn check(&self) -> Result<(), String>;

    /// What is shown instead of `ok` while the check passes.
    fn remark(&self) -> Option<String> {
        None
    }
}

/// Sets gauges that are read rather than counted, right before each scrape.
#[async_trait::async_trait]
pub trait Collector: Send + Sync {
    async fn collect(&self);
}

/// What the listener shows.
pub struct AdminParts {
    pub runtime: Runtime,
    pub metrics: Metrics,
    pub heartbeats: Vec<Heartbeat>,
    pub checks: Vec<Arc<dyn Readiness>>,
    pub collectors: Vec<Arc<dyn Collector>>,
}

/// The listener could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} (admin.listen)")]
pub struct AdminError {
    address: SocketAddr,
    #[source]
    source: std::io::Error,
}

/// A bound listener, not serving yet.
pub struct AdminServer {
    listener: TcpListener,
    address: SocketAddr,
    parts: Arc<AdminParts>,
}

impl AdminServer {
    pub async fn bind(listen: SocketAddr, parts: AdminParts) -> Result<Self, AdminError> {
        let failed = |source| AdminError { address: listen, source };
        let listener = TcpListener::bind(listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self { listener, address, parts: Arc::new(parts) })
    }

    /// With the port that the system picked when port 0 was asked for.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop` is cancelled; then closes every connection. It stays up through a shutdown's drain, so that
    /// `/readyz` can say why: cancel `stop` last.
    pub async fn run(self, stop: CancellationToken) {
        let Self { listener, parts, .. } = self;
        let runtime = parts.runtime.clone();
        let router = router(parts.clone());
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        let mut upkeep = runtime.instant() + UPKEEP_INTERVAL;
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = runtime.sleep_until(upkeep) => {
                    parts.metrics.upkeep();
                    upkeep = runtime.instant() + UPKEEP_INTERVAL;
                }
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
                accepted = accept(&listener, &permits) => match accepted {
                    Ok((stream, permit)) => {
                        connections.spawn(serve(stream, permit, router.clone()));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "the admin listener cannot accept a connection");
                        runtime.sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        connections.shutdown().await;
    }
}

/// Cancel-safe: a permit taken without a connection is given back.
async fn accept(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
) -> std::io::Result<(tokio::net::TcpStream, OwnedSemaphorePermit)> {
    let permit = permits.clone().acquire_owned().await.expect("the semaphore is never closed");
    let (stream, _) = listener.accept().await?;
    Ok((stream, permit))
}

async fn serve(stream: tokio::net::TcpStream, permit: OwnedSemaphorePermit, router: Router) {
    let service = hyper::service::service_fn(move |request| router.clone().oneshot(request));
    // An error here is the client's: it went away or sent no HTTP.
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    drop(permit);
}

fn router(parts: Arc<AdminParts>) -> Router {
    Router::new()
        .route("/metrics", get(metrics_page))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .with_state(parts)
}

async fn metrics_page(State(parts): State<Arc<AdminParts>>) -> Response {
    join_all(parts.collectors.iter().map(|collector| parts.runtime.timeout(CHECK_TIMEOUT, collector.collect()))).await;
    let content_type = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, content_type)], parts.metrics.render()).into_response()
}

async fn livez(State(parts): State<Arc<AdminParts>>) -> Response {
    let mut answers = Map::new();
    let mut alive = true;
    for heartbeat in &parts.heartbeats {
        let answer = match heartbeat.stuck_for() {
            None => "ok".to_owned(),
            Some(silent) => {
                alive = false;
                format!("stuck for {} ms", silent.as_millis())
            }
        };
        answers.insert(heartbeat.name().to_owned(), Value::String(answer));
    }
    answer(alive, &answers)
}

async fn readyz(State(parts): State<Arc<AdminParts>>) -> Response {
    let results = join_all(parts.checks.iter().map(|check| async {
        let result = parts.runtime.timeout(CHECK_TIMEOUT, check.check()).await;
        let result = result.unwrap_or_else(|| Err(format!("no answer within {} s", CHECK_TIMEOUT.as_secs())));
        (check.name(), result.map(|()| check.remark().unwrap_or_else(|| "ok".to_owned())))
    }))
    .await;
    let ready = results.iter().all(|(_, result)| result.is_ok());
    let text = |result: Result<String, String>| Value::String(result.unwrap_or_else(|wrong| wrong));
    answer(ready, &results.into_iter().map(|(name, result)| (name.to_owned(), text(result))).collect())
}

fn answer(good: bool, checks: &Map<String, Value>) -> Response {
    let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = json!({ "status": if good { "ok" } else { "failed" }, "checks": checks });
    (status, [(header::CONTENT_TYPE, "application/json")], format!("{body}\n")).into_response()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    struct Database(Arc<AtomicBool>);

    #[async_trait::async_trait]
    impl Readiness for Database {
        fn name(&self) -> &'static str {
            "database"
        }

        async fn check(&self) -> Result<(), String> {
            if self.0.load(Ordering::SeqCst) { Ok(()) } else { Err("does not answer".to_owned()) }
        }
    }

    struct Hangs;

    #[async_trait::async_trait]
    impl Readiness for Hangs {
        fn name(&self) -> &'static str {
            "hangs"
        }

        async fn check(&self) -> Result<(), String> {
            std::future::pending().await
        }
    }

    struct Sets;

    #[async_trait::async_trait]
    impl Collector for Sets {
        async fn collect(&self) {
            metrics::gauge!(crate::telemetry::names::DENY_ENTRIES).set(17.0);
        }
    }

    struct Running {
        runtime: Runtime,
        address: SocketAddr,
        stop: CancellationToken,
        task: tokio::task::JoinHandle<()>,
    }

    async fn start(runtime: Runtime, heartbeats: Vec<Heartbeat>, checks: Vec<Arc<dyn Readiness>>) -> Running {
        let metrics = Metrics::install(&runtime).expect("metrics");
        let collectors: Vec<Arc<dyn Collector>> = vec![Arc::new(Sets)];
        let parts = AdminParts { runtime: runtime.clone(), metrics, heartbeats, checks, collectors };
        let server = AdminServer::bind("127.0.0.1:0".parse().expect("an address"), parts).await.expect("bind");
        let (address, stop) = (server.address(), CancellationToken::new());
        assert_ne!(address.port(), 0);
        let task = runtime.spawn(server.run(stop.clone()));
        Running { runtime, address, stop, task }
    }

    async fn request(running: &Running, head: &str) -> String {
        let mut stream = running.runtime.connect(running.address).await.expect("connect");
        let request = format!("{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("write");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("read");
        answer
    }

    #[tokio::test]
    async fn ready_names_each_check() {
        let up = Arc::new(AtomicBool::new(true));
        let running = start(Runtime::production(), Vec::new(), vec![Arc::new(Database(up.clone()))]).await;
        let answer = request(&running, "GET /readyz").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"database\":\"ok\""), "{answer}");
        up.store(false, Ordering::SeqCst);
        let answer = request(&running, "GET /readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("\"database\":\"does not answer\""), "{answer}");
        running.stop.cancel();
        running.task.await.expect("the server stops");
    }

    #[tokio::test]
    async fn a_check_that_hangs_has_failed() {
        let running = start(Runtime::production(), Vec::new(), vec![Arc::new(Hangs)]).await;
        let answer = request(&running, "GET /readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("no answer within 2 s"), "{answer}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_runtime_that_stops_beating_is_stuck_and_recovers() {
        let runtime = Runtime::production();
        let heartbeat = Heartbeat::new(&runtime, "grpc-0", Duration::from_secs(10));
        runtime.sleep(Duration::from_secs(10)).await;
        assert_eq!(heartbeat.stuck_for(), None);
        runtime.sleep(Duration::from_secs(1)).await;
        assert_eq!(heartbeat.stuck_for(), Some(Duration::from_secs(11)));
        let stop = CancellationToken::new();
        let task = runtime.spawn(heartbeat.clone().run(stop.clone()));
        runtime.sleep(Duration::from_secs(600)).await;
        assert_eq!(heartbeat.stuck_for(), None);
        stop.cancel();
        task.await.expect("the beat stops");
    }

    #[tokio::test]
    async fn live_names_the_stuck_one() {
        let runtime = Runtime::production();
        let good = Heartbeat::new(&runtime, "main", Duration::from_secs(600));
        let stuck = Heartbeat::new(&runtime, "grpc-0", Duration::ZERO);
        runtime.sleep(Duration::from_millis(5)).await;
        let running = start(runtime, vec![good, stuck], Vec::new()).await;
        let answer = request(&running, "GET /livez").await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(answer.contains("\"main\":\"ok\"") && answer.contains("\"grpc-0\":\"stuck for "), "{answer}");
    }

    #[tokio::test]
    async fn metrics_are_collected_for_the_scrape_and_nothing_else_is_served() {
        let running = start(Runtime::production(), Vec::new(), Vec::new()).await;
        let answer = request(&running, "GET /metrics").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("nudged_deny_entries 17"), "{answer}");
        for path in ["/", "/metrics/", "/debug", "/config"] {
            let answer = request(&running, &format!("GET {path}")).await;
            assert!(answer.starts_with("HTTP/1.1 404"), "{path}: {answer}");
        }
        assert!(request(&running, "POST /readyz").await.starts_with("HTTP/1.1 405"));
        assert!(request(&running, "GET /livez").await.starts_with("HTTP/1.1 200"));
    }
}
