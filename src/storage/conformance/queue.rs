//! Jobs under leases.

use std::collections::BTreeSet;
use std::time::Duration;

use super::*;
use crate::domain::device::{Labels, Retirement};
use crate::domain::ids::{JobId, UserKey};
use crate::domain::notification::NewJob;
use crate::domain::pause::{Pause, PauseScope};
use crate::domain::sending::ProviderAnswer;
use crate::domain::targets::Progress;
use crate::runtime::Runtime;
use crate::storage::{Attempt, SUSPECT_CLAIMS};

pub async fn claims_go_by_route_lane_and_due_time(fixture: &Fixture) {
    let world = World::new(fixture).await;
    world.reachable("mina").await;
    world.register_fcm("mina", "tablet").await;
    let first = world.accept(world.to_users(&["mina"])).await;
    world.pass(10);
    let second = world.accept(world.to_users(&["mina"])).await;
    let overdue = NewEvent { not_before: Some(UnixMs(world.now().0 - 1_000)), ..world.to_users(&["mina"]) };
    let third = world.accept(overdue).await;
    assert!(world.claim(world.apns, Lane::Bulk).await.is_empty());
    let claimed = world.claim(world.apns, Lane::Interactive).await;
    let order: Vec<_> = claimed.iter().map(|claimed| claimed.notification.id).collect();
    assert_eq!(order, [first, second, third]);
    assert!(claimed.iter().all(|claimed| claimed.job.fence == 1 && claimed.job.route == world.apns));
    assert!(claimed.iter().all(|claimed| claimed.notification.body.content.title.is_some()));
    assert!(world.claim(world.apns, Lane::Interactive).await.is_empty());
    assert_eq!(world.claim(world.fcm, Lane::Interactive).await.len(), 3);
}

pub async fn a_claim_stays_within_its_room(fixture: &Fixture) {
    let world = World::new(fixture).await;
    for name in ["a", "b", "c"] {
        world.reachable(name).await;
    }
    for _ in 0..4 {
        world.accept(world.to_users(&["a", "b", "c"])).await;
    }
    let claim = async |max_targets, max_jobs| {
        let request = ClaimRequest { route: world.apns, lane: Lane::Interactive, max_targets, max_jobs };
        world.store().claim(request, world.fixture.boot, world.now()).await.unwrap().len()
    };
    assert_eq!(claim(2, 10).await, 1, "at least one");
    assert_eq!(claim(8, 10).await, 2);
    assert_eq!(claim(100, 1).await, 1);
    assert_eq!(claim(100, 10).await, 0);
}

pub async fn a_lost_fence_writes_nothing(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let device = world.reachable("mina").await;
    let id = world.accept(world.to_users(&["mina"])).await;
    let old = world.claim_one().await;
    world.store().release(vec![(old.job.id, old.job.fence)], world.now()).await.unwrap();
    assert!(!world.record(world.update(&old, entries(&old.job.targets, ResultCode::Sent))).await, "given back");
    let new = world.claim_one().await;
    assert!(new.job.fence > old.job.fence);
    let mut late = world.update(&old, entries(&old.job.targets, ResultCode::DeadToken));
    late.retirements.push(Retirement { device: device.id, since: None, reason: "410".to_owned() });
    late.followers.push(follower(&old, world.now()));
    late.details.push(attempt(&old, "TOKEN_GONE"));
    let sent = world.update(&new, entries(&new.job.targets, ResultCode::Sent));
    let held = world.store().record(vec![late, sent], world.now()).await.unwrap();
    assert_eq!(held, [false, true]);
    let counts = world.view(id).await.counts;
    assert_eq!((counts.sent, counts.dead, counts.open), (1, 0, 0));
    let history = world.store().person_history(world.app, id, &user("mina")).await.unwrap();
    assert!(history.devices[0].active && history.attempts.is_empty());
    // Late returns are ignored.
    world.store().release(vec![(old.job.id, old.job.fence)], world.now()).await.unwrap();
}

