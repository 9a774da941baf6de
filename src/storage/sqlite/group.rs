//! Group commit: many callers' steps in one transaction, each as if it ran alone.
//!
//! What is guaranteed. A step runs whole or not at all; it is answered only after the COMMIT that holds it. Steps of a
//! group run one after the other, so the second of two with one idempotency key sees the first. A refusal is decided
//! before the step's first write (checked), so it leaves nothing. A step that fails in the database or panics takes
//! the transaction with it; the others are run again without it. There are no savepoints: they cost every step a
//! third more for the sake of the one in a million that fails.
//!
//! What a step wants done outside the database (a "no" published, a job handed over, the engine woken) is collected
//! while it runs and done only after COMMIT, in this order: the "no"s, so that they stand before their callers are
//! answered; the jobs; the wake-ups; the answers.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Instant;

use diesel::RunQueryDsl;
use diesel::query_dsl::methods::ExecuteDsl;
use diesel::sqlite::SqliteConnection;
use tokio::sync::oneshot;

use super::cache::NotificationCache;
use super::effects::{Effects, Ids};
use super::fail::{Attempt, Fail, is_busy, is_damaged, is_disk_full, is_io_error, unavailable};
use super::handed;
use super::reach;
use super::statement::constant;
use super::watching::Horizon;
use crate::domain::deny::{DenyFeed, DenyKey, DenyPosition};
use crate::domain::identity::IdentityKey;
use crate::domain::ids::{AppKey, DeviceId, IdMaker, RouteId, UserKey};
use crate::domain::notification::{HandOff, HandedOver};
use crate::domain::outcome::Entry;
use crate::domain::platform::Lane;
use crate::domain::time::UnixMs;
use crate::planted;
use crate::runtime::Runtime;
use crate::storage::reach::Change;
use crate::storage::{BootId, Result, StoreError};
use crate::telemetry::names;

/// What every step may use beside the connection.
pub(super) struct Context {
    pub runtime: Runtime,
    pub ids: IdMaker,
    /// Who leases what a step leases: this process; in simulation the replica whose step is run.
    pub boot: AtomicI64,
    pub deny: Arc<DenyFeed>,
    pub identity: IdentityKey,
    /// How far watchers can read.
    pub horizon: Horizon,
    /// The last transaction that wrote anything found the disk full.
    pub disk_full: AtomicBool,
    /// Open jobs without rows.
    pub handed: handed::Open,
}

impl Context {
    pub fn boot(&self) -> BootId {
        BootId(self.boot.load(Ordering::Relaxed))
    }
}

/// One step's view of the transaction.
pub(super) struct Tx<'a> {
    pub conn: &'a mut SqliteConnection,
    pub context: &'a Context,
    pub cache: &'a mut NotificationCache,
    /// The app whose fan-out was leased last.
    pub last_fanout_app: &'a mut AppKey,
    /// Of the deny feed, taken before this transaction's first read.
    pub gated: DenyPosition,
    pub gated_at: Instant,
    pub handed: handed::Changes,
    /// Of the step: whose devices or choices it changed. They are packed anew before anybody reads them.
    pub changed: Vec<(UserKey, Change)>,
    /// The newest id before any step of the group took one.
    pub before: i64,
    ids: Ids,
    effects: Effects,
    wrote: bool,
    /// Any of the transaction's steps.
    wrote_any: bool,
    /// This transaction's, once something needed it.
    number: Option<i64>,
}

