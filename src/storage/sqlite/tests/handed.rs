//! Jobs without rows: open like any other, and back after a crash.

use std::time::Duration;

use super::super::handed as rowless;
use super::*;
use crate::domain::notification::HandedOver;
use crate::domain::outcome::ResultCode;
use crate::domain::targets::Progress;
use crate::storage::conformance::{Engine, World, entries};
use crate::storage::{Claimed, DeliveryFilter};

#[derive(diesel::QueryableByName)]
struct Count {
    #[diesel(sql_type = diesel::sql_types::BigInt)]
    count: i64,
}

fn count(store: &SqliteStore, query: &str) -> i64 {
    let row: Count = diesel::sql_query(query).get_result(&mut store.writer.inline_core().conn).unwrap();
    row.count
}

fn rows(store: &SqliteStore) -> i64 {
    count(store, "SELECT count(*) AS count FROM job")
}

/// An event for mina, handed over.
async fn handed_over(world: &World<'_>) -> Claimed {
    let engine = Engine::with_room(1);
    world.store().accept(world.to_users(&["mina"]), engine.clone(), world.now()).await.unwrap();
    let HandedOver { job, notification, .. } = engine.handed_over.lock().unwrap().remove(0);
    Claimed { job, notification }
}

#[tokio::test]
async fn a_job_without_a_row_is_open_until_a_block_names_its_targets() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let device = world.reachable("mina").await.id;
    let handed = handed_over(&world).await;
    let id = handed.notification.id;
    assert_eq!(rows(&store), 0);
    assert_eq!(world.view(id).await.counts.open, 1);
    assert_eq!(world.reasons(id, DeliveryFilter::default()).await, [(device, "QUEUED")]);
    let mina = crate::storage::conformance::user("mina");
    let open = store.person_history(world.app, id, &mina).await.unwrap().open;
    assert_eq!(open.iter().map(|(target, ..)| target.device).collect::<Vec<_>>(), [device]);
    let backlog = store.backlog(world.now()).await.unwrap();
    assert_eq!((backlog.jobs, backlog.targets, backlog.oldest_ready), (1, 1, [Some(world.now()), None]));
    assert_eq!(store.open_targets().await.unwrap(), [(world.app, 1)].into());

    let update = world.update(&handed, entries(&handed.job.targets, ResultCode::Sent));
    assert!(world.record(update.clone()).await);
    assert!(!world.record(update).await, "its fence is spent");
    let counts = world.view(id).await.counts;
    assert_eq!((counts.open, counts.sent), (0, 1));
    assert_eq!(world.reasons(id, DeliveryFilter::default()).await, [(device, "SENT")]);
    assert!(store.person_history(world.app, id, &mina).await.unwrap().open.is_empty());
    assert_eq!(store.backlog(world.now()).await.unwrap().jobs, 0);
    assert!(!store.cancel_notification(world.app, id, world.now()).await.unwrap(), "nothing is open");
    assert_eq!(rows(&store), 0);
}

#[tokio::test]
async fn a_cancel_finds_it() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    let id = handed_over(&world).await.notification.id;
    assert!(store.cancel_notification(world.app, id, world.now()).await.unwrap());
}

#[tokio::test]
async fn what_only_rows_can_tell_makes_rows() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    // Progress before the end.
    let first = handed_over(&world).await;
    let mut update = world.update(&first, Vec::new());
    update.progress = Some(Progress::none(1));
    assert!(world.record(update).await);
    assert_eq!((rows(&store), world.view(first.notification.id).await.counts.open), (1, 1));
    assert!(world.claim(world.apns, Lane::Interactive).await.is_empty(), "it is still ours");
    assert!(world.record(world.update(&first, entries(&first.job.targets, ResultCode::Sent))).await);
    // An end that does not say what became of the target.
    let second = handed_over(&world).await;
    assert!(world.record(world.update(&second, Vec::new())).await);
    assert_eq!((rows(&store), world.view(second.notification.id).await.counts.open), (0, 0));
    // A release.
    let third = handed_over(&world).await;
    store.release(vec![(third.job.id, third.job.fence)], world.now()).await.unwrap();
    let again = world.claim_one().await;
    assert_eq!((again.job.id, again.job.claims, again.job.fence), (third.job.id, 1, 3));
    assert!(!world.record(world.update(&third, entries(&third.job.targets, ResultCode::Sent))).await);
    // Being alone in flight.
    let alone = handed_over(&world).await;
    assert!(store.run_alone(alone.job.id, alone.job.fence).await.unwrap());
    assert!(world.record(world.update(&alone, entries(&alone.job.targets, ResultCode::Sent))).await);
    // To be put off.
    let fourth = handed_over(&world).await;
    let until = world.now().plus(Duration::from_secs(60));
    store.put_off(vec![(fourth.job.id, fourth.job.fence)], until).await.unwrap();
    assert_eq!(store.next_due(world.apns, Lane::Interactive).await.unwrap(), Some(until));
    assert_eq!(count(&store, "SELECT count(*) AS count FROM notification WHERE handed IS NOT NULL"), 0);
}