fn follower(claimed: &Claimed, due_at: UnixMs) -> NewJob {
    NewJob {
        notification: claimed.notification.id,
        route: claimed.job.route,
        lane: claimed.job.lane,
        targets: claimed.job.targets.clone(),
        attempt: claimed.job.attempt + 1,
        claims: 0,
        ready_at: due_at,
        due_at,
        first_attempt_at: Some(START),
    }
}

pub fn attempt(claimed: &Claimed, result: &'static str) -> Attempt {
    let target = claimed.job.targets[0];
    Attempt {
        user: target.user,
        device: target.device,
        attempt: claimed.job.attempt + 1,
        at: START,
        result,
        answer: ProviderAnswer::new(503, "ServiceUnavailable"),
        next_at: Some(UnixMs(START.0 + 60_000)),
    }
}

pub async fn a_finished_job_leaves_only_history(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let device = world.reachable("mina").await.id;
    let id = world.accept(world.to_users(&["mina"])).await;
    let claimed = world.claim_one().await;
    let due_at = UnixMs(world.now().0 + 60_000);
    let mut update = world.update(&claimed, entries(&claimed.job.targets, ResultCode::MovedToRetry));
    update.followers.push(follower(&claimed, due_at));
    update.details.push(attempt(&claimed, "MOVED_TO_RETRY"));
    assert!(world.record(update).await);
    assert!(world.claim(world.apns, Lane::Interactive).await.is_empty(), "not due");
    let delivery = world.store().list_deliveries(world.app, id, DeliveryFilter::default(), None, 9).await.unwrap();
    let delivery = &delivery.items[0];
    assert_eq!((delivery.reason, delivery.entry.device), ("MOVED_TO_RETRY", device));
    let last = delivery.last_attempt.as_ref().unwrap();
    assert_eq!((last.result, &*last.answer.reason, last.attempt), ("MOVED_TO_RETRY", "ServiceUnavailable", 1));
    world.pass(60_000);
    let retry = world.claim_one().await;
    assert_eq!((retry.job.attempt, retry.job.first_attempt_at, retry.job.ready_at), (1, Some(START), due_at));
    assert!(world.record(world.update(&retry, entries(&retry.job.targets, ResultCode::Sent))).await);
    assert_eq!(world.reasons(id, DeliveryFilter::default()).await, [(device, "SENT")]);
    assert_eq!(world.store().backlog(world.now()).await.unwrap().jobs, 0);
}

pub async fn a_checkpoint_survives_a_release(fixture: &Fixture) {
    let world = World::new(fixture).await;
    for name in ["a", "b", "c"] {
        world.reachable(name).await;
    }
    let id = world.accept(world.to_users(&["a", "b", "c"])).await;
    let claimed = world.claim_one().await;
    let mut progress = Progress::none(3);
    progress.finish(1);
    let mut update = world.update(&claimed, entries(&claimed.job.targets[1..2], ResultCode::Sent));
    update.progress = Some(progress);
    assert!(world.record(update).await);
    let counts = world.view(id).await.counts;
    assert_eq!((counts.open, counts.sent), (2, 1));
    world.store().release(vec![(claimed.job.id, claimed.job.fence)], world.now()).await.unwrap();
    let again = world.claim_one().await;
    assert_eq!(again.job.targets, claimed.job.targets);
    assert!(again.job.progress.is_finished(1) && again.job.progress.count() == 1);
}

/// Its answer was lost, for longer than the store itself goes on trying.
pub async fn a_checkpoint_asked_again_is_written_once(fixture: &Fixture) {
    let world = World::new(fixture).await;
    for name in ["a", "b", "c"] {
        world.reachable(name).await;
    }
    let id = world.accept(world.to_users(&["a", "b", "c"])).await;
    let claimed = world.claim_one().await;
    let checkpoint = |finished: &[usize], told: usize, code| {
        let mut progress = Progress::none(3);
        for index in finished {
            progress.finish(*index);
        }
        let mut update = world.update(&claimed, entries(&claimed.job.targets[told..=told], code));
        update.progress = Some(progress);
        update
    };
    let mut retried = checkpoint(&[1], 1, ResultCode::MovedToRetry);
    retried.followers.push(NewJob { targets: vec![claimed.job.targets[1]], ..follower(&claimed, world.now()) });
    assert!(world.record(retried.clone()).await);
    assert!(world.record(retried).await, "it is still ours");
    assert!(world.record(checkpoint(&[1, 2], 2, ResultCode::Sent)).await);
    assert!(world.record(checkpoint(&[1, 2], 2, ResultCode::Sent)).await);
    let counts = world.view(id).await.counts;
    assert_eq!((counts.open, counts.sent), (2, 1));
    assert_eq!(world.store().backlog(world.now()).await.unwrap().jobs, 2, "one follower");
    world.store().release(vec![(claimed.job.id, claimed.job.fence)], world.now()).await.unwrap();
    assert!(!world.record(checkpoint(&[1, 2], 2, ResultCode::Sent)).await, "another's by now");
}

