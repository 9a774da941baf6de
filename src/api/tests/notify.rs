//! NotifyEvent's short way against tonic's, call by call: whatever comes, both answer the same.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::StreamExt as _;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use prost::Message as _;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use tower::Service;

use super::harness::{TestServer, comment};
use crate::api::limits::ServerLimits;
use crate::api::notify::Notify;
use crate::api::proto::push_service_server::{PushServiceServer, SERVICE_NAME};
use crate::api::proto::{NotifyEventRequest, NotifyEventResponse};
use crate::api::push_service::PushApi;

const MAX_MESSAGE_BYTES: usize = 4_096;

/// Tonic's server, and how many calls it was given.
#[derive(Clone)]
struct ByTonic {
    server: PushServiceServer<PushApi>,
    calls: Arc<AtomicUsize>,
}

impl NamedService for ByTonic {
    const NAME: &'static str = SERVICE_NAME;
}

impl Service<Request<Body>> for ByTonic {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = <PushServiceServer<PushApi> as Service<Request<Body>>>::Future;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.server.call(request)
    }
}

struct Both {
    server: TestServer,
    ours: Notify<ByTonic>,
    tonic: ByTonic,
}

/// All that a caller is told.
#[derive(PartialEq, Debug)]
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    data: Bytes,
    trailers: Option<HeaderMap>,
}

impl Answer {
    /// `grpc-status`.
    fn code(&self) -> Option<&str> {
        let headers = self.trailers.as_ref().unwrap_or(&self.headers);
        headers.get("grpc-status").map(|code| code.to_str().expect("ASCII"))
    }
}

impl Both {
    async fn start() -> Self {
        let server = TestServer::start().await;
        let (service, keys, limits, _) = server.parts();
        let places = || Arc::new(Semaphore::new(1));
        let limits = ServerLimits { max_message_bytes: MAX_MESSAGE_BYTES, ..limits };
        let api = PushApi::new(service, keys, places(), places(), places(), &limits, CancellationToken::new());
        let api = Arc::new(api);
        let tonic = PushServiceServer::from_arc(Arc::clone(&api)).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let tonic = ByTonic { server: tonic, calls: Arc::default() };
        Self { server, ours: Notify::new(api, MAX_MESSAGE_BYTES, tonic.clone()), tonic }
    }

    fn request(&self, call: &Call) -> Request<Body> {
        let frames = call.frames.clone().into_iter().map(|frame| match frame {
            Sent::Data(data) => Ok(Frame::data(data)),
            Sent::Trailers(trailers) => Ok(Frame::trailers(trailers)),
            Sent::Broken => Err(Status::internal("the connection broke")),
        });
        // They come one by one.
        let frames = tokio_stream::iter(frames).then(|frame| async {
            tokio::task::yield_now().await;
            frame
        });
        let mut request = Request::new(Body::new(StreamBody::new(Box::pin(frames))));
        *request.uri_mut() = format!("/{SERVICE_NAME}/NotifyEvent").parse().expect("a path");
        if let Some(encoding) = call.encoding {
            request.headers_mut().insert("grpc-encoding", HeaderValue::from_static(encoding));
        }
        let caller = self.server.keys.authenticate(None, None, self.server.runtime.now());
        request.extensions_mut().insert(caller.expect("no keys are configured"));
        request
    }

    /// For the first time: the answers that follow say so, and are alike.
    async fn tell(&mut self, message: &[u8]) {
        let call = Call::of("the first time", vec![Sent::Data(whole(message))]);
        assert_eq!(read(self.tonic.call(self.request(&call)).await).await.code(), Some("0"));
    }

    /// Both answers are this one; and whether tonic's server gave ours.
    async fn answer(&mut self, call: &Call) -> (Answer, bool) {
        let (ours, tonic) = (self.request(call), self.request(call));
        let expected = read(self.tonic.call(tonic).await).await;
        let before = self.tonic.calls.load(Ordering::Relaxed);
        let answer = read(self.ours.call(ours).await).await;
        assert_eq!(answer, expected, "{}", call.what);
        (answer, self.tonic.calls.load(Ordering::Relaxed) > before)
    }
}

async fn read(answered: Result<Response<Body>, Infallible>) -> Answer {
    let Ok(response) = answered;
    let (head, body) = response.into_parts();
    let body = body.collect().await.expect("an answer");
    let trailers = body.trailers().cloned();
    Answer { status: head.status, headers: head.headers, data: body.to_bytes(), trailers }
}

#[derive(Clone)]
enum Sent {
    Data(Bytes),
    Trailers(HeaderMap),
    Broken,
}

struct Call {
    what: &'static str,
    frames: Vec<Sent>,
    encoding: Option<&'static str>,
}

