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