pub async fn claims_count_until_there_is_progress(fixture: &Fixture) {
    let world = World::new(fixture).await;
    world.reachable("mina").await;
    world.accept(world.to_users(&["mina"])).await;
    let crash = || world.store().release_others(fixture.boot, world.now());
    // As a process that is no more.
    let dead = BootId(fixture.boot.0 + 1);
    let request = ClaimRequest { route: world.apns, lane: Lane::Interactive, max_targets: 1, max_jobs: 1 };
    let claim_one = async || world.store().claim(request, dead, world.now()).await.unwrap().remove(0);
    assert_eq!(claim_one().await.job.claims, 1);
    crash().await.unwrap();
    let claimed = claim_one().await;
    assert_eq!(claimed.job.claims, 2);
    world.store().release(vec![(claimed.job.id, claimed.job.fence)], world.now()).await.unwrap();
    let claimed = claim_one().await;
    assert_eq!(claimed.job.claims, 2, "an orderly return does not count");
    let mut update = world.update(&claimed, entries(&claimed.job.targets, ResultCode::Deferred));
    update.progress = Some(Progress::none(1));
    assert!(world.record(update).await);
    crash().await.unwrap();
    assert_eq!(claim_one().await.job.claims, 1, "progress starts the count again");
}

pub async fn only_being_alone_in_flight_counts_against_a_suspect(fixture: &Fixture) {
    let world = World::new(fixture).await;
    world.reachable("mina").await;
    world.accept(world.to_users(&["mina"])).await;
    // A dead owner's lease may be freed by the store itself at any moment.
    let (dead, alive) = (BootId(fixture.boot.0 + 1), fixture.boot);
    let request = ClaimRequest { route: world.apns, lane: Lane::Interactive, max_targets: 1, max_jobs: 1 };
    let claim = async |owner| world.store().claim(request, owner, world.now()).await.unwrap().remove(0).job;
    let crash = async || world.store().release_others(alive, world.now()).await.unwrap();
    for claims in [1, 2, 3, 4, 5, 5, 5, 5, 5, 5] {
        assert_eq!(claim(dead).await.claims, claims, "who was there is suspect, and no more than that");
        crash().await;
    }
    let job = loop {
        let job = claim(dead).await;
        if world.store().run_alone(job.id, job.fence).await.unwrap() {
            break job;
        }
    };
    crash().await;
    assert!(!world.store().run_alone(job.id, job.fence).await.unwrap(), "the fence is lost");
    assert_eq!(claim(dead).await.claims, SUSPECT_CLAIMS + 1);
    crash().await;
    let job = claim(alive).await;
    assert_eq!(job.claims, SUSPECT_CLAIMS + 1, "it was claimed, and not begun");
    assert!(world.store().run_alone(job.id, job.fence).await.unwrap());
    world.store().release(vec![(job.id, job.fence)], world.now()).await.unwrap();
    assert_eq!(claim(alive).await.claims, SUSPECT_CLAIMS + 1, "an orderly return does not count");
}

