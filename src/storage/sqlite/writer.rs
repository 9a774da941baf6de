//! The one writer: five queues by importance, drained into groups.
//!
//! Acceptance and consent go first, then outcomes and claims, then fan-out pages, then imports, then retention; but each
//! class has a share of every group, or of every few groups, so none starves. In production the writer is a thread of its own; in simulation a step runs
//! on the caller's thread when it is submitted.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use diesel::sqlite::SqliteConnection;
use tokio::sync::{Notify, watch};

use super::fail::{Attempt, Fail, unavailable};
use super::group::{Core, Request, Step, Stop, Tx};
use super::open::{OpenError, Settings};
use crate::runtime::Runtime;
use crate::storage::{Result, StoreError};

/// Importance, highest first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Class {
    /// New events: refused when the queue is nearly full.
    Accept,
    /// Consent and devices: the same queue, with the last eighth to themselves.
    Consent,
    /// Claims, results, releases.
    Outcome,
    /// Fan-out pages.
    Page,
    /// Batches of an import.
    Import,
    Retention,
}

const QUEUES: usize = 5;

impl Class {
    const fn queue(self) -> usize {
        match self {
            Self::Accept | Self::Consent => 0,
            Self::Outcome => 1,
            Self::Page => 2,
            Self::Import => 3,
            Self::Retention => 4,
        }
    }
}

/// Bounds of each queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueueLimits {
    /// Requests in one queue.
    pub max_requests: usize,
    /// Bytes that the requests of one queue hold.
    pub max_bytes: usize,
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self { max_requests: 8192, max_bytes: 32 * 1024 * 1024 }
    }
}

/// A group is not extended beyond this, so that one full of large requests does not hold up the next.
const GROUP_MAX_BYTES: usize = 2 * 1024 * 1024;

/// While others wait, only one group in so many takes a batch of an import: a batch holds its group up for some
/// milliseconds.
const GROUPS_PER_IMPORT: u32 = 8;

/// Callers that were answered together come back together, within a moment that one of a busy processor's threads spends reading
/// them. Whoever starts with the first of them pays for a commit of its own: a group waits for so long, at most, while fewer than
/// three quarters of those whom the group before it answered have come back. Not where few were answered, or nobody just now.
const GATHER: Duration = Duration::from_micros(300);
/// The least callers of a group for whom the next one waits.
const GATHER_FROM: usize = 16;
/// Who has not come back by then has other things to do.
const BACK_WITHIN: Duration = Duration::from_millis(2);

#[derive(Default)]
struct Queue {
    steps: VecDeque<(usize, Box<dyn Step>)>,
    bytes: usize,
}

#[derive(Default)]
#[expect(clippy::struct_excessive_bools, reason = "four independent facts, not one state")]
struct State {
    queues: [Queue; QUEUES],
    /// Groups since the last batch of an import.
    groups_without_import: u32,
    /// The thread waits to be told of something. Telling one that works costs every request a call of the kernel.
    idle: bool,
    /// As many requests of callers are waited for as this; 0 for none.
    gathering: usize,
    paused: bool,
    stopping: bool,
    /// Nothing may be written any more.
    dead: bool,
}

impl State {
    fn is_empty(&self) -> bool {
        self.queues.iter().all(|queue| queue.steps.is_empty())
    }

    /// Requests of callers that wait.
    fn callers(&self) -> usize {
        self.queues[Class::Accept.queue()].steps.len()
    }

    /// Up to `most` steps: a page, a batch of an import and a retention step if they wait and it is their turn, a quarter
    /// for outcomes, the rest by importance.
    fn take_group(&mut self, most: usize) -> Vec<Box<dyn Step>> {
        let waits = |queue: usize| self.queues[queue].steps.len();
        let busy = waits(0) + waits(1) > 0;
        let pages = waits(2).min(if busy { 1 } else { 2 });
        self.groups_without_import = self.groups_without_import.saturating_add(1);
        let imports_turn = !(busy || pages > 0) || self.groups_without_import >= GROUPS_PER_IMPORT;
        let imports = if imports_turn { waits(3).min(1) } else { 0 };
        if imports > 0 {
            self.groups_without_import = 0;
        }
        let retention = waits(4).min(1);
        let room = most.saturating_sub(pages + imports + retention).max(2);
        let reserved = waits(1).min((room / 4).max(1));
        let accepts = waits(0).min(room - reserved);
        let outcomes = waits(1).min(room - accepts);
        let mut group = Vec::with_capacity(accepts + outcomes + pages + imports + retention);
        let mut group_bytes = 0;
        for (queue, count) in self.queues.iter_mut().zip([accepts, outcomes, pages, imports, retention]) {
            for taken in 0..count {
                if taken > 0 && group_bytes > GROUP_MAX_BYTES {
                    break;
                }
                let Some((bytes, step)) = queue.steps.pop_front() else { break };
                queue.bytes -= bytes;
                group_bytes += bytes;
                group.push(step);
            }
        }
        group
    }

