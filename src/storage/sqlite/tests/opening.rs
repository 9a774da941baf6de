//! Opening, locking, migrating, reopening.

use diesel::Connection;
use diesel::connection::SimpleConnection;
use diesel_migrations::MigrationHarness;

use super::*;
use crate::storage::conformance::World;
use crate::storage::sqlite::open::MIGRATIONS;

fn open_at(path: &Path) -> Result<SqliteStore, OpenError> {
    SqliteStore::open(Runtime::production(), &settings(path), Arc::default())
}

fn refused(result: Result<SqliteStore, OpenError>) -> OpenError {
    match result {
        Ok(_) => panic!("it opened"),
        Err(error) => error,
    }
}

#[tokio::test]
async fn a_second_process_is_kept_out_until_the_first_has_gone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nudged.db");
    let first = open_at(&path).unwrap();
    let error = refused(open_at(&path));
    assert!(matches!(error, OpenError::Locked { .. }));
    assert!(error.to_string().contains("another process uses the database"));
    first.ping().await.unwrap();
    drop(first);
    open_at(&path).unwrap().ping().await.unwrap();
}

#[test]
fn what_cannot_be_opened_says_why() {
    let directory = tempfile::tempdir().unwrap();
    let missing = refused(open_at(&directory.path().join("nowhere/nudged.db")));
    assert!(matches!(missing, OpenError::DirectoryMissing { .. }), "{missing}");
    let text = directory.path().join("letter.txt");
    std::fs::write(&text, "a letter, and long enough not to be taken for an empty database").unwrap();
    let no_database = refused(open_at(&text));
    assert!(matches!(no_database, OpenError::Damaged { .. }), "{no_database}");
    let memory = refused(SqliteStore::open(Runtime::production(), &Settings::memory(), Arc::default()));
    assert!(matches!(memory, OpenError::MemoryNeedsSimulation));
}

#[cfg(unix)]
#[tokio::test]
async fn its_files_are_its_owners_alone() {
    use std::os::unix::fs::PermissionsExt;
    let on_file = on_file();
    World::new(&fixture(&on_file.store, &on_file.deny)).await;
    let mut names = Vec::new();
    for entry in std::fs::read_dir(on_file.directory.path()).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", entry.file_name());
        names.push(entry.file_name().into_string().unwrap());
    }
    names.sort();
    assert_eq!(names, ["nudged.db", "nudged.db-shm", "nudged.db-wal", "nudged.db.lock"]);
}

#[tokio::test]
async fn migrations_are_applied_checked_and_taken_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nudged.db");
    let check_only = Settings { migrate: false, ..settings(&path) };
    let unmigrated = refused(SqliteStore::open(Runtime::production(), &check_only, Arc::default()));
    assert!(matches!(unmigrated, OpenError::NotMigrated { missing: 1.. }), "{unmigrated}");
    drop(open_at(&path).unwrap());
    let store = SqliteStore::open(Runtime::production(), &check_only, Arc::default()).unwrap();
    assert!(store.migrations_fit().await.unwrap());
    drop(store);

    let mut conn = SqliteConnection::establish(path.to_str().unwrap()).unwrap();
    conn.revert_all_migrations(MIGRATIONS).unwrap();
    let left: Vec<String> = constant!(
        diesel::sql_types::Text;
        "SELECT name FROM sqlite_schema WHERE name NOT LIKE '%diesel_schema_migrations%' ORDER BY name"
    )
    .load(&mut conn)
    .unwrap();
    assert!(left.is_empty(), "down leaves {left:?}");
    conn.run_pending_migrations(MIGRATIONS).unwrap();
    conn.batch_execute("INSERT INTO __diesel_schema_migrations (version) VALUES ('29991231000000')").unwrap();
    drop(conn);
    let newer = refused(open_at(&path));
    assert!(matches!(&newer, OpenError::NewerSchema { version } if version == "29991231000000"), "{newer}");
}

#[tokio::test]
async fn a_restart_keeps_everything_and_frees_the_leases() {
    let on_file = on_file();
    let before = fixture(&on_file.store, &on_file.deny);
    let world = World::new(&before).await;
    world.reachable("mina").await;
    let id = world.accept(world.to_users(&["mina"])).await;
    let claimed = world.claim_one().await;
    let public = on_file.store.identity().public_notification(id);
    let boot = on_file.store.boot_id();
    drop(before);
    let OnFile { store, directory, .. } = on_file;
    drop(store);

    let on_file = open_in(directory);
    let after = fixture(&on_file.store, &on_file.deny);
    assert_ne!(on_file.store.boot_id(), boot);
    assert_eq!(on_file.store.identity().read_public_notification(public), Some(id));
    let world = World::new(&after).await;
    assert!(world.claim(world.apns, Lane::Interactive).await.is_empty());
    assert_eq!(world.store().release_others(after.boot, world.now()).await.unwrap(), 1);
    let again = world.claim_one().await;
    assert_eq!((again.job.id, again.job.claims), (claimed.job.id, 2));
    // The clock was set back meanwhile: ids go on all the same.
    world.pass(-3_600_000);
    assert!(world.accept(world.to_users(&["mina"])).await > id);
    world.pass(1);
    let device = world.register("jun", "aa").await.id;
    assert!(device > claimed.job.targets[0].device);
}

#[tokio::test]
async fn unreadable_work_is_put_off_and_does_not_stand_in_the_way() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    let broken = world.accept(world.to_users(&["mina"])).await;
    world.pass(1);
    let fine = world.accept(world.to_users(&["mina"])).await;
    let spoil = format!(
        "UPDATE job SET targets = x'ffff' WHERE notification_id = {broken}; \
         INSERT INTO outcome_block (id, app, notification_id, first_user, last_user, at, entries) \
         VALUES (1, 1, {broken}, 0, 9223372036854775807, 0, x'01ff')"
    );
    store.writer.inline_core().conn.batch_execute(&spoil).unwrap();
    let claimed = world.claim(world.apns, Lane::Interactive).await;
    assert_eq!(claimed.iter().map(|claimed| claimed.notification.id).collect::<Vec<_>>(), [fine]);
    let due = world.store().next_due(world.apns, Lane::Interactive).await.unwrap().unwrap();
    assert!(due > world.now(), "it comes again, later");
    let corrupt = |result: Result<()>| matches!(result, Err(crate::storage::StoreError::Corrupt { .. }));
    let filter = crate::storage::DeliveryFilter::default();
    assert!(corrupt(world.store().list_deliveries(world.app, broken, filter, None, 9).await.map(drop)));
    assert!(corrupt(world.store().get_notification(world.app, broken).await.map(drop)));
    let mina = crate::storage::conformance::user("mina");
    assert!(corrupt(world.store().person_history(world.app, broken, &mina).await.map(drop)));

    let everyone = crate::domain::notification::Audience { everyone: true, ..Default::default() };
    let event = crate::domain::notification::NewEvent { may_broadcast: true, ..world.event(everyone) };
    world.accept(event.clone()).await;
    store.writer.inline_core().conn.batch_execute("UPDATE fanout SET audience = x'09'").unwrap();
    let readable = world.accept(event).await;
    let leased = world.store().claim_fanout(fixture.boot, world.now(), &[]).await.unwrap().unwrap();
    assert_eq!(leased.notification.id, readable);
    let mut spoiled = leased;
    spoiled.audience = Arc::from([7_u8].as_slice());
    assert!(corrupt(world.store().fanout_page(&spoiled, 9).await.map(drop)));
}
