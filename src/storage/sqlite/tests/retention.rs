//! Retention beside work that never ends.

use super::*;
use crate::storage::conformance::World;
use crate::storage::{RETAIN_BATCH, StoreError};

const DAY: i64 = 24 * 3_600_000;

#[tokio::test]
async fn open_work_at_the_old_end_does_not_stand_in_the_way() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    let mut open = Vec::new();
    for _ in 0..RETAIN_BATCH + 100 {
        open.push(world.accept(world.to_users(&["mina"])).await);
    }
    let mut done = Vec::new();
    for _ in 0..3 {
        done.push(world.accept(world.to_users(&["nobody"])).await);
    }
    world.pass(40 * DAY);
    let before = UnixMs(world.now().0 - 30 * DAY);
    let mut rows = Vec::new();
    for _ in 0..4 {
        rows.push(store.retain(before, world.now()).await.unwrap());
    }
    // Three results are in the first range of theirs, their notifications in the second; then it begins anew.
    assert_eq!(rows, [3, 3, 0, 0]);
    for id in done {
        let found = store.get_notification(world.app, id).await;
        assert!(matches!(found, Err(StoreError::NotificationNotFound { .. })));
    }
    for id in open {
        assert_eq!(world.view(id).await.counts.open, 1);
    }
}

/// Keys are gone through in their own order, whose they are and when they expire beside the point.
#[tokio::test]
async fn expired_keys_go_and_the_others_stay() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let keys = |named: &str| -> i64 {
        let sql = format!("SELECT count(*) FROM idempotency WHERE key LIKE '{named}'");
        let count = diesel::dsl::sql::<diesel::sql_types::BigInt>(&sql);
        count.get_result(&mut store.writer.inline_core().conn).unwrap()
    };
    // Of two apps, three in four of which have expired: more than a batch in what a step looks at, and more than a step looks at.
    let written = format!(
        "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 6400) \
         INSERT INTO idempotency (app, key, hash_version, hash, notification_id, expires_at) \
         SELECT n % 2, CASE WHEN n % 8 < 2 THEN 'kept-' ELSE 'old-' END || n, 1, x'00', n, \
         CASE WHEN n % 8 < 2 THEN {0} + 1 ELSE {0} - n % 2 END FROM n",
        world.now().0
    );
    diesel::sql_query(written).execute(&mut store.writer.inline_core().conn).unwrap();
    assert_eq!((keys("old-%"), keys("kept-%")), (4_800, 1_600));
    let mut rows = Vec::new();
    while keys("old-%") > 0 {
        rows.push(store.retain(UnixMs(0), world.now()).await.unwrap());
        assert!(rows.len() < 20, "{rows:?}");
    }
    assert!(rows.iter().all(|rows| *rows < 2 * RETAIN_BATCH), "{rows:?}");
    assert_eq!(rows.iter().sum::<u64>(), 4_800);
    assert_eq!(keys("kept-%"), 1_600);
    // It begins anew: a key that expires behind it is found.
    world.pass(DAY);
    for _ in 0..5 {
        store.retain(UnixMs(0), world.now()).await.unwrap();
    }
    assert_eq!(keys("%"), 0);
}

#[tokio::test]
async fn keys_that_have_not_expired_are_passed_over() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let written = format!(
        "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 60000) \
         INSERT INTO idempotency (app, key, hash_version, hash, notification_id, expires_at) \
         SELECT 1, printf('%06d', n), 1, x'00', n, {} + (n <> 59999) FROM n",
        world.now().0
    );
    diesel::sql_query(written).execute(&mut store.writer.inline_core().conn).unwrap();
    let mut rows = Vec::new();
    for _ in 0..6 {
        rows.push(store.retain(UnixMs(0), world.now()).await.unwrap());
    }
    // 50 000 in a call: the one that has expired is met by the second, with which the round ends.
    assert_eq!(rows, [0, 1, 0, 0, 0, 0]);
}
