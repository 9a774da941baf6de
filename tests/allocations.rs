//! A guard against creeping costs that does not depend on the machine's mood: allocations of the steps that run once a
//! target, a job or a page. Raise a bound only with a reason; each is a little above what is needed today.
//!
//! One test, for the counter is the process's own.

#![expect(clippy::unwrap_used, reason = "a test, whose set-up must work")]

use std::alloc::System;
use std::sync::Arc;
use std::time::Duration;

use nudged::domain::consent::{DeviceChoice, DeviceFacts, DeviceState, EventRules, UserChoice};
use nudged::domain::content::{self, Content, Data};
use nudged::domain::deny::DenyFeed;
use nudged::domain::identity::IdentityKey;
use nudged::domain::ids::{AppId, AppKey, DeviceId, EventType, NotificationId, RouteId, UserId, UserKey};
use nudged::domain::notification::{Audience, Body};
use nudged::domain::outcome::{self, Entry, ResultCode};
use nudged::domain::plan::{Person, plan};
use nudged::domain::platform::{Environment, Platform, Route, RouteSpec};
use nudged::domain::sending::{Priority, SendOptions};
use nudged::domain::targets::{self, Target};
use nudged::domain::time::UnixMs;
use nudged::domain::violation::Violations;
use nudged::render;
use nudged::runtime::Runtime;
use nudged::sandbox::{self, Sandbox};
use nudged::senders::http2::SendingThreads;
use nudged::senders::{Secret, Sender, apns, fcm};
use nudged::service::canonical::{self, CanonicalEvent};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static COUNTED: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const RUNS: usize = 32;

/// The fewest allocations, growth included, of several runs of `work`: the counter is the process's own, and what a
/// thread of the senders allocates meanwhile can only add to a run.
fn allocations<T>(work: impl Fn() -> T) -> usize {
    let run = || {
        let region = Region::new(COUNTED);
        let made = work();
        let change = region.change();
        drop(made);
        change.allocations + change.reallocations
    };
    (0..RUNS).map(|_| run()).min().unwrap()
}

fn targets_of(count: i64) -> Vec<Target> {
    (1..=count)
        .map(|at| Target {
            user: UserKey((30_000_000 + at * 31_536) << 22),
            device: DeviceId((1_000 + at * 7_919) << 18),
        })
        .collect()
}

fn message() -> Body {
    let content = Content {
        title: Some("새 댓글이 달렸어요".to_owned()),
        body: Some("보리: 우리 집 초코도 이렇게 자요! 너무 귀여워서 한참 봤어요.".to_owned()),
        link: Some("ifriendspet://post/8231".to_owned()),
        ..Content::default()
    };
    let mut data = Data::new();
    data.insert("post".to_owned(), 8231.into());
    Body { content, data, ..Body::default() }
}

fn senders(tokio: &tokio::runtime::Runtime, runtime: &Runtime) -> (SendingThreads, apns::ApnsSender, fcm::FcmSender) {
    let credentials = tokio.block_on(async {
        let sandbox = Sandbox::start(runtime, sandbox::Options::default()).await.unwrap();
        let credentials = sandbox.credentials().clone();
        sandbox.shutdown().await;
        credentials
    });
    let threads = SendingThreads::new(runtime, 1).unwrap();
    let deny = Arc::new(DenyFeed::default());
    let auth = apns::Auth::Token {
        p8_pem: Secret::new(credentials.apns_key_pem.clone().into_bytes()),
        key_id: credentials.key_id.clone(),
        team_id: credentials.team_id.clone(),
    };
    let settings = apns::Settings::new(auth, vec!["com.example.app".to_owned()]);
    let apns = apns::ApnsSender::new(runtime, &threads, &deny, &settings).unwrap();
    let settings = fcm::Settings::new(Secret::new(credentials.service_account_json.clone().into_bytes()));
    let fcm = fcm::FcmSender::new(runtime, &threads, &deny, &settings).unwrap();
    (threads, apns, fcm)
}

#[test]
fn the_hot_steps_allocate_by_the_batch_and_not_by_the_target() {
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let runtime = Runtime::production();
    let (threads, apns, fcm) = senders(&tokio, &runtime);
    let mut found = Vec::new();
    let mut check = |step: &'static str, count: usize, most: usize| found.push((step, count, most));

    let chosen = targets_of(500);
    let packed = targets::pack(targets::NEWEST, &chosen);
    check("pack 500 targets", allocations(|| targets::pack(targets::NEWEST, &chosen)), 2);
    check("unpack 500 targets", allocations(|| targets::unpack(targets::NEWEST, &packed)), 2);
    let entries: Vec<Entry> = chosen
        .iter()
        .map(|target| Entry { user: target.user, device: target.device, code: ResultCode::Sent })
        .collect();
    check("pack 500 outcomes", allocations(|| outcome::pack(&entries)), 2);

    let rules = EventRules { default_opt_in: true, actor: None, expires_at: UnixMs(i64::MAX), cancelled: false };
    let people: Vec<Person> = targets_of(1000)
        .into_iter()
        .zip(0..)
        .map(|(target, at)| Person {
            user: target.user,
            choice: UserChoice { all: Some(at % 10 != 0), this_type: None },
            devices: vec![(
                target.device,
                DeviceFacts {
                    state: DeviceState::Active,
                    route: RouteId(1 + at % 2),
                    route_known: true,
                    allowed_here: true,
                    choice: DeviceChoice { all: None, this_type: None },
                },
            )],
        })
        .collect();
    check("plan a page of 1000 people", allocations(|| plan(&people, &rules, UnixMs(1))), 40);

    let key = IdentityKey::new([7; 32]);
    check("nudged_id", allocations(|| key.nudged_id(NotificationId(7 << 22), DeviceId(9 << 18))), 0);

    let body = message();
    let checked = || {
        let mut violations = Violations::default();
        body.content.check("content", &mut violations);
        content::check_data("data", &body.data, &mut violations);
        assert!(violations.is_empty());
    };
    check("check content and data of an event", allocations(checked), 0);
    let event = CanonicalEvent {
        app: &AppId::parse("app_id", "pets").unwrap(),
        event_type: &EventType::parse("event_type", "comment.created").unwrap(),
        audience: &Audience { user_ids: vec![UserId::parse("user_ids[0]", "ann").unwrap()], ..Audience::default() },
        actor: None,
        body: &body,
        priority: Priority::High,
        ttl_ms: 1,
        collapse_key: None,
        event_at: None,
        not_before: None,
        max_audience: None,
    };
    // The form, the keys of `data` in order, and a number's digits.
    check("canonical form of an event", allocations(|| canonical::hash(&event)), 4);
    let message = render::message(&body, None);
    check("message of inline content, once a variant", allocations(|| render::message(&body, None)), 4);
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
    let to_apns = route(Platform::Apns, Environment::Production, "com.example.app");
    let to_fcm = route(Platform::Fcm, Environment::None, "");
    check("encode for APNs, once a variant", allocations(|| apns.encode(&to_apns, &message, &options)), 15);
    check("encode for FCM, once a variant", allocations(|| fcm.encode(&to_fcm, &message, &options)), 11);

    for (step, count, most) in &found {
        println!("{step}: {count} allocations, at most {most}");
    }
    let too_many: Vec<_> = found.iter().filter(|(_, count, most)| count > most).collect();
    assert!(too_many.is_empty(), "{too_many:?}");
    tokio.block_on(async {
        tokio::join!(apns.drain(Duration::ZERO), fcm.drain(Duration::ZERO));
        drop((apns, fcm));
        threads.shutdown().await;
    });
}
