//! The database of a history, in memory or in a file, and what its disk does to the store's calls.

use std::cell::RefCell;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use diesel::connection::SimpleConnection;
use diesel::sqlite::SqliteConnection;
use diesel::{Connection, RunQueryDsl};
use nudged::domain::deny::DenyFeed;
use nudged::domain::time::UnixMs;
use nudged::runtime::Runtime;
use nudged::storage::sqlite::{Disturb, Disturbance, Fate, Settings, SqliteStore, Synchronous};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::clock::START_MS;
use super::history;

/// Where a history keeps its database.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    Memory,
    /// A WAL file. A crash leaves it as it is on the disk, WAL and all.
    File,
}

/// Databases of one process, so that no two have one name.
static NUMBER: AtomicU64 = AtomicU64::new(0);

/// A database with all migrations: to run them for every history would take longer than the history.
static MIGRATED: LazyLock<Migrated> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("migrated.db");
    let tokio = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    tokio.block_on(async {
        let runtime = Runtime::simulated(0, UnixMs(START_MS));
        SqliteStore::open(runtime, &Settings::file(&path), Arc::default()).expect("it opens").close();
    });
    // What an installation makes for itself is each history's own.
    let mut conn = SqliteConnection::establish(path.to_str().expect("UTF-8")).expect("it opens");
    conn.batch_execute("DELETE FROM secret; DELETE FROM watermark; VACUUM; PRAGMA wal_checkpoint(TRUNCATE);")
        .expect("it is ours");
    drop(conn);
    let bytes = fs::read(&path).expect("it was written");
    let mut conn = SqliteConnection::establish(path.to_str().expect("UTF-8")).expect("it opens");
    let tables = tables(&mut conn);
    for table in tables.iter().filter(|table| *table != MIGRATIONS) {
        // What a migration puts into a table would be missing once that was cleared.
        let rows =
            diesel::sql_query(format!("SELECT name FROM (SELECT '' AS name FROM {table})")).load::<Table>(&mut conn);
        assert!(rows.expect("a table").is_empty(), "{table} is not empty in a new database");
    }
    let cleared: Vec<&str> = tables.iter().map(String::as_str).filter(|table| *table != MIGRATIONS).collect();
    let clear = format!("DELETE FROM {};", cleared.join("; DELETE FROM "));
    Migrated { bytes, path, tables, clear, _dir: dir }
});

/// The one table that is not empty in a new database.
const MIGRATIONS: &str = "__diesel_schema_migrations";

fn tables(conn: &mut SqliteConnection) -> Vec<String> {
    diesel::sql_query("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")
        .load::<Table>(conn)
        .expect("a schema")
        .into_iter()
        .map(|table| table.name)
        .collect()
}

#[derive(diesel::QueryableByName)]
struct Table {
    #[diesel(sql_type = diesel::sql_types::Text)]
    name: String,
}

struct Migrated {
    bytes: Vec<u8>,
    path: PathBuf,
    tables: Vec<String>,
    /// Makes it as it was when it was new.
    clear: String,
    _dir: tempfile::TempDir,
}

thread_local! {
    /// What databases in memory are copied from.
    static TEMPLATE: RefCell<SqliteConnection> = RefCell::new({
        let mut conn = SqliteConnection::establish(MIGRATED.path.to_str().expect("UTF-8")).expect("it opens");
        // Another thread's last connection is alone with the file while it closes.
        conn.batch_execute("PRAGMA busy_timeout = 10000").expect("it is a number");
        conn
    });
    /// One that was cleared, which is quicker than a copy.
    static CLEARED: RefCell<Option<InMemory>> = const { RefCell::new(None) };
}

pub struct InMemory {
    settings: Settings,
    /// Keeps it alive while no store has it open.
    keeper: SqliteConnection,
}

impl InMemory {
    fn new() -> Self {
        if let Some(cleared) = CLEARED.take() {
            return cleared;
        }
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let settings = Settings::shared_memory(&format!("history{number}"));
        let path = settings.path.to_str().expect("UTF-8");
        let keeper = SqliteConnection::establish(path).expect("a database in memory");
        let copy = format!("VACUUM INTO '{path}'");
        TEMPLATE.with_borrow_mut(|template| template.batch_execute(&copy)).expect("it is empty");
        Self { settings, keeper }
    }

