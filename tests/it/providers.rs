//! What providers answer, and what the running server makes of it: faults that pause, tokens that are dead or only
//! elsewhere, rates, and the dead sent again.

mod stalled;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use nudged::api::proto::admin_service_client::AdminServiceClient;
use nudged::api::proto::get_provider_status_response::{Route, State};
use nudged::api::proto::push_service_client::PushServiceClient;
use nudged::api::proto::{
    ConfirmRetirementsRequest, Delivery, Device, GetProviderStatusRequest, ListDeliveriesRequest, ListDevicesRequest,
    NotifyEventRequest, RedriveDeliveriesRequest, RegisterDeviceRequest, SetOptInRequest, delivery, device,
};
use nudged::runtime::Runtime;
use nudged::sandbox::{Action, Fault, Options, Sandbox, Target, TokenState};
use tonic::transport::Channel;

use super::postgres::Postgres;
use super::server::{APP, PATIENCE, Server, World, binary, event, free_port, opt_in, register};

type Client = PushServiceClient<Channel>;

async fn admin(address: &str) -> AdminServiceClient<Channel> {
    AdminServiceClient::connect(address.to_owned()).await.unwrap()
}

fn apns_token(number: usize) -> String {
    format!("{number:064x}")
}

/// People with an iPhone each, opted in.
async fn people(client: &mut Client, count: usize) -> Vec<String> {
    let mut names = Vec::new();
    for number in 0..count {
        let name = format!("user-{number}");
        register(client, &name, device::Platform::Apns, &apns_token(number)).await;
        opt_in(client, &name, true).await;
        names.push(name);
    }
    names
}

async fn notify(client: &mut Client, key: &str, users: &[String]) -> String {
    let users: Vec<&str> = users.iter().map(String::as_str).collect();
    client.notify_event(event(key, &users)).await.unwrap().into_inner().notification_id
}

async fn deliveries(client: &mut Client, id: &str) -> Vec<Delivery> {
    let request = ListDeliveriesRequest {
        app_id: APP.into(),
        notification_id: id.into(),
        page_size: 1_000,
        ..ListDeliveriesRequest::default()
    };
    client.list_deliveries(request).await.unwrap().into_inner().deliveries
}

