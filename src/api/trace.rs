//! W3C trace context: a caller's `traceparent` gives its `trace_id` to every log line of that request and, where traces
//! are exported, is the parent of the call's span.
//!
//! Deliveries are no spans, for one event may be a million of them. Without the header, or with one that is not well
//! formed, and without an exporter, nothing is added.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::{HeaderMap, Request, Response};
use tower::Service;
use tower_layer::Layer;
use tracing::Span;
use tracing::instrument::{Instrument as _, Instrumented};

use crate::telemetry::traces::{CallSpan, Parent};

const TRACEPARENT: &str = "traceparent";
const GRPC_STATUS: &str = "grpc-status";

/// Puts requests that bring a trace, or begin one, into a span with its ids.
#[derive(Clone, Copy)]
pub struct TraceLayer;

impl<S> Layer<S> for TraceLayer {
    type Service = Traced<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Traced { inner }
    }
}

/// See [`TraceLayer`].
#[derive(Clone)]
pub struct Traced<S> {
    inner: S,
}

impl<S, B, R> Service<Request<B>> for Traced<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Unpin,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Answer<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let given = trace(request.headers());
        let call = CallSpan::start(request.uri().path(), given.and_then(parent));
        let span = match (&call, given) {
            // The caller's trace and, as the parent of what is logged, our span in it.
            (Some(call), _) => {
                let (trace_id, parent_id) = call.ids();
                tracing::info_span!("request", path = request.uri().path(), trace_id, parent_id)
            }
            (None, Some(Given { trace_id, parent_id, .. })) => {
                tracing::info_span!("request", path = request.uri().path(), trace_id, parent_id)
            }
            (None, None) => Span::none(),
        };
        if let Some(call) = &call {
            request.extensions_mut().insert(call.clone());
        }
        // Layers below decide and log already when called.
        let inner = span.in_scope(|| self.inner.call(request)).instrument(span);
        Answer { inner, call }
    }
}

/// Tells the call's span what was answered. A stream's span ends when it is opened.
pub struct Answer<F> {
    inner: Instrumented<F>,
    call: Option<CallSpan>,
}

impl<F, R, E> Future for Answer<F>
where
    F: Future<Output = Result<Response<R>, E>> + Unpin,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let answer = ready!(Pin::new(&mut self.inner).poll(cx));
        if let (Some(call), Ok(response)) = (self.call.take(), &answer) {
            let status = response.headers().get(GRPC_STATUS);
            // An answer with a message has its status, which is OK, behind it.
            let code = status.map_or(Some(0), |status| status.to_str().ok()?.parse().ok());
            call.answered(code.unwrap_or(2));
        }
        Poll::Ready(answer)
    }
}

/// A `traceparent`, in its own hexadecimal.
#[derive(Clone, Copy)]
struct Given<'h> {
    trace_id: &'h str,
    parent_id: &'h str,
    flags: &'h str,
}

fn parent(given: Given<'_>) -> Option<Parent> {
    Some(Parent {
        trace_id: u128::from_str_radix(given.trace_id, 16).ok()?.to_be_bytes(),
        span_id: u64::from_str_radix(given.parent_id, 16).ok()?.to_be_bytes(),
        sampled: u8::from_str_radix(given.flags, 16).ok()? & 1 == 1,
    })
}

/// Trace id and the caller's span id, of a header as <https://www.w3.org/TR/trace-context/> §3.2 has it (read
/// 2026-11-24): later versions may add parts, version ff is none, and ids of zeroes are invalid.
fn trace(headers: &HeaderMap) -> Option<Given<'_>> {
    let value = headers.get(TRACEPARENT)?.to_str().ok()?;
    let mut parts = value.split('-');
    let (version, trace_id, parent_id, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |text: &str, length: usize| {
        text.len() == length && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let shaped = hex(version, 2) && hex(trace_id, 32) && hex(parent_id, 16) && hex(flags, 2) && version != "ff";
    let complete = version != "00" || parts.next().is_none();
    let meant = [trace_id, parent_id].iter().all(|id| id.bytes().any(|byte| byte != b'0'));
    (shaped && complete && meant).then_some(Given { trace_id, parent_id, flags })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: &str) -> Option<(String, String)> {
        let mut headers = HeaderMap::new();
        headers.insert(TRACEPARENT, value.parse().expect("a header value"));
        trace(&headers).map(|given| (given.trace_id.to_owned(), given.parent_id.to_owned()))
    }

    #[test]
    fn a_well_formed_header_gives_its_ids() {
        let ids = Some(("4bf92f3577b34da6a3ce929d0e0e4736".to_owned(), "00f067aa0ba902b7".to_owned()));
        assert_eq!(read("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"), ids);
        assert_eq!(read("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-later"), ids, "a later version");
    }

    #[tokio::test]
    async fn log_lines_of_the_call_carry_the_trace() {
        let captured = crate::telemetry::capture::capture();
        let mut service = TraceLayer.layer(tower::service_fn(|_: Request<()>| {
            Box::pin(async {
                tracing::info!("inside");
                Ok::<_, std::convert::Infallible>(Response::new(()))
            })
        }));
        let header = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let traced = Request::builder().uri("/x").header(TRACEPARENT, header).body(()).expect("a request");
        service.call(traced).await.expect("it answers");
        service.call(Request::new(())).await.expect("it answers");
        let text = captured.text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].contains(r#""trace_id":"4bf92f3577b34da6a3ce929d0e0e4736""#), "{text}");
        assert!(lines[0].contains(r#""parent_id":"00f067aa0ba902b7""#), "{text}");
        assert!(!lines[1].contains("trace_id"), "{text}");
    }

    #[test]
    fn anything_else_is_left_alone() {
        for wrong in [
            "",
            "00",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
        ] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
        assert!(trace(&HeaderMap::new()).is_none());
    }
}
