//! The store on SQLite: one process, one file, one writer.
//!
//! All writes go through one thread that commits them in groups ([`group`]), by importance ([`writer`]); reads have
//! connections and threads of their own ([`readers`]). In simulation both run inline on one connection, so that a
//! history is the same for the same seed. A lock beside the file keeps a second process out, which is why a start may
//! release every lease it finds.

mod accept;
mod dead;
mod devices;
mod disturb;
mod event_types;
mod explain;
mod fanout;
mod group;
mod handed;
mod history;
mod homes;
mod imports;
mod jobs;
mod leaving;
mod notifications;
mod open;
mod opt_in;
mod pauses;
mod people;
mod providers;
mod queue;
mod reach;
mod readers;
mod registry;
mod restorations;
mod retain;
mod scanner;
mod seed;
mod setup;
pub mod shared;
mod subscriptions;
#[cfg(test)]
mod tests;
mod watching;
mod writer;

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use diesel::sqlite::SqliteConnection;

pub use disturb::{Disturb, Disturbance, Fate};
pub use leaving::Source;
pub use open::{MEMORY, OpenError, Settings, Synchronous};
pub use seed::seed;
pub use writer::QueueLimits;

use self::disturb::disturbed;
use self::fail::{Attempt, unavailable};
use self::group::{Context, Core, Tx};
use self::readers::{Asker, Readers};
use self::scanner::Scanner;
use self::statement::constant;
use self::writer::{Class, Writer};
use super::paging::{page, page_limit};
use super::{cache, effects, fail, redrive, rows, statement, watching as watch_rows};
use crate::domain::deny::DenyFeed;
use crate::domain::time::UnixMs;
use crate::runtime::Runtime;
use crate::storage::{BootId, Result, TroubleRow};

/// See the module. Dropping the last handle writes what is queued and closes the database.
pub struct SqliteStore {
    // Before the lock, so that the file is free only when nothing uses it any more.
    writer: Writer,
    readers: Readers,
    /// None in simulation.
    scanner: Option<Scanner>,
    context: Arc<Context>,
    /// In simulation, at most.
    disturb: Option<Arc<dyn Disturb>>,
    paces: providers::Paces,
    lock: std::sync::Mutex<Option<File>>,
    /// How far retention has come.
    sweep: std::sync::Mutex<retain::Sweep>,
}

impl SqliteStore {
    /// Opens or makes the database and starts its threads. Every "no" is published to `deny` before it is answered.
    pub fn open(runtime: Runtime, settings: &Settings, deny: Arc<DenyFeed>) -> Result<Self, OpenError> {
        let opened = open::open(&runtime, settings)?;
        let boot = AtomicI64::new(open::boot_id(&runtime));
        let horizon = watching::Horizon::new(opened.epoch, opened.ids.newest());
        let context = Arc::new(Context {
            runtime,
            ids: opened.ids,
            boot,
            deny,
            identity: opened.identity,
            horizon,
            disk_full: AtomicBool::new(false),
            handed: handed::Open::default(),
        });
        let core = Core::new(opened.writer, Arc::clone(&context));
        let writer = Writer::start(&context.runtime, settings, core)?;
        let readers = Readers::start(&context.runtime, opened.readers)?;
        let scanner = opened.scanner.map(|conn| Scanner::start(&context, conn, &settings.path)).transpose()?;
        let (paces, lock) = (providers::Paces::default(), std::sync::Mutex::new(opened.lock));
        Ok(Self { writer, readers, scanner, context, disturb: None, paces, lock, sweep: std::sync::Mutex::default() })
    }

    /// In a simulation: every call is disturbed as `by` says.
    #[must_use]
    pub fn disturbed_by(mut self, by: Arc<dyn Disturb>) -> Self {
        self.disturb = self.context.runtime.is_simulated().then_some(by);
        self
    }

    /// What owns the leases of this start.
    pub fn boot_id(&self) -> BootId {
        self.context.boot()
    }

