//! "No means no" under load (`make consent`): a queue full of broadcasts, people who change their minds, phones that change
//! hands, devices that leave and events that are cancelled, in many histories at once, while pushes stall at the providers, the
//! link to Apple stands still again and again and, on Postgres, one of two replicas is cut off from the database. Nothing
//! forbidden is handed to a provider connection later than one second after the "no" was answered: to Apple that is when its
//! last byte leaves the server ([`link`]), to Google when it arrives.

mod history;
mod link;
mod model;

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nudged::api::proto::admin_service_client::AdminServiceClient;
use nudged::api::proto::push_service_client::PushServiceClient;
use nudged::api::proto::{Content, NotifyEventRequest, PauseDeliveryRequest, ResumeDeliveryRequest, device};
use nudged::sandbox::{Action, Fault};
use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use tonic::transport::Channel;

use super::postgres::Postgres;
use super::proxy::Proxy;
use super::server::{APP, PATIENCE, World, event, free_port, opt_in, register};
use super::tables::count;
use history::History;
use link::{Left, Link};
use model::{Model, Push};

const PLATFORMS: [device::Platform; 2] = [device::Platform::Apns, device::Platform::Fcm];
/// Histories at once, each with people of its own.
const HISTORIES: usize = 12;
/// People of a history, and a tablet that changes hands among them.
const OWN: usize = 5;
/// Pushes that the providers remember between two looks.
const RECORD: usize = 300_000;
/// An answer of the providers takes so long: the queue is to last.
const ANSWER_MS: u64 = 50;

struct Parameters {
    targets: u64,
    secs: u64,
    seed: u64,
    falsify: bool,
}

/// `NUDGED_CONSENT_…`.
fn parameter<T: FromStr<Err: std::fmt::Debug>>(name: &str) -> Option<T> {
    let text = std::env::var(format!("NUDGED_CONSENT_{name}")).ok()?;
    (!text.is_empty()).then(|| text.parse().expect(name))
}

