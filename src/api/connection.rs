//! One connection: HTTP/2, whose calls are answered by the services.
//!
//! The calls are polled by the connection's own task. What a commit of the store answers wakes that task once, and leaves
//! together; with a task for each call, as hyper has them, every answer goes through two more wake-ups, and a call costs half
//! as much again.
//!
//! What is guaranteed. A call ends when its caller resets it or the connection ends. A call that panics is answered INTERNAL
//! and harms no other. A caller that reads nothing holds up its own calls and no more than [`SEND_BUFFER`] each. A
//! connection of which nothing was heard for [`ServerLimits::keepalive_interval`] is asked for a sign of life, and ends
//! without one. At shutdown what is open goes on, and nothing new begins.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::StreamExt as _;
use futures_util::future::{BoxFuture, Either};
use futures_util::stream::FuturesUnordered;
use h2::server::{Connection, SendResponse};
use h2::{PingPong, Reason, RecvStream, SendStream};
use http::{Request, Response};
use http_body::{Body as _, Frame};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tower::Service;

use crate::runtime::Runtime;

use super::incoming::{Heard, Link};
use super::limits::ServerLimits;
use super::status::{self, ApiError};

/// What callers of one connection may send ahead of being read, in all its calls together.
const WINDOW: u32 = 1024 * 1024;
/// Of one call's answers, waiting for the caller to read.
const SEND_BUFFER: usize = 400 * 1024;

/// What every connection of a server shares.
#[derive(Clone)]
pub(super) struct Terms {
    pub limits: ServerLimits,
    pub runtime: Runtime,
    /// Nothing new begins from then on.
    pub ends: CancellationToken,
}

/// Something of a connection happened.
enum Event {
    Answered,
    /// Nothing was heard of the caller.
    Silent,
    ShuttingDown,
}

/// Until the connection ends. `services` never have to be waited for.
pub(super) async fn serve<L, S>(link: L, mut services: S, terms: Terms)
where
    L: Link,
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    let Terms { limits, runtime, ends } = terms;
    let (heard, certificate) = (link.heard(), link.certificate());
    let greeting = h2::server::Builder::new()
        .max_concurrent_streams(limits.max_streams_per_connection)
        .max_header_list_size(limits.max_header_bytes)
        .initial_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_send_buffer_size(SEND_BUFFER)
        .handshake(link);
    let mut connection: Connection<L, Bytes> = match runtime.timeout(limits.handshake, greeting).await {
        Some(Ok(connection)) => connection,
        Some(Err(error)) => return tracing::debug!(%error, "what was connected does not speak HTTP/2"),
        None => return tracing::debug!("what was connected says nothing"),
    };
    let mut work: FuturesUnordered<Either<_, BoxFuture<'static, Event>>> = FuturesUnordered::new();
    if let Some(pings) = connection.ping_pong() {
        work.push(Either::Right(listen(pings, heard, limits, runtime.clone()).boxed()));
    }
    work.push(Either::Right(ends.cancelled_owned().map(|()| Event::ShuttingDown).boxed()));
    poll_fn(|cx| {
        loop {
            // First, for what was answered is written by the look at the connection that follows.
            let mut has_moved = false;
            while let Poll::Ready(Some(event)) = work.poll_next_unpin(cx) {
                has_moved = true;
                match event {
                    Event::Answered => {}
                    Event::Silent => return Poll::Ready(()),
                    Event::ShuttingDown => connection.graceful_shutdown(),
                }
            }
            while let Poll::Ready(accepted) = connection.poll_accept(cx) {
                has_moved = true;
                let (request, respond) = match accepted {
                    Some(Ok(call)) => call,
                    Some(Err(error)) => {
                        tracing::debug!(%error, "a connection broke");
                        return Poll::Ready(());
                    }
                    None => return Poll::Ready(()),
                };
                let mut request = request.map(|body| Body::new(Incoming(body)));
                if let Some(certificate) = &certificate {
                    request.extensions_mut().insert(certificate.clone());
                }
                let _always = services.poll_ready(cx);
                // Layers decide and log already when called.
                let call = catch_unwind(AssertUnwindSafe(|| services.call(request)));
                work.push(Either::Left(answer(call.ok(), respond, runtime.clone())));
            }
            if !has_moved {
                return Poll::Pending;
            }
        }
    })
    .await;
}