impl Call {
    fn of(what: &'static str, frames: Vec<Sent>) -> Self {
        Self { what, frames, encoding: None }
    }
}

/// As it goes over the wire; `length` and `compressed` may be a lie.
fn framed(message: &[u8], length: usize, compressed: u8) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(compressed);
    frame.put_u32(u32::try_from(length).expect("it is small"));
    frame.put_slice(message);
    frame.freeze()
}

fn whole(message: &[u8]) -> Bytes {
    framed(message, message.len(), 0)
}

/// An event that is the same whenever it is told.
fn once() -> NotifyEventRequest {
    NotifyEventRequest { idempotency_key: "once".to_owned(), ..comment(&["ann"]) }
}

#[tokio::test]
async fn what_is_simple_goes_the_short_way_and_answers_as_tonic_does() {
    let mut both = Both::start().await;
    let message = once().encode_to_vec();
    let invalid = NotifyEventRequest { event_type: String::new(), subject: "a\nb".to_owned(), ..once() };
    let empty = || Sent::Data(Bytes::new());
    both.tell(&message).await;
    for (code, call) in [
        ("0", Call::of("a message", vec![Sent::Data(whole(&message))])),
        ("0", Call::of("empty frames about it", vec![empty(), Sent::Data(whole(&message)), empty()])),
        ("3", Call::of("an invalid event", vec![Sent::Data(whole(&invalid.encode_to_vec()))])),
        ("3", Call::of("an event of defaults", vec![Sent::Data(whole(&[]))])),
        ("3", Call::of("what is no message", vec![Sent::Data(whole(b"\x0a\xffgarbage"))])),
        ("3", Call::of("the largest that is none", vec![Sent::Data(whole(&[0; MAX_MESSAGE_BYTES]))])),
    ] {
        let (answer, by_tonic) = both.answer(&call).await;
        assert_eq!(answer.code(), Some(code), "{}: {answer:?}", call.what);
        assert!(!by_tonic, "{}", call.what);
        if code == "0" {
            let accepted = NotifyEventResponse::decode(answer.data.slice(5..)).expect("an answer");
            assert_eq!(accepted.duplicate, Some(true), "{}", call.what);
        }
    }
    both.server.stop().await.expect("it stops");
}

#[tokio::test]
async fn whatever_else_comes_is_tonics_to_answer() {
    let mut both = Both::start().await;
    let message = once().encode_to_vec();
    let (head, tail) = message.split_at(9);
    let data = |bytes: &[u8]| Sent::Data(Bytes::copy_from_slice(bytes));
    let large = vec![0; MAX_MESSAGE_BYTES + 1];
    let trailers = HeaderMap::from_iter([("x-late".parse().expect("a name"), HeaderValue::from_static("yes"))]);
    let mut torn = framed(head, message.len(), 0).to_vec();
    let first = torn.split_off(3);
    let calls = [
        ("0", Call::of("a message in two frames", vec![Sent::Data(framed(head, message.len(), 0)), data(tail)])),
        ("0", Call::of("a torn prefix", vec![data(&torn), data(&first), data(tail)])),
        ("0", Call::of("a second message", vec![Sent::Data(whole(&message)), Sent::Data(whole(&message))])),
        ("0", Call::of("trailers", vec![Sent::Data(whole(&message)), Sent::Trailers(trailers)])),
        ("3", Call::of("two in a frame, one torn", vec![data(&[whole(&message), whole(&message[..4])].concat())])),
        ("13", Call::of("nothing", vec![])),
        ("13", Call::of("half of a message", vec![Sent::Data(framed(head, message.len(), 0))])),
        ("13", Call::of("half of a prefix", vec![data(&[0, 0, 0])])),
        ("13", Call::of("a flag without an encoding", vec![Sent::Data(framed(&message, message.len(), 1))])),
        ("13", Call::of("a flag that is none", vec![Sent::Data(framed(&message, message.len(), 7))])),
        ("11", Call::of("a message too large", vec![Sent::Data(whole(&large))])),
        ("13", Call::of("a broken connection", vec![Sent::Data(whole(&message)), Sent::Broken])),
        ("13", Call::of("one that broke before", vec![Sent::Broken])),
        ("12", Call { encoding: Some("gzip"), ..Call::of("gzip", vec![Sent::Data(whole(&message))]) }),
        ("0", Call { encoding: Some("identity"), ..Call::of("identity", vec![Sent::Data(whole(&message))]) }),
    ];
    both.tell(&message).await;
    for (code, call) in calls {
        let (answer, by_tonic) = both.answer(&call).await;
        assert_eq!(answer.code(), Some(code), "{}: {answer:?}", call.what);
        assert!(by_tonic, "{}", call.what);
    }
    both.server.stop().await.expect("it stops");
}
