//! Backends with the right retry rule, and what must be true when they are done.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nudged::api::proto::push_service_client::PushServiceClient;
use nudged::api::proto::{Content, Delivery, ListDeliveriesRequest, NotifyEventRequest, delivery, device};
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};

use super::server::{APP, World, event, opt_in, register};

pub const USERS: u64 = 40;
const CALLERS: usize = 6;
/// Between two calls of a caller: a load that is real and yet looked through in seconds.
const PAUSE: Duration = Duration::from_millis(5);
/// A killed replica's leases are free after ten seconds of silence.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// What was acknowledged.
#[derive(Clone, Debug)]
pub struct Acknowledged {
    pub notification: String,
    /// Milliseconds since 1970.
    pub at: i64,
    /// The one call that was answered.
    pub took: Duration,
}

type Ledger = Arc<Mutex<BTreeMap<String, Acknowledged>>>;

pub struct Load {
    ledger: Ledger,
    stop: Arc<AtomicBool>,
    callers: Vec<JoinHandle<()>>,
}

/// People with a device on either platform; whatever one replica is told, every other knows.
pub async fn people(clients: &mut [PushServiceClient<Channel>]) {
    let count = clients.len();
    for user in 0..USERS {
        let client = &mut clients[usize::try_from(user).unwrap() % count];
        let name = format!("user-{user}");
        register(client, &name, device::Platform::Apns, &format!("{user:064x}")).await;
        register(client, &name, device::Platform::Fcm, &format!("fcm-token-{user}:APA91b")).await;
        opt_in(client, &name, true).await;
    }
}

impl Load {
    pub fn start(addresses: Vec<String>) -> Self {
        let load = Self { ledger: Ledger::default(), stop: Arc::new(AtomicBool::new(false)), callers: Vec::new() };
        let addresses = Arc::new(addresses);
        let callers = (0..CALLERS).map(|number| {
            let (addresses, ledger) = (Arc::clone(&addresses), Arc::clone(&load.ledger));
            tokio::spawn(call(addresses, number, ledger, Arc::clone(&load.stop)))
        });
        Self { callers: callers.collect(), ..load }
    }

    pub fn acknowledged(&self) -> usize {
        self.ledger.lock().unwrap().len()
    }

    pub async fn finish(self) -> BTreeMap<String, Acknowledged> {
        self.stop.store(true, Ordering::Relaxed);
        for caller in self.callers {
            caller.await.unwrap();
        }
        let ledger = self.ledger.lock().unwrap().clone();
        let notifications: BTreeSet<&String> = ledger.values().map(|one| &one.notification).collect();
        assert_eq!(notifications.len(), ledger.len(), "each key made its own notification");
        ledger
    }
}

fn now_ms() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

/// The event says its key, so that a push can be told from every other by its words.
fn keyed(number: u64) -> (String, NotifyEventRequest) {
    let key = format!("comment-{number}");
    let body = format!("보리: 너무 귀여워요! <{key}>");
    let content = Content { title: Some("새 댓글".into()), body: Some(body), ..Content::default() };
    let event = NotifyEventRequest { content: Some(content), ..event(&key, &[&format!("user-{}", number % USERS)]) };
    (key, event)
}

