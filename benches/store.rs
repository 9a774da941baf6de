//! The store's hot steps on a real file with 50 000 scattered people: `cargo bench --bench store`.

use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use nudged::domain::audience::PackedAudience;
use nudged::domain::content::Content;
use nudged::domain::deny::DenyFeed;
use nudged::domain::event_type::OnMaybe;
use nudged::domain::ids::{AppId, AppKey, EventType, Topic, UserId};
use nudged::domain::notification::{Audience, Body, NewEvent, NewJob, NoHandOff};
use nudged::domain::outcome::{Entry, ResultCode};
use nudged::domain::platform::{DeviceToken, Environment, Lane, Platform, RouteSpec};
use nudged::domain::sending::Priority;
use nudged::runtime::Runtime;
use nudged::storage::seed::{Seed, SeedPerson, SeedTopic};
use nudged::storage::sqlite::{Settings, SqliteStore, seed};
use nudged::storage::{ClaimRequest, JobUpdate, PageWrite, Queue as _, Registry as _};

const PEOPLE: u32 = 50_000;
const TOPIC: &str = "author:choco";

fn person(number: u32) -> SeedPerson {
    SeedPerson {
        user: UserId::trusted(&format!("user-{number}")),
        platform: Platform::Apns,
        token: DeviceToken::trusted(&format!("{:064x}", u128::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c))),
        opted_in: true,
    }
}

fn event(app: AppKey, audience: Audience, runtime: &Runtime) -> NewEvent {
    let now = runtime.now();
    let content =
        Content {
            title: Some("새 댓글".to_owned()), body: Some("너무 귀여워요!".to_owned()), ..Content::default()
        };
    NewEvent {
        app,
        event_type: EventType::trusted("comment.created"),
        type_version: None,
        default_opt_in: true,
        lane: None,
        on_maybe: OnMaybe::default(),
        idempotency: None,
        audience,
        actor: None,
        body: Arc::new(Body { content, ..Body::default() }),
        priority: Priority::High,
        collapse_key: None,
        event_at: now,
        not_before: None,
        expires_at: now.plus(Duration::from_secs(86_400)),
        max_audience: None,
        may_broadcast: true,
    }
}

fn steps(c: &mut Criterion) {
    let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let runtime = Runtime::production();
    let directory = tempfile::tempdir().expect("a directory");
    let settings = Settings::file(directory.path().join("bench.db"));
    let open = || SqliteStore::open(runtime.clone(), &settings, Arc::new(DenyFeed::default())).expect("a database");
    let store = open();
    let (app, route) = tokio.block_on(async {
        let app = store.ensure_app(&AppId::parse("app", "pets").expect("a slug"), runtime.now()).await.expect("a row");
        let spec = RouteSpec {
            app,
            platform: Platform::Apns,
            credential: "default".into(),
            environment: Environment::Sandbox,
            bundle: "com.example".into(),
        };
        (app, store.ensure_routes(&[spec], runtime.now()).await.expect("a row")[0].id)
    });
    store.close();
    drop(store);
    let topics = [SeedTopic { name: TOPIC, has: &|_| true }];
    let what = Seed { app, apns: route, fcm: route, topics: &topics, people: PEOPLE, person: &person };
    seed(&settings.path, &what, runtime.now()).expect("seeded");
    let store = Arc::new(open());
    let boot = store.boot_id();

    // Many callers, as behind the API: group commit is the point.
    let mut group = c.benchmark_group("accept");
    group.throughput(Throughput::Elements(256));
    let mut at = 0;
    group.bench_function("256 events for one person each, at once", |b| {
        b.iter(|| {
            tokio.block_on(async {
                let events = (0..256).map(|_| {
                    at = (at + 7_919) % PEOPLE;
                    let user_ids = vec![UserId::trusted(&format!("user-{at}"))];
                    let audience = Audience { user_ids, ..Audience::default() };
                    store.accept(event(app, audience, &runtime), Arc::new(NoHandOff), runtime.now())
                });
                futures_util::future::try_join_all(events).await.expect("accepted")
            })
        });
    });
    group.finish();

    let fanout = tokio.block_on(async {
        let audience = Audience { topics: vec![Topic::trusted(TOPIC)], ..Audience::default() };
        store.accept(event(app, audience, &runtime), Arc::new(NoHandOff), runtime.now()).await.expect("accepted");
        store.claim_fanout(boot, runtime.now(), &[]).await.expect("claimed").expect("one is due")
    });
    assert!(PackedAudience::unpack(&fanout.audience).is_ok());
    let mut group = c.benchmark_group("fan-out");
    group.throughput(Throughput::Elements(1000));
    let mut reading = fanout.clone();
    group.bench_function("read a page of 1000 people", |b| {
        b.iter(|| {
            let page = tokio.block_on(store.fanout_page(&reading, 1000)).expect("a page");
            reading.cursor = if page.done { fanout.cursor } else { page.cursor };
            page
        });
    });
    group.finish();

    let page = tokio.block_on(store.fanout_page(&fanout, 500)).expect("a page");
    let targets: Vec<_> = page.facts.iter().map(|(target, _)| *target).collect();
    let mut group = c.benchmark_group("job of 500");
    group.throughput(Throughput::Elements(500));
    group.bench_function("gate", |b| {
        let (id, kind) = (fanout.notification.id, &fanout.notification.event_type);
        b.iter(|| tokio.block_on(store.gate_facts(id, kind, &targets)).expect("facts"));
    });
    let write = || PageWrite {
        app,
        notification: fanout.notification.id,
        fence: fanout.fence,
        cursor: fanout.cursor,
        done: false,
        jobs: vec![NewJob {
            notification: fanout.notification.id,
            route,
            lane: Lane::Bulk,
            targets: targets.clone(),
            attempt: 0,
            claims: 0,
            ready_at: runtime.now(),
            due_at: runtime.now(),
            first_attempt_at: None,
        }],
        leased: 0,
        suppressed: Vec::new(),
    };
    let entries: Vec<Entry> = targets
        .iter()
        .map(|target| Entry { user: target.user, device: target.device, code: ResultCode::Sent })
        .collect();
    group.bench_function("insert, claim and record", |b| {
        b.iter(|| {
            tokio.block_on(async {
                store.write_page(write(), runtime.now()).await.expect("written").expect("the fence holds");
                let request = ClaimRequest { route, lane: Lane::Bulk, max_targets: 500, max_jobs: 1 };
                let claimed = store.claim(request, boot, runtime.now()).await.expect("claimed");
                let job = &claimed[0].job;
                let update = JobUpdate {
                    job: job.id,
                    fence: job.fence,
                    app,
                    notification: job.notification,
                    route,
                    progress: None,
                    entries: entries.clone(),
                    details: Vec::new(),
                    followers: Vec::new(),
                    retirements: Vec::new(),
                    device_changes: Vec::new(),
                };
                assert_eq!(store.record(vec![update], runtime.now()).await.expect("recorded"), [true]);
            });
        });
    });
    group.finish();
    store.close();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    targets = steps
}
criterion_main!(benches);