impl Parameters {
    fn read() -> Self {
        Self {
            targets: parameter("TARGETS").unwrap_or(20_000),
            secs: parameter("SECS").unwrap_or(10),
            seed: parameter("SEED").unwrap_or_else(rand::random),
            falsify: parameter("FALSIFY").unwrap_or(false),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sqlite() {
    consent(None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres() {
    consent(Some(Postgres::start())).await;
}

fn now_ms() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

fn name(person: u64) -> String {
    format!("person-{person}")
}

fn phone(person: u64) -> String {
    format!("{person:064x}")
}

fn android(person: u64) -> String {
    format!("fcm-{person}:APA91b")
}

fn tablet(history: u64) -> String {
    format!("{:064x}", (1_u64 << 40) + history)
}

/// The event says its key.
fn keyed(key: &str, users: &[&str]) -> NotifyEventRequest {
    let content = Content { title: Some("새 댓글".into()), body: Some(format!("<{key}>")), ..Content::default() };
    NotifyEventRequest { content: Some(content), ..event(key, users) }
}

fn key_of(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    text.split_once('<').and_then(|(_, rest)| rest.split_once('>')).map_or("", |(key, _)| key).to_owned()
}

async fn consent(postgres: Option<Postgres>) {
    let Parameters { targets, secs, seed, falsify } = Parameters::read();
    println!("consent: {targets} targets, {secs} s, seed {seed}");
    let world = World::recording(RECORD).await;
    let apple = Arc::new(Link::new(&world.sandbox).await);
    let mut environment = vec![
        ("NUDGED_APPS__IFRIENDSPET__APNS__ENDPOINT", format!("http://127.0.0.1:{}", apple.port)),
        ("NUDGED_DELIVERY__MAX_STREAMS", "50".to_owned()),
        ("NUDGED_DELIVERY__MAX_CONNECTIONS", "2".to_owned()),
    ];
    let (mut servers, mut cut_off) = (Vec::new(), None);
    if let Some(postgres) = &postgres {
        environment.push(("NUDGED_DATABASE__URL", postgres.url()));
        let proxy = Proxy::new(postgres.host()).await;
        let second = [
            ("NUDGED_DATABASE__URL", format!("postgres://nudged@127.0.0.1:{}/postgres", proxy.port)),
            ("NUDGED_GRPC__LISTEN", format!("127.0.0.1:{}", free_port())),
            ("NUDGED_ADMIN__LISTEN", format!("127.0.0.1:{}", free_port())),
        ];
        servers.push(world.start_with(&environment));
        world.client().await;
        servers.push(world.start_with(&environment.iter().cloned().chain(second).collect::<Vec<_>>()));
        cut_off = Some(proxy);
    } else {
        servers.push(world.start_with(&environment));
    }
    let client = world.client().await;

    // Histories' people lie among the others, so that every part of a broadcast has some.
    let deciders = (HISTORIES * OWN) as u64;
    let people = (targets / 40).clamp(2 * deciders, 10_000);
    let every = people / deciders;
    register_all(&client, people).await;
    world.sandbox.add_fault(Fault::new(Action::Stall {}).probability(0.001, seed)).unwrap();
    world.sandbox.add_fault(Fault::new(Action::Delay { ms: ANSWER_MS }).times(u32::MAX)).unwrap();
    let mut caller = client.clone();
    // Held by platform, audiences are worked out and nothing is sent, so that the queue is as long as asked for.
    let mut admin = AdminServiceClient::connect(world.address.clone()).await.unwrap();
    for platform in PLATFORMS {
        let reason = "the queue is filled".to_owned();
        let pause =
            PauseDeliveryRequest { app_id: APP.into(), platform: platform.into(), reason, ..Default::default() };
        admin.pause_delivery(pause).await.unwrap();
    }
    for number in 0..targets.div_ceil(2 * people) {
        let everyone =
            NotifyEventRequest { user_ids: Vec::new(), everyone: true, ..keyed(&format!("all-{number}"), &[]) };
        caller.notify_event(everyone).await.unwrap();
    }
    let queued = queued(&world, postgres.as_ref(), targets).await;
    for platform in PLATFORMS {
        let resume = ResumeDeliveryRequest { app_id: APP.into(), platform: platform.into(), ..Default::default() };
        admin.resume_delivery(resume).await.unwrap();
    }

    let stop = Arc::new(AtomicBool::new(false));
    let mut received = Record::default();
    let links = tokio::spawn(trouble(Arc::clone(&apple), cut_off, Arc::clone(&stop)));
    let histories: Vec<_> = (0..HISTORIES as u64)
        .map(|number| {
            let own = (0..OWN as u64).map(|one| (number * OWN as u64 + one) * every).collect::<Vec<u64>>();
            let random = SmallRng::seed_from_u64(seed ^ number);
            tokio::spawn(History::new(client.clone(), number, own, random).run(Arc::clone(&stop)))
        })
        .collect();
    let load = tokio::spawn(load(client.clone(), every, deciders, Arc::clone(&stop)));
    received.follow(&world, Duration::from_secs(secs)).await;
    stop.store(true, Ordering::Relaxed);
    // Their last words and what follows them are seen as well.
    received.follow(&world, Duration::from_secs(1)).await;
    let (mut model, mut changes) = (Model::default(), 0);
    for history in histories {
        let (theirs, made) = history.await.unwrap();
        model.merge(theirs);
        changes += made;
    }
    let events = load.await.unwrap();
    let stalls = links.await.unwrap();
    received.follow(&world, Duration::from_millis(2_500)).await;
    let last_seq = received.pushes.len();
    assert!(last_seq > 200, "the load was real: {last_seq}");
    let arrived = received.pushes.iter().map(|(_, push)| push);
    let mut pushes: Vec<Push> = arrived.clone().filter(|push| push.token.starts_with("fcm-")).cloned().collect();
    let tokens: HashMap<&str, &str> =
        received.pushes.iter().map(|(id, push)| (id.as_str(), push.token.as_str())).collect();
    let (left, mut lost) = (apple.take_left(), 0);
    for Left { nudged_id, key, at } in left {
        match tokens.get(nudged_id.as_str()) {
            Some(token) => pushes.push(Push { token: (*token).to_owned(), key, at }),
            // Whose it was only the provider can tell.
            None => lost += 1,
        }
    }
    // People without a history never said no.
    pushes.retain(|push| model.knows(&push.token));
    let arrived: Vec<Push> = arrived.filter(|push| model.knows(&push.token)).cloned().collect();
    if falsify {
        model.shift(30_000);
    }
    let judged = model.judge(&pushes);
    let of_deciders = pushes.len();
    println!(
        "consent: {queued} targets queued, {events} more events, {changes} changes in {HISTORIES} histories, {last_seq} pushes, \
         {of_deciders} of them to who decides, {stalls} stalls, {lost} that left and never arrived: {judged}"
    );
    println!("consent: what was handed over in time may arrive later; by their arrival: {}", model.judge(&arrived));
    println!(
        "ledger:{queued} queued targets, {changes} changes, {last_seq} pushes, {} forbidden",
        judged.forbidden.len()
    );
    assert!(of_deciders > 100, "enough to see something: {of_deciders}");
    let some = &judged.forbidden[..judged.forbidden.len().min(9)];
    assert!(some.is_empty(), "seed {seed}: {} forbidden: {some:?}", judged.forbidden.len());
}

async fn register_all(client: &PushServiceClient<Channel>, people: u64) {
    let next = Arc::new(AtomicU64::new(0));
    let workers: Vec<_> = (0..32)
        .map(|_| {
            let (mut client, next) = (client.clone(), Arc::clone(&next));
            tokio::spawn(async move {
                loop {
                    let person = next.fetch_add(1, Ordering::Relaxed);
                    if person >= people {
                        return;
                    }
                    register(&mut client, &name(person), device::Platform::Apns, &phone(person)).await;
                    register(&mut client, &name(person), device::Platform::Fcm, &android(person)).await;
                    opt_in(&mut client, &name(person), true).await;
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.unwrap();
    }
}

/// Waits until so many targets are open, or no more come; how many there are.
async fn queued(world: &World, postgres: Option<&Postgres>, wanted: u64) -> u64 {
    const OPEN: &str = "SELECT CAST(COALESCE(sum(target_count), 0) AS BIGINT) AS count FROM job";
    const EXPANDING: &str = "SELECT count(*) AS count FROM fanout";
    let ask = async |query: &str| match postgres {
        Some(postgres) => {
            u64::try_from(postgres.client().await.query_one(query, &[]).await.unwrap().get::<_, i64>(0)).unwrap()
        }
        None => tokio::task::block_in_place(|| count(&world.database(), query)),
    };
    let deadline = Instant::now() + 10 * PATIENCE;
    loop {
        let is_worked_out = ask(EXPANDING).await == 0;
        let open = ask(OPEN).await;
        if open >= wanted || is_worked_out || Instant::now() > deadline {
            return open;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// What the providers received.
#[derive(Default)]
struct Record {
    /// With their `nudged_id`.
    pushes: Vec<(String, Push)>,
    last: u64,
}

impl Record {
    /// Takes over what comes in the meantime.
    async fn follow(&mut self, world: &World, period: Duration) {
        let until = Instant::now() + period;
        while Instant::now() < until {
            for push in world.sandbox.received_since(self.last, RECORD) {
                assert!(self.last == 0 || push.seq == self.last + 1, "the record has forgotten pushes");
                self.last = push.seq;
                let known = Push { token: push.token.clone(), key: key_of(&push.body), at: push.at.0 };
                self.pushes.push((push.nudged_id.clone().unwrap_or_default(), known));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Events for those who change their minds, beside the broadcasts: how many.
async fn load(mut client: PushServiceClient<Channel>, every: u64, deciders: u64, stop: Arc<AtomicBool>) -> u64 {
    let names: Vec<String> = (0..deciders).map(|number| name(number * every)).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        client.notify_event(keyed(&format!("event-{number}"), &names)).await.unwrap();
        number += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    number
}

/// Stalls a link, and cuts the second replica off, again and again. How often.
async fn trouble(apple: Arc<Link>, cut_off: Option<Proxy>, stop: Arc<AtomicBool>) -> usize {
    let mut stalls = 0;
    while !stop.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        apple.stall();
        if let Some(proxy) = &cut_off {
            proxy.cut();
        }
        // Every other one long enough for the connection to be given up.
        let ms = if stalls % 2 == 0 { 1_500 } else { 4_000 };
        tokio::time::sleep(Duration::from_millis(ms)).await;
        apple.flow();
        if let Some(proxy) = &cut_off {
            proxy.mend();
        }
        stalls += 1;
    }
    stalls
}
