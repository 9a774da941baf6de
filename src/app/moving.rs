//! Moving an SQLite database to Postgres: what [`crate::storage::moving`] says, step by step.
//!
//! 1. The source's lock is taken: no server uses it. The destination is migrated and locked against a second move.
//! 2. Both are sealed. From here on neither is served until the move is over, or the source's seal is broken.
//! 3. Rows go over table by table in pages; each page is one transaction with the count of rows that have arrived. A move
//!    that was killed goes on after the last page.
//! 4. Both sides are read again and compared, and only then the destination is opened for servers.
//!
//! Leases go over as they are: nobody alive holds them, so the first replica frees them. Ids go over as they are, too: a
//! replica makes new ones above the highest it finds.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::mpsc;

use crate::domain::time::UnixMs;
use crate::planted;
use crate::runtime::Runtime;
use crate::storage::moving::{Arrival, Digest, MoveError, Seal, Table};
use crate::storage::postgres::{self, Destination};
use crate::storage::sqlite::{self, Source};

/// A page ends with the row that reaches one of these.
const PAGE_ROWS: u64 = 10_000;
const PAGE_BYTES: usize = 1024 * 1024;
/// Pages that wait between the reader and the writer.
const PAGES_WAITING: usize = 2;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the source cannot be opened")]
    Source(#[from] sqlite::OpenError),
    #[error("the destination cannot be opened")]
    Destination(#[from] postgres::OpenError),
    #[error(transparent)]
    Move(#[from] MoveError),
}

/// A move that is ready to begin or to go on.
pub struct Move {
    runtime: Runtime,
    /// Read on blocking threads, one at a time.
    source: Arc<Mutex<Source>>,
    destination: Destination,
    tables: Vec<Table>,
    seal: Option<Seal>,
    arrival: Option<Arrival>,
}

/// How far a move has come.
pub enum Step<'a> {
    /// Rows of a table that have arrived, of how many.
    Copied { table: &'a str, rows: u64, of: u64 },
    /// A table is the same on both sides.
    Verified { table: &'a str, digest: Digest },
}

/// What a move did.
pub struct Moved {
    /// Rows that this run copied.
    pub copied: u64,
    /// Rows on either side.
    pub rows: u64,
    pub copying: Duration,
    pub verifying: Duration,
}

impl Move {
    /// Takes both databases and looks at them. The destination is migrated; nothing else is written.
    pub async fn prepare(runtime: &Runtime, source: &Path, destination: &postgres::Settings) -> Result<Self, Error> {
        let path = source.to_owned();
        let opening = move || -> Result<_, Error> {
            let mut source = Source::open(&path)?;
            let (tables, seal) = (source.tables()?, source.seal()?);
            Ok((source, tables, seal))
        };
        let (source, tables, seal) = runtime.blocking(opening).await?;
        let destination = Destination::open(runtime, destination).await?;
        destination.lock().await?;
        destination.check_schema(&tables).await?;
        let arrival = destination.arrival().await?;
        match (&seal, &arrival) {
            (Some(seal), Some(arrival)) if seal.copy == arrival.copy => {}
            (Some(seal), _) if seal.done => {
                return Err(MoveError::MovedElsewhere { at: UnixMs(seal.since).to_string() }.into());
            }
            (_, Some(_)) => return Err(MoveError::OtherCopy.into()),
            (_, None) => destination.check_empty(&tables).await?,
        }
        let source = Arc::new(Mutex::new(source));
        Ok(Self { runtime: runtime.clone(), source, destination, tables, seal, arrival })
    }

    /// The tables, with the rows of the source.
    #[must_use]
    pub fn tables(&self) -> &[Table] {
        &self.tables
    }

    /// Rows that earlier runs have brought over.
    #[must_use]
    pub fn arrived(&self) -> u64 {
        self.arrival.as_ref().map_or(0, |arrival| arrival.rows.values().sum())
    }

    /// An earlier run came to the end; there is nothing to do.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.arrival.as_ref().is_some_and(|arrival| arrival.done) && self.seal.as_ref().is_some_and(|seal| seal.done)
    }

    /// Everything, or what is left of it. May be dropped or killed at any moment and run again.
    pub async fn run(mut self, mut tell: impl FnMut(Step<'_>)) -> Result<Moved, Error> {
        let mut arrival = self.seal_both().await?;
        let begun = self.runtime.instant();
        let mut copied = 0;
        if !arrival.done {
            for table in self.tables.clone() {
                copied += self.copy(&table, &mut arrival, &mut tell).await?;
            }
        }
        let copied_at = self.runtime.instant();
        if !arrival.done {
            for table in self.tables.clone() {
                let digest = self.verify(&table).await?;
                tell(Step::Verified { table: &table.name, digest });
            }
            arrival.done = true;
            self.destination.finish(&arrival).await?;
        }
        let done = Seal { copy: arrival.copy.clone(), since: arrival.since, done: true };
        self.on_source(move |source| source.set_seal(&done)).await?;
        Ok(Moved {
            copied,
            rows: arrival.rows.values().sum(),
            copying: copied_at - begun,
            verifying: self.runtime.instant() - copied_at,
        })
    }

    async fn seal_both(&mut self) -> Result<Arrival, Error> {
        let now = self.runtime.now().0;
        let seal = self.seal.clone().unwrap_or_else(|| {
            let copy: [u8; 16] = self.runtime.secret_bytes();
            Seal { copy: format!("{:032x}", u128::from_be_bytes(copy)), since: now, done: false }
        });
        if self.seal.is_none() {
            let seal = seal.clone();
            self.on_source(move |source| source.set_seal(&seal)).await?;
        }
        if let Some(arrival) = self.arrival.clone() {
            return Ok(arrival);
        }
        let arrival = Arrival { copy: seal.copy, since: now, done: false, rows: BTreeMap::new() };
        self.destination.begin(&arrival).await?;
        self.destination.check_unserved().await?;
        // What a server wrote before it saw the seal.
        self.destination.check_empty(&self.tables).await?;
        Ok(arrival)
    }

    async fn on_source<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Source) -> Result<T, MoveError> + Send + 'static,
    ) -> Result<T, MoveError> {
        let source = Arc::clone(&self.source);
        self.runtime.blocking(move || work(&mut source.lock().expect("no panic while held"))).await
    }

    async fn copy(
        &mut self,
        table: &Table,
        arrival: &mut Arrival,
        tell: &mut impl FnMut(Step<'_>),
    ) -> Result<u64, Error> {
        let skip = arrival.rows.get(&table.name).copied().unwrap_or(0);
        let (give, mut pages) = mpsc::channel(PAGES_WAITING);
        let theirs = table.clone();
        let (source, runtime) = (Arc::clone(&self.source), self.runtime.clone());
        let reading = runtime.blocking(move || {
            let mut page = Page::default();
            let mut source = source.lock().expect("no panic while held");
            source.read(&theirs, skip, |line| {
                page.push(line);
                !page.is_full() || give.blocking_send(std::mem::take(&mut page)).is_ok()
            })?;
            if page.rows > 0 && !planted::is("move-loses-the-last-batch") {
                // Nobody listens: the writer has failed, and says so.
                let _ = give.blocking_send(page);
            }
            Ok::<(), MoveError>(())
        });
        let (destination, arrival, tell) = (&mut self.destination, &mut *arrival, &mut *tell);
        // Owns the receiving end, so that the reader ends when this does.
        let writing = async move {
            let mut rows = skip;
            while let Some(page) = pages.recv().await {
                rows += page.rows;
                arrival.rows.insert(table.name.clone(), rows);
                destination.write(table, page.lines.into(), arrival).await?;
                tell(Step::Copied { table: &table.name, rows, of: table.rows });
            }
            Ok::<u64, MoveError>(rows - skip)
        };
        let (read, written) = tokio::join!(reading, writing);
        let written = written?;
        read?;
        Ok(written)
    }

    async fn verify(&self, table: &Table) -> Result<Digest, Error> {
        let theirs = table.clone();
        let (source, destination) =
            tokio::join!(self.on_source(move |source| source.digest(&theirs)), self.destination.digest(table));
        let (source, destination) = (source?, destination?);
        if source == destination {
            return Ok(source);
        }
        let (source_rows, destination_rows) = (source.rows, destination.rows);
        Err(MoveError::Different { table: table.name.clone(), source_rows, destination_rows }.into())
    }
}

/// Lets servers take the source again. Whether it was sealed.
pub async fn release(runtime: &Runtime, source: &Path) -> Result<bool, Error> {
    let path = source.to_owned();
    runtime.blocking(move || Ok(Source::open(&path)?.break_seal()?)).await
}

#[derive(Default)]
struct Page {
    lines: Vec<u8>,
    rows: u64,
}

impl Page {
    fn push(&mut self, line: &[u8]) {
        if self.rows == 0 {
            self.lines.reserve(PAGE_BYTES + PAGE_BYTES / 8);
        }
        self.lines.extend(line);
        self.rows += 1;
    }

    fn is_full(&self) -> bool {
        self.rows >= PAGE_ROWS || self.lines.len() >= PAGE_BYTES
    }
}
