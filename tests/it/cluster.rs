//! Several replicas on one Postgres under load, restarted in order, also between versions; every acknowledged event ends
//! with a result, and what the providers received is what the ledger says. (`torture` kills them.)

use std::time::{Duration, Instant};

use nudged::api::proto::push_service_client::PushServiceClient;
use tonic::transport::Channel;

use super::load::{Load, PATIENCE, people, settle};
use super::postgres::Postgres;
use super::server::{Server, World, free_port};
use super::tables::count;

/// What a restart in order may delay a push by, at most: it is handed back at once, and found within the poll of a second.
/// The rest is a slow machine's.
const RESTART_DELAY: Duration = Duration::from_secs(10);

pub struct Cluster {
    pub world: World,
    /// `None`: one process on SQLite.
    pub postgres: Option<Postgres>,
    ports: Vec<(u16, u16)>,
    replicas: Vec<Option<Server>>,
}

impl Cluster {
    /// All at once, on an empty database.
    pub async fn new(replicas: usize, environment: &[(&str, String)]) -> Self {
        Self::on(Some(Postgres::start()), World::new().await, replicas, environment).await
    }

    /// The providers remember so many pushes.
    pub async fn recording(limit: usize, replicas: usize, environment: &[(&str, String)]) -> Self {
        Self::on(Some(Postgres::start()), World::recording(limit).await, replicas, environment).await
    }

    pub async fn on_sqlite(limit: usize, environment: &[(&str, String)]) -> Self {
        Self::on(None, World::recording(limit).await, 1, environment).await
    }

    async fn on(postgres: Option<Postgres>, world: World, replicas: usize, environment: &[(&str, String)]) -> Self {
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
        let mut own = vec![
            ("NUDGED_GRPC__LISTEN", format!("127.0.0.1:{grpc}")),
            ("NUDGED_ADMIN__LISTEN", format!("127.0.0.1:{admin}")),
        ];
        if let Some(postgres) = &self.postgres {
            own.push(("NUDGED_DATABASE__URL", postgres.url()));
            own.push(("NUDGED_DATABASE__POSTGRES__POOL", "8".to_owned()));
        }
        own.extend(more.iter().cloned());
        self.world.start_with(&own)
    }

    pub fn addresses(&self) -> Vec<String> {
        self.ports.iter().map(|(grpc, _)| format!("http://127.0.0.1:{grpc}")).collect()
    }

    pub async fn client(&self, number: usize) -> PushServiceClient<Channel> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match PushServiceClient::connect(self.addresses()[number].clone()).await {
                Ok(client) => {
                    assert!(self.is_running(number), "somebody else answers in the place of replica {number}");
                    return client;
                }
                Err(error) if Instant::now() > deadline => {
                    let log = self.world.log();
                    let tail: Vec<&str> = log.lines().rev().take(20).collect();
                    panic!("replica {number} does not answer: {error}\n{}", tail.join("\n"));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// By number.
    pub fn is_running(&self, number: usize) -> bool {
        self.replicas[number].as_ref().is_some_and(Server::is_running)
    }

    /// Where their metrics are.
    pub fn admins(&self) -> Vec<String> {
        self.ports.iter().map(|(_, admin)| format!("127.0.0.1:{admin}")).collect()
    }

    /// Text of the first column of each row; `None` while Postgres does not answer.
    pub async fn ask(&self, query: &str) -> Option<Vec<String>> {
        let client = self.postgres.as_ref()?.try_client().await?;
        Some(client.query(query, &[]).await.ok()?.iter().map(|row| row.get(0)).collect())
    }

    /// `None` while the database does not say.
    pub async fn open_jobs(&self) -> Option<u64> {
        match &self.postgres {
            Some(postgres) => {
                let row = postgres.try_client().await?.query_one("SELECT count(*) FROM open_job", &[]).await.ok()?;
                u64::try_from(row.get::<_, i64>(0)).ok()
            }
            None => {
                Some(tokio::task::block_in_place(|| count(&self.world.database(), "SELECT count(*) AS count FROM job")))
            }
        }
    }

    pub async fn clients(&self) -> Vec<PushServiceClient<Channel>> {
        let mut clients = Vec::new();
        for number in 0..self.ports.len() {
            clients.push(self.client(number).await);
        }
        clients
    }

    pub fn kill(&mut self, number: usize) {
        self.replicas[number].take().unwrap().kill();
    }

    /// A new process in its place; it need not answer yet.
    pub fn start_again(&mut self, number: usize, environment: &[(&str, String)]) {
        self.replicas[number] = Some(self.start(number, environment));
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
async fn a_rolling_restart_between_versions_loses_nothing_and_delays_nobody_for_long() {
    const REPLICAS: usize = 3;
    // As a version that does not know the newest format of packed work.
    let older = [("NUDGED_DATABASE__POSTGRES__PACK_FORMAT", "1".to_owned())];
    let newer = [];
    let mut cluster = Cluster::new(REPLICAS, &older).await;
    people(&mut cluster.clients().await).await;
    let database = cluster.postgres.as_ref().unwrap().client().await;
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
        let dump = cluster.postgres.as_ref().unwrap().client().await;
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
    let database = cluster.postgres.as_ref().unwrap().client().await;
    let sizes = "SELECT sum(pg_total_relation_size(c.oid))::BIGINT / (SELECT count(*) FROM notification) FROM pg_class c \
         WHERE c.relkind = 'r' AND c.relname ~ '^(notification|outcome_block|idempotency)'";
    let bytes: i64 = database.query_one(sizes, &[]).await.unwrap().get(0);
    println!("{bytes} bytes of history for each event");
    assert!(figures[1] < 5 * figures[0] + Duration::from_millis(100), "{figures:?}");
    cluster.terminate();
}