#[tokio::test]
async fn what_is_open_when_a_backup_is_restored_is_cancelled() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    let handed = handed_over(&world).await;
    let later = world.now().plus(Duration::from_secs(1));
    let (last, cancelled) = store.cancel_open(later, NotificationId(0), 10, world.now()).await.unwrap();
    assert_eq!((last, cancelled), (Some(handed.notification.id), 1));
}

/// Retention takes blocks before their notification, and so many rows at a time.
#[tokio::test]
async fn what_retention_reached_is_not_open_without_its_blocks() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    let ended = handed_over(&world).await;
    assert!(world.record(world.update(&ended, entries(&ended.job.targets, ResultCode::Sent))).await);
    world.pass(1);
    let open = handed_over(&world).await;
    world.pass(1);
    let id = ended.notification.id;
    count(&store, "DELETE FROM outcome_block RETURNING 0 AS count");
    assert_eq!(world.view(id).await.counts.open, 1, "nothing says that it ended");
    store
        .write(Class::Retention, 0, "deleting what is old", move |tx| rowless::end_before(tx, id.0 + 1))
        .await
        .unwrap();
    assert_eq!(world.view(id).await.counts.open, 0);
    assert_eq!((rows(&store), world.view(open.notification.id).await.counts.open), (0, 1));
    // What a clock that was ahead takes for history.
    store.write(Class::Retention, 0, "deleting what is old", |tx| rowless::end_before(tx, i64::MAX)).await.unwrap();
    assert_eq!((rows(&store), world.view(open.notification.id).await.counts.open), (1, 1));
    let young = handed_over(&world).await;
    assert_eq!((rows(&store), world.view(young.notification.id).await.counts.open), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn age_makes_rows() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    let old = handed_over(&world).await;
    tokio::time::advance(Duration::from_secs(3)).await;
    let young = handed_over(&world).await;
    assert_eq!(rows(&store), 1);
    for (handed, code) in [(&old, ResultCode::Sent), (&young, ResultCode::DeadRejected)] {
        assert!(world.record(world.update(handed, entries(&handed.job.targets, code))).await);
    }
    assert_eq!(rows(&store), 0);
    assert_eq!(world.view(old.notification.id).await.counts.sent, 1);
}

#[tokio::test]
async fn a_crash_frees_what_was_open_and_nothing_else() {
    let on_file = on_file();
    let before = fixture(&on_file.store, &on_file.deny);
    let world = World::new(&before).await;
    world.reachable("mina").await;
    let mut sent = Vec::new();
    for _ in 0..5 {
        let handed = handed_over(&world).await;
        assert!(world.record(world.update(&handed, entries(&handed.job.targets, ResultCode::Sent))).await);
        sent.push(handed.notification.id);
    }
    let open = handed_over(&world).await;
    drop(before);
    let OnFile { store, directory, .. } = on_file;
    drop(store);

    let on_file = open_in(directory);
    let after = fixture(&on_file.store, &on_file.deny);
    let world = World::new(&after).await;
    let claimed = world.claim_one().await;
    assert_eq!((claimed.job.id, claimed.notification.id), (open.job.id, open.notification.id));
    assert_eq!((claimed.job.claims, &claimed.job.targets), (2, &open.job.targets));
    assert!(claimed.job.fence > open.job.fence);
    assert!(handed_over(&world).await.job.id > open.job.id, "ids go on behind it");
    assert!(!world.record(world.update(&open, entries(&open.job.targets, ResultCode::Sent))).await);
    assert!(world.record(world.update(&claimed, entries(&claimed.job.targets, ResultCode::Sent))).await);
    for id in sent.into_iter().chain([open.notification.id]) {
        let counts = world.view(id).await.counts;
        assert_eq!((counts.open, counts.sent), (0, 1));
    }
}
