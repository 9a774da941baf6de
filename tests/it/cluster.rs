//! Several replicas on one Postgres under load: replicas are killed with -9 one after the other and the database twice;
//! every acknowledged event ends with a result, and what the providers received is what the ledger says.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nudged::api::proto::push_service_client::PushServiceClient;
use nudged::api::proto::{ListDeliveriesRequest, delivery, device};
use tonic::transport::{Channel, Endpoint};

use super::postgres::Postgres;
use super::server::{APP, Server, World, event, free_port, opt_in, register};

/// How often a replica is killed, once a second; more by `NUDGED_TEST_CLUSTER_KILLS`.
const KILLS: u64 = 8;
const REPLICAS: usize = 3;
const USERS: u64 = 40;
const CALLERS: u64 = 6;
/// A killed replica's leases are free after ten seconds of silence.
const PATIENCE: Duration = Duration::from_secs(90);

type Ledger = Arc<Mutex<BTreeMap<String, String>>>;

struct Cluster {
    world: World,
    postgres: Postgres,
    ports: Vec<(u16, u16)>,
    replicas: Vec<Option<Server>>,
}

impl Cluster {
    async fn new() -> Self {
        let postgres = Postgres::start();
        let world = World::new().await;
        let ports: Vec<_> = (0..REPLICAS).map(|_| (free_port(), free_port())).collect();
        let mut cluster = Self { world, postgres, ports, replicas: Vec::new() };
        // All at once, on an empty database.
        cluster.replicas = (0..REPLICAS).map(|number| Some(cluster.start(number))).collect();
        for number in 0..REPLICAS {
            cluster.client(number).await;
        }
        cluster
    }

    fn start(&self, number: usize) -> Server {
        let (grpc, admin) = self.ports[number];
        self.world.start_with(&[
            ("NUDGED_DATABASE__URL", self.postgres.url()),
            ("NUDGED_DATABASE__POSTGRES__POOL", "8".to_owned()),
            ("NUDGED_GRPC__LISTEN", format!("127.0.0.1:{grpc}")),
            ("NUDGED_ADMIN__LISTEN", format!("127.0.0.1:{admin}")),
        ])
    }

    fn address(&self, number: usize) -> String {
        format!("http://127.0.0.1:{}", self.ports[number].0)
    }

