use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Streaming};

use super::harness::*;
use crate::api::limits::ServerLimits;
use crate::api::proto::notify_events_response::Outcome;
use crate::api::proto::*;
use crate::api::scopes::Scope;

fn message(sequence: u64, event: NotifyEventRequest) -> NotifyEventsRequest {
    NotifyEventsRequest { sequence, event: Some(event) }
}

fn keyed(key: &str) -> NotifyEventRequest {
    NotifyEventRequest { idempotency_key: key.into(), ..comment(&["choco"]) }
}

async fn open(client: &mut Client) -> (mpsc::Sender<NotifyEventsRequest>, Streaming<NotifyEventsResponse>) {
    let (sender, receiver) = mpsc::channel(2_000);
    let answers = client.notify_events(ReceiverStream::new(receiver)).await.expect("a stream").into_inner();
    (sender, answers)
}

async fn rest(mut answers: Streaming<NotifyEventsResponse>) -> BTreeMap<u64, Outcome> {
    let mut outcomes = BTreeMap::new();
    while let Some(answer) = answers.message().await.expect("the stream ends with OK") {
        let before = outcomes.insert(answer.sequence, answer.outcome.expect("an outcome"));
        assert!(before.is_none(), "answered twice");
    }
    outcomes
}

fn code_of(outcome: &Outcome) -> Code {
    match outcome {
        Outcome::Result(_) => Code::Ok,
        Outcome::Error(error) => Code::from(error.code),
    }
}

#[tokio::test]
async fn a_bad_event_is_answered_and_the_stream_goes_on() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    let (sender, mut answers) = open(&mut client).await;
    // Events of one stream are worked on together, so only what was answered is first.
    sender.send(message(1, keyed("a"))).await.expect("open");
    let first = answers.message().await.expect("an answer").expect("before the end");
    let events = [
        message(2, comment(&["choco"])),
        message(3, NotifyEventRequest { app_id: "zoo".into(), ..keyed("b") }),
        NotifyEventsRequest { sequence: 4, event: None },
        message(5, NotifyEventRequest { event_type: "X".into(), idempotency_key: String::new(), ..keyed("c") }),
        message(6, keyed("a")),
        message(7, NotifyEventRequest { subject: "s".into(), ..keyed("a") }),
        message(u64::MAX, keyed("d")),
    ];
    for event in events {
        sender.send(event).await.expect("open");
    }
    drop(sender);
    let mut outcomes = rest(answers).await;
    outcomes.insert(first.sequence, first.outcome.expect("an outcome"));
    let codes: BTreeMap<u64, Code> = outcomes.iter().map(|(at, outcome)| (*at, code_of(outcome))).collect();
    let expected = [
        (1, Code::Ok),
        (2, Code::InvalidArgument),
        (3, Code::NotFound),
        (4, Code::InvalidArgument),
        (5, Code::InvalidArgument),
        (6, Code::Ok),
        (7, Code::AlreadyExists),
        (u64::MAX, Code::Ok),
    ];
    assert_eq!(codes, expected.into_iter().collect());
    let Outcome::Error(error) = &outcomes[&2] else { panic!("an error") };
    assert!(error.message.contains("idempotency_key"), "{}", error.message);
    assert!(error.details.iter().any(|detail| detail.type_url.ends_with("google.rpc.BadRequest")));
    match (&outcomes[&1], &outcomes[&6]) {
        (Outcome::Result(first), Outcome::Result(second)) => {
            assert_eq!(first.notification_id, second.notification_id);
            assert_eq!((first.duplicate, second.duplicate), (Some(false), Some(true)));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn many_events_are_all_answered_once() {
    let limits = ServerLimits { stream_window_events: 16, ..ServerLimits::default() };
    let server = TestServer::with(Setup { limits, ..Setup::default() }).await;
    let mut client = server.client().await;
    enrol(&mut client, "choco").await;
    let (sender, answers) = open(&mut client).await;
    for at in 0..1_000 {
        sender.send(message(at, keyed(&format!("k{at}")))).await.expect("open");
    }
    drop(sender);
    let outcomes = rest(answers).await;
    assert_eq!(outcomes.len(), 1_000);
    assert!(outcomes.values().all(|outcome| code_of(outcome) == Code::Ok));
}

#[tokio::test]
async fn a_shutdown_answers_everything_received_and_ends_with_ok() {
    let stall = Arc::new(Stall::default());
    let server = TestServer::with(Setup { hand_off: Arc::clone(&stall) as _, ..Setup::default() }).await;
    let mut client = server.client().await;
    enrol(&mut client, "choco").await;
    let (sender, mut answers) = open(&mut client).await;
    for at in 0..100 {
        sender.send(message(at, keyed(&format!("k{at}")))).await.expect("open");
    }
    // A bad event is answered without the store: when its answer is here, all before it have been read.
    sender.send(message(100, comment(&["choco"]))).await.expect("open");
    let first = answers.message().await.expect("open").expect("an answer");
    assert_eq!(first.sequence, 100);
    let runtime = server.runtime.clone();
    let stopping = runtime.spawn(server.stop());
    runtime.sleep(Duration::from_millis(20)).await;
    assert!(!stopping.is_finished());
    stall.let_go();
    let outcomes = rest(answers).await;
    assert_eq!(outcomes.keys().copied().collect::<Vec<_>>(), (0..100).collect::<Vec<_>>());
    stopping.await.expect("no panic").expect("stopped");
    drop(sender);
}

#[tokio::test]
async fn reading_pauses_at_the_window() {
    let stall = Arc::new(Stall::default());
    let limits = ServerLimits { stream_window_events: 4, ..ServerLimits::default() };
    let server = TestServer::with(Setup { limits, hand_off: Arc::clone(&stall) as _, ..Setup::default() }).await;
    let mut client = server.client().await;
    enrol(&mut client, "choco").await;
    let (sender, mut answers) = open(&mut client).await;
    for at in 0..4 {
        sender.send(message(at, keyed(&format!("k{at}")))).await.expect("open");
    }
    // Would be answered at once if it were read.
    sender.send(message(4, comment(&["choco"]))).await.expect("open");
    let early = server.runtime.timeout(Duration::from_millis(100), answers.message()).await;
    assert!(early.is_none(), "{early:?}");
    stall.let_go();
    drop(sender);
    assert_eq!(rest(answers).await.len(), 5);
}

#[tokio::test]
async fn streams_have_deadlines_and_are_counted() {
    let limits = ServerLimits { max_event_streams: 1, ..ServerLimits::default() };
    let server = TestServer::with(Setup { limits, ..Setup::default() }).await;
    let mut client = server.client().await;
    let (_sender, receiver) = mpsc::channel(1);
    let mut request = Request::new(ReceiverStream::new(receiver));
    request.metadata_mut().insert("grpc-timeout", "100m".parse().expect("ASCII"));
    let mut answers = client.notify_events(request).await.expect("a stream").into_inner();
    let (_other, receiver) = mpsc::channel(1);
    let refused = client.notify_events(ReceiverStream::new(receiver)).await.expect_err("one too many");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::ResourceExhausted, "TOO_MANY_STREAMS"));
    let ended = answers.message().await.expect_err("the deadline");
    assert_eq!(ended.code(), Code::DeadlineExceeded);
    drop(answers);
}