impl Tx<'_> {
    /// Runs a writing statement; the number of rows it touched.
    pub fn execute<Q>(&mut self, query: Q) -> Attempt<usize>
    where
        Q: RunQueryDsl<SqliteConnection> + ExecuteDsl<SqliteConnection>,
    {
        self.wrote = true;
        Ok(query.execute(self.conn)?)
    }

    /// For writes that return rows and so do not go through [`Tx::execute`].
    pub fn writes(&mut self) -> &mut SqliteConnection {
        self.wrote = true;
        self.conn
    }

    /// For planted bugs: what was written so far stands by itself.
    pub fn commit_early(&mut self) -> Attempt<()> {
        self.execute(constant!((); "COMMIT"))?;
        self.execute(constant!((); "BEGIN IMMEDIATE"))?;
        Ok(())
    }

    pub fn next_id(&mut self, now: UnixMs) -> i64 {
        self.ids.next(&self.context.ids, now)
    }

    pub fn next_device(&mut self, now: UnixMs) -> DeviceId {
        self.ids.next_device(&self.context.ids, now)
    }

    /// The transaction's own: higher than that of any before it. Not the step's, which may be run again in another.
    pub fn number(&mut self, now: UnixMs) -> i64 {
        *self.number.get_or_insert_with(|| self.context.ids.next(now))
    }

    pub fn deny(&mut self, key: DenyKey) {
        self.effects.deny.push(key);
    }

    pub fn hand_over(&mut self, engine: &Arc<dyn HandOff>, job: HandedOver) {
        self.effects.hand_over(engine, job);
    }

    pub fn wake_jobs(&mut self, engine: &Arc<dyn HandOff>, route: RouteId, lane: Lane) {
        self.effects.wake_jobs(engine, route, lane);
    }

    pub fn planned(&mut self, engine: &Arc<dyn HandOff>, targets: usize, suppressed: Vec<Entry>) {
        self.effects.planned(engine, targets, suppressed);
    }

    pub fn wake_fanout(&mut self, engine: &Arc<dyn HandOff>) {
        self.effects.wake_fanout(engine);
    }
}

/// A caller's request, run at least once and answered exactly once.
pub(super) trait Step: Send {
    /// Keeps its answer for [`Step::answer`]. `Err`: the transaction must be rolled back.
    fn run(&mut self, tx: &mut Tx<'_>) -> Attempt<()>;
    /// After COMMIT.
    fn answer(self: Box<Self>);
    fn fail(self: Box<Self>, error: Fail);
    fn doing(&self) -> &'static str;
}

/// The [`Step`] of a closure. The closure does all its reads and refusals before its first write.
pub(super) struct Request<T, W> {
    work: W,
    doing: &'static str,
    ids: Ids,
    answer: Option<Result<T>>,
    reply: oneshot::Sender<Result<T>>,
}

impl<T, W> Request<T, W>
where
    T: Send + 'static,
    W: FnMut(&mut Tx<'_>) -> Attempt<T> + Send + 'static,
{
    pub fn queued(doing: &'static str, work: W) -> (Box<dyn Step>, oneshot::Receiver<Result<T>>) {
        let (reply, answer) = oneshot::channel();
        (Box::new(Self { work, doing, ids: Ids::default(), answer: None, reply }), answer)
    }
}

impl<T, W> Step for Request<T, W>
where
    T: Send,
    W: FnMut(&mut Tx<'_>) -> Attempt<T> + Send,
{
    fn run(&mut self, tx: &mut Tx<'_>) -> Attempt<()> {
        self.ids.restart();
        tx.ids = std::mem::take(&mut self.ids);
        tx.wrote = false;
        let result = (self.work)(tx).and_then(|value| reach::pack_changed(tx).map(|()| value));
        self.ids = std::mem::take(&mut tx.ids);
        tx.wrote_any |= tx.wrote;
        match result {
            Ok(value) => self.answer = Some(Ok(value)),
            Err(Fail::Refused(error)) if !tx.wrote => self.answer = Some(Err(error)),
            Err(fail) => return Err(fail),
        }
        Ok(())
    }

    fn answer(self: Box<Self>) {
        let answer = self.answer.unwrap_or_else(|| Err(unavailable(self.doing)));
        // The caller may have gone; the step happened all the same.
        let _ = self.reply.send(answer);
    }

    fn fail(self: Box<Self>, error: Fail) {
        let _ = self.reply.send(Err(error.into_store(self.doing)));
    }

    fn doing(&self) -> &'static str {
        self.doing
    }
}

/// Why a transaction did not happen.
enum Fault {
    /// The step at this index broke it; rolled back.
    Step { index: usize, error: Fail, panicked: bool },
    /// It could not begin, or certainly did not commit.
    Whole(diesel::result::Error),
    /// COMMIT failed in a way that leaves its outcome unknown; or the file cannot be read or written, or is damaged.
    Stop(Stop),
}

/// Why nothing may be written any more.
#[derive(Debug)]
pub(super) struct Stop {
    /// The file itself is damaged; otherwise a restart may do.
    pub damaged: bool,
    pub why: String,
}

impl Stop {
    /// After any statement: the file cannot be trusted, or not be read.
    pub fn after(error: &diesel::result::Error) -> Option<Self> {
        if is_damaged(error) {
            return Some(Self { damaged: true, why: format!("the database file is damaged: {error}") });
        }
        is_io_error(error).then(|| Self { damaged: false, why: format!("the database file fails: {error}") })
    }

    pub fn after_fail(fail: &Fail) -> Option<Self> {
        match fail {
            Fail::Database(error) => Self::after(error),
            Fail::Refused(_) | Fail::Corrupt(_) => None,
        }
    }

    /// After a COMMIT that neither happened for sure nor failed for sure.
    fn after_commit(error: &diesel::result::Error) -> Self {
        let why = || format!("whether a transaction was committed is not known: {error}");
        Self::after(error).filter(|stop| stop.damaged).unwrap_or_else(|| Self { damaged: false, why: why() })
    }
}

impl Fault {
    /// What the group does for itself failed.
    fn of_whole(fail: Fail) -> Self {
        if let Some(stop) = Stop::after_fail(&fail) {
            return Self::Stop(stop);
        }
        match fail {
            Fail::Database(error) => Self::Whole(error),
            other => Self::Whole(diesel::result::Error::DeserializationError(format!("{other:?}").into())),
        }
    }
}

/// The writing connection and what belongs to it.
pub(super) struct Core {
    pub conn: SqliteConnection,
    pub context: Arc<Context>,
    cache: NotificationCache,
    last_fanout_app: AppKey,
    #[cfg(test)]
    pub commit_fault: Option<CommitFault>,
}

/// What a test lets COMMIT do, once.
#[cfg(test)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum CommitFault {
    /// It committed, and then says that it failed.
    LostAnswer,
    DiskFull,
    /// A page that the transaction needs is not what was written.
    Damaged,
}

impl Core {
    pub fn new(conn: SqliteConnection, context: Arc<Context>) -> Self {
        Self {
            conn,
            context,
            cache: NotificationCache::default(),
            last_fanout_app: AppKey(0),
            #[cfg(test)]
            commit_fault: None,
        }
    }

