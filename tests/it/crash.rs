//! `kill -9` of the real binary in mid-load, again and again: every acknowledged event ends with a result, and what the
//! providers received is exactly what the ledger says, identity by identity.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nudged::api::proto::push_service_client::PushServiceClient;
use nudged::api::proto::{ListDeliveriesRequest, delivery, device};
use tonic::transport::{Channel, Endpoint};

use super::server::{APP, PATIENCE, World, event, opt_in, register};

/// How often the server is killed; more by `NUDGED_TEST_KILLS`.
const KILLS: u32 = 8;
const USERS: u64 = 40;
const CALLERS: u64 = 8;
/// Between two kills.
const RUN: Duration = Duration::from_millis(700);

/// What callers were told: idempotency key to notification id.
type Ledger = Arc<Mutex<BTreeMap<String, String>>>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_to_kill_9() {
    let kills = std::env::var("NUDGED_TEST_KILLS").ok().map_or(KILLS, |text| text.parse().unwrap());
    let world = World::new().await;
    let mut server = world.start();
    let mut client = world.client().await;
    for user in 0..USERS {
        let name = format!("user-{user}");
        register(&mut client, &name, device::Platform::Apns, &format!("{user:064x}")).await;
        register(&mut client, &name, device::Platform::Fcm, &format!("fcm-token-{user}:APA91b")).await;
        opt_in(&mut client, &name, true).await;
    }

    let ledger = Ledger::default();
    let stop = Arc::new(AtomicBool::new(false));
    let next = Arc::new(AtomicU64::new(0));
    let callers: Vec<_> = (0..CALLERS)
        .map(|_| {
            let (address, ledger) = (world.address.clone(), Arc::clone(&ledger));
            tokio::spawn(call(address, ledger, Arc::clone(&next), Arc::clone(&stop)))
        })
        .collect();
    for _ in 0..kills {
        tokio::time::sleep(RUN).await;
        server.kill();
        server = world.start();
        world.client().await;
    }
    tokio::time::sleep(RUN).await;
    stop.store(true, Ordering::Relaxed);
    for caller in callers {
        caller.await.unwrap();
    }

    let acknowledged = ledger.lock().unwrap().clone();
    assert!(acknowledged.len() > 100, "the load was real: {}", acknowledged.len());
    let notifications: BTreeSet<&String> = acknowledged.values().collect();
    assert_eq!(notifications.len(), acknowledged.len(), "each key made its own notification");

    let mut client = world.client().await;
    let mut expected = BTreeSet::new();
    let deadline = Instant::now() + PATIENCE;
    for id in notifications {
        let deliveries = loop {
            let deliveries = deliveries(&mut client, id).await;
            if deliveries.iter().all(|one| one.state() != delivery::State::Open) && !deliveries.is_empty() {
                break deliveries;
            }
            assert!(Instant::now() < deadline, "{id} does not come to an end: {deliveries:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        assert_eq!(deliveries.len(), 2, "both of the person's devices: {deliveries:?}");
        for one in deliveries {
            assert_eq!(one.state(), delivery::State::Sent, "{one:?}");
            assert!(expected.insert(one.nudged_id), "an identity names one delivery");
        }
    }

    let mut received: BTreeMap<String, u32> = BTreeMap::new();
    for push in world.received() {
        assert!(push.accepted, "the sandbox refused a push: {:?}", push.reason);
        *received.entry(push.nudged_id.clone().unwrap()).or_default() += 1;
    }
    let lost: Vec<&String> = expected.iter().filter(|id| !received.contains_key(*id)).collect();
    assert!(lost.is_empty(), "recorded as sent and never received: {lost:?}");
    let duplicates: u32 = received.values().map(|times| times - 1).sum();
    // What was received and not acknowledged to a caller was sent for a caller who was killed out of its answer.
    let unacknowledged = received.keys().filter(|id| !expected.contains(*id)).count();
    println!(
        "{kills} kills: {} acknowledged, {} pushes expected, lost 0, {duplicates} repeated with the same identity, \
         {unacknowledged} of unacknowledged events",
        acknowledged.len(),
        expected.len(),
    );
    // At most what was in flight at a kill can be repeated.
    assert!(duplicates <= kills * 20_000);
    assert!(server.terminate().success(), "an orderly stop after all of it");
}

/// A backend with the right retry rule: the same key until it is answered.
async fn call(address: String, ledger: Ledger, next: Arc<AtomicU64>, stop: Arc<AtomicBool>) {
    let channel = Endpoint::from_shared(address).unwrap().connect_lazy();
    let mut client = PushServiceClient::new(channel);
    while !stop.load(Ordering::Relaxed) {
        let number = next.fetch_add(1, Ordering::Relaxed);
        let key = format!("comment-{number}");
        let user = format!("user-{}", number % USERS);
        loop {
            match client.notify_event(event(&key, &[&user])).await {
                Ok(answer) => {
                    ledger.lock().unwrap().insert(key, answer.into_inner().notification_id);
                    break;
                }
                Err(status) => {
                    let code = status.code();
                    let expected =
                        [tonic::Code::Unavailable, tonic::Code::Unknown, tonic::Code::Cancelled, tonic::Code::Internal];
                    assert!(expected.contains(&code), "{status:?}");
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
    }
}

async fn deliveries(client: &mut PushServiceClient<Channel>, id: &str) -> Vec<nudged::api::proto::Delivery> {
    let request = ListDeliveriesRequest {
        app_id: APP.into(),
        notification_id: id.to_owned(),
        ..ListDeliveriesRequest::default()
    };
    client.list_deliveries(request).await.unwrap().into_inner().deliveries
}
