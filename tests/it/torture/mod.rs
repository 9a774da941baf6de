//! `make torture`: the real binary, its replicas and its Postgres are killed with -9 in full load, again and again. Every
//! acknowledged event reaches both of its person's devices, and what comes twice comes under its first identity.
//!
//! A campaign is a number of legs, each on a fresh database with a few kills, so that neither memory nor disk grows with
//! its length. Between two kills at least `EVENTS` events are acknowledged. At a leg's end the callers get their last
//! answers, everything comes to rest, and the ledger is held against the providers' record.

mod ledger;
mod stream;
mod suspects;
mod watchdog;

use std::collections::BTreeSet;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nudged::api::proto::push_service_client::PushServiceClient;
use nudged::api::proto::{delivery, device};
use nudged::sandbox::Platform;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use tonic::transport::Channel;
use uuid::Uuid;

use super::cluster::Cluster;
use super::load::deliveries;
use super::postgres::Death;
use super::server::{opt_in, register};
use ledger::{Tamper, Verdict};
use stream::{Callers, Load};
use watchdog::Watchdog;

const USERS: u64 = 200;
/// Kills of one leg.
const LEG: u64 = 10;
/// Room in the engine of one process; all events are INTERACTIVE, whose part it is.
const PERMITS: u64 = 1_000;
/// Of both lanes: INTERACTIVE has half.
const MAX_IN_FLIGHT: u64 = 2 * PERMITS;
/// Acknowledged events whose deliveries are asked for at a leg's end, and what they say compared with what came.
const SAMPLE: usize = 200;
/// Pushes between two looks at the providers' record, at most.
const RECORD: usize = 300_000;

/// What dies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Victim {
    /// The only process, on SQLite.
    Sqlite,
    /// One of several replicas on Postgres.
    Replica,
    /// Postgres itself; its replicas live.
    Postgres,
}

struct Parameters {
    victim: Victim,
    kills: u64,
    /// Acknowledged between two kills, at least.
    events: u64,
    seed: u64,
    replicas: usize,
    tamper: Option<Tamper>,
}

/// `NUDGED_TORTURE_…`.
fn parameter<T: FromStr<Err: std::fmt::Debug>>(name: &str) -> Option<T> {
    let text = std::env::var(format!("NUDGED_TORTURE_{name}")).ok()?;
    (!text.is_empty()).then(|| text.parse().expect(name))
}