    /// Runs and answers every step. `Err`: the outcome of a COMMIT is unknown, or the file is damaged; the caller must stop
    /// using the database, for a guess could lose or double what was accepted.
    #[expect(clippy::cast_precision_loss, reason = "a group has some hundred steps")]
    pub fn run(&mut self, group: Vec<Box<dyn Step>>) -> Result<(), Stop> {
        metrics::histogram!(names::WRITER_GROUP_SIZE).record(group.len() as f64);
        let mut waiting = VecDeque::from([group]);
        // Of steps that run again in this call, too.
        let before = self.context.ids.newest();
        while let Some(mut group) = waiting.pop_front() {
            if group.is_empty() {
                continue;
            }
            match self.attempt(&mut group, before) {
                Ok(effects) => {
                    effects.apply(&self.context.deny, &self.context.runtime);
                    for step in group {
                        step.answer();
                    }
                }
                Err(Fault::Step { index, error, panicked }) => {
                    self.cache.clear();
                    let after = group.split_off(index + 1);
                    let bad = group.pop().expect("the failed step is the last one left");
                    if panicked || (group.is_empty() && after.is_empty()) {
                        tracing::error!(doing = bad.doing(), error = ?error, "a step of the store failed");
                        bad.fail(error);
                    } else {
                        waiting.push_front(after);
                        waiting.push_front(vec![bad]);
                        waiting.push_front(group);
                        continue;
                    }
                    waiting.push_front(after);
                    waiting.push_front(group);
                }
                Err(Fault::Whole(error)) => {
                    self.cache.clear();
                    tracing::error!(%error, steps = group.len(), "a transaction did not happen");
                    let full = is_disk_full(&error);
                    if full {
                        self.context.disk_full.store(true, Ordering::Relaxed);
                    }
                    for step in group {
                        let doing = step.doing();
                        step.fail(Fail::Refused(if full { StoreError::DiskFull } else { unavailable(doing) }));
                    }
                }
                Err(Fault::Stop(stop)) => {
                    for step in std::iter::once(group).chain(waiting).flatten() {
                        let doing = step.doing();
                        step.fail(Fail::Refused(unavailable(doing)));
                    }
                    return Err(stop);
                }
            }
        }
        Ok(())
    }

