//! What is known of the providers, and what they said of devices.

use std::collections::BTreeMap;
use std::time::Duration;

use super::*;
use crate::domain::device::Retirement;
use crate::domain::pacing::{Bucket, PermitRequest, Rate};
use crate::storage::{DeviceChange, DeviceTimes, RedriveBatch, RedriveFilter, Redriven, Trouble, TroubleCause};

fn request(per_minute: u32, lane: Lane, wanted: u32) -> PermitRequest {
    PermitRequest { rate: Rate { per_minute, ramp_up: Duration::from_secs(60) }, lane, wanted, slow_down: false }
}

pub async fn permits_follow_the_arithmetic_of_the_rate(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let mut expected = None;
    let mut seed = 7_u64;
    let mut next = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % below
    };
    for step in 0..120 {
        // Now and then idle, now and then a complaint; bulk and interactive; less and more than there is.
        let pause = if step % 40 == 39 { 61_001 } else { i64::try_from(next(2_000)).unwrap() };
        world.pass(pause);
        let lane = Lane::ALL[usize::try_from(next(2)).unwrap()];
        let wanted = u32::try_from(next(30_000)).unwrap();
        let request = PermitRequest { slow_down: step % 25 == 24, ..request(600_000, lane, wanted) };
        let known = expected.unwrap_or_else(|| Bucket::fresh(request.rate, world.now()));
        let (after, block) = known.take(request, world.now());
        let leased = world.store().lease_permits("pets/fcm/default", request, world.now()).await.unwrap();
        let difference = i64::from(leased.granted) - i64::from(block.granted);
        assert!(difference.abs() <= 1, "step {step}: {leased:?} instead of {block:?}");
        // Rounding may differ by one permit; it must not add up.
        let drift = f64::from(block.granted) - f64::from(leased.granted);
        expected = Some(Bucket { permits: after.permits + drift, ..after });
    }
    let other = world.store().lease_permits("pets/fcm/other", request(60, Lane::Interactive, 5), world.now()).await;
    assert_eq!(other.unwrap().granted, 1, "another credential has its own");
}

pub async fn permits_asked_for_at_once_are_granted_once(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let now = world.now();
    let ask = |_| {
        let store = Arc::clone(&fixture.store);
        async move { store.lease_permits("c", request(60_000, Lane::Interactive, 30), now).await.unwrap().granted }
    };
    let granted: Vec<u32> = futures_util::future::join_all((0..16).map(ask)).await;
    assert_eq!(granted.iter().sum::<u32>(), 100, "a tenth of a second's worth of burst, whoever asks: {granted:?}");
}

fn trouble(name: &str, seen_at: UnixMs) -> Trouble {
    Trouble {
        name: name.to_owned(),
        cause: TroubleCause::Tokens,
        reason: "410 Unregistered".to_owned(),
        since: seen_at,
        seen_at,
        confirmed_until: None,
    }
}

pub async fn a_trouble_is_known_until_it_ends_or_nobody_meets_it(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let store = world.store();
    store.report_trouble(trouble("route/1", world.now())).await.unwrap();
    store
        .report_trouble(Trouble { cause: TroubleCause::Configuration, ..trouble("route/2", world.now()) })
        .await
        .unwrap();
    world.pass(60_000);
    store.report_trouble(Trouble { reason: "again".to_owned(), ..trouble("route/1", world.now()) }).await.unwrap();
    let known = store.troubles(world.now()).await.unwrap();
    assert_eq!(known.len(), 2);
    assert_eq!((&*known[0].name, &*known[0].reason, known[0].since), ("route/1", "again", START), "since it began");
    assert_eq!((known[1].cause, known[0].seen_at), (TroubleCause::Configuration, world.now()));
    store.end_trouble("route/1", world.now()).await.unwrap();
    assert_eq!(store.troubles(world.now()).await.unwrap().len(), 1);
    world.pass(5 * 60_000);
    assert!(store.troubles(world.now()).await.unwrap().is_empty(), "whoever met it is gone");
    store.report_trouble(trouble("route/2", world.now())).await.unwrap();
    assert_eq!(store.troubles(world.now()).await.unwrap()[0].since, world.now(), "it began anew");
}

