//! The shared suite on a file with threads and in memory inline, and what is particular to SQLite.

use std::path::Path;
use std::sync::Arc;

use diesel::RunQueryDsl as _;

use super::readers::snapshot;
use super::*;
use crate::domain::ids::{AppKey, DeviceId, EventType, NotificationId, RouteId};
use crate::domain::notification::{Accepted, HandOff};
use crate::domain::platform::Lane;
use crate::storage::conformance::{Fixture, START};
use crate::storage::{Queue as _, Registry as _};
use crate::store_conformance;

/// A store, the feed it publishes to, and the directory that it lives in.
struct OnFile {
    store: Arc<SqliteStore>,
    deny: Arc<DenyFeed>,
    directory: tempfile::TempDir,
}

fn settings(path: &Path) -> Settings {
    Settings { synchronous: Synchronous::Normal, ..Settings::file(path) }
}

fn open_in(directory: tempfile::TempDir) -> OnFile {
    let deny = Arc::<DenyFeed>::default();
    let settings = settings(&directory.path().join("nudged.db"));
    let store = SqliteStore::open(Runtime::production(), &settings, Arc::clone(&deny)).unwrap();
    OnFile { store: Arc::new(store), deny, directory }
}

fn on_file() -> OnFile {
    open_in(tempfile::tempdir().unwrap())
}

fn in_memory() -> (Arc<SqliteStore>, Arc<DenyFeed>) {
    let deny = Arc::<DenyFeed>::default();
    let runtime = Runtime::simulated(1, START);
    let store = SqliteStore::open(runtime, &Settings::memory(), Arc::clone(&deny)).unwrap();
    (Arc::new(store), deny)
}

fn fixture(store: &Arc<SqliteStore>, deny: &Arc<DenyFeed>) -> Fixture {
    Fixture {
        store: Arc::<SqliteStore>::clone(store),
        deny: Arc::clone(deny),
        boot: store.boot_id(),
        kept: Box::new(()),
    }
}

mod threaded {
    use super::*;

    fn open() -> Fixture {
        let OnFile { store, deny, directory } = on_file();
        Fixture { kept: Box::new(directory), ..fixture(&store, &deny) }
    }

    store_conformance!(open());
}

mod inline {
    use super::*;

    fn open() -> Fixture {
        let (store, deny) = in_memory();
        fixture(&store, &deny)
    }

    store_conformance!(open());
}

mod consent_model;
mod dead;
mod disk;
mod groups;
mod handed;
mod homes;
mod opening;
mod people;
mod retention;
mod statements;
