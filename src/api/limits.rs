//! Limits of the server, and the layer that keeps deadlines and sheds load.
//!
//! A request beyond [`ServerLimits::max_concurrent_requests`] is answered RESOURCE_EXHAUSTED at once instead of
//! waiting: a queue in front of a slow database only makes every answer late. Health checks are never shed.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderMap, Request, Response};
use tokio::sync::Semaphore;
use tonic::body::Body;
use tower::Service;
use tower_layer::Layer;

use crate::runtime::{Instant, Runtime};

use super::scopes;
use super::status::{self, ApiError};

/// All limits of the gRPC server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ServerLimits {
    /// Connections open at once; more wait in the listener's backlog. Default 1 024.
    pub max_connections: usize,
    /// HTTP/2 streams of one connection at once; more wait in the client. Default 1 024.
    pub max_streams_per_connection: u32,
    /// Requests being worked on at once in the whole process; more are shed. Default 4 096.
    pub max_concurrent_requests: usize,
    /// Open NotifyEvents streams in the whole process; more are refused. Default 64, which bounds their windows to
    /// 256 MiB.
    pub max_event_streams: usize,
    /// Open imports in the whole process; more are refused. Default 8.
    pub max_import_streams: usize,
    /// Open WatchDeliveries streams in the whole process; more are refused. Default 64, which bounds what waits for them to
    /// about 64 × (500 + 256) messages of some hundred bytes.
    pub max_watchers: usize,
    /// How often a watcher that has been told everything looks again. Default 200 ms.
    pub watch_poll: Duration,
    /// After this long without a message a watcher gets a `progress`. Default 10 s.
    pub watch_heartbeat: Duration,
    /// Messages that wait for one watcher to read them. Default 256.
    pub watch_buffer: usize,
    /// A watcher that reads nothing for this long while messages wait is ended. Default 30 s.
    pub watch_patience: Duration,
    /// Unanswered events of one stream; reading pauses there. Default 512.
    pub stream_window_events: usize,
    /// Bytes of unanswered events of one stream; reading pauses there. Default 4 MiB.
    pub stream_window_bytes: usize,
    /// The largest request message; tonic answers a larger one OUT_OF_RANGE before reading it. Default 256 KiB.
    pub max_message_bytes: usize,
    /// All headers of one request. Default 16 KiB.
    pub max_header_bytes: u32,
    /// How long a unary call may take, whatever the client allows. Default 30 s.
    pub max_deadline: Duration,
    /// A PING after this long without traffic. Default 30 s.
    pub keepalive_interval: Duration,
    /// A connection that does not answer a PING for this long is closed. Default 10 s.
    pub keepalive_timeout: Duration,
    /// How long a TLS handshake may take, and after it what HTTP/2 begins with. Default 10 s.
    pub handshake: Duration,
    /// How long open calls may go on at shutdown; then their connections are cut. Default 20 s.
    pub drain: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            max_connections: 1_024,
            max_streams_per_connection: 1_024,
            max_concurrent_requests: 4_096,
            max_event_streams: 64,
            max_import_streams: 8,
            max_watchers: 64,
            watch_poll: Duration::from_millis(200),
            watch_heartbeat: Duration::from_secs(10),
            watch_buffer: 256,
            watch_patience: Duration::from_secs(30),
            stream_window_events: 512,
            stream_window_bytes: 4 * 1024 * 1024,
            max_message_bytes: 256 * 1024,
            max_header_bytes: 16 * 1024,
            max_deadline: Duration::from_secs(30),
            keepalive_interval: Duration::from_secs(30),
            keepalive_timeout: Duration::from_secs(10),
            handshake: Duration::from_secs(10),
            drain: Duration::from_secs(20),
        }
    }
}

/// When a request's caller stops waiting; in the request's extensions when there is such a time.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(pub Instant);

/// We answer a little before the deadline, for the answer takes its time: by then tonic's clients give up with CANCELLED,
/// which says nothing of why.
const ANSWER_BEFORE: Duration = Duration::from_millis(2);

/// Deadlines and load shedding.
#[derive(Clone)]
pub struct LimitsLayer {
    max_deadline: Duration,
    permits: Arc<Semaphore>,
    runtime: Runtime,
}

impl LimitsLayer {
    /// `permits` are shared by all layers with the same ones.
    #[must_use]
    pub fn new(max_deadline: Duration, permits: Arc<Semaphore>, runtime: Runtime) -> Self {
        Self { max_deadline, permits, runtime }
    }
}

impl<S> Layer<S> for LimitsLayer {
    type Service = Limited<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Limited { inner, limits: self.clone() }
    }
}

/// See [`LimitsLayer`].
#[derive(Clone)]
pub struct Limited<S> {
    inner: S,
    limits: LimitsLayer,
}

impl<S, B> Service<Request<B>> for Limited<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let path = request.uri().path();
        let (health, stream) = (scopes::is_health(path), scopes::is_stream(path));
        let asked = grpc_timeout(request.headers()).map(|asked| asked.saturating_sub(ANSWER_BEFORE));
        let LimitsLayer { max_deadline, permits, runtime } = self.limits.clone();
        let allowed = match (asked, stream) {
            (asked, true) => asked,
            (asked, false) => Some(asked.map_or(max_deadline, |asked| asked.min(max_deadline))),
        };
        let deadline = allowed.map(|allowed| Deadline(runtime.instant() + allowed));
        if let Some(deadline) = deadline {
            request.extensions_mut().insert(deadline);
        }
        let permit = if health { None } else { Some(permits.try_acquire_owned()) };
        let answer = match permit.transpose() {
            Ok(permit) => Ok((self.inner.call(request), permit)),
            Err(_) => Err(ApiError::Overloaded),
        };
        Box::pin(async move {
            let refused = |error: ApiError| Ok(status::status(&error, &runtime).into_http());
            // Held until there is an answer.
            let (answer, _permit) = match answer {
                Ok(begun) => begun,
                Err(overloaded) => return refused(overloaded),
            };
            match deadline {
                None => answer.await,
                Some(Deadline(at)) => tokio::select! {
                    biased;
                    answer = answer => answer,
                    () = runtime.sleep_until(at) => refused(ApiError::DeadlineExceeded),
                },
            }
        })
    }
}

/// `grpc-timeout`: at most 8 digits and a unit. A malformed one counts as none, as the specification's servers do.
fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3_600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_the_specification_says() {
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", text.parse().expect("a header"));
            grpc_timeout(&headers)
        };
        assert_eq!(read("5S"), Some(Duration::from_secs(5)));
        assert_eq!(read("99999999H"), Some(Duration::from_secs(99_999_999 * 3_600)));
        assert_eq!(read("250m"), Some(Duration::from_millis(250)));
        for wrong in ["", "S", "5", "5x", "-5S", "123456789S", "1.5S"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }
}