    /// For the next history of this thread, unless something is in the way.
    fn reuse(mut self) {
        let is_as_new = || -> diesel::QueryResult<bool> {
            self.keeper.batch_execute(&MIGRATED.clear)?;
            Ok(tables(&mut self.keeper) == MIGRATED.tables)
        }();
        if is_as_new == Ok(true) {
            CLEARED.set(Some(self));
        }
    }
}

/// To be called before the first history.
pub fn prepare() {
    LazyLock::force(&MIGRATED);
}

pub enum Database {
    Memory(InMemory),
    File {
        dir: tempfile::TempDir,
        /// Crashes so far.
        generation: u32,
    },
}

impl Database {
    pub fn new(place: Place) -> Self {
        match place {
            Place::Memory => Self::Memory(InMemory::new()),
            Place::File => {
                let dir = tempfile::tempdir().expect("a directory");
                fs::write(dir.path().join("0.db"), &MIGRATED.bytes).expect("room in the temporary directory");
                Self::File { dir, generation: 0 }
            }
        }
    }

    /// When its history has ended and its store is gone.
    pub fn done(self) {
        if let Self::Memory(memory) = self {
            memory.reuse();
        }
    }

    pub fn settings(&self) -> Settings {
        match self {
            Self::Memory(memory) => Settings { cache_kib: 1024, ..memory.settings.clone() },
            Self::File { .. } => {
                // A crash of the process loses nothing that was written, synced or not; that is the power cut's part.
                let synchronous = Synchronous::Normal;
                Settings { synchronous, cache_kib: 1024, ..Settings::file(self.path()) }
            }
        }
    }

    fn path(&self) -> PathBuf {
        match self {
            Self::Memory(memory) => memory.settings.path.clone(),
            Self::File { dir, generation } => dir.path().join(format!("{generation}.db")),
        }
    }

    /// What the disk holds when the process dies, before anything closes its files in order. `forgets`: the log is not among it.
    pub fn crash(&mut self, forgets: bool) {
        let before = self.path();
        let Self::File { dir, generation } = self else { return };
        *generation += 1;
        let after = dir.path().join(format!("{generation}.db"));
        fs::copy(&before, &after).expect("room in the temporary directory");
        let wal = |path: &PathBuf| PathBuf::from(format!("{}-wal", path.display()));
        if wal(&before).exists() && !forgets {
            fs::copy(wal(&before), wal(&after)).expect("room in the temporary directory");
        }
    }
}

/// Opens the store, disturbed as `weather` says.
pub fn open(
    runtime: &Runtime,
    database: &Database,
    deny: &Arc<DenyFeed>,
    weather: &Arc<Weather>,
) -> Result<SqliteStore, String> {
    let store = SqliteStore::open(runtime.clone(), &database.settings(), Arc::clone(deny));
    Ok(store.map_err(|error| error.to_string())?.disturbed_by(Arc::clone(weather) as Arc<dyn Disturb>))
}

/// What the disk does.
pub struct Weather(Mutex<(SmallRng, history::Database)>);

/// Calls whose callers repeat them when they cannot know: the only ones whose answers are lost.
const CALLERS: &[&str] = &[
    "accepting an event",
    "registering a device",
    "unregistering a device",
    "recording a choice",
    "recording a subscription",
    "cancelling a notification",
];

impl Weather {
    pub fn new(seed: u64, database: history::Database) -> Self {
        Self(Mutex::new((SmallRng::seed_from_u64(seed ^ 0x5bd1_e995_7b7d_159d), database)))
    }

    pub fn set(&self, database: history::Database) {
        self.0.lock().unwrap().1 = database;
    }
}

impl Disturb for Weather {
    fn next(&self, doing: &'static str) -> Disturbance {
        let (rng, database) = &mut *self.0.lock().unwrap();
        if *database == history::Database::default() {
            return Disturbance::default();
        }
        let mut slow = || {
            let is_slow = rng.random_range(0..100) < database.slow;
            let most = if is_slow { database.slowest_ms } else { 0 };
            Duration::from_millis(u64::from(rng.random_range(0..=most)))
        };
        let (before, after) = (slow(), slow());
        let fate = if rng.random_range(0..100) < database.busy {
            Fate::Busy
        } else if rng.random_range(0..100) < database.lost && CALLERS.contains(&doing) {
            Fate::AnswerLost
        } else {
            Fate::Answered
        };
        Disturbance { before, fate, after }
    }
}
