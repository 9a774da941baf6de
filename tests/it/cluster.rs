//! Several replicas on one Postgres under load: replicas are killed with -9 one after the other and the database twice,
//! or restarted in order, also between versions; every acknowledged event ends with a result, and what the providers
//! received is what the ledger says.

use std::time::{Duration, Instant};

use nudged::api::proto::push_service_client::PushServiceClient;
use tonic::transport::Channel;

use super::load::{Load, PATIENCE, people, settle};
use super::postgres::Postgres;
use super::server::{Server, World, free_port};

/// How often a replica is killed, once a second; more by `NUDGED_TEST_CLUSTER_KILLS`.
const KILLS: u64 = 8;
/// What a restart in order may delay a push by, at most: it is handed back at once, and found within the poll of a second.
/// The rest is a slow machine's.
const RESTART_DELAY: Duration = Duration::from_secs(10);

pub struct Cluster {
    pub world: World,
    pub postgres: Postgres,
    ports: Vec<(u16, u16)>,
    replicas: Vec<Option<Server>>,
}

impl Cluster {
    /// All at once, on an empty database.
    pub async fn new(replicas: usize, environment: &[(&str, String)]) -> Self {
        let postgres = Postgres::start();
        let world = World::new().await;
        let ports: Vec<_> = (0..replicas).map(|_| (free_port(), free_port())).collect();
        let mut cluster = Self { world, postgres, ports, replicas: Vec::new() };
        cluster.replicas = (0..replicas).map(|number| Some(cluster.start(number, environment))).collect();
        for number in 0..replicas {
            cluster.client(number).await;
        }
        cluster
    }

    fn start(&self, number: usize, more: &[(&str, String)]) -> Server {
        let (grpc, admin) = self.ports[number];
        let own = [
            ("NUDGED_DATABASE__URL", self.postgres.url()),
            ("NUDGED_DATABASE__POSTGRES__POOL", "8".to_owned()),
            ("NUDGED_GRPC__LISTEN", format!("127.0.0.1:{grpc}")),
            ("NUDGED_ADMIN__LISTEN", format!("127.0.0.1:{admin}")),
        ];
        self.world.start_with(&own.into_iter().chain(more.iter().cloned()).collect::<Vec<_>>())
    }

    pub fn addresses(&self) -> Vec<String> {
        self.ports.iter().map(|(grpc, _)| format!("http://127.0.0.1:{grpc}")).collect()
    }

