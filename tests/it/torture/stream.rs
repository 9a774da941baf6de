//! Backends with the right retry rule over NotifyEvents: whatever is unanswered when a stream ends is asked again over the
//! next one, with the same key, at whichever replica answers.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nudged::api::proto::notify_events_response::Outcome;
use nudged::api::proto::push_service_client::PushServiceClient;
use nudged::api::proto::{Content, NotifyEventRequest, NotifyEventsRequest};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;
use tonic::{Code, Status};

use super::super::server::event;
use super::ledger::Ledger;

/// Unanswered events of a stream.
const WINDOW: usize = 256;
/// Deliveries that may be under way before the callers wait: bounds what a leg's end waits for.
const AHEAD: u64 = 20_000;
/// After a stream broke, or was told to wait.
const PAUSE: Duration = Duration::from_millis(10);

/// What all streams of a leg share.
pub struct Callers {
    pub ledger: Mutex<Ledger>,
    next: AtomicU64,
    stop: AtomicBool,
}

pub struct Load {
    pub callers: Arc<Callers>,
    streams: Vec<JoinHandle<()>>,
}

impl Load {
    pub fn start(addresses: &[String], streams: usize) -> Self {
        let callers =
            Arc::new(Callers { ledger: Mutex::default(), next: AtomicU64::new(0), stop: AtomicBool::new(false) });
        let stream = |number: usize| tokio::spawn(stream(addresses.to_vec(), number, Arc::clone(&callers)));
        let streams = (0..streams).map(stream).collect();
        Self { callers, streams }
    }

    /// No new events; those that were asked are asked until they are answered.
    pub async fn finish(self) {
        self.callers.stop.store(true, Ordering::Relaxed);
        for stream in self.streams {
            stream.await.unwrap();
        }
    }
}

impl Callers {
    pub fn acknowledged(&self) -> u64 {
        self.ledger.lock().unwrap().acknowledged()
    }

    /// The next event, unless enough is under way.
    fn begin(&self) -> Option<u64> {
        if self.stop.load(Ordering::Relaxed) {
            return None;
        }
        let asked = 2 * self.next.load(Ordering::Relaxed);
        if asked > self.ledger.lock().unwrap().pushes() + AHEAD {
            return None;
        }
        Some(self.next.fetch_add(1, Ordering::Relaxed))
    }
}

fn request(number: u64) -> NotifyEventsRequest {
    let body = format!("보리: 너무 귀여워요! <{number}>");
    let content = Content { title: Some("새 댓글".into()), body: Some(body), ..Content::default() };
    let event = event(&format!("comment-{number}"), &[&super::user(number)]);
    NotifyEventsRequest { sequence: number, event: Some(NotifyEventRequest { content: Some(content), ..event }) }
}

async fn stream(addresses: Vec<String>, first: usize, callers: Arc<Callers>) {
    let mut clients: Vec<_> = addresses
        .into_iter()
        .map(|address| PushServiceClient::new(Endpoint::from_shared(address).unwrap().connect_lazy()))
        .collect();
    let mut unanswered = BTreeSet::new();
    let mut at = first % clients.len();
    while !(callers.stop.load(Ordering::Relaxed) && unanswered.is_empty()) {
        if let Err(status) = session(&mut clients[at], &mut unanswered, &callers).await {
            use Code::{Cancelled, DeadlineExceeded, Internal, ResourceExhausted, Unavailable, Unknown};
            let expected = [Unavailable, Unknown, Cancelled, Internal, DeadlineExceeded, ResourceExhausted];
            assert!(expected.contains(&status.code()), "{status:?}");
            at = (at + 1) % clients.len();
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// One stream, to its end or ours.
async fn session(
    client: &mut PushServiceClient<tonic::transport::Channel>,
    unanswered: &mut BTreeSet<u64>,
    callers: &Callers,
) -> Result<(), Status> {
    let (events, outgoing) = mpsc::channel(WINDOW);
    for number in &*unanswered {
        events.try_send(request(*number)).expect("the window is the channel's");
    }
    let mut answers = client.notify_events(ReceiverStream::new(outgoing)).await?.into_inner();
    loop {
        while unanswered.len() < WINDOW
            && let Some(number) = callers.begin()
        {
            unanswered.insert(number);
            if events.try_send(request(number)).is_err() {
                return Ok(());
            }
        }
        if unanswered.is_empty() && callers.stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        let answer = tokio::select! {
            answer = answers.message() => answer?,
            () = tokio::time::sleep(PAUSE) => continue,
        };
        let Some(answer) = answer else { return Ok(()) };
        match answer.outcome {
            Some(Outcome::Result(result)) => {
                assert!(unanswered.remove(&answer.sequence), "an answer to nothing: {}", answer.sequence);
                callers.ledger.lock().unwrap().acknowledge(answer.sequence, &result.notification_id);
            }
            // All that is unanswered is asked again over a new stream.
            Some(Outcome::Error(error)) => return Err(Status::new(Code::from_i32(error.code), error.message)),
            None => return Err(Status::unknown("an answer without an outcome")),
        }
    }
}