    async fn client(&self, number: usize) -> PushServiceClient<Channel> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match PushServiceClient::connect(self.address(number)).await {
                Ok(client) => return client,
                Err(error) if Instant::now() > deadline => {
                    let log = std::fs::read_to_string(self.world.config.with_file_name("server.log")).unwrap();
                    let tail: Vec<&str> = log.lines().rev().take(20).collect();
                    panic!("replica {number} does not answer: {error}\n{}", tail.join("\n"));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    fn kill(&mut self, number: usize) {
        self.replicas[number].take().unwrap().kill();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_when_replicas_and_the_database_are_killed() {
    let kills = std::env::var("NUDGED_TEST_CLUSTER_KILLS").ok().map_or(KILLS, |text| text.parse().unwrap());
    let mut cluster = Cluster::new().await;
    for user in 0..USERS {
        // Whatever one replica was told, every other knows.
        let mut client = cluster.client(usize::try_from(user).unwrap() % REPLICAS).await;
        let name = format!("user-{user}");
        register(&mut client, &name, device::Platform::Apns, &format!("{user:064x}")).await;
        register(&mut client, &name, device::Platform::Fcm, &format!("fcm-token-{user}:APA91b")).await;
        opt_in(&mut client, &name, true).await;
    }

    let (ledger, stop, next) = (Ledger::default(), Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let addresses: Arc<[String]> = (0..REPLICAS).map(|number| cluster.address(number)).collect();
    let callers: Vec<_> = (0..CALLERS)
        .map(|number| {
            let (addresses, ledger) = (Arc::clone(&addresses), Arc::clone(&ledger));
            let (next, stop) = (Arc::clone(&next), Arc::clone(&stop));
            tokio::spawn(call(addresses, usize::try_from(number).unwrap(), ledger, next, stop))
        })
        .collect();
    let began = Instant::now();
    for kill in 0..kills {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let victim = usize::try_from(kill).unwrap() % REPLICAS;
        cluster.kill(victim);
        if kill == kills / 3 || kill == 2 * kills / 3 {
            tokio::task::block_in_place(|| cluster.postgres.kill_and_restart(Duration::from_millis(500)));
        }
        cluster.replicas[victim] = Some(cluster.start(victim));
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    stop.store(true, Ordering::Relaxed);
    for caller in callers {
        caller.await.unwrap();
    }
    let loaded_for = began.elapsed();

    let acknowledged = ledger.lock().unwrap().clone();
    assert!(acknowledged.len() > 100, "the load was real: {}", acknowledged.len());
    let notifications: BTreeSet<&String> = acknowledged.values().collect();
    assert_eq!(notifications.len(), acknowledged.len(), "each key made its own notification");
    let mut client = cluster.client(0).await;
    let mut expected = BTreeSet::new();
    let ended = Instant::now();
    for id in notifications {
        let deliveries = loop {
            let deliveries = deliveries(&mut client, id).await;
            if deliveries.iter().all(|one| one.state() != delivery::State::Open) && !deliveries.is_empty() {
                break deliveries;
            }
            assert!(ended.elapsed() < PATIENCE, "{id} does not come to an end: {deliveries:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        assert_eq!(deliveries.len(), 2, "both of the person's devices: {deliveries:?}");
        for one in deliveries {
            assert_eq!(one.state(), delivery::State::Sent, "{one:?}");
            assert!(expected.insert(one.nudged_id), "an identity names one delivery");
        }
    }

    let mut received: BTreeMap<String, u32> = BTreeMap::new();
    for push in cluster.world.received() {
        assert!(push.accepted, "the sandbox refused a push: {:?}", push.reason);
        *received.entry(push.nudged_id.clone().unwrap()).or_default() += 1;
    }
    let lost: Vec<&String> = expected.iter().filter(|id| !received.contains_key(*id)).collect();
    assert!(lost.is_empty(), "recorded as sent and never received: {lost:?}");
    let duplicates: u32 = received.values().map(|times| times - 1).sum();
    let unacknowledged = received.keys().filter(|id| !expected.contains(*id)).count();
    println!(
        "{REPLICAS} replicas, {kills} of them killed and Postgres twice in {loaded_for:.1?}: {} acknowledged, {} pushes \
         expected, lost 0, {duplicates} repeated with the same identity, {unacknowledged} of unacknowledged events",
        acknowledged.len(),
        expected.len(),
    );
    for replica in cluster.replicas.into_iter().flatten() {
        assert!(replica.terminate().success(), "an orderly stop after all of it");
    }
}

/// A backend with the right retry rule: the same key, at whichever replica answers.
async fn call(addresses: Arc<[String]>, first: usize, ledger: Ledger, next: Arc<AtomicU64>, stop: Arc<AtomicBool>) {
    let mut clients: Vec<_> = addresses
        .iter()
        .map(|address| {
            let endpoint = Endpoint::from_shared(address.clone()).unwrap().timeout(Duration::from_secs(10));
            PushServiceClient::new(endpoint.connect_lazy())
        })
        .collect();
    let mut at = first;
    while !stop.load(Ordering::Relaxed) {
        let number = next.fetch_add(1, Ordering::Relaxed);
        let (key, user) = (format!("comment-{number}"), format!("user-{}", number % USERS));
        loop {
            let turn = at % clients.len();
            match clients[turn].notify_event(event(&key, &[&user])).await {
                Ok(answer) => {
                    ledger.lock().unwrap().insert(key, answer.into_inner().notification_id);
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

async fn deliveries(client: &mut PushServiceClient<Channel>, id: &str) -> Vec<nudged::api::proto::Delivery> {
    let request = ListDeliveriesRequest {
        app_id: APP.into(),
        notification_id: id.to_owned(),
        ..ListDeliveriesRequest::default()
    };
    client.list_deliveries(request).await.unwrap().into_inner().deliveries
}
