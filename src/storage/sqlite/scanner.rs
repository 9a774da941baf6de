//! The reader of fan-out pages, on a connection and thread of its own, from a snapshot that
//! is kept for a while.
//!
//! Why: a WAL connection that begins to read after somebody wrote drops its page cache and its memory map. At one read
//! a page that is most of a read's cost. From a kept snapshot the map stays, and reading a scattered row is a memory
//! access.
//!
//! What makes it right is the deny feed: every answer comes with the feed's position from *before* the snapshot began.
//! Whoever says no later has a higher position, is met at the hand-over, and is asked about again, on a reader with a
//! snapshot of its own. A fan-out that was just claimed begins with a new snapshot ([`Scanner::renew`]): what was
//! answered before its event was accepted is seen. What came later than that may as well have come a second later.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use diesel::RunQueryDsl;
use diesel::sqlite::SqliteConnection;
use tokio::sync::oneshot;

use super::fail::{Attempt, Fail, unavailable};
use super::group::Context;
use super::open::OpenError;
use super::statement::constant;
use crate::storage::{Gate, Result};

/// The age at which a snapshot is given up: it keeps the log from being emptied.
const KEPT: Duration = Duration::from_secs(1);
/// A log of this size is worth a pause in which the writer can begin it anew.
const LONG_LOG_BYTES: u64 = 48 * 1024 * 1024;
/// The pause.
const PAUSE: Duration = Duration::from_millis(20);

type Work = Box<dyn FnOnce(&mut SqliteConnection, Gate) -> bool + Send>;

pub(super) struct Scanner {
    /// As many requests as the engine has lanes and an expander; `None` once it is stopped.
    requests: Mutex<Option<Sender<Work>>>,
    /// The next read wants a new snapshot.
    is_stale: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Scanner {
    pub fn start(context: &Arc<Context>, conn: SqliteConnection, path: &Path) -> Result<Self, OpenError> {
        let (requests, queue) = channel();
        let mut log = path.as_os_str().to_owned();
        log.push("-wal");
        let is_stale = Arc::<AtomicBool>::default();
        let stale = Arc::clone(&is_stale);
        let scan = Scan { conn, context: Arc::clone(context), log: log.into(), snapshot: None, is_stale: stale };
        let thread = context.runtime.thread("nudged-scanner", move || scan.run(&queue)).map_err(OpenError::Thread)?;
        Ok(Self { requests: Mutex::new(Some(requests)), is_stale, thread: Mutex::new(Some(thread)) })
    }

    /// Runs `work` in the kept snapshot, with the gate taken before that began.
    pub async fn read<T, W>(&self, doing: &'static str, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnOnce(&mut SqliteConnection, Gate) -> Attempt<T> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let request: Work = Box::new(move |conn, gate| {
            let result = work(conn, gate);
            let is_whole = !matches!(result, Err(Fail::Database(_)));
            let _ = reply.send(result);
            is_whole
        });
        let sent = match &*self.requests.lock().expect("no panic while held") {
            Some(requests) => requests.send(request).is_ok(),
            None => false,
        };
        if !sent {
            return Err(unavailable(doing));
        }
        match answer.await {
            Ok(answer) => answer.map_err(|fail| fail.into_store(doing)),
            Err(_) => Err(unavailable(doing)),
        }
    }

    /// What was written until now is seen by the next read.
    pub fn renew(&self) {
        self.is_stale.store(true, Ordering::Release);
    }

    /// Reads what is queued, and waits for the thread.
    pub fn stop(&self) {
        self.requests.lock().expect("no panic while held").take();
        let thread = self.thread.lock().expect("no panic while held").take();
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

struct Scan {
    conn: SqliteConnection,
    context: Arc<Context>,
    log: PathBuf,
    /// Of the snapshot that is open.
    snapshot: Option<Gate>,
    is_stale: Arc<AtomicBool>,
}

impl Scan {
    fn run(mut self, queue: &Receiver<Work>) {
        loop {
            let age = self.snapshot.map(|gate| self.now().saturating_duration_since(gate.at));
            if age.is_some_and(|age| age >= KEPT) {
                self.end("COMMIT");
                if std::fs::metadata(&self.log).is_ok_and(|log| log.len() > LONG_LOG_BYTES) {
                    // Whoever asks meanwhile waits for it.
                    std::thread::park_timeout(PAUSE);
                }
            }
            let next = match self.snapshot.and(age) {
                None => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(age) => queue.recv_timeout(KEPT.saturating_sub(age)),
            };
            match next {
                Ok(work) => self.serve(work),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn serve(&mut self, work: Work) {
        if self.is_stale.swap(false, Ordering::AcqRel) {
            self.end("COMMIT");
        }
        let gate = if let Some(gate) = self.snapshot {
            gate
        } else {
            let gate = Gate { position: self.context.deny.position(), at: self.now() };
            if let Err(error) = constant!((); "BEGIN DEFERRED").execute(&mut self.conn) {
                // The work's own statements then say what is wrong, each for itself.
                tracing::debug!(%error, "no snapshot can be begun");
            } else {
                self.snapshot = Some(gate);
            }
            gate
        };
        let conn = &mut self.conn;
        match catch_unwind(AssertUnwindSafe(|| work(conn, gate))) {
            Ok(true) => {}
            Ok(false) => self.end("ROLLBACK"),
            Err(_) => {
                tracing::error!("a read of the store panicked");
                self.end("ROLLBACK");
            }
        }
    }

    fn end(&mut self, how: &'static str) {
        if self.snapshot.take().is_none() {
            return;
        }
        let ended = match how {
            "COMMIT" => constant!((); "COMMIT").execute(&mut self.conn),
            _ => constant!((); "ROLLBACK").execute(&mut self.conn),
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "no snapshot to end");
        }
    }

    fn now(&self) -> Instant {
        self.context.runtime.instant().into_std()
    }
}

/// What is read inline, in simulation, is as fresh as it can be.
pub(super) fn gate_now(context: &Context) -> Gate {
    Gate { position: context.deny.position(), at: context.runtime.instant().into_std() }
}
