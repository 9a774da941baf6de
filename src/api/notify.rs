//! NotifyEvent, read and answered without tonic's wrapping of a call.
//!
//! What backends call all day is one message that came whole, uncompressed, and one that goes back. For such a call tonic's server
//! makes a reader of streams, a buffer of its own, and a writer of streams, and passes the message from one to the other. Here
//! it is read where it lies. Whatever is not that simple goes to tonic's server with all that came: it alone knows what compression,
//! torn messages and limits come to.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::future::{BoxFuture, Either};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, header};
use http_body::{Body as _, Frame};
use prost::Message as _;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::{Code, Status};
use tower::Service;

use super::proto::{NotifyEventRequest, NotifyEventResponse};
use super::push_service::PushApi;
use super::status;

/// As <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md> has it (read 2026-12-01): whether it is compressed, and its
/// length.
const PREFIX: usize = 5;
const PATH: &str = "/nudged.v1.PushService/NotifyEvent";
const ENCODING: &str = "grpc-encoding";
const STATUS: &str = "grpc-status";
const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

type Answered = Result<Response<Body>, Infallible>;

/// NotifyEvent by a short way, the other methods of the service by theirs.
#[derive(Clone)]
pub struct Notify<S> {
    api: Arc<PushApi>,
    max_message_bytes: usize,
    service: S,
}

impl<S> Notify<S> {
    /// `service`: all methods of `api`, by tonic.
    pub fn new(api: Arc<PushApi>, max_message_bytes: usize, service: S) -> Self {
        Self { api, max_message_bytes, service }
    }
}

impl<S: NamedService> NamedService for Notify<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Notify<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Unpin,
    S::Future: Unpin,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Either<Call<S>, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if request.uri().path() != PATH || request.headers().contains_key(ENCODING) {
            return Either::Right(self.service.call(request));
        }
        let reading = Reading { request, came: Bytes::new(), notify: self.clone() };
        Either::Left(Call::Reading(Box::new(reading)))
    }
}

/// One call.
pub enum Call<S: Service<Request<Body>>> {
    /// Boxed, for calls pass from layer to layer, and most of their time they wait for the store.
    Reading(Box<Reading<S>>),
    Answering(BoxFuture<'static, Result<NotifyEventResponse, Status>>),
    /// Not so simple.
    ByTonic(S::Future),
    Done,
}

pub struct Reading<S> {
    request: Request<Body>,
    /// The only frame with anything in it.
    came: Bytes,
    notify: Notify<S>,
}

impl<S> Future for Call<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Unpin,
    S::Future: Unpin,
{
    type Output = Answered;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Answered> {
        loop {
            match &mut *self {
                Self::Reading(reading) => {
                    let frame = ready!(Pin::new(reading.request.body_mut()).poll_frame(cx));
                    if let Some(Ok(frame)) = &frame
                        && let Some(data) = frame.data_ref()
                        && (data.is_empty() || reading.came.is_empty())
                    {
                        if !data.is_empty() {
                            reading.came = data.clone();
                        }
                        continue;
                    }
                    let Self::Reading(reading) = std::mem::replace(&mut *self, Self::Done) else {
                        unreachable!("it was a moment ago")
                    };
                    *self = reading.read(frame);
                }
                Self::Answering(answer) => {
                    let response = match ready!(answer.as_mut().poll(cx)) {
                        Ok(message) => answered(&message),
                        Err(status) => status.into_http(),
                    };
                    *self = Self::Done;
                    return Poll::Ready(Ok(response));
                }
                Self::ByTonic(answer) => return Pin::new(answer).poll(cx),
                Self::Done => unreachable!("polled after it was done"),
            }
        }
    }
}

impl<S> Reading<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone,
{
    /// `last`: what came after the frame with the message; `None` where the caller said all.
    fn read(self, last: Option<Result<Frame<Bytes>, Status>>) -> Call<S> {
        let Self { request, came, mut notify } = self;
        let message = last.is_none().then(|| whole(&came, notify.max_message_bytes)).flatten();
        let Some(message) = message else {
            let first = (!came.is_empty()).then(|| Ok(Frame::data(came)));
            let ahead = first.into_iter().chain(last).collect();
            return Call::ByTonic(notify.service.call(request.map(|rest| Body::new(Prefixed { ahead, rest }))));
        };
        let (mut parts, _) = request.into_parts();
        Call::Answering(match NotifyEventRequest::decode(message) {
            Ok(message) => notify.api.notify(&mut parts.extensions, message),
            Err(error) => Box::pin(std::future::ready(Err(status::unreadable(&error)))),
        })
    }
}

/// The one message in it, which is not compressed and not too large.
fn whole(came: &Bytes, max_message_bytes: usize) -> Option<Bytes> {
    let (prefix, message) = came.split_first_chunk::<PREFIX>()?;
    let [compressed, length @ ..] = *prefix;
    let is_whole = compressed == 0 && u32::from_be_bytes(length) as usize == message.len();
    (is_whole && message.len() <= max_message_bytes).then(|| came.slice(PREFIX..))
}

fn answered(message: &NotifyEventResponse) -> Response<Body> {
    let length = message.encoded_len();
    let mut data = BytesMut::with_capacity(PREFIX + length);
    data.put_u8(0);
    data.put_u32(u32::try_from(length).expect("an answer is small"));
    message.encode_raw(&mut data);
    let mut response = Response::new(Body::new(Answer::Message(data.freeze())));
    *response.headers_mut() = one(header::CONTENT_TYPE, GRPC);
    response
}

/// With room for no more: it has room for six unless told.
fn one(name: HeaderName, value: HeaderValue) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(1);
    headers.insert(name, value);
    headers
}

/// One message, and that all is well.
enum Answer {
    Message(Bytes),
    Status,
    Done,
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let (frame, next) = match std::mem::replace(&mut *self, Self::Done) {
            Self::Message(message) => (Frame::data(message), Self::Status),
            Self::Status => {
                let code = HeaderValue::from(Code::Ok as u16);
                (Frame::trailers(one(HeaderName::from_static(STATUS), code)), Self::Done)
            }
            Self::Done => return Poll::Ready(None),
        };
        *self = next;
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Done)
    }
}

/// What was read already, and the rest.
struct Prefixed {
    ahead: VecDeque<Result<Frame<Bytes>, Status>>,
    rest: Body,
}

impl http_body::Body for Prefixed {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match self.ahead.pop_front() {
            Some(frame) => Poll::Ready(Some(frame)),
            None => Pin::new(&mut self.rest).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ahead.is_empty() && self.rest.is_end_stream()
    }
}
