//! Opening a database: lock, file mode, pragmas, migrations, and what the installation keeps in it.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use diesel::connection::SimpleConnection;
use diesel::sql_types::{BigInt, Binary, Nullable, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{Connection, OptionalExtension, RunQueryDsl};
use diesel_migrations::{EmbeddedMigrations, MigrationHarness, embed_migrations};

use super::fail::DAMAGED;
use super::statement::constant;
use super::watching;
use super::writer::QueueLimits;
use crate::domain::identity::IdentityKey;
use crate::domain::ids::IdMaker;
use crate::planted;
use crate::runtime::Runtime;

pub(super) const MIGRATIONS: EmbeddedMigrations = embed_migrations!("migrations/sqlite");

/// The path of a database that lives in memory, for simulation.
pub const MEMORY: &str = ":memory:";
/// SQLite's own file system in memory (<https://www.sqlite.org/inmemorydb.html>, read 2026-11).
const SHARED_MEMORY: &str = "file:/";
const SHARED_MEMORY_END: &str = "?vfs=memdb";

/// How often a committed transaction is forced to the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Synchronous {
    /// At every COMMIT: what was answered survives a power cut.
    #[default]
    Full,
    /// At checkpoints: survives a killed process, not a power cut. For tests.
    Normal,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// The database file; its directory must exist. [`MEMORY`] only in simulation.
    pub path: PathBuf,
    pub synchronous: Synchronous,
    /// Reading connections, each on a thread of its own, 1 to 16.
    pub readers: usize,
    /// Page cache of each connection in KiB. A large one costs the writer: while the file is below 1 GiB, SQLite looks through all
    /// of it after a commit in which a tree was balanced; and what is not in the log comes from the file's map anyway.
    pub cache_kib: u32,
    pub queue: QueueLimits,
    /// The most requests committed together, at least 4.
    pub group_max: usize,
    /// Apply missing migrations; otherwise a database that lacks one is refused.
    pub migrate: bool,
}

impl Settings {
    #[must_use]
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            synchronous: Synchronous::Full,
            readers: 3,
            cache_kib: 4 * 1024,
            queue: QueueLimits::default(),
            group_max: 256,
            migrate: true,
        }
    }

    /// A database in memory, for simulation.
    #[must_use]
    pub fn memory() -> Self {
        Self::file(MEMORY)
    }

    /// The same, shared by every connection of the process that names it, and there for as long as one is open: a store
    /// that is opened again finds what an earlier one left. `name` is letters and digits.
    #[must_use]
    pub fn shared_memory(name: &str) -> Self {
        Self::file(format!("{SHARED_MEMORY}{name}{SHARED_MEMORY_END}"))
    }

    fn is_memory(&self) -> bool {
        let path = self.path.to_string_lossy();
        path == MEMORY || (path.starts_with(SHARED_MEMORY) && path.ends_with(SHARED_MEMORY_END))
    }
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("another process uses the database {path}; stop it, or give this one a database of its own")]
    Locked { path: PathBuf },
    #[error("the directory {directory} of the database does not exist; create it or change database.url")]
    DirectoryMissing { directory: PathBuf },
    #[error("cannot {doing} {path}")]
    File {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the database path {path} is not valid UTF-8")]
    PathNotText { path: PathBuf },
    #[error("a database in memory is only for simulation; give a file")]
    MemoryNeedsSimulation,
    #[error("cannot open {path} as an SQLite database: {reason}")]
    Connect { path: PathBuf, reason: String },
    /// What is in the file is not what was written, or it never was a database.
    #[error(
        "the database {path} is damaged ({reason}); restore a backup: docs/reliability.md, \"The disk and the database file\""
    )]
    Damaged { path: PathBuf, reason: String },
    #[error("the database was written by a newer version of nudged (it has the migration {version}); use that version")]
    NewerSchema { version: String },
    #[error("the database lacks {missing} migration(s); run `nudged migrate`")]
    NotMigrated { missing: usize },
    #[error("{path} was moved to Postgres{}, so it is not served any more: its open work would be sent twice; \
         `nudged migrate --from sqlite://{path} --release` takes that back", if *done { "" } else { ", or is about to be" })]
    Moved { path: String, done: bool },
    #[error("the migration of the database failed: {reason}")]
    Migrate { reason: String },
    #[error("the database cannot be read at start: {reason}")]
    Read { reason: String },
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

impl From<diesel::result::Error> for OpenError {
    fn from(error: diesel::result::Error) -> Self {
        Self::Read { reason: error.to_string() }
    }
}

/// An opened database.
pub(super) struct Opened {
    pub writer: SqliteConnection,
    pub readers: Vec<SqliteConnection>,
    /// Reads through a memory map, from snapshots that it keeps. None in simulation.
    pub scanner: Option<SqliteConnection>,
    pub identity: IdentityKey,
    pub ids: IdMaker,
    /// Of watchers' positions.
    pub epoch: i64,
    /// Released by the operating system when dropped.
    pub lock: Option<File>,
}

