//! Calls by the thousand through real gRPC.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, bail};
use prost_types::{Struct, Value, value::Kind};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::Channel;

use super::world::{APP, TOPIC};
use crate::api::proto::notify_events_response::Outcome;
use crate::api::proto::push_service_client::PushServiceClient;
use crate::api::proto::{Content, NotifyEventRequest, NotifyEventsRequest};
use crate::runtime::Runtime;

pub type Client = PushServiceClient<Channel>;

/// Unanswered events of one stream, as the server allows.
const WINDOW: usize = 512;
/// Callers that share a connection.
pub const CALLERS_PER_CONNECTION: usize = 64;

/// How long calls took, in microseconds, ascending.
#[derive(Clone, Default)]
pub struct Latencies(Vec<u64>);

impl Latencies {
    pub fn new(mut micros: Vec<u64>) -> Self {
        micros.sort_unstable();
        Self(micros)
    }

    /// `per_mille`: 500 for the median.
    pub fn at(&self, per_mille: usize) -> u64 {
        let rank = (self.0.len() * per_mille).div_ceil(1000).max(1);
        self.0.get(rank - 1).copied().unwrap_or(0)
    }

    pub fn max(&self) -> u64 {
        self.0.last().copied().unwrap_or(0)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// Repeats a text until it is `bytes` long, at a character's end.
fn filled(text: &str, bytes: usize) -> String {
    let mut filled: String = text
        .chars()
        .cycle()
        .scan(0, |length, c| {
            *length += c.len_utf8();
            (*length <= bytes).then_some(c)
        })
        .collect();
    if filled.is_empty() {
        filled.push('!');
    }
    filled
}

/// What a community app sends. `sent_us` is measured by the fake provider.
fn content(payload: usize) -> Content {
    Content {
        title: Some("새 댓글이 달렸어요".to_owned()),
        body: Some(filled("보리: 우리 집 초코도 이렇게 자요! 너무 귀여워서 한참 봤어요. ", payload)),
        link: Some("ifriendspet://post/8231".to_owned()),
        ..Content::default()
    }
}

fn data(sent_us: Option<i64>) -> Struct {
    #[expect(clippy::cast_precision_loss, reason = "microseconds since 1970 fit 53 bits until 2255")]
    let number = |value: i64| Value { kind: Some(Kind::NumberValue(value as f64)) };
    let sent = sent_us.map(|at| ("sandbox_sent_us".to_owned(), number(at)));
    Struct { fields: sent.into_iter().chain([("post".to_owned(), number(8231))]).collect() }
}

/// Something happened for one person.
pub fn event(runtime: &Runtime, user: &str, key: String, payload: usize) -> NotifyEventRequest {
    NotifyEventRequest {
        app_id: APP.to_owned(),
        event_type: "comment.created".to_owned(),
        idempotency_key: key,
        user_ids: vec![user.to_owned()],
        content: Some(content(payload)),
        data: Some(data(Some(runtime.now_us()))),
        ..NotifyEventRequest::default()
    }
}

/// Something happened for everybody with the topic. `sent_us`: whether pushes tell their age.
pub fn broadcast(runtime: &Runtime, key: String, payload: usize, aged: bool) -> NotifyEventRequest {
    NotifyEventRequest {
        app_id: APP.to_owned(),
        event_type: "post.created".to_owned(),
        idempotency_key: key,
        topics: vec![TOPIC.to_owned()],
        content: Some(content(payload)),
        data: Some(data(aged.then(|| runtime.now_us()))),
        ..NotifyEventRequest::default()
    }
}

/// `count` calls by `callers` at once; the first error ends it.
pub async fn calls<F, Called>(
    runtime: &Runtime,
    clients: &[Client],
    callers: usize,
    count: u32,
    call: F,
) -> anyhow::Result<Latencies>
where
    F: Fn(Client, u32) -> Called + Clone + Send + 'static,
    Called: Future<Output = Result<(), Status>> + Send,
{
    let next = Arc::new(AtomicU32::new(0));
    let mut running = Vec::with_capacity(callers);
    for caller in 0..callers {
        let client = clients[caller / CALLERS_PER_CONNECTION % clients.len()].clone();
        let (runtime_, next, call) = (runtime.clone(), Arc::clone(&next), call.clone());
        running.push(runtime.spawn(async move {
            let mut took = Vec::with_capacity(count as usize / callers + 1);
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return Ok(took);
                }
                let began = runtime_.instant();
                call(client.clone(), number).await?;
                took.push(micros(runtime_.instant() - began));
            }
        }));
    }
    let mut all = Vec::with_capacity(count as usize);
    for caller in running {
        let took: Result<Vec<u64>, Status> = caller.await.context("a caller panicked")?;
        all.extend(took.context("a call failed")?);
    }
    Ok(Latencies::new(all))
}

/// `count` events over one stream, as many unanswered as the server allows.
pub async fn stream<F>(runtime: &Runtime, mut client: Client, count: u32, make: F) -> anyhow::Result<Latencies>
where
    F: Fn(u32) -> NotifyEventRequest + Send + 'static,
{
    let (events, outgoing) = mpsc::channel(WINDOW);
    let window = Arc::new(Semaphore::new(WINDOW));
    let (for_sender, clock) = (Arc::clone(&window), runtime.clone());
    let began: Arc<[std::sync::OnceLock<crate::runtime::Instant>]> =
        (0..count).map(|_| std::sync::OnceLock::new()).collect();
    let begins = Arc::clone(&began);
    let sending = runtime.spawn(async move {
        for sequence in 0..count {
            let Ok(permit) = for_sender.acquire().await else { return };
            permit.forget();
            let _ = begins[sequence as usize].set(clock.instant());
            let message = NotifyEventsRequest { sequence: u64::from(sequence), event: Some(make(sequence)) };
            if events.send(message).await.is_err() {
                return;
            }
        }
    });
    let mut answers = client.notify_events(ReceiverStream::new(outgoing)).await?.into_inner();
    let mut took = Vec::with_capacity(count as usize);
    while let Some(answer) = answers.message().await? {
        window.add_permits(1);
        let at = usize::try_from(answer.sequence)?;
        let Some(Outcome::Result(_)) = answer.outcome else { bail!("event {at} failed: {:?}", answer.outcome) };
        let began = began.get(at).and_then(std::sync::OnceLock::get).context("an answer to nothing")?;
        took.push(micros(runtime.instant() - *began));
    }
    sending.await?;
    if took.len() != count as usize {
        bail!("{} of {count} events were answered", took.len());
    }
    Ok(Latencies::new(took))
}

pub fn micros(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_at_characters() {
        for bytes in [1, 2, 3, 10, 150, 3000] {
            let text = filled("보리 ", bytes);
            assert!(text.len() <= bytes.max(3) && text.len() + 3 >= bytes, "{bytes}: {}", text.len());
        }
    }

    #[test]
    fn percentiles_are_of_the_ranks() {
        let latencies = Latencies::new((1..=1000).rev().collect());
        assert_eq!((latencies.at(500), latencies.at(990), latencies.at(999), latencies.max()), (500, 990, 999, 1000));
        assert_eq!(Latencies::default().at(500), 0);
    }
}