pub async fn a_confirmation_outlives_the_trouble(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let store = world.store();
    let until = world.now().plus(Duration::from_secs(600));
    assert!(!store.confirm_trouble("route/1", until).await.unwrap(), "nothing to confirm");
    store.report_trouble(trouble("route/1", world.now())).await.unwrap();
    assert!(store.confirm_trouble("route/1", until).await.unwrap());
    store.end_trouble("route/1", world.now()).await.unwrap();
    let known = store.troubles(world.now()).await.unwrap();
    assert_eq!(known[0].confirmed_until, Some(until), "the other replicas still need to know");
    store.report_trouble(trouble("route/1", world.now())).await.unwrap();
    assert_eq!(store.troubles(world.now()).await.unwrap()[0].confirmed_until, Some(until));
    world.pass(600_000);
    store.end_trouble("route/1", world.now()).await.unwrap();
    assert!(store.troubles(world.now()).await.unwrap().is_empty());
}

async fn change(world: &World<'_>, device_changes: Vec<DeviceChange>) {
    world.pass(1);
    world.accept(world.to_users(&["mina"])).await;
    let claimed = world.claim(world.apns, Lane::Interactive).await.remove(0);
    let update = world.update(&claimed, entries(&claimed.job.targets, ResultCode::MovedToRetry));
    assert!(world.record(JobUpdate { device_changes, ..update }).await);
}

pub async fn a_device_is_left_alone_and_doubted(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let device = world.reachable("mina").await;
    let until = world.now().plus(Duration::from_secs(3_600));
    let times = async || world.store().device_times(&[DeviceId(5), device.id]).await.unwrap();
    let confirmed_at = device.confirmed_at;
    assert_eq!(times().await, [None, Some(DeviceTimes { confirmed_at, doubted_at: None })]);
    change(&world, vec![DeviceChange::Hold { device: device.id, until, doubted: false }]).await;
    assert_eq!(world.store().held_devices(world.now(), 9).await.unwrap(), [(device.id, until)]);
    assert_eq!(times().await[1].unwrap().doubted_at, None);
    let shorter = world.now().plus(Duration::from_secs(5));
    change(&world, vec![DeviceChange::Hold { device: device.id, until: shorter, doubted: true }]).await;
    assert_eq!(
        world.store().held_devices(world.now(), 9).await.unwrap(),
        [(device.id, until)],
        "the longer one stands"
    );
    assert_eq!(times().await[1].unwrap().doubted_at, Some(world.now()));
    assert!(world.store().held_devices(until, 9).await.unwrap().is_empty());
    // A registration that is written settles the doubt, and ends what was held for it.
    world.pass(HOUR);
    world.reachable("mina").await;
    assert_eq!(times().await[1].unwrap().doubted_at, None);
    assert!(world.store().held_devices(START, 9).await.unwrap().is_empty());
}

pub async fn a_device_moves_to_the_route_that_reached_it(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let device = world.reachable("mina").await;
    let reroute = |from, to| DeviceChange::Reroute { device: device.id, from, to };
    change(&world, vec![reroute(world.fcm, world.apns)]).await;
    let route = async || world.store().list_devices(world.app, &user("mina"), None, 9).await.unwrap().items[0].route;
    assert_eq!(route().await, world.apns, "it was not there any more");
    change(&world, vec![reroute(world.apns, world.fcm)]).await;
    assert_eq!(route().await, world.fcm);
}

/// Walks the history in steps of two blocks.
async fn redrive(world: &World<'_>, filter: RedriveFilter) -> Redriven {
    let mut sum = Redriven::default();
    loop {
        let batch = RedriveBatch { app: world.app, filter: filter.clone(), after: sum.after, max_blocks: 2 };
        let step = world.store().redrive(batch, world.now()).await.unwrap();
        assert!(step.done || step.after > sum.after, "it goes on");
        sum.redriven += step.redriven;
        sum.too_late += step.too_late;
        sum.routes.extend(step.routes);
        (sum.after, sum.done) = (step.after, step.done);
        if step.done {
            return sum;
        }
    }
}

async fn dies(world: &World<'_>, names: &[&str], code: ResultCode) -> NotificationId {
    world.pass(1);
    let id = world.accept(world.to_users(names)).await;
    let claimed = world.claim_one().await;
    assert!(world.record(world.update(&claimed, entries(&claimed.job.targets, code))).await);
    id
}