impl Parameters {
    /// `kills` and `events`: where nothing else is said.
    fn new(victim: Victim, kills: u64, events: u64) -> Self {
        Self {
            victim,
            kills: parameter("KILLS").unwrap_or(kills),
            events: parameter("EVENTS").unwrap_or(events),
            seed: parameter("SEED").unwrap_or_else(rand::random),
            replicas: if victim == Victim::Sqlite { 1 } else { parameter("REPLICAS").unwrap_or(2) },
            tamper: parameter("BREAK"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sqlite() {
    torture(Parameters::new(Victim::Sqlite, 20, 1_000)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres() {
    torture(Parameters::new(Victim::Replica, 15, 1_000)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_itself() {
    torture(Parameters::new(Victim::Postgres, 10, 1_000)).await;
}

fn user(number: u64) -> String {
    format!("user-{}", number % USERS)
}

/// The device of an event's person.
fn token(number: u64, on: Platform) -> String {
    let user = number % USERS;
    match on {
        Platform::Apns => format!("{user:064x}"),
        Platform::Fcm => format!("fcm-token-{user}:APA91b"),
    }
}

async fn torture(parameters: Parameters) {
    let Parameters { victim, kills, events, seed, replicas, tamper } = parameters;
    println!("torture of {victim:?}: {kills} kills, {events} events between them, {replicas} processes, seed {seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let (mut sum, mut done, mut early) = (Verdict::default(), 0, 0);
    let began = Instant::now();
    while done < kills {
        let leg = Leg { victim, kills: LEG.min(kills - done), events, replicas, tamper };
        let (verdict, kills_early) = leg.run(&mut random).await;
        (done, early) = (done + leg.kills, early + kills_early);
        println!("{done} kills and {early} at the start after {:.0?}: {verdict}", began.elapsed());
        // Each process held no more than its room at each kill; of replicas only one dies, but all lose their database.
        let processes = if victim == Victim::Replica { 1 } else { replicas as u64 };
        let most_repeated = (leg.kills + kills_early) * processes * PERMITS;
        if let Err(words) = verdict.check(most_repeated) {
            panic!("seed {seed}, the leg up to kill {done}: {words}");
        }
        assert!(verdict.acknowledged >= leg.kills * events, "the load was real");
        sum.add(&verdict);
    }
    println!("torture of {victim:?}: {done} kills, {early} more at the start, in {:.0?}: {sum}", began.elapsed());
    // For `scripts/torture.sh`.
    println!(
        "ledger:{done} kills, {} acknowledged events, {} pushes, {} repeats",
        sum.acknowledged, sum.pushes, sum.repeated
    );
}

#[derive(Clone, Copy)]
struct Leg {
    victim: Victim,
    kills: u64,
    events: u64,
    replicas: usize,
    tamper: Option<Tamper>,
}

impl Leg {
    /// The verdict, and how often a process was killed while it started.
    async fn run(self, random: &mut SmallRng) -> (Verdict, u64) {
        let room = [("NUDGED_DELIVERY__MAX_IN_FLIGHT_TARGETS", MAX_IN_FLIGHT.to_string())];
        let mut cluster = match self.victim {
            Victim::Sqlite => Cluster::on_sqlite(RECORD, &room).await,
            Victim::Replica | Victim::Postgres => Cluster::recording(RECORD, self.replicas, &room).await,
        };
        people(&mut cluster.clients().await).await;
        let load = Load::start(&cluster.addresses(), 2 * self.replicas);
        let callers = Arc::clone(&load.callers);
        let mut early = 0;
        for _ in 0..self.kills {
            let watchdog = Watchdog::new(&cluster, &callers);
            let wanted = callers.acknowledged() + self.events + random.random_range(0..=self.events / 10);
            let progress = reach(&cluster, &callers, wanted);
            watchdog.within(Duration::from_secs(180), "acknowledging the events of a round", progress).await;
            tokio::time::sleep(Duration::from_millis(random.random_range(0..50))).await;
            early += self.kill(&mut cluster, random, &room).await;
        }
        let watchdog = Watchdog::new(&cluster, &callers);
        let last = callers.acknowledged() + self.events / 10;
        watchdog
            .within(Duration::from_secs(180), "going on after the last kill", reach(&cluster, &callers, last))
            .await;
        watchdog.within(Duration::from_secs(120), "answering the last callers", load.finish_reading(&cluster)).await;
        watchdog.within(Duration::from_secs(180), "coming to rest", rest(&cluster, &callers)).await;
        watchdog.within(Duration::from_secs(120), "asking for deliveries", sample(&cluster, &callers)).await;
        let verdict = {
            let mut ledger = callers.ledger.lock().unwrap();
            if let Some(how) = self.tamper {
                ledger.tamper(how);
            }
            ledger.verdict()
        };
        tokio::task::block_in_place(|| cluster.terminate());
        (verdict, early)
    }

    async fn kill(self, cluster: &mut Cluster, random: &mut SmallRng, room: &[(&str, String)]) -> u64 {
        if self.victim == Victim::Postgres {
            let death = [Death::Postmaster, Death::All, Death::Session][random.random_range(0..3)];
            // Longer than the leases of a silent replica last, sometimes.
            let away = if random.random_ratio(1, 16) { 11_000 } else { random.random_range(0..800) };
            let postgres = cluster.postgres.as_mut().expect("it is there to be killed");
            tokio::task::block_in_place(|| postgres.die(death, Duration::from_millis(away)));
            return 0;
        }
        let number = random.random_range(0..self.replicas);
        let mut early = 0;
        cluster.kill(number);
        cluster.start_again(number, room);
        while random.random_ratio(1, 8) {
            tokio::time::sleep(Duration::from_millis(random.random_range(0..300))).await;
            cluster.kill(number);
            cluster.start_again(number, room);
            early += 1;
        }
        cluster.client(number).await;
        early
    }
}

async fn people(clients: &mut [PushServiceClient<Channel>]) {
    for number in 0..USERS {
        let client = &mut clients[usize::try_from(number).unwrap() % clients.len()];
        for (on, platform) in [(Platform::Apns, device::Platform::Apns), (Platform::Fcm, device::Platform::Fcm)] {
            register(client, &user(number), platform, &token(number, on)).await;
        }
        opt_in(client, &user(number), true).await;
    }
}

/// Takes over what the providers received since the last look.
fn read(cluster: &Cluster, callers: &Callers) {
    let mut ledger = callers.ledger.lock().unwrap();
    for push in cluster.world.sandbox.received_since(ledger.last_seq(), RECORD) {
        ledger.receive(&push);
    }
}

/// Until so many events are acknowledged.
async fn reach(cluster: &Cluster, callers: &Callers, wanted: u64) {
    while callers.acknowledged() < wanted {
        read(cluster, callers);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

impl Load {
    async fn finish_reading(self, cluster: &Cluster) {
        let callers = Arc::clone(&self.callers);
        let finish = self.finish();
        tokio::pin!(finish);
        loop {
            tokio::select! {
                () = &mut finish => return,
                () = tokio::time::sleep(Duration::from_millis(5)) => read(cluster, &callers),
            }
        }
    }
}

/// Until no job is open, and nothing more comes.
async fn rest(cluster: &Cluster, callers: &Callers) {
    loop {
        read(cluster, callers);
        if cluster.open_jobs().await == Some(0) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // What is recorded as sent was received before.
    read(cluster, callers);
}

/// The records that support reads must say what the providers saw.
async fn sample(cluster: &Cluster, callers: &Callers) {
    let mut client = cluster.client(0).await;
    let sample = callers.ledger.lock().unwrap().sample(SAMPLE);
    for (notification, identities) in sample {
        let recorded = deliveries(&mut client, &notification.to_string()).await;
        if !recorded.iter().all(|one| one.state() == delivery::State::Sent) {
            let (log, id) = (cluster.world.log(), notification.to_string());
            let told: Vec<&str> = log.lines().filter(|line| line.contains(&id)).collect();
            panic!("{recorded:?}\n{}", told.join("\n"));
        }
        let recorded: BTreeSet<Uuid> = recorded.iter().map(|one| Uuid::parse_str(&one.nudged_id).unwrap()).collect();
        assert_eq!(recorded, identities, "what is recorded of {notification} is what came");
    }
}