    /// Answers, with the reason, when the outcome of a COMMIT is unknown: everything is answered `Unavailable` from
    /// then on, and the process must exit; the next start reads what the database really holds.
    pub async fn fatal(&self) -> Arc<str> {
        self.writer.fatal().await
    }

    /// Whether the reason of [`SqliteStore::fatal`] is a damaged file: a restart does not help.
    pub fn is_damaged(&self) -> bool {
        self.writer.is_damaged()
    }

    /// Whether the last write found the disk full. Then one is tried, so that the end of it is noticed.
    pub async fn is_disk_full(&self) -> bool {
        if self.context.disk_full.load(Ordering::Relaxed) {
            // The schema cookie's neighbour, which nobody reads: it is written whatever it was.
            let probe = |tx: &mut Tx<'_>| tx.execute(constant!((); "PRAGMA user_version = 0"));
            let _ = self.write(Class::Outcome, 0, "trying to write", probe).await;
        }
        self.context.disk_full.load(Ordering::Relaxed)
    }

    /// Requests that wait to be written.
    pub fn waiting(&self) -> usize {
        self.writer.waiting()
    }

    /// What the database holds, without pages that it has free and without the log.
    pub async fn size_bytes(&self) -> Result<u64> {
        self.read(Asker::Caller, "measuring the database", retain::size_bytes).await
    }

    /// Whether the schema is this version's, for `/readyz`.
    pub async fn migrations_fit(&self) -> Result<bool> {
        self.read(Asker::Caller, "looking at the migrations", |conn| Ok(open::migrations_fit(conn))).await
    }

    /// Writes what is queued, refuses what comes later, and lets the database go. Blocks for as long as that takes.
    pub fn close(&self) {
        self.writer.stop();
        self.readers.stop();
        if let Some(scanner) = &self.scanner {
            scanner.stop();
        }
        self.lock.lock().expect("no panic while held").take();
    }

    async fn write<T, W>(&self, class: Class, bytes: usize, doing: &'static str, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnMut(&mut Tx<'_>) -> Attempt<T> + Send + 'static,
    {
        let call = self.writer.submit(class, bytes, doing, work);
        disturbed(&self.context.runtime, self.disturb.as_ref(), doing, call).await
    }

    async fn read<T, W>(&self, asker: Asker, doing: &'static str, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnOnce(&mut SqliteConnection) -> Attempt<T> + Send + 'static,
    {
        if self.writer.is_dead() {
            return Err(unavailable(doing));
        }
        let alarm = self.writer.alarm();
        let work = move |conn: &mut SqliteConnection| {
            let result = work(conn);
            alarm.hear(&result);
            result
        };
        if self.context.runtime.is_simulated() {
            let call = async {
                let answer = self.writer.read_inline(work).unwrap_or_else(|| Err(unavailable(doing).into()));
                answer.map_err(|fail| fail.into_store(doing))
            };
            return disturbed(&self.context.runtime, self.disturb.as_ref(), doing, call).await;
        }
        self.readers.read(asker, doing, work).await
    }

    /// See [`Readers::read_quickly`].
    async fn read_quickly<T, W>(&self, doing: &'static str, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnOnce(&mut SqliteConnection) -> Attempt<T> + Send + 'static,
    {
        if self.writer.is_dead() || self.context.runtime.is_simulated() {
            return self.read(Asker::Caller, doing, work).await;
        }
        self.readers.read_quickly(doing, work).await
    }
}

/// What stops providers by a database that a running server may be using, for `nudged check`.
///
/// # Errors
/// In words, when it cannot be read.
pub fn troubles(path: &std::path::Path, now: UnixMs) -> Result<Vec<TroubleRow>, String> {
    providers::inspect(path, now)
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        self.close();
    }
}

/// What a small request holds, roughly, for the queue's bound.
const SMALL: usize = 512;
