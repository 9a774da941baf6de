//! The history's partitions as time passes.

use std::collections::BTreeSet;
use std::time::Duration;

use super::replicas::{count, eventually, fixture};
use super::*;
use crate::domain::outcome::ResultCode;
use crate::storage::WatchFilter;
use crate::storage::conformance::{START, World, entries};
use crate::storage::postgres::partitions::{Plan, keep};

const DAY: i64 = 24 * 3_600_000;
const PLAN: Plan = Plan { days: 1, ahead: 3 };

/// Midnight of the day before the cases begin, after so many days.
fn midnight(days: i64) -> UnixMs {
    UnixMs(START.0 - START.0.rem_euclid(DAY) + days * DAY)
}

async fn names(database: &Database, table: &str) -> BTreeSet<String> {
    let mut conn = database.connect().await;
    let names: Vec<String> = constant!(
        diesel::sql_types::Text;
        "SELECT c.relname::TEXT FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid \
         WHERE i.inhparent = $1::TEXT::regclass",
        diesel::sql_types::Text => table,
    )
    .load(&mut conn)
    .await
    .unwrap();
    names.into_iter().collect()
}

async fn keep_all(store: &PostgresStore, before: UnixMs, now: UnixMs) -> u64 {
    let mut dropped = 0;
    // Each round is bounded.
    for _ in 0..8 {
        dropped += keep(&store.inner, PLAN, before, now).await.unwrap();
    }
    dropped
}

/// Claims and sends everything.
async fn send_all(world: &World<'_>) {
    for claimed in world.claim(world.apns, Lane::Interactive).await {
        assert!(world.record(world.update(&claimed, entries(&claimed.job.targets, ResultCode::Sent))).await);
    }
}

#[tokio::test]
async fn partitions_are_there_before_the_first_row() {
    let database = Database::new().await;
    let runtime = Runtime::production();
    let settings = Settings { days_ahead: 2, server_clock: true, ..database.settings() };
    let open = async || {
        let deny = Arc::new(DenyFeed::shared(runtime.instant().into_std()));
        let store = PostgresStore::open(runtime.clone(), &settings, Arc::clone(&deny)).await.unwrap();
        (Arc::new(store), deny)
    };
    let ((store, deny), _other) = tokio::join!(open(), open());
    for table in ["notification", "outcome_block", "attempt_detail"] {
        assert_eq!(names(&database, table).await.len(), 1 + 3, "the default, today and two days");
    }
    let fixture = fixture(&store, &deny);
    let mut world = World::new(&fixture).await;
    world.now = runtime.now().0.into();
    world.reachable("mina").await;
    let from = store.watch(world.app, None, &WatchFilter::default(), 1).await.unwrap().position;
    let id = world.accept(world.to_users(&["mina"])).await;
    send_all(&world).await;
    assert_eq!(world.view(id).await.counts.sent, 1);
    let told =
        crate::storage::conformance::watching::told(&*store, world.app, from, &WatchFilter::default(), 9, 1).await;
    assert_eq!(told.len(), 1, "also where old partitions are left out");
    assert_eq!(count(&database, "SELECT count(*) FROM notification_default").await, 0);
    assert_eq!(count(&database, "SELECT count(*) FROM outcome_block_default").await, 0);
    assert_eq!(count(&database, "SELECT count(*) FROM outcome_block").await, 1);
}