    fn take_all(&mut self) -> Vec<Box<dyn Step>> {
        self.queues
            .iter_mut()
            .flat_map(|queue| {
                queue.bytes = 0;
                queue.steps.drain(..).map(|(_, step)| step).collect::<Vec<_>>()
            })
            .collect()
    }
}

struct Shared {
    state: Mutex<State>,
    ready: Condvar,
    /// Told after a group was taken, for those who wait for room.
    room: [Notify; QUEUES],
    limits: QueueLimits,
    group_max: usize,
    fatal: watch::Sender<Option<Arc<str>>>,
    /// Why it had to stop: the file is damaged.
    damaged: AtomicBool,
    /// In simulation the connection lives here.
    inline: Option<Mutex<Core>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    fn told_room(&self) {
        for room in &self.room {
            room.notify_waiters();
        }
    }

    /// Nothing is written from now on; everybody who waits is told so.
    fn die(&self, stop: &Stop) {
        let left = {
            let mut state = self.state();
            if state.dead {
                return;
            }
            state.dead = true;
            state.take_all()
        };
        self.damaged.store(stop.damaged, Ordering::Relaxed);
        tracing::error!(why = stop.why, "the store stops");
        self.fatal.send_replace(Some(Arc::from(&*stop.why)));
        self.told_room();
        for step in left {
            let doing = step.doing();
            step.fail(Fail::Refused(unavailable(doing)));
        }
    }
}

pub(super) struct Writer {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    thread_id: Option<ThreadId>,
}