pub async fn other_owners_jobs_are_released(fixture: &Fixture) {
    let world = World::new(fixture).await;
    world.reachable("mina").await;
    world.accept(world.to_users(&["mina"])).await;
    world.pass(1);
    world.accept(world.to_users(&["mina"])).await;
    let request = ClaimRequest { route: world.apns, lane: Lane::Interactive, max_targets: 1, max_jobs: 1 };
    let dead = BootId(fixture.boot.0 + 1);
    let theirs = world.store().claim(request, dead, world.now()).await.unwrap();
    let ours = world.claim_one().await;
    assert_eq!(world.store().release_others(fixture.boot, world.now()).await.unwrap(), 1);
    let again = world.claim_one().await;
    assert_eq!(again.job.id, theirs[0].job.id);
    assert!(again.job.fence > theirs[0].job.fence + 1, "the release bumps the fence too");
    assert!(world.record(world.update(&ours, entries(&ours.job.targets, ResultCode::Sent))).await);
    assert!(!world.record(world.update(&theirs[0], entries(&ours.job.targets, ResultCode::Sent))).await);
}

pub async fn a_dead_token_is_retired_unless_confirmed_since(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let device = world.reachable("mina").await;
    let confirmed = device.confirmed_at;
    let gated = fixture.deny.position();
    let state = |since: Option<UnixMs>| {
        let world = &world;
        let device = device.id;
        async move {
            world.pass(1);
            world.accept(world.to_users(&["mina"])).await;
            let claimed = world.claim_one().await;
            let mut update = world.update(&claimed, entries(&claimed.job.targets, ResultCode::DeadToken));
            update.retirements.push(Retirement { device, since, reason: "410 Unregistered".to_owned() });
            assert!(world.record(update).await);
            let devices = world.store().list_devices(world.app, &user("mina"), None, 9).await.unwrap().items;
            (devices[0].active, devices[0].retired_reason.clone())
        }
    };
    assert_eq!(state(Some(UnixMs(confirmed.0 - 1))).await, (true, None), "registered again since");
    assert_eq!(state(Some(confirmed)).await, (false, Some("410 Unregistered".to_owned())));
    assert!(!fixture.deny.hit(gated, UserKey(1), device.id, NotificationId(1)));
    world.pass(1);
    assert_eq!(world.reachable("mina").await.id, device.id);
    assert!(!state(None).await.0);
}

pub async fn a_cancel_reaches_the_gate(fixture: &Fixture) {
    let world = World::new(fixture).await;
    world.reachable("mina").await;
    let id = world.accept(world.to_users(&["mina"])).await;
    let claimed = world.claim_one().await;
    let cancelled =
        || async { world.store().gate_facts(id, &comment(), &claimed.job.targets).await.unwrap().cancelled };
    assert!(!cancelled().await);
    assert!(world.store().cancel_notification(world.app, id, world.now()).await.unwrap());
    assert!(cancelled().await);
    assert!(!world.store().cancel_notification(world.app, id, world.now()).await.unwrap(), "a repeat");
    world.store().release(vec![(claimed.job.id, claimed.job.fence)], world.now()).await.unwrap();
    assert_eq!(world.claim_one().await.notification.cancelled_at, Some(world.now()));
    assert!(world.store().gate_facts(NotificationId(5), &comment(), &[]).await.unwrap().cancelled, "gone");
}

/// A day forward, an hour back, and back further, between any two steps: nothing open is lost, no id is used twice, and once
/// the clock has passed the last due time everything has been claimed and ended.
pub async fn nothing_is_lost_while_the_clock_jumps(fixture: &Fixture) {
    const EVENTS: usize = 60;
    let world = World::new(fixture).await;
    let device = world.reachable("mina").await.id;
    let jumps = [1, 24 * HOUR, -HOUR, 0, -24 * HOUR, 7, -HOUR, 25 * HOUR];
    let (mut notifications, mut jobs, mut ended) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
    let mut newest = NotificationId(0);
    for step in 0..EVENTS {
        world.pass(jumps[step % jumps.len()]);
        let id = world.accept(world.to_users(&["mina"])).await;
        assert!(notifications.insert(id) && id > newest, "ids go on");
        newest = id;
        if step % 3 == 0 {
            world.pass(jumps[(step / 3) % jumps.len()]);
            end_all(&world, &mut jobs, &mut ended).await;
        }
    }
    world.pass(60 * 24 * HOUR);
    // Postgres remembers how far a claim has looked, and looks at everything again after some seconds.
    let runtime = Runtime::production();
    let deadline = runtime.instant() + Duration::from_secs(20);
    while ended.len() < EVENTS && runtime.instant() < deadline {
        end_all(&world, &mut jobs, &mut ended).await;
        runtime.sleep(Duration::from_millis(50)).await;
    }
    ended.sort_unstable();
    assert_eq!(ended, notifications.into_iter().collect::<Vec<_>>(), "each once");
    assert_eq!(world.store().backlog(world.now()).await.unwrap().rows(), 0);
    assert!(world.register("jun", "bb").await.id > device);
}