#[tokio::test]
async fn forty_days_pass_under_traffic_and_two_replicas_keep_house() {
    const DAYS: i64 = 40;
    const KEPT: i64 = 10;
    let database = Database::new().await;
    let ((a, deny), (b, _)) = (database.open().await, database.open().await);
    let fixture = fixture(&a, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    keep_all(&a, UnixMs(0), midnight(0)).await;
    let mut accepted = Vec::new();
    for day in 0..DAYS {
        world.now.store(midnight(day).0 + DAY / 2, Ordering::Relaxed);
        let now = world.now();
        let before = UnixMs(now.0 - KEPT * DAY);
        let traffic = async {
            for _ in 0..3 {
                accepted.push((day, world.accept(world.to_users(&["mina", "nobody"])).await));
                send_all(&world).await;
                world.pass(1);
            }
        };
        let (kept, other, ()) =
            tokio::join!(keep(&a.inner, PLAN, before, now), keep(&b.inner, PLAN, before, now), traffic);
        kept.unwrap();
        other.unwrap();
        // Who was busy or had to wait comes again; it is never long.
        keep_all(&b, before, now).await;
    }
    for table in ["notification", "outcome_block", "attempt_detail"] {
        let left = names(&database, table).await.len();
        assert_eq!(left as i64, 1 + KEPT + 1 + 3, "the default, what is kept, the day itself and those ahead: {table}");
        assert_eq!(count(&database, &format!("SELECT count(*) FROM {table}_default")).await, 0);
    }
    for (day, id) in accepted {
        let found = a.get_notification(world.app, id).await;
        if day < DAYS - 1 - KEPT {
            assert!(matches!(found, Err(StoreError::NotificationNotFound { .. })), "day {day} is kept");
        } else {
            let counts = found.unwrap().counts;
            assert_eq!((counts.sent, counts.suppressed, counts.open), (1, 1, 0), "day {day}");
        }
    }
    assert!(count(&database, "SELECT value AS count FROM watermark WHERE name = 'history'").await > 0);
}

#[tokio::test]
async fn a_partition_with_open_work_inside_stays_until_it_is_done() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    keep_all(&store, UnixMs(0), midnight(0)).await;
    world.accept(world.to_users(&["mina"])).await;
    send_all(&world).await;
    let open = world.accept(world.to_users(&["mina", "nobody"])).await;
    world.pass(DAY);
    keep_all(&store, UnixMs(0), world.now()).await;
    // The next day has only work that is done.
    let later = NewEvent { not_before: Some(UnixMs(world.now().0 + 300 * DAY)), ..world.to_users(&["nobody"]) };
    world.accept(later).await;
    world.pass(40 * DAY);
    let before = UnixMs(world.now().0 - 30 * DAY);
    let days = |names: BTreeSet<String>| names.into_iter().filter(|name| name < &"notification_p20261001".to_owned());
    let dropped = keep_all(&store, before, world.now()).await;
    assert!(dropped > 0);
    let left: Vec<String> = days(names(&database, "notification").await).collect();
    assert_eq!(left, ["notification_default", "notification_p20260921"], "the day of the open one, and not the next");
    let view = world.view(open).await;
    assert_eq!((view.counts.open, view.counts.suppressed), (1, 1), "its results are there too");
    send_all(&world).await;
    assert_eq!(world.view(open).await.counts.sent, 1);
    assert!(keep_all(&store, before, world.now()).await > 0);
    assert_eq!(days(names(&database, "notification").await).count(), 1, "only the default one");
    assert!(matches!(store.get_notification(world.app, open).await, Err(StoreError::NotificationNotFound { .. })));
}

#[tokio::test]
async fn a_long_reader_puts_a_drop_off_and_writers_hardly_notice() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    keep_all(&store, UnixMs(0), midnight(0)).await;
    world.accept(world.to_users(&["mina"])).await;
    send_all(&world).await;
    world.pass(40 * DAY);
    let before = UnixMs(world.now().0 - 30 * DAY);
    // Partitions for today exist, so that the drop is the step at hand.
    let mut reader = database.connect().await;
    reader
        .batch_execute(
            "BEGIN; SELECT count(*) FROM notification; SELECT count(*) FROM outcome_block; \
         SELECT count(*) FROM attempt_detail",
        )
        .await
        .unwrap();
    let runtime = Runtime::production();
    let writes = async {
        let (mut written, mut longest) = (0, Duration::ZERO);
        let begun = runtime.instant();
        while runtime.instant() - begun < Duration::from_secs(1) {
            let at = runtime.instant();
            world.accept(world.to_users(&["nobody"])).await;
            longest = longest.max(runtime.instant() - at);
            written += 1;
        }
        (written, longest)
    };
    let (dropped, (written, longest)) = tokio::join!(keep(&store.inner, PLAN, before, world.now()), writes);
    assert_eq!(dropped.unwrap(), 0);
    assert!(written > 3 && longest < Duration::from_secs(4), "{written} events, the slowest took {longest:?}");
    reader.batch_execute("COMMIT").await.unwrap();
    eventually("it is dropped", async || keep(&store.inner, PLAN, before, world.now()).await.unwrap() > 0).await;
}

#[tokio::test]
async fn rows_of_no_partition_are_deleted_one_by_one() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    world.accept(world.to_users(&["mina", "nobody"])).await;
    send_all(&world).await;
    keep_all(&store, UnixMs(0), world.now()).await;
    assert_eq!(names(&database, "notification").await.len(), 1 + 3, "today's rows stay where they are");
    assert_eq!(names(&database, "attempt_detail").await.len(), 1 + 4);
    // Another replica at it: this one leaves it alone.
    let mut other = database.connect().await;
    other.batch_execute(&format!("BEGIN; SELECT pg_advisory_xact_lock({})", retain::RETENTION_LOCK)).await.unwrap();
    world.pass(40 * DAY);
    let before = UnixMs(world.now().0 - 30 * DAY);
    assert_eq!(store.retain(before, world.now()).await.unwrap(), 0);
    other.batch_execute("COMMIT").await.unwrap();
    assert!(store.retain(before, world.now()).await.unwrap() >= 3);
    assert_eq!(names(&database, "notification").await.len(), 1, "the empty partitions are old too");
    assert_eq!(count(&database, "SELECT count(*) FROM notification_default").await, 0);
    assert_eq!(count(&database, "SELECT count(*) FROM outcome_block_default").await, 0);
}
