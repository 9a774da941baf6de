//! A watcher of two replicas on one Postgres: one is killed, the other stopped in order, and the stream goes on elsewhere
//! with the last cursor. What it was told is what the ledger says, each result once.

use std::collections::BTreeSet;
use std::time::Instant;

use nudged::api::proto::push_service_client::PushServiceClient;
use nudged::api::proto::watch_deliveries_response::Event;
use nudged::api::proto::{
    ListDeliveriesRequest, UnregisterDeviceRequest, WatchDeliveriesRequest, WatchDeliveriesResponse, delivery, device,
};
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::postgres::Postgres;
use super::server::{APP, PATIENCE, Server, World, event, free_port, opt_in, register};

const USERS: usize = 6;
/// Events of each of three parts.
const EVENTS: usize = 40;

type Told = (String, String, String, i32);

struct Replica {
    address: String,
    environment: Vec<(&'static str, String)>,
}

impl Replica {
    fn new(postgres: &Postgres) -> Self {
        let (grpc, admin) = (free_port(), free_port());
        let environment = vec![
            ("NUDGED_DATABASE__URL", postgres.url()),
            ("NUDGED_DATABASE__POSTGRES__POOL", "8".to_owned()),
            ("NUDGED_GRPC__LISTEN", format!("127.0.0.1:{grpc}")),
            ("NUDGED_ADMIN__LISTEN", format!("127.0.0.1:{admin}")),
        ];
        Self { address: format!("http://127.0.0.1:{grpc}"), environment }
    }

    fn start(&self, world: &World) -> Server {
        world.start_with(&self.environment)
    }

    async fn client(&self) -> PushServiceClient<Channel> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match PushServiceClient::connect(self.address.clone()).await {
                Ok(client) => return client,
                Err(error) => assert!(Instant::now() < deadline, "{} does not answer: {error}", self.address),
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}

/// Reads from one replica after the other.
struct Watcher {
    cursor: String,
    stream: Streaming<WatchDeliveriesResponse>,
    told: BTreeSet<Told>,
    retired: Vec<String>,
}

async fn open(replica: &Replica, cursor: &str) -> Streaming<WatchDeliveriesResponse> {
    let request = WatchDeliveriesRequest { app_id: APP.into(), cursor: cursor.to_owned(), filter: None };
    replica.client().await.watch_deliveries(request).await.unwrap().into_inner()
}

impl Watcher {
    async fn begin(replica: &Replica) -> Self {
        let mut stream = open(replica, "").await;
        let first = stream.message().await.unwrap().unwrap();
        assert!(matches!(first.event, Some(Event::Progress(_))), "{first:?}");
        Self { cursor: first.cursor, stream, told: BTreeSet::new(), retired: Vec::new() }
    }

    async fn go_on_at(&mut self, replica: &Replica) {
        self.stream = open(replica, &self.cursor).await;
    }

    async fn next(&mut self) -> Result<(), Status> {
        let message = tokio::time::timeout(PATIENCE, self.stream.message()).await.expect("a sign of life");
        let message = message?.expect("streams end with an error");
        self.cursor = message.cursor;
        match message.event.unwrap() {
            Event::Delivery(one) => {
                let state = one.state().into();
                assert!(self.told.insert((one.notification_id, one.user_id, one.nudged_id, state)), "told twice");
            }
            Event::DeviceRetired(retired) => self.retired.push(format!("{} {}", retired.user_id, retired.reason)),
            Event::Progress(_) => {}
        }
        Ok(())
    }

    async fn until(&mut self, count: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.told.len() < count {
            self.next().await.unwrap();
            assert!(Instant::now() < deadline, "only {} of {count} results are told", self.told.len());
        }
    }

    /// How the stream ends.
    async fn end(&mut self) -> Status {
        loop {
            if let Err(status) = self.next().await {
                return status;
            }
        }
    }
}

/// To everybody, by turns through these replicas.
async fn send(part: usize, replicas: &[&Replica], accepted: &mut Vec<String>) {
    let people: Vec<String> = (0..USERS).map(|user| format!("user-{user}")).collect();
    let people: Vec<&str> = people.iter().map(String::as_str).collect();
    let mut clients = Vec::new();
    for replica in replicas {
        clients.push(replica.client().await);
    }
    for number in 0..EVENTS {
        let turn = number % clients.len();
        let answer = clients[turn].notify_event(event(&format!("event-{part}-{number}"), &people)).await.unwrap();
        accepted.push(answer.into_inner().notification_id);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_goes_on_at_another_replica_and_misses_nothing() {
    let postgres = Postgres::start();
    let world = World::new().await;
    let replicas = [Replica::new(&postgres), Replica::new(&postgres)];
    let [first, second] = &replicas;
    let (first_server, second_server) = (first.start(&world), second.start(&world));
    let mut client = first.client().await;
    second.client().await;
    for user in 0..USERS {
        let name = format!("user-{user}");
        register(&mut client, &name, device::Platform::Apns, &format!("{user:064x}")).await;
        // The last one was never asked.
        if user + 1 < USERS {
            opt_in(&mut client, &name, true).await;
        }
    }
    let mut watcher = Watcher::begin(first).await;
    let mut accepted = Vec::new();

    send(0, &[first, second], &mut accepted).await;
    watcher.until(EVENTS * USERS / 2).await;
    watcher.go_on_at(second).await;
    watcher.until(EVENTS * USERS).await;

    watcher.go_on_at(first).await;
    first_server.kill();
    send(1, &[second], &mut accepted).await;
    let end = watcher.end().await;
    assert!(matches!(end.code(), Code::Unknown | Code::Unavailable | Code::Internal | Code::Cancelled), "{end:?}");
    watcher.go_on_at(second).await;
    watcher.until(2 * EVENTS * USERS).await;

    let first_server = first.start(&world);
    let mut client = first.client().await;
    let tablet = register(&mut client, "user-0", device::Platform::Fcm, "fcm-token-0:APA91b").await;
    let unregister =
        UnregisterDeviceRequest { app_id: APP.into(), device_id: tablet, ..UnregisterDeviceRequest::default() };
    client.unregister_device(unregister).await.unwrap();
    send(2, &[first], &mut accepted).await;
    let (end, stopped) = tokio::join!(watcher.end(), tokio::task::spawn_blocking(|| second_server.terminate()));
    assert_eq!(end.code(), Code::Unavailable, "{end:?}");
    assert!(stopped.unwrap().success(), "a watcher does not hold it up");
    watcher.go_on_at(first).await;
    watcher.until(3 * EVENTS * USERS).await;
    while watcher.retired.is_empty() {
        watcher.next().await.unwrap();
    }
    assert_eq!(watcher.retired, ["user-0 UNREGISTERED"]);

    let mut ledger = BTreeSet::new();
    for id in accepted {
        let request = ListDeliveriesRequest { app_id: APP.into(), notification_id: id, ..Default::default() };
        for one in client.list_deliveries(request).await.unwrap().into_inner().deliveries {
            assert_ne!(one.state(), delivery::State::Open, "{one:?}");
            let state = one.state().into();
            ledger.insert((one.notification_id, one.user_id, one.nudged_id, state));
        }
    }
    assert_eq!(watcher.told, ledger);
    assert_eq!(ledger.len(), 3 * EVENTS * USERS);
    assert!(first_server.terminate().success());
}
