//! One connection, spoken to in bare HTTP/2.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use h2::Reason;
use h2::client::{ResponseFuture, SendRequest};
use http::{Request, Response};
use http_body::Frame;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tower::service_fn;

use crate::api::connection::{self, Terms};
use crate::api::incoming;
use crate::api::limits::ServerLimits;
use crate::runtime::Runtime;

const SOON: Duration = Duration::from_millis(50);
/// For what certainly happens.
const LATE: Duration = Duration::from_secs(20);
/// More than any window.
const LARGE: usize = 5 * 1024 * 1024;

type Answer = BoxFuture<'static, Result<Response<Body>, Infallible>>;

/// Tells when it is dropped.
struct Told(mpsc::UnboundedSender<()>);

impl Drop for Told {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}

const FRAME: usize = 64 * 1024;

/// Frames, or one that panics.
struct Large {
    left: usize,
    panics: bool,
}

impl http_body::Body for Large {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        assert!(!self.panics, "as it was asked to");
        let Some(left) = self.left.checked_sub(FRAME) else { return Poll::Ready(None) };
        self.left = left;
        Poll::Ready(Some(Ok(Frame::data(Bytes::from(vec![7; FRAME])))))
    }
}

fn ok(body: Body) -> Answer {
    std::future::ready(Ok(Response::new(body))).boxed()
}

/// What is served: each path does what it says.
fn call(request: &Request<Body>, told: &mpsc::UnboundedSender<()>, go_on: &Arc<Semaphore>) -> Answer {
    match request.uri().path() {
        "/empty" => ok(Body::empty()),
        "/large" => ok(Body::new(Large { left: LARGE, panics: false })),
        "/panics-at-once" => panic!("as it was asked to"),
        "/panics" => async { panic!("as it was asked to") }.boxed(),
        "/panics-late" => ok(Body::new(Large { left: LARGE, panics: true })),
        "/waits" => {
            let (told, go_on) = (Told(told.clone()), Arc::clone(go_on));
            async move {
                let _told = told;
                let _going_on = go_on.acquire().await;
                Ok(Response::new(Body::empty()))
            }
            .boxed()
        }
        path => panic!("{path}"),
    }
}

struct Server {
    runtime: Runtime,
    ends: CancellationToken,
    cut: CancellationToken,
    serving: JoinHandle<()>,
    /// A call that waited is gone.
    told: mpsc::UnboundedReceiver<()>,
    go_on: Arc<Semaphore>,
}

/// A server of one connection, and its other end.
async fn serve(limits: ServerLimits) -> (Server, DuplexStream) {
    let runtime = Runtime::production();
    let (theirs, ours) = tokio::io::duplex(64 * 1024);
    let places = Arc::new(Semaphore::new(1));
    let sockets = futures_util::stream::iter([ours]);
    let mut links = std::pin::pin!(incoming::accept(sockets, places));
    let link = futures_util::StreamExt::next(&mut links).await.expect("a link");
    let (ends, cut) = (CancellationToken::new(), CancellationToken::new());
    let (tell, told) = mpsc::unbounded_channel();
    let go_on = Arc::new(Semaphore::new(0));
    let services = service_fn({
        let go_on = Arc::clone(&go_on);
        move |request| call(&request, &tell, &go_on)
    });
    let terms = Terms { limits, runtime: runtime.clone(), ends: ends.clone(), cut: cut.clone() };
    let serving = runtime.spawn(connection::serve(link, services, terms));
    (Server { runtime, ends, cut, serving, told, go_on }, theirs)
}

impl Server {
    async fn within<F: Future>(&self, future: F) -> F::Output {
        self.runtime.timeout(LATE, future).await.expect("in time")
    }

    async fn ended(self) {
        self.runtime.timeout(LATE, self.serving).await.expect("in time").expect("no panic");
    }

    /// A client, whose connection is driven until it ends.
    async fn client(&self, socket: DuplexStream) -> SendRequest<Bytes> {
        let (client, connection) = h2::client::handshake(socket).await.expect("greeted");
        drop(self.runtime.spawn(connection.map(drop)));
        client
    }
}

fn ask(client: &mut SendRequest<Bytes>, path: &str) -> ResponseFuture {
    let request = Request::builder().uri(format!("http://nudged{path}")).body(()).expect("a request");
    client.send_request(request, true).expect("open").0
}

/// The status and the length of an answer.
async fn read(answer: ResponseFuture) -> Result<(Option<String>, usize), h2::Error> {
    let (head, mut body) = answer.await?.into_parts();
    let mut length = 0;
    while let Some(data) = body.data().await {
        let data = data?;
        length += data.len();
        body.flow_control().release_capacity(data.len())?;
    }
    let status = head.headers.get("grpc-status").map(|status| status.to_str().expect("ASCII").to_owned());
    Ok((status, length))
}

#[tokio::test]
async fn a_call_that_panics_is_answered_and_harms_no_other() {
    let (server, socket) = serve(ServerLimits::default()).await;
    let mut client = server.client(socket).await;
    let waiting = ask(&mut client, "/waits");
    for path in ["/panics-at-once", "/panics"] {
        let answer = server.within(read(ask(&mut client, path))).await.expect("an answer");
        assert_eq!(answer, (Some("13".to_owned()), 0), "{path}: INTERNAL");
    }
    let error = server.within(read(ask(&mut client, "/panics-late"))).await.expect_err("its stream is reset");
    assert_eq!(error.reason(), Some(Reason::INTERNAL_ERROR), "{error}");
    server.go_on.add_permits(1);
    assert_eq!(server.within(read(waiting)).await.expect("an answer"), (None, 0));
}

