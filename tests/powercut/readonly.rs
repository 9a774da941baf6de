//! A file system that turns read-only while the store serves, as Linux does with one that failed.

use std::sync::Arc;

use libsqlite3_sys::{SQLITE_IOERR_WRITE, SQLITE_READONLY};
use nudged::domain::notification::Audience;
use nudged::domain::time::UnixMs;
use nudged::storage::sqlite::Synchronous;
use nudged::storage::{Registry as _, StoreError};

use super::check::remembers;
use super::disk::Image;
use super::eye::Eye;
use super::life::{World, block_on, open_store, user};
use super::room::Room;
use super::vfs::Mounted;

const NOW: i64 = 1_790_000_000_000;
/// More changes than one transaction makes.
const MOST_CHANGES: usize = 200;

/// Whatever it was in the middle of, and in either of SQLite's words: the store stops and says why, nothing is answered that is
/// not kept, and once the file system takes writes again the next start finds what was answered.
#[test]
fn a_file_system_that_turns_read_only_stops_the_store_and_loses_nothing() {
    let directory = super::directory();
    for code in [SQLITE_READONLY, SQLITE_IOERR_WRITE] {
        let mut stops = 0;
        for after in 0..MOST_CHANGES {
            let mounted = Mounted::new(directory.path(), &Image::new(), 1);
            let stopped = block_on(turns_read_only(directory.path(), &mounted, after, code));
            if !stopped {
                break;
            }
            stops += 1;
        }
        assert!(
            (2..MOST_CHANGES).contains(&stops),
            "code {code}: an event is several changes, and {stops} stopped the store"
        );
    }
}

/// Whether the event still needed a change that was refused.
async fn turns_read_only(directory: &std::path::Path, mounted: &Mounted, after: usize, code: i32) -> bool {
    let to = |name: &str| Audience { user_ids: vec![user(name)], ..Audience::default() };
    let store = open_store(directory, Synchronous::Full, 1, NOW);
    let mut world = World::new(store, NOW, 1).await;
    world.enrol("choco", "abcdef").await;
    world.accept(to("choco"), 0).await;
    world.now += 1_000;
    mounted.refuse(after, code);
    if !is_unavailable(&mut world, to("choco"), "refused").await {
        return false;
    }
    let why = world.store.fatal().await;
    assert!(why.contains("readonly database") || why.contains("disk I/O error"), "code {code}: {why}");
    assert!(!world.store.is_damaged(), "it may be mended without a backup");
    assert!(is_unavailable(&mut world, to("choco"), "later").await, "nothing is written by half");
    let facts = std::mem::take(&mut world.facts);
    drop(world);

    mounted.allow();
    let store = open_store(directory, Synchronous::Full, 2, NOW + 2_000);
    let damage = Eye::open(&directory.join("nudged.db"), Synchronous::Full).damage();
    assert!(damage.is_empty(), "code {code} after {after} changes: {damage:?}");
    let mut world = World::new(store, NOW + 2_000, 2).await;
    remembers(&mut world, &facts).await.unwrap_or_else(|lost| panic!("code {code} after {after} changes: {lost}"));
    world.accept(to("choco"), 0).await;
    true
}

/// What a caller is told of an event.
async fn is_unavailable(world: &mut World, audience: Audience, key: &str) -> bool {
    let event = world.event(audience, key, 0);
    let accepted = world.store.accept(event, Arc::<Room>::default(), UnixMs(world.now)).await;
    matches!(accepted, Err(StoreError::Unavailable { .. }))
}