impl OpenError {
    /// The reasons of SQLite that mean a damaged file have an error of their own, whatever found them.
    fn of(self, path: &Path) -> Self {
        match self {
            Self::Connect { reason, .. } | Self::Migrate { reason } | Self::Read { reason }
                if DAMAGED.iter().any(|words| reason.contains(words)) =>
            {
                Self::Damaged { path: path.to_owned(), reason }
            }
            other => other,
        }
    }
}

pub(super) fn open(runtime: &Runtime, settings: &Settings) -> Result<Opened, OpenError> {
    open_all(runtime, settings).map_err(|error| error.of(&settings.path))
}

fn open_all(runtime: &Runtime, settings: &Settings) -> Result<Opened, OpenError> {
    if settings.is_memory() && !runtime.is_simulated() {
        return Err(OpenError::MemoryNeedsSimulation);
    }
    let lock = if settings.is_memory() { None } else { Some(lock_file(&settings.path)?) };
    let mut writer = connect(settings)?;
    migrate(&mut writer, settings.migrate)?;
    if let Some(seal) = super::leaving::seal(&mut writer)? {
        return Err(OpenError::Moved { path: settings.path.display().to_string(), done: seal.done });
    }
    let identity = identity(&mut writer, runtime)?;
    let recovered = super::handed::recover(&mut writer)?;
    if recovered > 0 {
        tracing::info!(jobs = recovered, "jobs that were handed over when the process before ended are free again");
    }
    let ids = id_maker(&mut writer)?;
    if !settings.is_memory() {
        // Nobody else writes, so its map stands, and what is not in the WAL is read without a call or a copy. What was looked
        // through to start is not needed again.
        writer.batch_execute("PRAGMA mmap_size = 1099511627776; PRAGMA shrink_memory;").map_err(OpenError::from)?;
    }
    let epoch = watching::epoch(&mut writer, runtime)?;
    let (mut readers, mut scanner) = (Vec::new(), None);
    if !runtime.is_simulated() {
        for _ in 0..settings.readers.clamp(1, 16) {
            readers.push(connect(settings)?);
        }
        let mut conn = connect(settings)?;
        // As much as the build allows. The readers go without: each new snapshot would drop the map.
        conn.batch_execute("PRAGMA mmap_size = 1099511627776;").map_err(OpenError::from)?;
        scanner = Some(conn);
    }
    Ok(Opened { writer, readers, scanner, identity, ids, epoch, lock })
}

/// Makes sure that the file exists, for its owner only (SQLite gives its -wal and -shm the same mode), and that no
/// other process has it. The lock is on a file beside it: SQLite's own locks are let go when any handle of the
/// database file is closed.
pub(super) fn lock_file(path: &Path) -> Result<File, OpenError> {
    if let Some(directory) = path.parent()
        && !directory.as_os_str().is_empty()
        && !directory.is_dir()
    {
        return Err(OpenError::DirectoryMissing { directory: directory.to_owned() });
    }
    let mut lock_path = path.as_os_str().to_owned();
    lock_path.push(".lock");
    let lock_path = PathBuf::from(lock_path);
    let failed = |doing, path: &Path| {
        let path = path.to_owned();
        move |source| OpenError::File { doing, path, source }
    };
    let lock = owner_only(&lock_path).map_err(failed("create the lock file", &lock_path))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(OpenError::Locked { path: path.to_owned() }),
        Err(TryLockError::Error(source)) => return Err(failed("lock", &lock_path)(source)),
    }
    owner_only(path).map_err(failed("create the database", path))?;
    Ok(lock)
}

