//! Jobs without rows: open like any other, somebody else's when their replica is gone, and never written twice.

use std::time::Duration;

use super::replicas::{count, eventually, execute, fixture};
use super::*;
use crate::domain::device::Retirement;
use crate::domain::notification::{HandedOver, NewJob};
use crate::domain::outcome::ResultCode;
use crate::domain::platform::Lane;
use crate::domain::sending::ProviderAnswer;
use crate::domain::targets::Progress;
use crate::storage::conformance::{Engine, World, entries, user};
use crate::storage::{Attempt as SendAttempt, DeliveryFilter};

async fn rows(database: &Database) -> i64 {
    count(database, "SELECT count(*) AS count FROM job").await
}

async fn groups(database: &Database) -> i64 {
    count(database, "SELECT count(*) AS count FROM handed").await
}

async fn opened() -> (Database, Arc<PostgresStore>, Fixture) {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    (database, store, fixture)
}

async fn reachable(world: &World<'_>, names: &[&str]) {
    for name in names {
        world.reachable(name).await;
    }
}

/// As a block tells of jobs without rows, in SQL; a condition goes behind it.
const TELL: &str = "INSERT INTO outcome_block (id, app, notification_id, route, first_user, last_user, at, entries) \
     SELECT id + 1, app, notification_id, route, first_user, last_user, 0, '' FROM handed_job";

/// An event for each of these people, handed over in one group as far as they come together.
async fn handed_over(world: &World<'_>, names: &[&str]) -> Vec<Claimed> {
    let engine = Engine::with_room(names.len());
    let accepted = names.iter().map(|name| world.store().accept(world.to_users(&[name]), engine.clone(), world.now()));
    for accepted in futures_util::future::join_all(accepted).await {
        accepted.unwrap();
    }
    let handed = std::mem::take(&mut *engine.handed_over.lock().unwrap());
    handed.into_iter().map(|HandedOver { job, notification, .. }| Claimed { job, notification }).collect()
}

async fn one(world: &World<'_>) -> Claimed {
    handed_over(world, &["mina"]).await.remove(0)
}

fn sent(world: &World<'_>, claimed: &Claimed) -> JobUpdate {
    world.update(claimed, entries(&claimed.job.targets, ResultCode::Sent))
}

/// Another try of the same targets, by this route, due now.
fn follower(world: &World<'_>, claimed: &Claimed, route: RouteId) -> NewJob {
    NewJob {
        notification: claimed.notification.id,
        route,
        lane: Lane::Interactive,
        targets: claimed.job.targets.clone(),
        attempt: 1,
        claims: 0,
        ready_at: world.now(),
        due_at: world.now(),
        first_attempt_at: Some(world.now()),
    }
}

#[tokio::test]
async fn a_job_without_a_row_is_open_until_a_block_tells_of_it() {
    let (database, store, fixture) = opened().await;
    let world = World::new(&fixture).await;
    let device = world.reachable("mina").await.id;
    let handed = one(&world).await;
    let id = handed.notification.id;
    assert_eq!((rows(&database).await, groups(&database).await), (0, 1));
    assert_eq!(world.view(id).await.counts.open, 1);
    assert_eq!(world.reasons(id, DeliveryFilter::default()).await, [(device, "QUEUED")]);
    let open = store.person_history(world.app, id, &user("mina")).await.unwrap().open;
    assert_eq!(open.iter().map(|(target, ..)| target.device).collect::<Vec<_>>(), [device]);
    let backlog = store.backlog(world.now()).await.unwrap();
    assert_eq!((backlog.jobs, backlog.targets, backlog.oldest_ready), (1, 1, [Some(world.now()), None]));
    assert_eq!(store.open_targets().await.unwrap(), [(world.app, 1)].into());

    let update = sent(&world, &handed);
    assert!(world.record(update.clone()).await);
    assert!(!world.record(update).await, "its fence is spent");
    let counts = world.view(id).await.counts;
    assert_eq!((counts.open, counts.sent), (0, 1));
    assert_eq!(world.reasons(id, DeliveryFilter::default()).await, [(device, "SENT")]);
    assert!(store.person_history(world.app, id, &user("mina")).await.unwrap().open.is_empty());
    assert_eq!(store.backlog(world.now()).await.unwrap().jobs, 0);
    assert!(!store.cancel_notification(world.app, id, world.now()).await.unwrap(), "nothing is open");
    assert_eq!((rows(&database).await, groups(&database).await), (0, 0));

    let cancelled = one(&world).await;
    assert!(store.cancel_notification(world.app, cancelled.notification.id, world.now()).await.unwrap());
    let later = Runtime::production().now().plus(Duration::from_secs(60));
    let restored = one(&world).await;
    let (last, count) = store.cancel_open(later, NotificationId(0), 10, world.now()).await.unwrap();
    assert_eq!((last, count), (Some(restored.notification.id), 1));
    store.close().await;
}