#[tokio::test]
async fn a_call_ends_with_its_caller() {
    let (mut server, socket) = serve(ServerLimits::default()).await;
    let mut client = server.client(socket).await;
    let request = Request::builder().uri("http://nudged/waits").body(()).expect("a request");
    let (answer, mut stream) = client.send_request(request, false).expect("open");
    // It has arrived, for the next one has.
    server.within(read(ask(&mut client, "/empty"))).await.expect("an answer");
    assert!(server.told.try_recv().is_err(), "it waits");
    stream.send_reset(Reason::CANCEL);
    let told = server.runtime.timeout(LATE, server.told.recv()).await;
    assert_eq!(told, Some(Some(())));
    drop(answer);
}

#[tokio::test]
async fn who_reads_slowly_holds_up_their_own_call_only() {
    let (server, socket) = serve(ServerLimits::default()).await;
    let mut client = server.client(socket).await;
    let slow = server.within(ask(&mut client, "/large")).await.expect("its head");
    for _ in 0..3 {
        assert_eq!(server.within(read(ask(&mut client, "/empty"))).await.expect("an answer"), (None, 0));
    }
    let mut body = slow.into_body();
    let mut length = 0;
    while let Some(data) = server.within(body.data()).await {
        let data = data.expect("data");
        length += data.len();
        body.flow_control().release_capacity(data.len()).expect("released");
    }
    assert_eq!(length, LARGE);
}

#[tokio::test]
async fn what_is_open_at_a_shutdown_is_answered() {
    let (server, socket) = serve(ServerLimits::default()).await;
    let mut client = server.client(socket).await;
    let waiting = ask(&mut client, "/waits");
    server.within(read(ask(&mut client, "/empty"))).await.expect("an answer");
    server.ends.cancel();
    // The client hears of it.
    let refused = async {
        loop {
            match client.clone().ready().await {
                Ok(mut ready) => {
                    let request = Request::builder().uri("http://nudged/empty").body(()).expect("a request");
                    match ready.send_request(request, true) {
                        Ok((answer, _)) => drop(answer.await),
                        Err(error) => return error,
                    }
                }
                Err(error) => return error,
            }
        }
    };
    assert!(server.within(refused).await.is_go_away());
    server.go_on.add_permits(1);
    assert_eq!(server.within(read(waiting)).await.expect("an answer"), (None, 0));
    server.ended().await;
}

/// A frame is half written, so nothing is read either, and the caller reads nothing.
#[tokio::test]
async fn the_cut_ends_also_what_cannot_be_written() {
    let (server, socket) = serve(ServerLimits::default()).await;
    let mut builder = h2::client::Builder::new();
    let large = u32::try_from(LARGE).expect("it fits");
    builder.initial_window_size(large).initial_connection_window_size(large);
    let (mut client, mut connection) = builder.handshake::<_, Bytes>(socket).await.expect("greeted");
    let answer = ask(&mut client, "/large");
    let begun = server.within(futures_util::future::select(&mut connection, answer)).await;
    assert!(matches!(begun, futures_util::future::Either::Right((Ok(_), _))), "the head is there");
    // Nobody looks at the connection from now on.
    server.ends.cancel();
    assert!(server.runtime.timeout(4 * SOON, server.go_on.acquire()).await.is_none());
    assert!(!server.serving.is_finished(), "an answer is under way");
    server.cut.cancel();
    server.ended().await;
    drop((client, connection));
}

#[tokio::test]
async fn who_gives_no_sign_of_life_is_let_go() {
    // A busy machine may hold up this process for longer than SOON.
    let limits = ServerLimits { keepalive_interval: SOON, keepalive_timeout: 40 * SOON, ..ServerLimits::default() };
    let (mut server, socket) = serve(limits).await;
    let (mut client, mut connection) = h2::client::handshake(socket).await.expect("greeted");
    let waiting = ask(&mut client, "/waits");
    // It answers every PING.
    let alive = server.runtime.timeout(10 * SOON, &mut connection).await;
    assert!(alive.is_none() && !server.serving.is_finished(), "{alive:?}");
    // Nobody looks at it any more.
    let told = server.runtime.timeout(LATE, server.told.recv()).await;
    assert_eq!(told, Some(Some(())), "what it asked for ends with it");
    server.ended().await;
    drop(waiting);
}

#[tokio::test]
async fn what_does_not_speak_http2_is_let_go() {
    let limits = ServerLimits { handshake: SOON, ..ServerLimits::default() };
    for said in [&b"GET / HTTP/1.1\r\nhost: nudged\r\n\r\n"[..], b"PRI * HTTP", b""] {
        let (server, mut socket) = serve(limits).await;
        socket.write_all(said).await.expect("said");
        let mut answer = Vec::new();
        server.within(socket.read_to_end(&mut answer)).await.ok();
        server.ended().await;
    }
}