pub async fn the_dead_are_sent_again_once(fixture: &Fixture) {
    let world = World::new(fixture).await;
    for name in ["a", "b"] {
        world.reachable(name).await;
    }
    let rejected = dies(&world, &["a", "b"], ResultCode::DeadRejected).await;
    let sent = dies(&world, &["a"], ResultCode::Sent).await;
    let over = dies(&world, &["b"], ResultCode::DeadRetriesOver).await;
    let late =
        world.accept(NewEvent { expires_at: world.now().plus(Duration::from_secs(5)), ..world.to_users(&["a"]) }).await;
    let claimed = world.claim_one().await;
    assert!(world.record(world.update(&claimed, entries(&claimed.job.targets, ResultCode::DeadRejected))).await);
    world.pass(10_000);
    let all = redrive(&world, RedriveFilter::default()).await;
    assert_eq!((all.redriven, all.too_late), (3, 1));
    assert!(all.routes.iter().all(|route| *route == (world.apns, Lane::Interactive)));
    let again = redrive(&world, RedriveFilter::default()).await;
    assert_eq!((again.redriven, again.too_late), (0, 1), "they are open by now");
    let counts = world.view(rejected).await.counts;
    assert_eq!((counts.open, counts.dead), (2, 0));
    assert_eq!(world.view(late).await.counts.dead, 1);
    assert_eq!(world.view(sent).await.counts.sent, 1);
    assert!(world.reasons(over, DeliveryFilter::default()).await.iter().all(|(_, reason)| *reason == "REDRIVEN"));
    let mut sizes = BTreeMap::new();
    for claimed in world.claim(world.apns, Lane::Interactive).await {
        assert_eq!((claimed.job.attempt, claimed.job.first_attempt_at), (0, None), "a new life");
        sizes.insert(claimed.notification.id, claimed.job.targets.len());
        let code = if claimed.notification.id == over { ResultCode::DeadRejected } else { ResultCode::Sent };
        assert!(world.record(world.update(&claimed, entries(&claimed.job.targets, code))).await);
    }
    assert_eq!(sizes, BTreeMap::from([(rejected, 2), (over, 1)]));
    assert_eq!((world.view(rejected).await.counts.sent, world.view(rejected).await.counts.dead), (2, 0));
    assert_eq!(redrive(&world, RedriveFilter::default()).await.redriven, 1, "it died again");
    assert_eq!(world.view(over).await.counts.dead, 0);
}

pub async fn a_redrive_takes_only_what_it_was_asked_for(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let other = World::of_app(fixture, "birds").await;
    let a = world.reachable("a").await.id;
    world.reachable("b").await;
    other.reachable("a").await;
    let first = dies(&world, &["a", "b"], ResultCode::DeadRejected).await;
    world.pass(1_000);
    dies(&world, &["a", "b"], ResultCode::DeadRetriesOver).await;
    other.pass(5_000);
    let foreign = dies(&other, &["a"], ResultCode::DeadRejected).await;
    let died = world.now();
    let count = async |filter| redrive(&world, filter).await.redriven;
    assert_eq!(count(RedriveFilter { notification: Some(foreign), ..RedriveFilter::default() }).await, 0);
    assert_eq!(count(RedriveFilter { user: Some(user("nobody")), ..RedriveFilter::default() }).await, 0);
    assert_eq!(count(RedriveFilter { died_before: Some(START), ..RedriveFilter::default() }).await, 0);
    let one = RedriveFilter { notification: Some(first), device: Some(a), ..RedriveFilter::default() };
    assert_eq!(count(one).await, 1);
    let over =
        RedriveFilter { reasons: vec![ResultCode::DeadRetriesOver], user: Some(user("b")), ..RedriveFilter::default() };
    assert_eq!(count(over).await, 1);
    assert_eq!(
        count(RedriveFilter { died_from: Some(died), ..RedriveFilter::default() }).await,
        1,
        "the later one of a"
    );
    assert_eq!(count(RedriveFilter::default()).await, 1, "what is left");
    assert_eq!(other.view(foreign).await.counts.dead, 1);
}

pub async fn a_redrive_leaves_what_was_cancelled_and_what_retired_is_suppressed(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let device = world.reachable("mina").await;
    let cancelled = dies(&world, &["mina"], ResultCode::DeadRejected).await;
    assert!(!world.store().cancel_notification(world.app, cancelled, world.now()).await.unwrap(), "nothing was open");
    world.pass(1);
    let gone = world.accept(world.to_users(&["mina"])).await;
    let claimed = world.claim_one().await;
    let mut update = world.update(&claimed, entries(&claimed.job.targets, ResultCode::DeadToken));
    update.retirements.push(Retirement { device: device.id, since: None, reason: "410".to_owned() });
    assert!(world.record(update).await);
    let redriven = redrive(&world, RedriveFilter::default()).await;
    assert_eq!((redriven.redriven, redriven.too_late), (1, 1));
    let claimed = world.claim_one().await;
    assert_eq!(claimed.notification.id, gone);
    let facts = world.store().gate_facts(gone, &comment(), &claimed.job.targets).await.unwrap().facts;
    assert_eq!(facts[0].as_ref().unwrap().state, crate::domain::consent::DeviceState::Retired, "the gate asks again");
}