/// How many deliveries there are of each reason, once that is as wanted.
async fn reasons(client: &mut Client, id: &str, wanted: &[(&str, usize)]) {
    let wanted: BTreeMap<String, usize> = wanted.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut counts = BTreeMap::new();
        for one in deliveries(client, id).await {
            *counts.entry(one.reason).or_insert(0) += 1;
        }
        if counts == wanted {
            return;
        }
        assert!(Instant::now() < deadline, "{id}: {counts:?} instead of {wanted:?}");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

async fn routes(address: &str) -> Vec<Route> {
    let request = GetProviderStatusRequest { app_id: APP.into() };
    admin(address).await.get_provider_status(request).await.unwrap().into_inner().routes
}

/// The route that the sandbox's configuration makes the default for iPhones.
async fn apns_route(world: &World) -> Route {
    let is_it = |route: &Route| route.apns_environment() == device::ApnsEnvironment::Sandbox;
    routes(&world.address).await.into_iter().find(is_it).unwrap()
}

/// Apple's production, with the same keys.
async fn production(world: &World) -> (tempfile::TempDir, Sandbox) {
    let here = world.config.parent().unwrap();
    let there = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(here).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() && path.extension().is_none_or(|extension| extension != "toml") {
            std::fs::copy(&path, there.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    let options = Options { dir: Some(there.path().to_owned()), ..Options::default() };
    let production = Sandbox::start(&Runtime::production(), options).await.unwrap();
    (there, production)
}

fn check(world: &World) -> String {
    let output = binary().args(["check", "--config"]).arg(&world.config).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_credential_burns_nothing_says_why_and_goes_on_by_itself() {
    let world = World::new().await;
    let server = world.start();
    let mut client = world.client().await;
    let users = people(&mut client, 20).await;
    world.sandbox.add_fault(Fault::status(403, "InvalidProviderToken").on(Target::Apns).times(100_000)).unwrap();
    let id = notify(&mut client, "one", &users).await;
    let deadline = Instant::now() + PATIENCE;
    let route = loop {
        let route = apns_route(&world).await;
        if route.state() == State::Paused {
            break route;
        }
        assert!(Instant::now() < deadline, "it is not paused: {route:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!((&*route.cause, &*route.reason), ("configuration", "403 InvalidProviderToken"));
    let all = routes(&world.address).await;
    let apple = |route: &&Route| route.platform() == device::Platform::Apns;
    assert!(all.iter().filter(apple).all(|route| route.state() == State::Paused), "shared by the credential's routes");
    assert!(all.iter().filter(|route| !apple(route)).all(|route| route.state() == State::Working), "{all:?}");
    let fcm = all.iter().find(|route| route.platform() == device::Platform::Fcm).unwrap();
    assert_eq!(fcm.rate_per_minute, None, "the sandbox's configuration says so");
    assert_eq!(
        world.metric("nudged_provider_up{app=\"ifriendspet\",platform=\"apns\",credential=\"default\"}").await,
        Some(0.0)
    );
    // A second process reads it from the database while the server uses it.
    let deadline = Instant::now() + PATIENCE;
    while !check(&world).contains("403 InvalidProviderToken") {
        assert!(Instant::now() < deadline, "{}", check(&world));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(check(&world).contains("apps.ifriendspet.apns, credential `default`"), "{}", check(&world));
    reasons(&mut client, &id, &[("QUEUED", 20)]).await;
    let refused = world.received().len();
    assert!(refused <= 20 + 4, "one probe at a time: {refused} requests were refused");
    world.sandbox.clear_faults();
    reasons(&mut client, &id, &[("SENT", 20)]).await;
    assert!(deliveries(&mut client, &id).await.iter().all(|one| one.last_attempt.is_none()), "no attempt was burned");
    let deadline = Instant::now() + PATIENCE;
    while check(&world).contains("InvalidProviderToken") {
        assert!(Instant::now() < deadline, "the trouble is over");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(apns_route(&world).await.state(), State::Working);
    server.kill();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_of_the_other_environment_moves_there_and_one_of_neither_is_retired() {
    let world = World::new().await;
    let (_dir, production) = production(&world).await;
    let server =
        world.start_with(&[("NUDGED_APPS__IFRIENDSPET__APNS__ENDPOINT", production.apns_endpoint().to_owned())]);
    let mut client = world.client().await;
    let users = people(&mut client, 3).await;
    world.sandbox.set_token_state(&apns_token(1), TokenState::Bad {}).unwrap();
    world.sandbox.set_token_state(&apns_token(2), TokenState::Bad {}).unwrap();
    production.set_token_state(&apns_token(2), TokenState::Bad {}).unwrap();
    let id = notify(&mut client, "one", &users).await;
    reasons(&mut client, &id, &[("SENT", 2), ("TOKEN_GONE", 1)]).await;
    // As often as it takes: a starved machine may give the answer up for late, and a repeat has the same identity.
    let accepted: BTreeSet<(String, Option<String>)> = production
        .received()
        .iter()
        .filter(|push| push.accepted)
        .map(|push| (push.token.clone(), push.nudged_id.clone()))
        .collect();
    assert_eq!(accepted.iter().map(|(token, _)| token).collect::<Vec<_>>(), [&apns_token(1)]);
    let device = async |client: &mut Client, user: &str| {
        let request = ListDevicesRequest { app_id: APP.into(), user_id: user.into(), ..ListDevicesRequest::default() };
        client.list_devices(request).await.unwrap().into_inner().devices.remove(0)
    };
    assert_eq!(device(&mut client, "user-0").await.apns_environment(), device::ApnsEnvironment::Sandbox);
    assert_eq!(device(&mut client, "user-1").await.apns_environment(), device::ApnsEnvironment::Production);
    let dead = device(&mut client, "user-2").await;
    assert!(dead.active == Some(false) && dead.retired_reason.contains("BadDeviceToken"), "{dead:?}");
    // From now on at once, and nobody is asked about the dead one.
    let asked = world.received().len();
    let id = notify(&mut client, "two", &users[1..]).await;
    reasons(&mut client, &id, &[("SENT", 1), ("NO_DEVICE", 1)]).await;
    assert_eq!(world.received().len(), asked);
    server.kill();
}

/// Apple's other environment is asked about one bad token a minute; the others wait for their turn, alive.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_tokens_are_asked_about_elsewhere_than_are_allowed_a_minute() {
    let world = World::new().await;
    let (_dir, production) = production(&world).await;
    let server = world.start_with(&[
        ("NUDGED_APPS__IFRIENDSPET__APNS__ENDPOINT", production.apns_endpoint().to_owned()),
        ("NUDGED_APPS__IFRIENDSPET__APNS__ENVIRONMENT_PROBES_PER_MINUTE", "1".to_owned()),
    ]);
    let mut client = world.client().await;
    let users = people(&mut client, 3).await;
    for number in 0..3 {
        world.sandbox.set_token_state(&apns_token(number), TokenState::Bad {}).unwrap();
    }
    let id = notify(&mut client, "one", &users).await;
    reasons(&mut client, &id, &[("SENT", 1), ("MOVED_TO_RETRY", 2)]).await;
    let asked: BTreeSet<String> = production.received().iter().map(|push| push.token.clone()).collect();
    assert_eq!(asked.len(), 1, "{asked:?}");
    let mut waits: Vec<i64> = deliveries(&mut client, &id)
        .await
        .into_iter()
        .filter_map(|one| one.last_attempt)
        .map(|last| last.next_at.unwrap().seconds - last.at.unwrap().seconds)
        .collect();
    waits.sort_unstable();
    assert!(matches!(waits[..], [59..=61, 119..=121]), "a minute apart: {waits:?}");
    for user in &users {
        let request = ListDevicesRequest { app_id: APP.into(), user_id: user.clone(), ..ListDevicesRequest::default() };
        let devices = client.list_devices(request).await.unwrap().into_inner().devices;
        assert!(devices.iter().all(Device::active), "{devices:?}");
    }
    server.kill();
}

/// That the credential is refused where a bad token is asked about is not the token's fault.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_credential_refused_elsewhere_retires_nobody() {
    let world = World::new().await;
    let (_dir, production) = production(&world).await;
    let server =
        world.start_with(&[("NUDGED_APPS__IFRIENDSPET__APNS__ENDPOINT", production.apns_endpoint().to_owned())]);
    let mut client = world.client().await;
    let users = people(&mut client, 2).await;
    world.sandbox.set_token_state(&apns_token(0), TokenState::Bad {}).unwrap();
    production.add_fault(Fault::status(403, "InvalidProviderToken").on(Target::Apns).times(100)).unwrap();
    let id = notify(&mut client, "one", &users).await;
    reasons(&mut client, &id, &[("SENT", 1), ("MOVED_TO_RETRY", 1)]).await;
    let all = deliveries(&mut client, &id).await;
    let last = all.into_iter().find_map(|one| one.last_attempt).expect("it was tried");
    assert_eq!(last.platform_reason, "BadDeviceToken; elsewhere 403 InvalidProviderToken");
    let wait = last.next_at.unwrap().seconds - last.at.unwrap().seconds;
    assert!((299..=301).contains(&wait), "five minutes, like others that a fault keeps from being asked: {wait} s");
    let request = ListDevicesRequest { app_id: APP.into(), user_id: users[0].clone(), ..ListDevicesRequest::default() };
    let device = client.list_devices(request).await.unwrap().into_inner().devices.remove(0);
    assert!(device.active(), "{device:?}");
    assert!(routes(&world.address).await.iter().all(|route| route.state() == State::Working), "it works here");
    server.kill();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dying_alike_pauses_instead_until_an_operator_confirms() {
    dying_alike(TokenState::OtherApp {}, "400 DeviceTokenNotForTopic").await;
}

/// Apple's answer to tokens of the other environment: each would be asked about there, before it is retired.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_tokens_alike_pause_instead_until_an_operator_confirms() {
    dying_alike(TokenState::Bad {}, "400 BadDeviceToken").await;
}

async fn dying_alike(state: TokenState, answer: &str) {
    let world = World::new().await;
    let server = world.start_with(&[("NUDGED_DELIVERY__RETIREMENT_GUARD_MIN", "5".to_owned())]);
    let mut client = world.client().await;
    let users = people(&mut client, 30).await;
    for number in 0..30 {
        world.sandbox.set_token_state(&apns_token(number), state).unwrap();
    }
    let id = notify(&mut client, "one", &users).await;
    let deadline = Instant::now() + PATIENCE;
    while world.metric("nudged_retirements_held_total{platform=\"apns\"}").await < Some(25.0) {
        assert!(Instant::now() < deadline, "they are not held: {:?}", deliveries(&mut client, &id).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let route = apns_route(&world).await;
    assert_eq!((route.state(), &*route.cause), (State::Paused, "tokens"));
    assert!(route.reason.contains(answer), "{route:?}");
    if state == (TokenState::OtherApp {}) {
        reasons(&mut client, &id, &[("TOKEN_GONE", 5), ("QUEUED", 25)]).await;
    }
    // Those of the first five that are to be asked about elsewhere wait as well.
    let gone = deliveries(&mut client, &id).await.iter().filter(|one| one.state() == delivery::State::Dead).count();
    assert!(gone <= 5, "{gone} are retired");
    let choice = |environment: device::ApnsEnvironment| ConfirmRetirementsRequest {
        app_id: APP.into(),
        platform: device::Platform::Apns.into(),
        apns_environment: environment.into(),
        ..ConfirmRetirementsRequest::default()
    };
    let mut admin = admin(&world.address).await;
    let other = admin.confirm_retirements(choice(device::ApnsEnvironment::Production)).await.unwrap().into_inner();
    assert_eq!(other.confirmed, Some(false), "nothing is wrong there");
    // The stored trouble is told by a task of its own.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let request = choice(device::ApnsEnvironment::Sandbox);
        if admin.confirm_retirements(request).await.unwrap().into_inner().confirmed == Some(true) {
            break;
        }
        assert!(Instant::now() < deadline, "it is not known");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    reasons(&mut client, &id, &[("TOKEN_GONE", 30)]).await;
    server.kill();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_many_requests_slow_one_device_and_nobody_else() {
    let world = World::new().await;
    let server = world.start();
    let mut client = world.client().await;
    let users = people(&mut client, 2).await;
    let mut fault = Fault::status(429, "TooManyRequests").token(apns_token(0));
    if let Action::Status { retry_after, .. } = &mut fault.action {
        *retry_after = Some("4".to_owned());
    }
    world.sandbox.add_fault(fault).unwrap();
    let first = notify(&mut client, "one", &users).await;
    reasons(&mut client, &first, &[("SENT", 1), ("MOVED_TO_RETRY", 1)]).await;
    let told = world.received().iter().find(|push| push.status == 429).unwrap().at;
    // Another one for the same device is not even tried; the other device's goes out.
    let second = notify(&mut client, "two", &users).await;
    reasons(&mut client, &second, &[("SENT", 1), ("DEFERRED", 1)]).await;
    reasons(&mut client, &first, &[("SENT", 2)]).await;
    reasons(&mut client, &second, &[("SENT", 2)]).await;
    for push in world.received().iter().filter(|push| push.token == apns_token(0) && push.status == 200) {
        assert!(push.at.since(told) >= Duration::from_millis(3_900), "{:?}", push.at.since(told));
    }
    server.kill();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_called_gone_within_the_hour_is_held_and_asked_once_more() {
    let world = World::new().await;
    let server = world.start();
    let mut client = world.client().await;
    let users = people(&mut client, 1).await;
    world.sandbox.set_token_state(&apns_token(0), TokenState::Unregistered { since: None }).unwrap();
    let first = notify(&mut client, "one", &users).await;
    reasons(&mut client, &first, &[("MOVED_TO_RETRY", 1)]).await;
    let retry = deliveries(&mut client, &first).await.remove(0).last_attempt.unwrap();
    let wait = retry.next_at.unwrap().seconds - retry.at.unwrap().seconds;
    assert!((3_500..=3_700).contains(&wait), "{wait} s: until a repeated registration would be written");
    let second = notify(&mut client, "two", &users).await;
    reasons(&mut client, &second, &[("DEFERRED", 1)]).await;
    assert_eq!(world.received().len(), 1, "it is left alone");
    server.kill();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_dead_are_redriven_through_the_gates() {
    let world = World::new().await;
    let server = world.start();
    let mut client = world.client().await;
    let users = people(&mut client, 4).await;
    world.sandbox.add_fault(Fault::status(400, "BadTopic").on(Target::Apns).times(4)).unwrap();
    let id = notify(&mut client, "one", &users).await;
    reasons(&mut client, &id, &[("REJECTED", 4)]).await;
    opt_in(&mut client, "user-3", false).await;
    let one = deliveries(&mut client, &id).await.into_iter().find(|one| one.user_id == "user-0").unwrap();
    let mut admin = admin(&world.address).await;
    let redrive = RedriveDeliveriesRequest { app_id: APP.into(), ..RedriveDeliveriesRequest::default() };
    let request = RedriveDeliveriesRequest { nudged_id: one.nudged_id.clone(), ..redrive.clone() };
    assert_eq!(admin.redrive_deliveries(request.clone()).await.unwrap().into_inner().redriven, 1);
    reasons(&mut client, &id, &[("REJECTED", 3), ("SENT", 1)]).await;
    assert_eq!(admin.redrive_deliveries(request).await.unwrap().into_inner().redriven, 0, "it is not dead");
    let request = RedriveDeliveriesRequest { reasons: vec!["TOKEN_GONE".into()], ..redrive.clone() };
    assert_eq!(admin.redrive_deliveries(request).await.unwrap().into_inner().redriven, 0, "of another reason");
    let bad = RedriveDeliveriesRequest { reasons: vec!["SENT".into()], notification_id: "x".into(), ..redrive };
    let refused = admin.redrive_deliveries(bad).await.expect_err("two wrong fields");
    assert!(refused.message().contains("reasons[0]") && refused.message().contains("notification_id"), "{refused}");
    let output =
        binary().args(["dead", "redrive", "--all", "--app", APP, "--address", &world.address]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.starts_with("3 deliveries are open again; 0 "), "{said} {}", String::from_utf8_lossy(&output.stderr));
    reasons(&mut client, &id, &[("SENT", 3), ("OPTED_OUT", 1)]).await;
    let identities: Vec<_> = world.received().iter().filter_map(|push| push.nudged_id.clone()).collect();
    assert_eq!(identities.iter().filter(|id| **id == one.nudged_id).count(), 2, "the same identity as before");
    server.kill();
}

/// Ten a second for all replicas together: each alone would be three times as fast.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rate_holds_over_all_replicas() {
    const REPLICAS: usize = 3;
    const USERS: usize = 30;
    const PER_SECOND: f64 = 10.0;
    let postgres = Postgres::start();
    let world = World::new().await;
    let ports: Vec<_> = (0..REPLICAS).map(|_| (free_port(), free_port())).collect();
    let start = |(grpc, admin): (u16, u16)| -> Server {
        world.start_with(&[
            ("NUDGED_DATABASE__URL", postgres.url()),
            ("NUDGED_GRPC__LISTEN", format!("127.0.0.1:{grpc}")),
            ("NUDGED_ADMIN__LISTEN", format!("127.0.0.1:{admin}")),
            ("NUDGED_APPS__IFRIENDSPET__APNS__RATE_PER_MINUTE", "600".to_owned()),
            ("NUDGED_APPS__IFRIENDSPET__APNS__RAMP_UP_SECS", "0".to_owned()),
        ])
    };
    let servers: Vec<Server> = ports.iter().map(|ports| start(*ports)).collect();
    let mut clients = Vec::new();
    for (grpc, _) in &ports {
        let address = format!("http://127.0.0.1:{grpc}");
        let deadline = Instant::now() + PATIENCE;
        clients.push(loop {
            match Client::connect(address.clone()).await {
                Ok(client) => break client,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        });
    }
    let users = people(&mut clients[0], USERS).await;
    let mut ids = Vec::new();
    for (number, client) in clients.iter_mut().enumerate() {
        let users: Vec<&str> = users.iter().map(String::as_str).collect();
        let event = NotifyEventRequest { ..event(&format!("event-{number}"), &users) };
        ids.push(client.notify_event(event).await.unwrap().into_inner().notification_id);
    }
    for id in &ids {
        reasons(&mut clients[0], id, &[("SENT", USERS)]).await;
    }
    let mut at: Vec<i64> = world.received().iter().map(|push| push.at.0).collect();
    at.sort_unstable();
    assert_eq!(at.len(), REPLICAS * USERS, "each once");
    #[expect(clippy::cast_precision_loss, reason = "a test of seconds")]
    let took = (at[at.len() - 1] - at[0]) as f64 / 1000.0;
    // All but the burst of a second came at the rate, or slower on a busy machine.
    let least = (f64::from(u32::try_from(REPLICAS * USERS).unwrap()) - PER_SECOND) / PER_SECOND;
    assert!(took >= least - 1.0, "{took:.1} s for 90 pushes, {least:.1} s at the rate");
    // In no two seconds more than those two, the burst, and what may be used a second late.
    let most =
        at.iter().map(|from| at.iter().filter(|one| (*from..*from + 2_000).contains(*one)).count()).max().unwrap();
    assert!(most <= 41, "{most} pushes within two seconds");
    for server in servers {
        server.kill();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_behind_a_broken_third_party_wait_and_the_others_go_on() {
    let world = World::new().await;
    let server = world.start();
    let mut client = world.client().await;
    for user in ["ios", "android"] {
        register(&mut client, user, device::Platform::Fcm, &format!("fcm-token-{user}:APA91b")).await;
        opt_in(&mut client, user, true).await;
    }
    let fault = Fault::status(401, "THIRD_PARTY_AUTH_ERROR").token("fcm-token-ios:APA91b").times(1_000);
    world.sandbox.add_fault(fault).unwrap();
    for round in 0..3 {
        let users = ["ios".to_owned(), "android".to_owned()];
        let id = notify(&mut client, &format!("event-{round}"), &users).await;
        reasons(&mut client, &id, &[("SENT", 1), ("MOVED_TO_RETRY", 1)]).await;
        let waiting = deliveries(&mut client, &id).await.into_iter().find(|one| one.user_id == "ios").unwrap();
        assert_eq!(waiting.state(), delivery::State::Open);
    }
    assert!(routes(&world.address).await.iter().all(|route| route.state() == State::Working));
    assert!(world.metric("nudged_unreachable_targets_total{platform=\"fcm\"}").await >= Some(3.0));
    server.kill();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_platform_that_stalls_holds_its_own_deliveries_and_never_the_others() {
    let world = World::new().await;
    let server = world.start_with(&[
        ("NUDGED_DELIVERY__MAX_STREAMS", "10".to_owned()),
        ("NUDGED_DELIVERY__MAX_CONNECTIONS", "1".to_owned()),
        ("NUDGED_DELIVERY__SENDER_THREADS", "1".to_owned()),
    ]);
    let mut client = world.client().await;
    let users = people(&mut client, 60).await;
    register(&mut client, "android", device::Platform::Fcm, "fcm-token-android:APA91b").await;
    opt_in(&mut client, "android", true).await;
    world.sandbox.add_fault(Fault::new(Action::Stall {}).on(Target::Apns).times(100_000)).unwrap();
    notify(&mut client, "stalled", &users).await;
    let began = Instant::now();
    let id = notify(&mut client, "free", &["android".to_owned()]).await;
    reasons(&mut client, &id, &[("SENT", 1)]).await;
    assert!(began.elapsed() < Duration::from_secs(10), "it did not wait for Apple's time-out");
    let status = apns_route(&world).await;
    assert!(status.in_flight <= 10, "{status:?}");
    server.kill();
}