impl Writer {
    pub fn start(runtime: &Runtime, settings: &Settings, core: Core) -> Result<Self, OpenError> {
        let simulated = runtime.is_simulated();
        let (inline, threaded) = if simulated { (Some(Mutex::new(core)), None) } else { (None, Some(core)) };
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            ready: Condvar::new(),
            room: Default::default(),
            limits: settings.queue,
            group_max: settings.group_max.max(4),
            fatal: watch::channel(None).0,
            damaged: AtomicBool::new(false),
            inline,
        });
        let thread = match threaded {
            None => None,
            Some(core) => {
                let shared = Arc::clone(&shared);
                let body = move || write_until_stopped(&shared, core);
                Some(runtime.thread("nudged-writer", body).map_err(OpenError::Thread)?)
            }
        };
        let thread_id = thread.as_ref().map(|thread| thread.thread().id());
        Ok(Self { shared, thread: Mutex::new(thread), thread_id })
    }

    /// Queues a step and waits for its answer. Once queued it happens, whether or not anybody waits. `bytes`: what the
    /// step holds.
    pub async fn submit<T, W>(&self, class: Class, bytes: usize, doing: &'static str, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnMut(&mut Tx<'_>) -> Attempt<T> + Send + 'static,
    {
        let (step, answer) = Request::queued(doing, work);
        self.enqueue(class, bytes, doing, step).await?;
        if let Some(core) = &self.shared.inline {
            self.run_inline(core);
        }
        answer.await.unwrap_or_else(|_| Err(unavailable(doing)))
    }

    /// Accept and consent are refused when there is no room, so that their callers hear of it; the rest waits, since it
    /// is our own work and bounded by permits.
    async fn enqueue(&self, class: Class, bytes: usize, doing: &'static str, step: Box<dyn Step>) -> Result<()> {
        let QueueLimits { max_requests, max_bytes } = self.shared.limits;
        let (max_requests, max_bytes) = match class {
            Class::Accept => (max_requests - max_requests / 8, max_bytes - max_bytes / 8),
            _ => (max_requests, max_bytes),
        };
        let room = &self.shared.room[class.queue()];
        let mut told = std::pin::pin!(room.notified());
        let mut step = Some(step);
        let mut push = || {
            let mut state = self.shared.state();
            if state.dead || state.stopping {
                return Err(unavailable(doing));
            }
            let queue = &mut state.queues[class.queue()];
            // A request larger than the whole bound goes alone rather than never.
            let fits = queue.steps.len() < max_requests && queue.bytes + bytes <= max_bytes;
            if (fits || queue.steps.is_empty())
                && let Some(step) = step.take()
            {
                queue.steps.push_back((bytes, step));
                queue.bytes += bytes;
                // Once: the thread is told when it takes its group that nobody is waited for.
                let is_gathered = state.gathering > 0 && state.callers() == state.gathering;
                let wake = std::mem::take(&mut state.idle) || is_gathered;
                drop(state);
                if wake {
                    self.shared.ready.notify_one();
                }
                return Ok(true);
            }
            Ok(false)
        };
        // Nearly always there is room, and nobody needs to be told of more.
        if push()? {
            return Ok(());
        }
        loop {
            told.as_mut().enable();
            if push()? {
                return Ok(());
            }
            if matches!(class, Class::Accept | Class::Consent) {
                return Err(StoreError::Overloaded { what: "the queue to the database is full" });
            }
            told.as_mut().await;
            told.set(room.notified());
        }
    }

    fn run_inline(&self, core: &Mutex<Core>) {
        loop {
            let mut core = core.lock().expect("a panic in a step is caught");
            let group = {
                let mut state = self.shared.state();
                if state.paused || state.dead {
                    return;
                }
                state.take_group(self.shared.group_max)
            };
            if group.is_empty() {
                return;
            }
            self.shared.told_room();
            if let Err(stop) = core.run(group) {
                drop(core);
                self.shared.die(&stop);
                return;
            }
        }
    }

    /// A read on the writer's own connection, in simulation; `None` in production.
    pub fn read_inline<T>(&self, work: impl FnOnce(&mut SqliteConnection) -> T) -> Option<T> {
        let core = self.shared.inline.as_ref()?;
        let mut core = core.lock().expect("a panic in a step is caught");
        Some(work(&mut core.conn))
    }

    pub fn is_dead(&self) -> bool {
        let state = self.shared.state();
        state.dead || state.stopping
    }

    /// Whether [`Writer::fatal`]'s reason is the file itself.
    pub fn is_damaged(&self) -> bool {
        self.shared.damaged.load(Ordering::Relaxed)
    }

    /// For those who read beside it.
    pub fn alarm(&self) -> Alarm {
        Alarm(Arc::clone(&self.shared))
    }

    /// Answers, with the reason, when the store had to stop.
    pub async fn fatal(&self) -> Arc<str> {
        let mut fatal = self.shared.fatal.subscribe();
        loop {
            if let Some(why) = fatal.borrow_and_update().clone() {
                return why;
            }
            if fatal.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Writes what is queued, takes nothing more, and waits for the thread.
    pub fn stop(&self) {
        self.shared.state().stopping = true;
        self.shared.ready.notify_all();
        self.shared.told_room();
        // Dropping an engine's last handle on the writer's own thread must not make it wait for itself.
        let own = self.thread_id == Some(std::thread::current().id());
        let thread = self.thread.lock().expect("no panic while held").take();
        if let Some(thread) = thread
            && !own
        {
            let _ = thread.join();
        }
    }

    /// Until the guard is dropped everything submitted waits: a test forms a group so.
    #[cfg(test)]
    pub fn pause(&self) -> Paused<'_> {
        self.shared.state().paused = true;
        Paused { writer: self }
    }

    /// How many steps wait.
    pub fn waiting(&self) -> usize {
        self.shared.state().queues.iter().map(|queue| queue.steps.len()).sum()
    }

    #[cfg(test)]
    pub fn inline_core(&self) -> MutexGuard<'_, Core> {
        self.shared.inline.as_ref().expect("only in simulation").lock().expect("a panic in a step is caught")
    }
}

/// Stops the store when a reader meets what no reader may go on from.
pub(super) struct Alarm(Arc<Shared>);

impl Alarm {
    pub fn hear<T>(&self, result: &Attempt<T>) {
        if let Err(fail) = result
            && let Some(stop) = Stop::after_fail(fail)
        {
            self.0.die(&stop);
        }
    }
}

