//! Replicas of two versions side by side: what one writes the other can read.

use super::replicas::{count, eventually, fixture};
use super::*;
use crate::domain::outcome::ResultCode;
use crate::storage::conformance::{World, entries};

async fn open_at(database: &Database, pack_format: i16) -> (Arc<PostgresStore>, Arc<DenyFeed>) {
    database.open_with(&Settings { pack_format, ..database.settings() }).await.unwrap()
}

const OF_FORMAT_2: &str = "SELECT count(*) FROM job WHERE format = 2";

#[tokio::test]
async fn a_cluster_writes_what_its_oldest_replica_reads() {
    let database = Database::new().await;
    let (old, old_deny) = open_at(&database, 1).await;
    let (new, new_deny) = open_at(&database, 2).await;
    let (ours, theirs) = (fixture(&new, &new_deny), fixture(&old, &old_deny));
    let world = World::new(&ours).await;
    world.reachable("mina").await;
    world.accept(world.to_users(&["mina"])).await;
    assert_eq!(count(&database, OF_FORMAT_2).await, 0, "from its first job on");
    let old_world =
        World { fixture: &theirs, app: world.app, apns: world.apns, fcm: world.fcm, now: world.now().0.into() };
    let claimed = old_world.claim_one().await;
    assert!(old_world.record(old_world.update(&claimed, entries(&claimed.job.targets, ResultCode::Sent))).await);

    // The upgrade is over.
    old.close().await;
    eventually("the newest format is written", async || {
        world.accept(world.to_users(&["mina"])).await;
        count(&database, OF_FORMAT_2).await > 0
    })
    .await;

    // And taken back: what waits is packed anew before the last newer replica is gone.
    let (old, old_deny) = open_at(&database, 1).await;
    let theirs = fixture(&old, &old_deny);
    let old_world =
        World { fixture: &theirs, app: world.app, apns: world.apns, fcm: world.fcm, now: world.now().0.into() };
    let held = world.claim(world.apns, Lane::Interactive).await;
    assert!(!held.is_empty(), "what is leased is given back in the old format, too");
    new.close().await;
    assert_eq!(count(&database, OF_FORMAT_2).await, 0);
    let all = old_world.claim(world.apns, Lane::Interactive).await;
    assert!(all.len() >= held.len());
    assert!(all.iter().all(|claimed| claimed.job.targets == held[0].job.targets), "packed anew, and the same");
    assert_eq!(count(&database, "SELECT count(*) FROM job WHERE owner = 0").await, 0, "nothing is left to nobody");
}

#[tokio::test]
async fn open_work_is_packed_anew_while_an_older_replica_is_there() {
    let database = Database::new().await;
    let (new, new_deny) = open_at(&database, 2).await;
    let ours = fixture(&new, &new_deny);
    let world = World::new(&ours).await;
    world.reachable("mina").await;
    world.accept(world.to_users(&["mina"])).await;
    let claimed = world.claim_one().await;
    for _ in 0..2 {
        world.accept(world.to_users(&["mina"])).await;
    }
    assert_eq!(count(&database, OF_FORMAT_2).await, 3);
    let (old, _old_deny) = open_at(&database, 1).await;
    eventually("what is free is packed anew", async || count(&database, OF_FORMAT_2).await == 1).await;
    // What was leased keeps its fence: its results are written.
    assert!(world.record(world.update(&claimed, entries(&claimed.job.targets, ResultCode::Sent))).await);
    old.close().await;
}