/// Opens for writing; a new file is its owner's alone.
fn owner_only(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

pub(super) fn connect(settings: &Settings) -> Result<SqliteConnection, OpenError> {
    let Settings { path, cache_kib, .. } = settings;
    let refused = |reason: String| OpenError::Connect { path: path.clone(), reason };
    let text = path.to_str().ok_or_else(|| OpenError::PathNotText { path: path.clone() })?;
    let mut conn = SqliteConnection::establish(text).map_err(|error| refused(error.to_string()))?;
    let synchronous = match settings.synchronous {
        Synchronous::Full if planted::is("commit-without-sync") => "NORMAL",
        Synchronous::Full => "FULL",
        Synchronous::Normal => "NORMAL",
    };
    // busy_timeout comes first: the others may meet another connection's lock.
    let pragmas = format!(
        "PRAGMA busy_timeout = 5000; PRAGMA journal_mode = WAL; PRAGMA synchronous = {synchronous}; \
         PRAGMA cache_size = -{cache_kib}; PRAGMA temp_store = MEMORY; PRAGMA mmap_size = 0; \
         PRAGMA foreign_keys = OFF; PRAGMA wal_autocheckpoint = 2000; PRAGMA journal_size_limit = 67108864;"
    );
    conn.batch_execute(&pragmas).map_err(|error| refused(error.to_string()))?;
    Ok(conn)
}

pub(super) fn migrate(conn: &mut SqliteConnection, apply: bool) -> Result<(), OpenError> {
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| OpenError::Migrate { reason: error.to_string() };
    let known =
        diesel::migration::MigrationSource::<diesel::sqlite::Sqlite>::migrations(&MIGRATIONS).map_err(failed)?;
    let newest = known.iter().map(|migration| migration.name().version().to_string()).max().unwrap_or_default();
    for applied in conn.applied_migrations().map_err(failed)? {
        let version = applied.to_string();
        if version > newest {
            return Err(OpenError::NewerSchema { version });
        }
    }
    if apply {
        // An index of a large table is sorted in files, not in memory.
        let sort_in = |conn: &mut SqliteConnection, place: &str| {
            conn.batch_execute(&format!("PRAGMA temp_store = {place};"))
                .map_err(|error| OpenError::Migrate { reason: error.to_string() })
        };
        sort_in(conn, "FILE")?;
        conn.run_pending_migrations(MIGRATIONS).map_err(failed)?;
        sort_in(conn, "MEMORY")?;
        super::reach::pack_all_once(conn)
            .map_err(|fail| OpenError::Migrate { reason: fail.into_store("pack the reach of people").to_string() })?;
    } else {
        let missing = conn.pending_migrations(MIGRATIONS).map_err(failed)?.len();
        if missing > 0 {
            return Err(OpenError::NotMigrated { missing });
        }
    }
    Ok(())
}

/// For `/readyz`: every migration of this version is there and none of a newer one.
pub(super) fn migrations_fit(conn: &mut SqliteConnection) -> bool {
    migrate(conn, false).is_ok()
}

/// The installation's key, made at the first start.
fn identity(conn: &mut SqliteConnection, runtime: &Runtime) -> Result<IdentityKey, OpenError> {
    const NAME: &str = "identity";
    let stored: Option<Vec<u8>> =
        constant!(Binary; "SELECT value FROM secret WHERE name = ?1", Text => NAME).get_result(conn).optional()?;
    let bytes: [u8; 32] = if let Some(bytes) = stored {
        bytes
            .try_into()
            .map_err(|_| OpenError::Read { reason: "the installation's identity key has another length".to_owned() })?
    } else {
        let bytes = runtime.secret_bytes();
        constant!(
            (); "INSERT INTO secret (name, value, created_at) VALUES (?1, ?2, ?3)",
            Text => NAME, Binary => &bytes[..], BigInt => runtime.now().0,
        )
        .execute(conn)?;
        bytes
    };
    Ok(IdentityKey::new(bytes))
}

/// Continues after the highest ids there are, so that a clock that was set back repeats none.
fn id_maker(conn: &mut SqliteConnection) -> Result<IdMaker, OpenError> {
    let newest: Option<i64> = constant!(
        Nullable<BigInt>;
        "SELECT max(id) FROM (SELECT max(id) AS id FROM app UNION ALL SELECT max(id) FROM app_user \
         UNION ALL SELECT max(id) FROM route UNION ALL SELECT max(id) FROM opt_in_history \
         UNION ALL SELECT max(id) FROM topic UNION ALL SELECT max(id) FROM event_type_version \
         UNION ALL SELECT max(id) FROM notification UNION ALL SELECT max(id) FROM job \
         UNION ALL SELECT max(id) FROM outcome_block UNION ALL SELECT max(id) FROM attempt_detail \
         UNION ALL SELECT max(id) FROM deny UNION ALL SELECT max(id) FROM device_retirement \
         UNION ALL SELECT max(b.xid) FROM app a, outcome_block b WHERE b.app = a.id AND b.xid = \
         (SELECT max(xid) FROM outcome_block WHERE app = a.id) \
         UNION ALL SELECT value FROM watermark WHERE name IN ('history', 'handed'))"
    )
    .get_result(conn)?;
    let newest_device: Option<i64> = constant!(Nullable<BigInt>; "SELECT max(id) FROM device").get_result(conn)?;
    Ok(IdMaker::new(0, newest.unwrap_or(0), newest_device.unwrap_or(0)))
}

/// A number that no earlier or later start has, for all practical purposes: 62 random bits, positive.
pub(super) fn boot_id(runtime: &Runtime) -> i64 {
    let bits = u64::from_le_bytes(runtime.secret_bytes()) >> 2;
    bits.cast_signed() + 1
}