/// Claims and records whatever is due.
async fn end_all(world: &World<'_>, jobs: &mut BTreeSet<JobId>, ended: &mut Vec<NotificationId>) {
    for claimed in world.claim(world.apns, Lane::Interactive).await {
        assert!(jobs.insert(claimed.job.id), "no id twice, and no job after its end");
        let update = world.update(&claimed, entries(&claimed.job.targets, ResultCode::Sent));
        assert!(world.record(update).await, "its fence is its own");
        ended.push(claimed.notification.id);
    }
}

pub async fn the_backlog_counts_what_waits(fixture: &Fixture) {
    let world = World::new(fixture).await;
    for name in ["a", "b"] {
        world.reachable(name).await;
    }
    world.accept(world.to_users(&["a", "b"])).await;
    world.pass(1_000);
    world.accept(world.to_users(&["a"])).await;
    let everyone = Audience { everyone: true, ..Audience::default() };
    world.accept(NewEvent { may_broadcast: true, ..world.event(everyone) }).await;
    let backlog = world.store().backlog(world.now()).await.unwrap();
    assert_eq!((backlog.jobs, backlog.targets, backlog.fanouts), (2, 3, 1));
    assert_eq!(backlog.oldest_ready, [Some(START), None]);
    assert_eq!(world.store().next_due(world.apns, Lane::Interactive).await.unwrap(), Some(START));
    assert_eq!(world.store().next_due(world.apns, Lane::Bulk).await.unwrap(), None);
}

pub async fn retention_keeps_open_work_and_consent(fixture: &Fixture) {
    let world = World::new(fixture).await;
    world.reachable("mina").await;
    let done = world.accept(NewEvent { idempotency: Some(key("k", 1)), ..world.to_users(&["mina"]) }).await;
    let claimed = world.claim_one().await;
    let mut update = world.update(&claimed, entries(&claimed.job.targets, ResultCode::DeadRejected));
    update.details.push(attempt(&claimed, "REJECTED"));
    assert!(world.record(update).await);
    let open = world.accept(world.to_users(&["mina", "nobody"])).await;
    world.pass(40 * 24 * HOUR);
    let kept = world.accept(world.to_users(&["mina"])).await;
    let before = UnixMs(world.now().0 - 30 * 24 * HOUR);
    let mut rows = 0;
    loop {
        let deleted = world.store().retain(before, world.now()).await.unwrap();
        rows += deleted;
        if deleted == 0 {
            break;
        }
    }
    assert_eq!(rows, 4, "a key, a detail, a block and a notification");
    assert!(matches!(
        world.store().get_notification(world.app, done).await,
        Err(StoreError::NotificationNotFound { .. })
    ));
    assert_eq!(world.view(open).await.counts.suppressed, 1);
    assert_eq!(world.view(kept).await.counts.open, 1);
    let history = world.store().person_history(world.app, kept, &user("mina")).await.unwrap();
    assert_eq!(history.choices.len(), 1);
}

pub async fn gate_facts_keep_the_order_asked(fixture: &Fixture) {
    let world = World::new(fixture).await;
    for name in ["a", "b", "c"] {
        world.reachable(name).await;
    }
    let id = world.accept(world.to_users(&["a", "b", "c"])).await;
    let mut targets = world.claim_one().await.job.targets;
    targets.reverse();
    targets.insert(1, Target { user: targets[0].user, device: DeviceId(12) });
    targets.push(Target { user: targets[0].user, device: targets[3].device });
    let facts = world.store().gate_facts(id, &comment(), &targets).await.unwrap();
    assert!(!facts.cancelled);
    for (at, (target, facts)) in targets.iter().zip(&facts.facts).enumerate() {
        match at {
            1 => assert_eq!(*facts, None, "no such device"),
            4 => assert_eq!(*facts, None, "another user's device"),
            _ => assert_eq!(facts.as_ref().unwrap().target, *target),
        }
    }
}