    pub async fn client(&self, number: usize) -> PushServiceClient<Channel> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match PushServiceClient::connect(self.addresses()[number].clone()).await {
                Ok(client) => return client,
                Err(error) if Instant::now() > deadline => {
                    let log = self.world.log();
                    let tail: Vec<&str> = log.lines().rev().take(20).collect();
                    panic!("replica {number} does not answer: {error}\n{}", tail.join("\n"));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    async fn clients(&self) -> Vec<PushServiceClient<Channel>> {
        let mut clients = Vec::new();
        for number in 0..self.ports.len() {
            clients.push(self.client(number).await);
        }
        clients
    }

    fn kill(&mut self, number: usize) {
        self.replicas[number].take().unwrap().kill();
    }

    /// SIGTERM, and a new process in its place.
    async fn restart(&mut self, number: usize, environment: &[(&str, String)]) {
        let old = self.replicas[number].take().unwrap();
        assert!(tokio::task::block_in_place(|| old.terminate()).success(), "an orderly stop under load");
        self.replicas[number] = Some(self.start(number, environment));
        self.client(number).await;
    }

    pub fn terminate(self) {
        for replica in self.replicas.into_iter().flatten() {
            assert!(replica.terminate().success(), "an orderly stop after all of it");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_when_replicas_and_the_database_are_killed() {
    const REPLICAS: usize = 4;
    let kills = std::env::var("NUDGED_TEST_CLUSTER_KILLS").ok().map_or(KILLS, |text| text.parse().unwrap());
    let mut cluster = Cluster::new(REPLICAS, &[]).await;
    people(&mut cluster.clients().await).await;
    let load = Load::start(cluster.addresses());
    let began = Instant::now();
    for kill in 0..kills {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let victim = usize::try_from(kill).unwrap() % REPLICAS;
        cluster.kill(victim);
        if kill == kills / 3 || kill == 2 * kills / 3 {
            tokio::task::block_in_place(|| cluster.postgres.kill_and_restart(Duration::from_millis(500)));
        }
        cluster.replicas[victim] = Some(cluster.start(victim, &[]));
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let ledger = load.finish().await;
    let loaded_for = began.elapsed();
    assert!(ledger.len() > 100, "the load was real: {}", ledger.len());
    let mut client = cluster.client(0).await;
    let settled = settle(&cluster.world, &mut client, &ledger).await;
    println!("{REPLICAS} replicas, {kills} of them killed and Postgres twice in {loaded_for:.1?}: {settled}");
    cluster.terminate();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_between_versions_loses_nothing_and_delays_nobody_for_long() {
    const REPLICAS: usize = 3;
    // As a version that does not know the newest format of packed work.
    let older = [("NUDGED_DATABASE__POSTGRES__PACK_FORMAT", "1".to_owned())];
    let newer = [];
    let mut cluster = Cluster::new(REPLICAS, &older).await;
    people(&mut cluster.clients().await).await;
    let database = cluster.postgres.client().await;
    let formats = async || -> i64 {
        let row = database.query_one("SELECT count(DISTINCT pack_format) FROM replica WHERE boot_id <> 0", &[]).await;
        row.unwrap().get(0)
    };
    let load = Load::start(cluster.addresses());
    // Up, and back again.
    for environment in [&newer[..], &older[..]] {
        for number in 0..REPLICAS {
            cluster.restart(number, environment).await;
            assert!(number + 1 == REPLICAS || formats().await == 2, "both versions are there");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        assert_eq!(formats().await, 1);
    }
    let ledger = load.finish().await;
    assert!(ledger.len() > 100, "the load was real: {}", ledger.len());
    let mut client = cluster.client(0).await;
    let settled = settle(&cluster.world, &mut client, &ledger).await;
    let slowest = ledger.values().map(|one| one.took).max().unwrap();
    println!("{REPLICAS} replicas, each restarted twice: {settled}, slowest call {slowest:.1?}");
    assert_eq!(settled.repeated, 0, "what is in flight is waited for, what is not goes to others");
    let limit = i64::try_from(RESTART_DELAY.as_millis()).unwrap();
    assert!(settled.slowest_ms < limit, "{settled:?}");
    cluster.terminate();
}

/// Slows nothing by more than docs/scaling.md says. Longer by `NUDGED_TEST_DUMP_SECS`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_snapshot_beside_the_load_slows_it_little() {
    let secs = std::env::var("NUDGED_TEST_DUMP_SECS").ok().map_or(3, |text| text.parse().unwrap());
    let cluster = Cluster::new(2, &[]).await;
    people(&mut cluster.clients().await).await;
    let mut figures = Vec::new();
    for with_snapshot in [false, true] {
        let dump = cluster.postgres.client().await;
        if with_snapshot {
            // As pg_dump does.
            dump.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SELECT count(*) FROM job")
                .await
                .unwrap();
        }
        let load = Load::start(cluster.addresses());
        tokio::time::sleep(Duration::from_secs(secs)).await;
        let ledger = load.finish().await;
        let mut client = cluster.client(0).await;
        let settled = settle(&cluster.world, &mut client, &ledger).await;
        let mut took: Vec<Duration> = ledger.values().map(|one| one.took).collect();
        took.sort_unstable();
        let median = took[took.len() / 2];
        let late = took[took.len() * 99 / 100];
        println!("with a snapshot {with_snapshot}: {} events, p50 {median:.1?}, p99 {late:.1?}, {settled}", took.len());
        assert_eq!(settled.repeated, 0);
        figures.push(median);
        cluster.world.sandbox.clear();
    }
    let database = cluster.postgres.client().await;
    let sizes = "SELECT sum(pg_total_relation_size(c.oid))::BIGINT / (SELECT count(*) FROM notification) FROM pg_class c \
         WHERE c.relkind = 'r' AND c.relname ~ '^(notification|outcome_block|idempotency)'";
    let bytes: i64 = database.query_one(sizes, &[]).await.unwrap().get(0);
    println!("{bytes} bytes of history for each event");
    assert!(figures[1] < 5 * figures[0] + Duration::from_millis(100), "{figures:?}");
    cluster.terminate();
}