    /// `before`: see [`Tx::before`].
    fn attempt(&mut self, group: &mut [Box<dyn Step>], before: i64) -> Result<Effects, Fault> {
        let gated = self.context.deny.position();
        let gated_at = self.context.runtime.instant().into_std();
        if planted::is("answer-before-commit") {
            let _ = constant!((); "COMMIT").execute(&mut self.conn);
        }
        if let Err(error) = constant!((); "BEGIN IMMEDIATE").execute(&mut self.conn) {
            return Err(Stop::after(&error).map_or(Fault::Whole(error), Fault::Stop));
        }
        let mut tx = Tx {
            conn: &mut self.conn,
            context: &self.context,
            cache: &mut self.cache,
            last_fanout_app: &mut self.last_fanout_app,
            gated,
            gated_at,
            handed: handed::Changes::default(),
            changed: Vec::new(),
            before,
            ids: Ids::default(),
            effects: Effects::default(),
            wrote: false,
            wrote_any: false,
            number: None,
        };
        if let Err(fail) = handed::age(&mut tx, gated_at, None) {
            drop(tx);
            return Err(self.roll_back(Fault::of_whole(fail)));
        }
        for (index, step) in group.iter_mut().enumerate() {
            let fault = match catch_unwind(AssertUnwindSafe(|| step.run(&mut tx))) {
                Ok(Ok(())) => continue,
                Ok(Err(error)) if error.is_disk_full() => {
                    let Fail::Database(error) = error else { unreachable!("only the database fills a disk") };
                    Fault::Whole(error)
                }
                Ok(Err(error)) => match Stop::after_fail(&error) {
                    Some(stop) => Fault::Stop(stop),
                    None => Fault::Step { index, error, panicked: false },
                },
                Err(_) => {
                    let error = Fail::Refused(unavailable(step.doing()));
                    Fault::Step { index, error, panicked: true }
                }
            };
            drop(tx);
            return Err(self.roll_back(fault));
        }
        if let Err(fail) = handed::raise_floor(&mut tx, gated_at) {
            drop(tx);
            return Err(self.roll_back(Fault::of_whole(fail)));
        }
        let (effects, number, wrote, changes) = (tx.effects, tx.number, tx.wrote_any, tx.handed);
        match self.commit() {
            Ok(()) => {
                self.context.handed.apply(changes, gated_at);
                if wrote && self.context.disk_full.swap(false, Ordering::Relaxed) {
                    tracing::info!("the disk takes writes again");
                }
                if let Some(number) = number {
                    self.context.horizon.advance(number);
                }
                Ok(effects)
            }
            Err(error) if is_disk_full(&error) || is_busy(&error) => Err(self.roll_back(Fault::Whole(error))),
            Err(error) => Err(Fault::Stop(Stop::after_commit(&error))),
        }
    }

    fn commit(&mut self) -> diesel::QueryResult<()> {
        #[cfg(test)]
        if let Some(fault) = self.commit_fault.take() {
            let says = |text: &str| {
                let kind = diesel::result::DatabaseErrorKind::Unknown;
                diesel::result::Error::DatabaseError(kind, Box::new(text.to_owned()))
            };
            return match fault {
                CommitFault::LostAnswer => {
                    constant!((); "COMMIT").execute(&mut self.conn)?;
                    Err(says("disk I/O error"))
                }
                CommitFault::DiskFull => Err(says("database or disk is full")),
                CommitFault::Damaged => Err(says("database disk image is malformed")),
            };
        }
        if planted::is("answer-before-commit") {
            return Ok(());
        }
        constant!((); "COMMIT").execute(&mut self.conn)?;
        Ok(())
    }

    /// SQLite has rolled back by itself after some errors, and then says that there is no transaction. One that
    /// cannot be ended makes the next BEGIN fail, which answers its group.
    fn roll_back(&mut self, fault: Fault) -> Fault {
        if let Err(error) = constant!((); "ROLLBACK").execute(&mut self.conn) {
            tracing::debug!(%error, "nothing to roll back");
        }
        fault
    }
}