pub async fn a_job_is_put_off_and_pulled_forward(fixture: &Fixture) {
    let world = World::new(fixture).await;
    world.reachable("mina").await;
    world.accept(world.to_users(&["mina"])).await;
    let later = NewEvent { not_before: Some(UnixMs(world.now().0 + HOUR)), ..world.to_users(&["mina"]) };
    world.accept(later).await;
    let held = world.claim_one().await;
    let until = UnixMs(world.now().0 + 60_000);
    world.store().put_off(vec![(held.job.id, held.job.fence + 1)], until).await.unwrap();
    assert!(world.claim(world.apns, Lane::Interactive).await.is_empty(), "another fence frees nothing");
    world.store().put_off(vec![(held.job.id, held.job.fence)], until).await.unwrap();
    assert!(world.claim(world.apns, Lane::Interactive).await.is_empty());
    assert_eq!(world.store().next_due(world.apns, Lane::Interactive).await.unwrap(), Some(until));
    let pull = async |lane| world.store().pull_forward(world.apns, lane, world.now(), 10).await.unwrap();
    assert_eq!(pull(Lane::Bulk).await, 0);
    assert_eq!(pull(Lane::Interactive).await, 1, "what has a later time of its own keeps it");
    assert_eq!(pull(Lane::Interactive).await, 0);
    let again = world.claim_one().await;
    assert_eq!((again.job.id, again.job.claims), (held.job.id, 1), "no claim was spent");
    world.store().put_off(vec![(again.job.id, again.job.fence)], until).await.unwrap();
    world.pass(60_000);
    assert_eq!(world.claim_one().await.job.id, held.job.id, "due by itself");
}

pub async fn names_and_labels_keep_the_order_asked(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let plain = world.register("mina", "aa01").await;
    let mut labelled = world.registration("bora", "aa02");
    labelled.details.labels = [("stage".to_owned(), "qa".to_owned())].into();
    let labelled = world.try_register(labelled).await.unwrap().device;
    let at = |device| Target { user: UserKey(1), device };
    let targets = [at(labelled.id), at(DeviceId(12)), at(plain.id)];
    let known = world.store().names_and_labels(&targets).await.unwrap();
    assert_eq!(known[0], Some((user("bora"), labelled.details.labels)));
    assert_eq!(known[1], None);
    assert_eq!(known[2], Some((user("mina"), Labels::new())));
}

pub async fn open_targets_are_counted_by_app(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let other = World::of_app(fixture, "shop").await;
    for name in ["a", "b"] {
        world.reachable(name).await;
    }
    other.reachable("a").await;
    assert!(world.store().open_targets().await.unwrap().is_empty());
    world.accept(world.to_users(&["a", "b"])).await;
    world.accept(world.to_users(&["a"])).await;
    other.accept(other.to_users(&["a"])).await;
    let open = world.store().open_targets().await.unwrap();
    assert_eq!(open, [(world.app, 3), (other.app, 1)].into());
}

pub async fn pauses_are_kept_until_they_are_resumed(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let pause = |app, platform, event_type, reason: &str| Pause {
        scope: PauseScope { app, platform, event_type },
        since: world.now(),
        reason: reason.to_owned(),
    };
    let whole = pause(Some(world.app), None, None, "a bad template");
    let one = pause(Some(world.app), Some(Platform::Fcm), Some(comment()), "");
    assert!(world.store().pause(whole.clone()).await.unwrap());
    assert!(world.store().pause(one.clone()).await.unwrap());
    assert!(!world.store().pause(Pause { reason: "again".into(), ..whole.clone() }).await.unwrap());
    let mut kept = world.store().pauses().await.unwrap();
    kept.sort_by(|a, b| b.reason.cmp(&a.reason));
    assert_eq!(kept, [whole.clone(), one.clone()], "the first words stand");
    assert!(world.store().resume(&whole.scope).await.unwrap());
    assert!(!world.store().resume(&whole.scope).await.unwrap());
    assert_eq!(world.store().pauses().await.unwrap(), [one]);
}