#[tokio::test]
async fn a_key_taken_away_stops_an_open_stream() {
    let server = TestServer::with(Setup { keys: vec![root_key("old")], ..Setup::default() }).await;
    let mut client = server.client_with("nk_old").await;
    let (sender, mut answers) = open(&mut client).await;
    sender.send(message(1, keyed("a"))).await.expect("open");
    let answer = answers.message().await.expect("open").expect("an answer");
    assert_eq!(code_of(&answer.outcome.expect("an outcome")), Code::Ok);
    server.keys.replace(vec![key("old", &["pets"], &[Scope::Read])]);
    sender.send(message(2, keyed("b"))).await.expect("open");
    let answer = answers.message().await.expect("open").expect("an answer");
    assert_eq!(code_of(&answer.outcome.expect("an outcome")), Code::PermissionDenied);
    server.keys.replace(vec![root_key("new")]);
    sender.send(message(3, keyed("c"))).await.expect("open");
    let answer = answers.message().await.expect("open").expect("an answer");
    assert_eq!(code_of(&answer.outcome.expect("an outcome")), Code::Unauthenticated);
}

#[tokio::test]
async fn a_message_too_large_ends_the_stream_after_the_answers() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    let (sender, mut answers) = open(&mut client).await;
    sender.send(message(1, keyed("a"))).await.expect("open");
    let large = NotifyEventRequest { subject: "x".repeat(256 * 1024), ..keyed("b") };
    sender.send(message(2, large)).await.expect("open");
    let answer = answers.message().await.expect("open").expect("an answer");
    assert_eq!((answer.sequence, code_of(&answer.outcome.expect("an outcome"))), (1, Code::Ok));
    assert_eq!(answers.message().await.expect_err("ended").code(), Code::OutOfRange);
}
