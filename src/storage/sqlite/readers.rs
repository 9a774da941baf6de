//! Reading connections on threads of their own; in simulation reads run on the writer's connection.
//!
//! A read that begins after a write was answered sees it (WAL: a read transaction starts from the newest commit). The
//! deny feed's argument stands on that. Two queues: what the engine asks goes before what people list, and the first
//! reader serves the engine alone where there is more than one.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use diesel::RunQueryDsl;
use diesel::sqlite::SqliteConnection;
use tokio::sync::{Semaphore, oneshot};

use super::fail::{Attempt, unavailable};
use super::open::OpenError;
use super::statement::constant;
use crate::runtime::Runtime;
use crate::storage::Result;

/// Reads waiting per queue; more wait outside.
const MAX_WAITING: usize = 1024;
/// Quick reads that wait for each reader at work on one before another reader is woken: to wake it, and to lay it down
/// again, costs more than such a read takes.
const QUICK_PER_READER: usize = 4;

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Asker {
    Engine,
    Caller,
}

struct Work {
    run: Box<dyn FnOnce(&mut SqliteConnection) + Send>,
    is_quick: bool,
}

#[derive(Default)]
struct State {
    queues: [VecDeque<Work>; 2],
    /// The engine's own reader waits.
    engine_idle: bool,
    /// Of the others: at work on a quick read, waiting to be woken, and woken but not there yet.
    quick: usize,
    asleep: usize,
    woken: usize,
    stopping: bool,
}

impl State {
    /// Whether one of those who serve everybody is to be told; the caller does so.
    fn wakes_one(&mut self, is_quick: bool) -> bool {
        let waiting: usize = self.queues.iter().map(VecDeque::len).sum();
        let coming = self.quick + self.woken;
        let wakes = self.asleep > self.woken && waiting > if is_quick { coming * QUICK_PER_READER } else { 0 };
        self.woken += usize::from(wakes);
        wakes
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// For the reader that serves the engine alone.
    engine_ready: Condvar,
    /// For those that serve everybody.
    ready: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }
}

pub(super) struct Readers {
    shared: Arc<Shared>,
    room: [Semaphore; 2],
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Readers {
    /// One thread per connection; none in simulation.
    pub fn start(runtime: &Runtime, connections: Vec<SqliteConnection>) -> Result<Self, OpenError> {
        let shared = Arc::<Shared>::default();
        let several = connections.len() > 1;
        let mut threads = Vec::with_capacity(connections.len());
        for (index, conn) in connections.into_iter().enumerate() {
            let theirs = Arc::clone(&shared);
            let engine_only = several && index == 0;
            let body = move || read_until_stopped(&theirs, conn, engine_only);
            threads.push(runtime.thread(&format!("nudged-reader-{index}"), body).map_err(OpenError::Thread)?);
        }
        let room = [Semaphore::new(MAX_WAITING), Semaphore::new(MAX_WAITING)];
        Ok(Self { shared, room, threads: Mutex::new(threads) })
    }

    pub async fn read<T, W>(&self, asker: Asker, doing: &'static str, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnOnce(&mut SqliteConnection) -> Attempt<T> + Send + 'static,
    {
        self.queue(asker, false, doing, work).await
    }

    /// A caller's read of some microseconds, such as one row by its key.
    pub async fn read_quickly<T, W>(&self, doing: &'static str, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnOnce(&mut SqliteConnection) -> Attempt<T> + Send + 'static,
    {
        self.queue(Asker::Caller, true, doing, work).await
    }

    async fn queue<T, W>(&self, asker: Asker, is_quick: bool, doing: &'static str, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnOnce(&mut SqliteConnection) -> Attempt<T> + Send + 'static,
    {
        let queue = match asker {
            Asker::Engine => 0,
            Asker::Caller => 1,
        };
        let _room = self.room[queue].acquire().await.map_err(|_| unavailable(doing))?;
        let (reply, answer) = oneshot::channel();
        let wake = {
            let mut state = self.shared.state();
            if state.stopping {
                return Err(unavailable(doing));
            }
            let run = Box::new(move |conn: &mut SqliteConnection| {
                if !reply.is_closed() {
                    let _ = reply.send(work(conn));
                }
            });
            state.queues[queue].push_back(Work { run, is_quick });
            if asker == Asker::Engine && std::mem::take(&mut state.engine_idle) {
                Some(&self.shared.engine_ready)
            } else {
                state.wakes_one(is_quick).then_some(&self.shared.ready)
            }
        };
        if let Some(wake) = wake {
            wake.notify_one();
        }
        match answer.await {
            Ok(answer) => answer.map_err(|fail| fail.into_store(doing)),
            Err(_) => Err(unavailable(doing)),
        }
    }

    /// Reads what is queued, takes nothing more, and waits for the threads.
    pub fn stop(&self) {
        self.shared.state().stopping = true;
        self.shared.engine_ready.notify_all();
        self.shared.ready.notify_all();
        let own = std::thread::current().id();
        for thread in std::mem::take(&mut *self.threads.lock().expect("no panic while held")) {
            if thread.thread().id() != own {
                let _ = thread.join();
            }
        }
    }
}

fn read_until_stopped(shared: &Shared, mut conn: SqliteConnection, engine_only: bool) {
    loop {
        let Some(work) = next_read(shared, engine_only) else { return };
        if catch_unwind(AssertUnwindSafe(|| (work.run)(&mut conn))).is_err() {
            tracing::error!("a read of the store panicked");
            // It may have been inside a snapshot.
            let _ = constant!((); "ROLLBACK").execute(&mut conn);
        }
        if work.is_quick && !engine_only {
            shared.state().quick -= 1;
        }
    }
}

/// `None` when there is nothing more to come.
fn next_read(shared: &Shared, engine_only: bool) -> Option<Work> {
    let mut state = shared.state();
    loop {
        let mut next = state.queues[0].pop_front();
        if next.is_none() && !engine_only {
            next = state.queues[1].pop_front();
        }
        match next {
            Some(work) if engine_only => {
                state.engine_idle = false;
                return Some(work);
            }
            Some(work) => {
                if work.is_quick {
                    state.quick += 1;
                } else if state.wakes_one(false) {
                    // What is quick must not wait behind what may not be.
                    drop(state);
                    shared.ready.notify_one();
                }
                return Some(work);
            }
            None if state.stopping => return None,
            None if engine_only => {
                state.engine_idle = true;
                state = shared.engine_ready.wait(state).expect("no panic while held");
            }
            None => {
                state.asleep += 1;
                state = shared.ready.wait(state).expect("no panic while held");
                state.asleep -= 1;
                state.woken = state.woken.saturating_sub(1);
            }
        }
    }
}

/// Several statements that see one state of the database.
pub(super) fn snapshot<T>(
    conn: &mut SqliteConnection,
    work: impl FnOnce(&mut SqliteConnection) -> Attempt<T>,
) -> Attempt<T> {
    constant!((); "BEGIN DEFERRED").execute(conn)?;
    let result = work(conn);
    constant!((); "COMMIT").execute(conn)?;
    result
}
