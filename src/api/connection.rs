//! One connection: HTTP/2, whose calls are answered by the services.
//!
//! The calls are polled by the connection's own task, so that what a commit of the store answers leaves together; with a task
//! for each call, as hyper has them, every answer goes through two more wake-ups.
//!
//! What is guaranteed. A call ends when its caller resets it or the connection ends. A call that panics is answered INTERNAL
//! and harms no other. A caller that reads nothing holds up its own calls and no more than [`SEND_BUFFER`] and a message each.
//! A connection of which nothing was heard for [`ServerLimits::keepalive_interval`] is asked for a sign of life, and ends
//! without one. At shutdown callers are told, and what is open goes on until it is cut.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
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
use tokio::task::unconstrained;
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
    /// Callers are told to begin nothing new.
    pub ends: CancellationToken,
    /// What is open by then ends.
    pub cut: CancellationToken,
}

/// Something of a connection happened.
enum Event {
    Answered,
    ShuttingDown,
    /// Nothing was heard of the caller, or the drain is over.
    Over,
}

/// Until the connection ends. `services` never have to be waited for.
pub(super) async fn serve<L, S>(link: L, mut services: S, terms: Terms)
where
    L: Link,
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    let Terms { limits, runtime, ends, cut } = terms;
    let (heard, certificate) = (link.heard(), link.certificate());
    let greeting = h2::server::Builder::new()
        .max_concurrent_streams(limits.max_streams_per_connection)
        .max_header_list_size(limits.max_header_bytes)
        .initial_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_send_buffer_size(SEND_BUFFER)
        .handshake(link);
    let greeting = runtime.timeout(limits.handshake, cut.run_until_cancelled(greeting));
    let mut connection: Connection<L, Bytes> = match greeting.await.flatten() {
        Some(Ok(connection)) => connection,
        Some(Err(error)) => return tracing::debug!(%error, "what was connected does not speak HTTP/2"),
        None => return tracing::debug!("what was connected says nothing"),
    };
    let mut work: FuturesUnordered<Either<_, BoxFuture<'static, Event>>> = FuturesUnordered::new();
    if let Some(pings) = connection.ping_pong() {
        work.push(Either::Right(listen(pings, heard, limits, runtime.clone()).boxed()));
    }
    work.push(Either::Right(ends.cancelled_owned().map(|()| Event::ShuttingDown).boxed()));
    work.push(Either::Right(cut.cancelled_owned().map(|()| Event::Over).boxed()));
    poll_fn(|cx| {
        loop {
            // First, for what was answered is written by the look at the connection that follows. Outside tokio's budget, which is
            // one task's: a hundred answers would use it up, and leave nothing for writing them. What calls may do in one turn is
            // bounded by the connection's windows.
            let mut has_moved = false;
            while let Poll::Ready(Some(event)) = pin!(unconstrained(work.next())).poll(cx) {
                has_moved = true;
                match event {
                    Event::Answered => {}
                    Event::ShuttingDown => connection.graceful_shutdown(),
                    Event::Over => return Poll::Ready(()),
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
            return Event::Over;
        }
        // Its answer is no traffic.
        heard.take();
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
    // Boxed: a call that waits for its answer needs no room for sending it, and hundreds wait.
    let sending = AssertUnwindSafe(send(&mut respond, response).boxed()).catch_unwind().await;
    let broken = match sending {
        Ok(Ok(())) => return Event::Answered,
        Ok(Err(error)) => error.to_string(),
        Err(_) => "it panicked".to_owned(),
    };
    tracing::debug!(error = broken, "an answer broke off");
    // Nothing, where the caller or the connection is gone.
    respond.send_reset(Reason::INTERNAL_ERROR);
    Event::Answered
}

type SendError = Box<dyn std::error::Error + Send + Sync>;

async fn send(respond: &mut SendResponse<Bytes>, response: Response<Body>) -> Result<(), SendError> {
    let (head, mut body) = response.into_parts();
    let head = Response::from_parts(head, ());
    if body.is_end_stream() {
        respond.send_response(head, true)?;
        return Ok(());
    }
    let mut stream = respond.send_response(head, false)?;
    // Room is asked for only when there is something to send: a stream that waits keeps none of the connection's from others.
    while let Some(frame) = poll_fn(|cx| next(&mut stream, &mut body, cx)).await {
        match frame?.into_data().map_err(Frame::into_trailers) {
            Ok(data) => {
                if !data.is_empty() && !room(&mut stream).await {
                    return Ok(());
                }
                stream.send_data(data, false)?;
            }
            Err(Ok(trailers)) => return Ok(stream.send_trailers(trailers)?),
            Err(Err(_)) => {}
        }
    }
    // Without trailers, or the caller does not wait any more, who is past hearing of it.
    stream.send_data(Bytes::new(), true).or(Ok(()))
}

/// `None`: there is no more, or nobody waits for it.
fn next(
    stream: &mut SendStream<Bytes>,
    body: &mut Body,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<Frame<Bytes>, tonic::Status>>> {
    match Pin::new(body).poll_frame(cx) {
        Poll::Pending if stream.poll_reset(cx).is_ready() => Poll::Ready(None),
        polled => polled,
    }
}

/// Until the caller has any room: a frame may be larger, and the next one waits. `false`: nobody waits for it.
async fn room(stream: &mut SendStream<Bytes>) -> bool {
    stream.reserve_capacity(1);
    while stream.capacity() == 0 {
        if !matches!(poll_fn(|cx| stream.poll_capacity(cx)).await, Some(Ok(_))) {
            return false;
        }
    }
    true
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
