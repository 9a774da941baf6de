//! Watchers where transactions end in another order than they begin.

use super::replicas::{count, execute, fixture};
use super::*;
use crate::storage::conformance::World;
use crate::storage::conformance::watching::{race, told};
use crate::storage::{WatchFilter, Watched};

#[tokio::test]
async fn three_replicas_commit_and_watchers_that_change_them_miss_nothing() {
    let database = Database::new().await;
    let mut stores = Vec::new();
    for _ in 0..3 {
        stores.push(database.open().await);
    }
    let fixture = fixture(&stores[0].0, &stores[0].1);
    let parties: Vec<_> = stores
        .iter()
        .map(|(store, _)| (Arc::clone(store) as Arc<dyn crate::storage::Store>, store.boot_id()))
        .collect();
    let rounds = std::env::var("NUDGED_TEST_WATCH_ROUNDS").ok().map_or(20, |text| text.parse().unwrap());
    race(&parties, &fixture, 6, rounds).await;
}

#[tokio::test]
async fn what_an_older_transaction_commits_late_is_told_first() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let from = store.watch(world.app, None, &WatchFilter::default(), 1).await.unwrap().position;
    // An older transaction with a younger id, still open: as a replica that was held up in the middle.
    let mut slow = database.connect().await;
    slow.batch_execute(&format!(
        "BEGIN; INSERT INTO device_retirement (id, app, device, user_key, reason, at) \
         VALUES ({}, {}, 7, 1, 'LATE', 1)",
        i64::MAX - 1,
        world.app.0
    ))
    .await
    .unwrap();
    world.accept(world.to_users(&["mina"])).await;
    for _ in 0..20 {
        let page = store.watch(world.app, Some(from), &WatchFilter::default(), 9).await.unwrap();
        assert!(page.events.is_empty() && !page.more, "it would be told behind its turn: {page:?}");
        assert!(page.position.transaction >= from.transaction);
    }
    slow.batch_execute("COMMIT").await.unwrap();
    let events = told(&*store, world.app, from, &WatchFilter::default(), 1, 2).await;
    assert!(matches!(&events[0].watched, Watched::DeviceRetired { reason, .. } if reason == "LATE"), "{events:?}");
    assert!(matches!(&events[1].watched, Watched::Delivery { .. }));
}

#[tokio::test]
async fn a_database_that_came_to_another_server_begins_anew() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let before = fixture(&store, &deny);
    let world = World::new(&before).await;
    let from = store.watch(world.app, None, &WatchFilter::default(), 1).await.unwrap().position;
    world.accept(world.to_users(&["mina"])).await;
    told(&*store, world.app, from, &WatchFilter::default(), 9, 1).await;
    store.close().await;
    // As restored from the dump of a server that had counted much further.
    execute(
        &database,
        "UPDATE watermark SET value = value + 1 WHERE name = 'watch_server'; \
         INSERT INTO watermark (name, value) VALUES ('history', 4611686018427387904); \
         UPDATE outcome_block SET xid = 4611686018427387904",
    )
    .await;
    let ((store, deny), (other, _)) = (database.open().await, database.open().await);
    let after = fixture(&store, &deny);
    let world = World { fixture: &after, app: world.app, apns: world.apns, fcm: world.fcm, now: world.now().0.into() };
    let refused = store.watch(world.app, Some(from), &WatchFilter::default(), 9).await;
    assert!(matches!(refused, Err(StoreError::CursorForeign)), "{refused:?}");
    let from = other.watch(world.app, None, &WatchFilter::default(), 1).await.unwrap().position;
    world.accept(world.to_users(&["mina"])).await;
    told(&*store, world.app, from, &WatchFilter::default(), 9, 1).await;
    assert_eq!(count(&database, "SELECT count(*) FROM outcome_block").await, 2, "what was there still is");
}

#[tokio::test]
async fn a_position_ahead_of_the_server_is_foreign() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let from = store.watch(world.app, None, &WatchFilter::default(), 1).await.unwrap().position;
    let ahead = crate::domain::watch::WatchPosition { transaction: from.transaction + 1_000_000, ..from };
    let refused = store.watch(world.app, Some(ahead), &WatchFilter::default(), 9).await;
    assert!(matches!(refused, Err(StoreError::CursorForeign)), "as after a restore to an earlier time: {refused:?}");
}
