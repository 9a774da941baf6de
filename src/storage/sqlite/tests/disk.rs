//! A full disk and a damaged file, as SQLite itself meets them.

use std::io::{Seek as _, SeekFrom, Write as _};

use diesel::connection::SimpleConnection as _;

use super::*;
use crate::storage::StoreError;
use crate::storage::conformance::World;
use crate::storage::sqlite::group::CommitFault;

/// The writer's connection may not grow its file any further.
fn set_max_pages(store: &SqliteStore, pages: i64) {
    let limit = format!("PRAGMA max_page_count = {pages}");
    store.writer.inline_core().conn.batch_execute(&limit).unwrap();
}

/// SQLITE_FULL of a statement, not of COMMIT: what was accepted stays, and the end of it is noticed without an event.
#[tokio::test]
async fn a_database_that_may_not_grow_refuses_what_would_and_goes_on_when_it_may() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    set_max_pages(&store, 1);
    let mut accepted = 0;
    let refused = loop {
        match world.try_accept(world.to_users(&["mina"])).await {
            Ok(_) => accepted += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, StoreError::DiskFull), "{refused:?}");
    assert!(accepted > 0);
    assert!(!store.writer.is_dead());
    let open = world.store().backlog(world.now()).await.unwrap();
    assert_eq!(open.targets, accepted, "what was accepted is there, and nothing of what was refused");
    assert!(store.size_bytes().await.unwrap() > 0);
    set_max_pages(&store, i64::from(u32::MAX) - 1);
    assert!(!store.is_disk_full().await, "a write was tried");
    world.try_accept(world.to_users(&["mina"])).await.unwrap();
}

#[tokio::test]
async fn a_full_disk_is_known_until_a_write_succeeds() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let fill = || store.writer.inline_core().commit_fault = Some(CommitFault::DiskFull);
    fill();
    assert!(matches!(world.try_accept(world.to_users(&["mina"])).await, Err(StoreError::DiskFull)));
    // The probe's own COMMIT finds it full again.
    fill();
    assert!(store.is_disk_full().await);
    world.store().ping().await.unwrap();
    assert!(store.context.disk_full.load(Ordering::Relaxed), "a transaction that wrote nothing proves nothing");
    assert!(!store.is_disk_full().await);
}

#[tokio::test]
async fn a_damaged_page_met_by_the_writer_stops_the_store() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    store.writer.inline_core().commit_fault = Some(CommitFault::Damaged);
    assert!(matches!(world.try_accept(world.to_users(&["mina"])).await, Err(StoreError::Unavailable { .. })));
    let why = store.fatal().await;
    assert!(store.is_damaged() && why.contains("damaged") && why.contains("malformed"), "{why}");
    assert!(matches!(store.ping().await, Err(StoreError::Unavailable { .. })), "and nothing is read or written");
}

/// SQLite's own word, by the one way to have it from a file that can be written.
#[tokio::test]
async fn a_database_that_turned_read_only_stops_the_store() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    store.writer.inline_core().conn.batch_execute("PRAGMA query_only = ON").unwrap();
    assert!(matches!(world.try_accept(world.to_users(&["mina"])).await, Err(StoreError::Unavailable { .. })));
    assert!(store.writer.is_dead(), "what cannot be written is not tried again and again");
    let why = store.fatal().await;
    assert!(why.contains("readonly") && !store.is_damaged(), "{why}");
}

/// Overwrites everything from the `from`th byte on.
fn spoil(path: &Path, from: u64) {
    let Ok(mut file) = std::fs::OpenOptions::new().write(true).open(path) else { return };
    let length = file.metadata().unwrap().len();
    file.seek(SeekFrom::Start(from)).unwrap();
    file.write_all(&vec![0xa5; usize::try_from(length.saturating_sub(from)).unwrap()]).unwrap();
    file.sync_all().unwrap();
}

/// A database of several pages, closed.
async fn filled() -> (tempfile::TempDir, std::path::PathBuf) {
    let on_file = on_file();
    let fixture = fixture(&on_file.store, &on_file.deny);
    let world = World::new(&fixture).await;
    for number in 0..50 {
        world.reachable(&format!("user-{number}")).await;
        world.accept(world.to_users(&[&format!("user-{number}")])).await;
    }
    drop(fixture);
    let OnFile { store, directory, .. } = on_file;
    drop(store);
    let path = directory.path().join("nudged.db");
    assert!(std::fs::metadata(&path).unwrap().len() > 100_000);
    (directory, path)
}

#[tokio::test]
async fn a_damaged_file_is_not_opened_and_the_error_says_what_to_do() {
    for from in [0, 100, 4096] {
        let (_directory, path) = filled().await;
        spoil(&path, from);
        let opened = SqliteStore::open(Runtime::production(), &settings(&path), Arc::default());
        let error = opened.err().expect("it opened");
        assert!(matches!(error, OpenError::Damaged { .. }), "from byte {from}: {error}");
        let text = error.to_string();
        assert!(text.contains("damaged") && text.contains("restore a backup"), "{text}");
    }
}

/// Not the pages that a start reads: the first reader that meets one of them stops the store.
#[tokio::test]
async fn a_damaged_page_met_by_a_reader_stops_the_store() {
    let on_file = on_file();
    let fixture = fixture(&on_file.store, &on_file.deny);
    let world = World::new(&fixture).await;
    for number in 0..50 {
        world.reachable(&format!("user-{number}")).await;
        world.accept(world.to_users(&[&format!("user-{number}")])).await;
    }
    world.store().backlog(world.now()).await.unwrap();
    let path = on_file.directory.path().join("nudged.db");
    spoil(&path, 4096);
    spoil(&on_file.directory.path().join("nudged.db-wal"), 32);
    // Whoever reads next with a new snapshot may still have pages of its own; one of the readers meets it soon.
    let store = &on_file.store;
    let stopped = async {
        loop {
            let _ = world.store().open_targets().await;
            let _ = world.store().list_opt_ins(world.app, &crate::storage::conformance::user("user-7")).await;
            let _ = world.store().set_opt_in(world.choice("user-7", false), world.now()).await;
            tokio::task::yield_now().await;
        }
    };
    let runtime = crate::runtime::Runtime::production();
    let why = tokio::select! {
        why = store.fatal() => why,
        () = stopped => unreachable!("it has no end"),
        () = runtime.sleep(std::time::Duration::from_secs(30)) => panic!("nobody noticed"),
    };
    assert!(store.is_damaged(), "{why}");
    assert!(matches!(world.store().open_targets().await, Err(StoreError::Unavailable { .. })));
}