#[tokio::test]
async fn a_group_goes_with_the_last_of_its_jobs() {
    let (database, store, fixture) = opened().await;
    let world = World::new(&fixture).await;
    let names: Vec<String> = (0..20).map(|number| format!("u{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    reachable(&world, &names).await;
    let handed = handed_over(&world, &names).await;
    let made = groups(&database).await;
    assert!(handed.len() == 20 && (1..20).contains(&made), "{made} groups of {}", handed.len());
    let (last, others) = handed.split_last().unwrap();
    // Some at once and one by one; whatever was recorded at the same time.
    let (many, few) = others.split_at(10);
    let many: Vec<JobUpdate> = many.iter().map(|claimed| sent(&world, claimed)).collect();
    let few = futures_util::future::join_all(few.iter().map(|claimed| world.record(sent(&world, claimed))));
    let (many, few) = tokio::join!(store.record(many, world.now()), few);
    assert!(many.unwrap().into_iter().chain(few).all(|held| held));
    assert_eq!(store.backlog(world.now()).await.unwrap().jobs, 1);
    assert!(groups(&database).await > 0);
    assert!(world.record(sent(&world, last)).await);
    eventually("the groups are gone", async || groups(&database).await == 0).await;
    assert_eq!(rows(&database).await, 0);
    assert_eq!(count(&database, "SELECT count(*) AS count FROM outcome_block").await, 20);
    store.close().await;
}

/// Failed attempts, retries and dead tokens are written under the group, too.
#[tokio::test]
async fn what_else_a_push_came_to_needs_no_row() {
    let (database, store, fixture) = opened().await;
    let world = World::new(&fixture).await;
    reachable(&world, &["mina", "choco", "dubu"]).await;
    let handed = handed_over(&world, &["mina", "choco", "dubu"]).await;
    let [mina, choco, dubu] = &handed[..] else { panic!("{} jobs", handed.len()) };
    let mut dead = world.update(mina, entries(&mina.job.targets, ResultCode::DeadToken));
    let device = mina.job.targets[0].device;
    dead.retirements.push(Retirement { device, since: None, reason: "410 Unregistered".to_owned() });
    let mut retried = world.update(choco, entries(&choco.job.targets, ResultCode::MovedToRetry));
    let target = choco.job.targets[0];
    retried.details.push(SendAttempt {
        user: target.user,
        device: target.device,
        attempt: 1,
        at: world.now(),
        result: ResultCode::MovedToRetry.name(),
        answer: ProviderAnswer::new(503, "UNAVAILABLE"),
        next_at: Some(world.now()),
    });
    retried.followers.push(follower(&world, choco, choco.job.route));
    let held = store.record(vec![dead, retried, sent(&world, dubu)], world.now()).await.unwrap();
    assert_eq!(held, [true, true, true]);
    assert_eq!(rows(&database).await, 1, "the retry's");
    assert_eq!(count(&database, "SELECT count(*) AS count FROM device_retirement").await, 1);
    assert_eq!(count(&database, "SELECT count(*) AS count FROM attempt_detail").await, 1);
    eventually("the group is gone", async || groups(&database).await == 0).await;
    let retry = world.claim_one().await;
    assert_eq!((retry.job.attempt, retry.notification.id), (1, choco.notification.id));
    assert_eq!(world.view(choco.notification.id).await.counts.open, 1);
    store.close().await;
}

#[tokio::test]
async fn what_only_rows_can_tell_makes_rows() {
    let (database, store, fixture) = opened().await;
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    // Progress before the end.
    let first = one(&world).await;
    let mut update = world.update(&first, Vec::new());
    update.progress = Some(Progress::none(1));
    assert!(world.record(update).await);
    assert_eq!((rows(&database).await, groups(&database).await), (1, 0));
    assert_eq!(world.view(first.notification.id).await.counts.open, 1);
    assert!(world.claim(world.apns, Lane::Interactive).await.is_empty(), "it is still ours");
    assert!(world.record(sent(&world, &first)).await);
    // An end that does not say what became of the target.
    let second = one(&world).await;
    assert!(world.record(world.update(&second, Vec::new())).await);
    assert_eq!((rows(&database).await, world.view(second.notification.id).await.counts.open), (0, 0));
    // A release.
    let third = one(&world).await;
    store.release(vec![(third.job.id, third.job.fence)], world.now()).await.unwrap();
    let again = world.claim_one().await;
    assert_eq!((again.job.id, again.job.claims, again.job.fence), (third.job.id, 1, 3));
    assert!(!world.record(sent(&world, &third)).await);
    // Being alone in flight.
    let alone = one(&world).await;
    assert!(store.run_alone(alone.job.id, alone.job.fence).await.unwrap());
    assert!(world.record(sent(&world, &alone)).await);
    // To be put off.
    let fourth = one(&world).await;
    let until = world.now().plus(Duration::from_secs(60));
    store.put_off(vec![(fourth.job.id, fourth.job.fence)], until).await.unwrap();
    assert_eq!(store.next_due(world.apns, Lane::Interactive).await.unwrap(), Some(until));
    assert_eq!(groups(&database).await, 0);
    store.close().await;
}

#[tokio::test]
async fn age_makes_rows_and_their_lease_goes_on() {
    let (database, store, fixture) = opened().await;
    let world = World::new(&fixture).await;
    reachable(&world, &["mina", "choco", "dubu"]).await;
    let handed = handed_over(&world, &["mina", "choco", "dubu"]).await;
    assert!(world.record(sent(&world, &handed[0])).await);
    eventually("they have rows", async || groups(&database).await == 0).await;
    assert_eq!(rows(&database).await, 2, "what has ended gets none");
    assert!(world.claim(world.apns, Lane::Interactive).await.is_empty(), "they are still ours");
    let updates: Vec<JobUpdate> = handed[1..].iter().map(|claimed| sent(&world, claimed)).collect();
    assert_eq!(store.record(updates, world.now()).await.unwrap(), [true, true]);
    assert_eq!(rows(&database).await, 0);
    // Another did it, which this replica does not know: its lease is found among the rows.
    let other = one(&world).await;
    execute(
        &database,
        "INSERT INTO job (id, app, notification_id, route, lane, format, ready_at, due_at, owner, fence, claims, first_user, \
         last_user, target_count, targets) SELECT id, app, notification_id, route, lane, format, ready_at, due_at, owner, fence, \
         claims, first_user, last_user, target_count, targets FROM handed_job; DELETE FROM handed",
    )
    .await;
    assert_eq!(rows(&database).await, 1);
    assert!(world.record(sent(&world, &other)).await);
    assert_eq!((rows(&database).await, world.view(other.notification.id).await.counts.sent), (0, 1));
    store.close().await;
}

#[tokio::test]
async fn what_a_dead_replica_had_open_is_the_others_and_nothing_else() {
    let database = Database::new().await;
    let (first, deny) = database.open().await;
    let (second, second_deny) = database.open().await;
    let of_first = fixture(&first, &deny);
    let of_second = fixture(&second, &second_deny);
    let world = World::new(&of_first).await;
    let others = World::new(&of_second).await;
    reachable(&world, &["mina", "choco"]).await;
    eventually("both know of each other", async || first.inner.context.packing.rowless()).await;
    let handed = handed_over(&world, &["mina", "choco"]).await;
    assert_eq!((rows(&database).await, groups(&database).await > 0), (0, true));
    assert!(world.record(sent(&world, &handed[0])).await);
    assert_eq!(second.release_others(second.boot_id(), world.now()).await.unwrap(), 0, "it lives");
    // Nobody beats for it any more.
    for task in &*first.tasks.lock().unwrap() {
        task.abort();
    }
    let boot = first.boot_id().0;
    execute(&database, &format!("UPDATE replica SET heartbeat = 0 WHERE boot_id = {boot}")).await;
    eventually("its work is free", async || {
        second.release_others(second.boot_id(), world.now()).await.unwrap();
        groups(&database).await == 0
    })
    .await;
    let claimed = others.claim_one().await;
    assert_eq!(
        (claimed.job.id, claimed.job.claims, &claimed.job.targets),
        (handed[1].job.id, 2, &handed[1].job.targets)
    );
    assert_eq!(rows(&database).await, 1, "what was recorded is not sent again");
    // It is late, not dead.
    assert!(!world.record(sent(&world, &handed[1])).await);
    assert!(others.record(sent(&others, &claimed)).await);
    for claimed in &handed {
        let counts = others.view(claimed.notification.id).await.counts;
        assert_eq!((counts.open, counts.sent), (0, 1));
    }
    second.close().await;
}

#[tokio::test]
async fn a_replica_that_leaves_gives_back_what_it_had() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let before = fixture(&store, &deny);
    let world = World::new(&before).await;
    world.reachable("mina").await;
    let handed = one(&world).await;
    store.close().await;
    assert_eq!((rows(&database).await, groups(&database).await), (1, 0));
    let (store, deny) = database.open().await;
    let after = fixture(&store, &deny);
    let world = World::new(&after).await;
    assert_eq!(world.claim_one().await.job.id, handed.job.id);
    store.close().await;
}

/// A group whose answer was lost was handed to nobody.
#[tokio::test]
async fn a_group_that_nobody_knows_of_is_freed() {
    let (database, store, fixture) = opened().await;
    let world = World::new(&fixture).await;
    reachable(&world, &["mina", "choco"]).await;
    let lost = one(&world).await;
    let group = store.inner.context.handed.groups();
    store.inner.context.handed.forget(group[0]);
    let known = handed_over(&world, &["choco"]).await;
    store.inner.context.sweep.ask();
    eventually("it is free", async || rows(&database).await == 1).await;
    let claimed = world.claim_one().await;
    assert_eq!((claimed.job.id, claimed.job.claims), (lost.job.id, 1), "nobody had tried");
    assert!(world.record(sent(&world, &known[0])).await);
    store.close().await;
}

/// It would not take them up when the last newer one goes.
#[tokio::test]
async fn beside_a_replica_that_does_not_know_of_them_there_are_none() {
    let (database, store, fixture) = opened().await;
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    execute(
        &database,
        "INSERT INTO replica (slot, boot_id, heartbeat, version, pack_format) \
         VALUES (1000, 77, (extract(epoch FROM clock_timestamp()) * 1000)::BIGINT + 3600000, 'older', 2)",
    )
    .await;
    eventually("it is heard of", async || !store.inner.context.packing.rowless()).await;
    let handed = one(&world).await;
    assert_eq!((rows(&database).await, groups(&database).await), (1, 0));
    assert!(world.record(sent(&world, &handed)).await);
    assert_eq!(rows(&database).await, 0);
    store.close().await;
}

/// Who makes rows waits for who records, and then sees it, whatever isolation the server begins with.
#[tokio::test]
async fn what_is_recorded_while_rows_are_made_gets_none() {
    for isolation in ["read committed", "repeatable read", "serializable"] {
        let database = Database::new().await;
        let name = &database.name;
        execute(&database, &format!("ALTER DATABASE {name} SET default_transaction_isolation = '{isolation}'")).await;
        let (store, deny) = database.open().await;
        let fixture = fixture(&store, &deny);
        let world = World::new(&fixture).await;
        world.reachable("mina").await;
        let handed = one(&world).await;
        let mut recording = database.connect().await;
        recording.batch_execute("BEGIN; SELECT id FROM handed FOR KEY SHARE").await.unwrap();
        let making = Runtime::production().spawn({
            let (store, lease) = (Arc::clone(&store), (handed.job.id, handed.job.fence));
            async move { super::super::handed::rows_for(&store.inner, [lease].into_iter()).await }
        });
        eventually("it waits for the lock", async || {
            count(&database, "SELECT count(*) AS count FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()").await > 0
        })
        .await;
        recording.batch_execute(&format!("{TELL}; COMMIT")).await.unwrap();
        making.await.unwrap().unwrap();
        assert_eq!((rows(&database).await, groups(&database).await), (0, 0), "{isolation}");
        store.close().await;
    }
}

/// The group stays, for another of its jobs is open, and would take the same again.
#[tokio::test]
async fn results_whose_answer_was_lost_are_written_once() {
    let database = Database::new().await;
    let (store, deny, proxy) = database.open_behind_a_proxy().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    reachable(&world, &["mina", "choco"]).await;
    for is_retried in [false, true] {
        let handed = handed_over(&world, &["mina", "choco"]).await;
        let [mina, choco] = &handed[..] else { panic!("{} jobs", handed.len()) };
        let id = mina.notification.id;
        let mut update = sent(&world, mina);
        if is_retried {
            update = world.update(mina, entries(&mina.job.targets, ResultCode::MovedToRetry));
            update.followers.push(follower(&world, mina, mina.job.route));
            proxy.lose_answer_to(b"COMMIT");
        } else {
            let group = store.inner.context.handed.of(&[update.clone()])[0].unwrap();
            proxy.lose_answer_to(Box::leak(Box::new(group.to_be_bytes())));
        }
        assert!(world.record(update.clone()).await);
        assert!(proxy.is_lost());
        let blocks = format!("SELECT count(*) AS count FROM outcome_block WHERE notification_id = {}", id.0);
        let jobs = format!("SELECT count(*) AS count FROM job WHERE notification_id = {}", id.0);
        assert_eq!(count(&database, &blocks).await, 1);
        assert_eq!(count(&database, &jobs).await, i64::from(is_retried), "the follower, once");
        assert!(!world.record(update).await, "its fence is spent");
        assert_eq!(count(&database, &blocks).await, 1);
        assert!(world.record(sent(&world, choco)).await);
        assert_eq!(world.view(choco.notification.id).await.counts.sent, 1);
    }
    store.close().await;
}

/// A call that was given up may have been written; what is called again has other ids.
#[tokio::test]
async fn results_that_were_given_up_and_are_called_again_are_written_once() {
    let (database, store, fixture) = opened().await;
    let world = World::new(&fixture).await;
    reachable(&world, &["mina", "choco"]).await;
    let [mina, choco] = &handed_over(&world, &["mina", "choco"]).await[..] else { panic!("two jobs") };
    let updates = [sent(&world, mina)];
    let handed = &store.inner.context.handed;
    let doubt = handed.doubt(&handed.of(&updates));
    execute(&database, &format!("{TELL} WHERE id = {}", mina.job.id.0)).await;
    drop(doubt);
    assert!(!world.record(updates[0].clone()).await, "it has ended");
    let blocks = "SELECT count(*) AS count FROM outcome_block";
    assert_eq!((count(&database, blocks).await, rows(&database).await), (1, 1));
    assert!(world.record(sent(&world, choco)).await, "the other is still ours");
    assert_eq!((count(&database, blocks).await, rows(&database).await, groups(&database).await), (2, 0, 0));
    store.close().await;
}

/// Its results would be taken for those of the job that goes there.
#[tokio::test]
async fn a_job_that_goes_on_by_another_route_ends_none_that_goes_there() {
    let (database, store, fixture) = opened().await;
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    world.register_fcm("mina", "fcm-1").await;
    let engine = Engine::with_room(2);
    store.accept(world.to_users(&["mina"]), engine.clone(), world.now()).await.unwrap();
    let handed: Vec<HandedOver> = std::mem::take(&mut *engine.handed_over.lock().unwrap());
    let claimed = |route| {
        let of = handed.iter().find(|handed| handed.job.route == route).unwrap();
        Claimed { job: of.job.clone(), notification: Arc::clone(&of.notification) }
    };
    let (apns, fcm) = (claimed(world.apns), claimed(world.fcm));
    let mut moved = world.update(&apns, entries(&apns.job.targets, ResultCode::MovedToRetry));
    moved.followers.push(follower(&world, &apns, world.fcm));
    assert!(world.record(moved).await);
    let mut there = world.claim(world.fcm, Lane::Interactive).await;
    let there = there.pop().expect("the follower");
    assert!(world.record(sent(&world, &there)).await);
    assert_eq!(world.view(fcm.notification.id).await.counts.open, 1, "the other waits for its answer");
    eventually("all have rows", async || groups(&database).await == 0).await;
    assert_eq!(rows(&database).await, 1);
    assert!(world.record(sent(&world, &fcm)).await);
    assert_eq!(world.view(fcm.notification.id).await.counts.open, 0);
    store.close().await;
}
