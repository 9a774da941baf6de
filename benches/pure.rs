//! What a delivery computes, without any database or network: `cargo bench --bench pure`.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use nudged::domain::consent::{self, DeviceChoice, DeviceFacts, DeviceState, EventRules, UserChoice};
use nudged::domain::content::{Content, Data};
use nudged::domain::deny::{DenyFeed, DenyKey};
use nudged::domain::identity::IdentityKey;
use nudged::domain::ids::{AppKey, DeviceId, NotificationId, RouteId, UserKey};
use nudged::domain::notification::Body;
use nudged::domain::outcome::{self, Entry, ResultCode};
use nudged::domain::plan::{Person, plan};
use nudged::domain::platform::{Environment, Platform, Route, RouteSpec};
use nudged::domain::sending::{Priority, SendOptions};
use nudged::domain::targets::{self, Target};
use nudged::domain::time::UnixMs;
use nudged::runtime::Runtime;
use nudged::sandbox::Sandbox;
use nudged::senders::http2::SendingThreads;
use nudged::senders::{Secret, Sender, apns, fcm};
use nudged::{render, sandbox};

/// Ids as they are after a year: far apart and in no order to each other.
fn scattered(count: i64) -> Vec<Target> {
    (0..count)
        .map(|at| Target {
            user: UserKey((30_000_000_000 + at * 31_536_000) << 22),
            device: DeviceId((1_000_000 + (at * 7_919_777) % 31_536_000) << 18),
        })
        .collect()
}

fn decisions(c: &mut Criterion) {
    let rules = EventRules { default_opt_in: true, actor: None, expires_at: UnixMs(i64::MAX), cancelled: false };
    let choice = UserChoice { all: Some(true), this_type: None };
    let device = DeviceFacts {
        state: DeviceState::Active,
        route: RouteId(1),
        route_known: true,
        allowed_here: true,
        choice: DeviceChoice { all: None, this_type: None },
    };
    c.bench_function("gates, one device", |b| {
        b.iter(|| consent::gates(&rules, black_box(UserKey(7)), black_box(choice), &device, UnixMs(1)));
    });
    let people: Vec<Person> = scattered(1000)
        .into_iter()
        .enumerate()
        .map(|(at, target)| Person {
            user: target.user,
            choice: UserChoice { all: Some(at % 10 != 0), this_type: None },
            devices: vec![(target.device, DeviceFacts { route: RouteId(1 + (at % 2) as i64), ..device })],
        })
        .collect();
    let mut group = c.benchmark_group("per person");
    group.throughput(Throughput::Elements(1000));
    group.bench_function("plan a page of 1000", |b| b.iter(|| plan(black_box(&people), &rules, UnixMs(1))));
    group.finish();

    let feed = DenyFeed::default();
    let now = Runtime::production().instant().into_std();
    feed.publish(&(0..1000).map(|user| DenyKey::User(UserKey(user))).collect::<Vec<_>>(), now);
    let (old, new) = (nudged::domain::deny::DenyPosition(0), feed.position());
    c.bench_function("deny feed, nothing new", |b| {
        b.iter(|| feed.hit(black_box(new), UserKey(1), DeviceId(2), NotificationId(3)));
    });
    c.bench_function("deny feed, 1000 new", |b| {
        b.iter(|| feed.hit(black_box(old), UserKey(5000), DeviceId(2), NotificationId(3)));
    });
    let key = IdentityKey::new([7; 32]);
    c.bench_function("nudged_id", |b| {
        b.iter(|| key.nudged_id(black_box(NotificationId(7 << 22)), black_box(DeviceId(9 << 18))));
    });
}

fn packing(c: &mut Criterion) {
    let chosen = scattered(targets::MAX_TARGETS as i64);
    let packed = targets::pack(targets::NEWEST, &chosen);
    let entries: Vec<Entry> = chosen
        .iter()
        .map(|target| Entry { user: target.user, device: target.device, code: ResultCode::Sent })
        .collect();
    let blocks = outcome::pack(&entries);
    let mut group = c.benchmark_group("per target");
    group.throughput(Throughput::Elements(chosen.len() as u64));
    group.bench_function("pack 500 targets", |b| b.iter(|| targets::pack(targets::NEWEST, black_box(&chosen))));
    group.bench_function("unpack 500 targets", |b| b.iter(|| targets::unpack(targets::NEWEST, black_box(&packed))));
    group.bench_function("pack 500 outcomes", |b| b.iter(|| outcome::pack(black_box(&entries))));
    group.bench_function("unpack 500 outcomes", |b| b.iter(|| outcome::unpack(black_box(&blocks))));
    group.finish();
}

fn encoding(c: &mut Criterion) {
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let runtime = Runtime::production();
    let credentials = tokio.block_on(async {
        let sandbox = Sandbox::start(&runtime, sandbox::Options::default()).await.expect("a sandbox");
        let credentials = sandbox.credentials().clone();
        sandbox.shutdown().await;
        credentials
    });
    let threads = SendingThreads::new(&runtime, 1).expect("a thread");
    let deny = Arc::new(DenyFeed::default());
    let auth = apns::Auth::Token {
        p8_pem: Secret::new(credentials.apns_key_pem.clone().into_bytes()),
        key_id: credentials.key_id.clone(),
        team_id: credentials.team_id.clone(),
    };
    let bundle = "com.example.app";
    let apns_settings = apns::Settings::new(auth, vec![bundle.to_owned()]);
    let apns = apns::ApnsSender::new(&runtime, &threads, &deny, &apns_settings).expect("valid settings");
    let fcm_settings = fcm::Settings::new(Secret::new(credentials.service_account_json.clone().into_bytes()));
    let fcm = fcm::FcmSender::new(&runtime, &threads, &deny, &fcm_settings).expect("valid settings");

    let content = Content {
        title: Some("새 댓글이 달렸어요".to_owned()),
        body: Some("보리: 우리 집 초코도 이렇게 자요! 너무 귀여워서 한참 봤어요.".to_owned()),
        link: Some("ifriendspet://post/8231".to_owned()),
        ..Content::default()
    };
    let mut data = Data::new();
    data.insert("post".to_owned(), 8231.into());
    let body = Body { content, data, ..Body::default() };
    c.bench_function("message of inline content", |b| b.iter(|| render::message(black_box(&body), None)));
    let message = render::message(&body, None);
    let options = SendOptions {
        priority: Priority::High,
        collapse_key: None,
        expires_at: UnixMs(1_800_000_000_000),
        push_id: true,
    };
    let route = |platform, environment, bundle: &str| Route {
        id: RouteId(1),
        spec: RouteSpec { app: AppKey(1), platform, credential: "default".into(), environment, bundle: bundle.into() },
    };
    let to_apns = route(Platform::Apns, Environment::Production, bundle);
    let to_fcm = route(Platform::Fcm, Environment::None, "");
    c.bench_function("encode for APNs, once a variant", |b| b.iter(|| apns.encode(&to_apns, &message, &options)));
    c.bench_function("encode for FCM, once a variant", |b| b.iter(|| fcm.encode(&to_fcm, &message, &options)));
    tokio.block_on(async {
        tokio::join!(apns.drain(Duration::ZERO), fcm.drain(Duration::ZERO));
        drop((apns, fcm));
        threads.shutdown().await;
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(30).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets = decisions, packing, encoding
}
criterion_main!(benches);