/// Until the caller gives no sign of life.
async fn listen(mut pings: PingPong, heard: Heard, limits: ServerLimits, runtime: Runtime) -> Event {
    loop {
        runtime.sleep(limits.keepalive_interval).await;
        if heard.take() {
            continue;
        }
        let answer = runtime.timeout(limits.keepalive_timeout, pings.ping(h2::Ping::opaque())).await;
        if !matches!(answer, Some(Ok(_))) {
            tracing::debug!("a caller that gives no sign of life is let go");
            return Event::Silent;
        }
    }
}

/// `call`: `None` if it panicked already.
async fn answer<F>(call: Option<F>, mut respond: SendResponse<Bytes>, runtime: Runtime) -> Event
where
    F: Future<Output = Result<Response<Body>, Infallible>>,
{
    let called = async {
        match call {
            Some(call) => AssertUnwindSafe(call).catch_unwind().await.ok(),
            None => None,
        }
    };
    let response = tokio::select! {
        biased;
        response = called => response,
        // The caller does not wait any more.
        _ = poll_fn(|cx| respond.poll_reset(cx)) => return Event::Answered,
    };
    let response = match response {
        Some(Ok(response)) => response,
        None => status::status(&ApiError::Internal("a call panicked".to_owned()), &runtime).into_http(),
    };
    match AssertUnwindSafe(send(respond, response)).catch_unwind().await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "an answer could not be sent"),
        // Dropped, its stream is reset.
        Err(_) => tracing::error!("an answer panicked while it was sent"),
    }
    Event::Answered
}

async fn send(mut respond: SendResponse<Bytes>, response: Response<Body>) -> Result<(), h2::Error> {
    let (head, mut body) = response.into_parts();
    let head = Response::from_parts(head, ());
    if body.is_end_stream() {
        respond.send_response(head, true)?;
        return Ok(());
    }
    let mut stream = respond.send_response(head, false)?;
    while let Some(frame) = poll_fn(|cx| next(&mut stream, &mut body, cx)).await {
        let frame = match frame {
            Ok(frame) => frame,
            Err(status) => {
                tracing::debug!(%status, "an answer broke off");
                stream.send_reset(Reason::INTERNAL_ERROR);
                return Ok(());
            }
        };
        match frame.into_data().map_err(Frame::into_trailers) {
            Ok(data) => stream.send_data(data, false)?,
            Err(Ok(trailers)) => return stream.send_trailers(trailers),
            Err(Err(_)) => {}
        }
    }
    // Without trailers, or the caller does not wait any more, who is past hearing of it.
    stream.send_data(Bytes::new(), true).or(Ok(()))
}

/// Once the caller has room for it. `None`: there is no more, or nobody waits for it.
fn next(
    stream: &mut SendStream<Bytes>,
    body: &mut Body,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<Frame<Bytes>, tonic::Status>>> {
    // Any will do: a frame is small, and the next waits until the caller has read some of what came before.
    stream.reserve_capacity(1);
    while stream.capacity() == 0 {
        if !matches!(ready!(stream.poll_capacity(cx)), Some(Ok(_))) {
            return Poll::Ready(None);
        }
    }
    match Pin::new(body).poll_frame(cx) {
        Poll::Pending if stream.poll_reset(cx).is_ready() => Poll::Ready(None),
        polled => polled,
    }
}

/// The message, or messages, of a call.
struct Incoming(RecvStream);

impl http_body::Body for Incoming {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        if let Some(data) = ready!(self.0.poll_data(cx)) {
            let data = data?;
            // It is the reader's now, who bounds what it holds.
            self.0.flow_control().release_capacity(data.len())?;
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        Poll::Ready(ready!(self.0.poll_trailers(cx))?.map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }
}