#[cfg(test)]
pub(super) struct Paused<'a> {
    writer: &'a Writer,
}

#[cfg(test)]
impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.writer.shared.state().paused = false;
        self.writer.shared.ready.notify_all();
        if let Some(core) = &self.writer.shared.inline {
            self.writer.run_inline(core);
        }
    }
}

fn write_until_stopped(shared: &Shared, mut core: Core) {
    /// The thread must never end unnoticed: its callers would wait for ever.
    struct Ending<'a>(&'a Shared);
    impl Drop for Ending<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                self.0.die(&Stop { damaged: false, why: "the writer thread panicked".to_owned() });
            }
        }
    }
    let _ending = Ending(shared);
    let runtime = core.context.runtime.clone();
    // Callers of the last group, and when they were answered.
    let mut answered: Option<(usize, Instant)> = None;
    loop {
        let (group, callers) = {
            let mut state = shared.state();
            while !state.stopping && (state.paused || state.is_empty()) {
                state.idle = true;
                state = shared.ready.wait(state).expect("no panic while held");
            }
            state.idle = false;
            if state.is_empty() {
                return;
            }
            if let Some((callers, at)) = answered
                && callers >= GATHER_FROM
                && runtime.instant().into_std() < at + BACK_WITHIN
            {
                state = gather(shared, &runtime, state, callers - callers / 4, GATHER);
                if state.paused && !state.stopping {
                    continue;
                }
            }
            let waiting = state.callers();
            (state.take_group(shared.group_max), waiting - state.callers())
        };
        shared.told_room();
        if let Err(stop) = core.run(group) {
            shared.die(&stop);
            return;
        }
        // Results alone answer no caller.
        if callers > 0 {
            answered = Some((callers, runtime.instant().into_std()));
        }
    }
}

/// Until so many callers wait, for `most` at most.
fn gather<'a>(
    shared: &'a Shared,
    runtime: &Runtime,
    mut state: MutexGuard<'a, State>,
    callers: usize,
    most: Duration,
) -> MutexGuard<'a, State> {
    let now = || runtime.instant().into_std();
    let until = now() + most;
    state.gathering = callers;
    while !state.stopping && !state.paused && state.callers() < callers {
        let left = until.saturating_duration_since(now());
        if left.is_zero() {
            break;
        }
        state = shared.ready.wait_timeout(state, left).expect("no panic while held").0;
    }
    state.gathering = 0;
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writer() -> Writer {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            ready: Condvar::new(),
            room: Default::default(),
            limits: QueueLimits::default(),
            group_max: 256,
            fatal: watch::channel(None).0,
            damaged: AtomicBool::new(false),
            inline: None,
        });
        Writer { shared, thread: Mutex::default(), thread_id: None }
    }

    async fn enqueue(writer: &Writer, class: Class) {
        let (step, _) = Request::queued("nothing", |_: &mut Tx<'_>| Ok(()));
        writer.enqueue(class, 1, "nothing", step).await.expect("there is room");
    }

    #[tokio::test]
    async fn a_group_waits_until_enough_have_come_back() {
        const LONG: Duration = Duration::from_secs(60);
        let (writer, runtime) = (writer(), Runtime::production());
        // They are there already.
        enqueue(&writer, Class::Accept).await;
        let begun = runtime.instant();
        drop(gather(&writer.shared, &runtime, writer.shared.state(), 1, LONG));
        // Two more come, and what is no caller's does not count.
        let (shared, clock) = (Arc::clone(&writer.shared), runtime.clone());
        let gathering = move || gather(&shared, &clock, shared.state(), 3, LONG).callers();
        let gathering = runtime.thread("gathering", gathering).expect("a thread");
        for class in [Class::Outcome, Class::Consent, Class::Page, Class::Accept] {
            enqueue(&writer, class).await;
        }
        assert_eq!(gathering.join().expect("it gathers"), 3);
        // Nobody comes.
        let state = gather(&writer.shared, &runtime, writer.shared.state(), 4, Duration::from_millis(1));
        assert_eq!((state.callers(), state.gathering), (3, 0));
        drop(state);
        // A stop is not held up.
        writer.stop();
        drop(gather(&writer.shared, &runtime, writer.shared.state(), 9, LONG));
        assert!(runtime.instant() - begun < LONG, "somebody was not told");
    }
}