/// The same key, at whichever replica answers.
async fn call(addresses: Arc<Vec<String>>, first: usize, ledger: Ledger, stop: Arc<AtomicBool>) {
    // No key is used by two loads.
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut clients: Vec<_> = addresses
        .iter()
        .map(|address| {
            let endpoint = Endpoint::from_shared(address.clone()).unwrap().timeout(Duration::from_secs(10));
            PushServiceClient::new(endpoint.connect_lazy())
        })
        .collect();
    let mut at = first;
    while !stop.load(Ordering::Relaxed) {
        let (key, event) = keyed(NEXT.fetch_add(1, Ordering::Relaxed));
        loop {
            let turn = at % clients.len();
            let begun = Instant::now();
            match clients[turn].notify_event(event.clone()).await {
                Ok(answer) => {
                    let notification = answer.into_inner().notification_id;
                    let one = Acknowledged { notification, at: now_ms(), took: begun.elapsed() };
                    ledger.lock().unwrap().insert(key, one);
                    tokio::time::sleep(PAUSE).await;
                    break;
                }
                Err(status) => {
                    use tonic::Code::{Cancelled, DeadlineExceeded, Internal, ResourceExhausted, Unavailable, Unknown};
                    let code = status.code();
                    let expected = [Unavailable, Unknown, Cancelled, Internal, DeadlineExceeded, ResourceExhausted];
                    assert!(expected.contains(&code), "{status:?}");
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    at += 1;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
    }
}

pub async fn deliveries(client: &mut PushServiceClient<Channel>, id: &str) -> Vec<Delivery> {
    let request = ListDeliveriesRequest {
        app_id: APP.into(),
        notification_id: id.to_owned(),
        ..ListDeliveriesRequest::default()
    };
    client.list_deliveries(request).await.unwrap().into_inner().deliveries
}

/// What the providers received of what was acknowledged.
#[derive(Debug)]
pub struct Settled {
    pub acknowledged: usize,
    pub expected: usize,
    /// Pushes received once more, each with its first identity.
    pub repeated: usize,
    /// Received although nobody was told that the event was accepted.
    pub unacknowledged: usize,
    /// From the answer to the caller to the last first push, in milliseconds.
    pub slowest_ms: i64,
}

impl std::fmt::Display for Settled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { acknowledged, expected, repeated, unacknowledged, slowest_ms } = self;
        write!(
            f,
            "{acknowledged} acknowledged, {expected} pushes expected, lost 0, {repeated} repeated with the same identity, \
             {unacknowledged} of unacknowledged events, the slowest {slowest_ms} ms after its acknowledgement"
        )
    }
}

/// Waits until every acknowledged event has its final result, then holds the providers' records against the ledger.
pub async fn settle(
    world: &World,
    client: &mut PushServiceClient<Channel>,
    ledger: &BTreeMap<String, Acknowledged>,
) -> Settled {
    let ended = Instant::now();
    let mut expected: BTreeMap<String, &Acknowledged> = BTreeMap::new();
    for one in ledger.values() {
        let id = &one.notification;
        let deliveries = loop {
            let deliveries = deliveries(client, id).await;
            if deliveries.iter().all(|one| one.state() != delivery::State::Open) && !deliveries.is_empty() {
                break deliveries;
            }
            assert!(ended.elapsed() < PATIENCE, "{id} does not come to an end: {deliveries:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        assert_eq!(deliveries.len(), 2, "both of the person's devices: {deliveries:?}");
        for delivery in deliveries {
            assert_eq!(delivery.state(), delivery::State::Sent, "{delivery:?}");
            assert!(expected.insert(delivery.nudged_id, one).is_none(), "an identity names one delivery");
        }
    }
    let mut received: BTreeMap<String, (usize, i64)> = BTreeMap::new();
    let mut identities: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
    for push in world.received() {
        assert!(push.accepted, "the sandbox refused a push: {:?}", push.reason);
        let identity = push.nudged_id.clone().unwrap();
        let words = String::from_utf8_lossy(&push.body);
        let (_, key) = words.split_once('<').expect("the event's key");
        let key = key.split('>').next().unwrap_or_default().to_owned();
        identities.entry((key, push.token.clone())).or_default().insert(identity.clone());
        let entry = received.entry(identity).or_insert((0, push.at.0));
        entry.0 += 1;
        entry.1 = entry.1.min(push.at.0);
    }
    let other: Vec<_> = identities.iter().filter(|(_, identities)| identities.len() > 1).collect();
    assert!(other.is_empty(), "a repeat carries the identity of the first: {other:?}");
    let lost: Vec<&String> = expected.keys().filter(|id| !received.contains_key(*id)).collect();
    assert!(lost.is_empty(), "recorded as sent and never received: {lost:?}");
    Settled {
        acknowledged: ledger.len(),
        expected: expected.len(),
        repeated: received.values().map(|(times, _)| times - 1).sum(),
        unacknowledged: received.keys().filter(|id| !expected.contains_key(*id)).count(),
        slowest_ms: expected.iter().map(|(id, one)| received[id].1 - one.at).max().unwrap_or(0),
    }
}
