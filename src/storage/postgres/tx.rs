//! One step in one transaction, repeated where that is the right answer.
//!
//! Every write of the store is a step of its own: the server groups the commits of concurrent connections by itself.
//! A step that the server refused for reasons of timing (a deadlock, a serialization failure, somebody else's row with
//! the same key) is run again, and so is one whose connection was lost, for as long as its caller may be expected to
//! wait. A step of one writing statement goes without BEGIN and COMMIT: two round trips of three. The outcome of a lost COMMIT is
//! unknown; therefore a step takes its ids once and every re-run takes the same
//! again, steps that are not harmless to repeat ask [`Tx::is_repeated`], and the "no"s of the lost run are published
//! with the next.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use diesel::result::{DatabaseErrorKind, Error as DieselError};
use diesel::sql_types::{Array, BigInt, SmallInt};
use diesel_async::methods::ExecuteDsl;
use diesel_async::pooled_connection::deadpool::Object;
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection};
use futures_util::future::BoxFuture;

use super::cache::NotificationCache;
use super::effects::{Effects, Ids};
use super::fail::{Attempt, Fail, unavailable};
use super::query::RunQuery;
use super::statement::constant;
use super::{Context, Inner, repack};
use crate::domain::deny::{DenyKey, DenyPosition};
use crate::domain::ids::{JobId, RouteId, UserKey};
use crate::domain::notification::{HandOff, HandedOver};
use crate::domain::outcome::Entry;
use crate::domain::platform::Lane;
use crate::domain::time::UnixMs;
use crate::runtime::Instant;
use crate::storage::reach::Change;
use crate::storage::{Result, StoreError};

/// How long a step is tried before its caller is told to come again. Below the default deadline of a call.
const PATIENCE: Duration = Duration::from_secs(4);
/// One run of a step, above the server's own statement timeout only in sum.
pub(super) const RUN_LIMIT: Duration = Duration::from_secs(6);
/// Repeats after refusals of timing: some two seconds in all.
const MAX_TIMING: u32 = 20;
/// Between two tries to reach the server.
const RECONNECT: Duration = Duration::from_millis(100);

/// A pooled connection inside BEGIN; one that is not ended properly is thrown away.
struct Session(Option<Object<AsyncPgConnection>>);

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(object) = self.0.take() {
            drop(Object::take(object));
        }
    }
}

/// A step's view of its transaction.
pub(super) struct Tx {
    session: Session,
    pub context: Arc<Context>,
    /// Of the deny feed, taken before this transaction's first read.
    pub gated: DenyPosition,
    pub gated_at: std::time::Instant,
    ids: Ids,
    effects: Effects,
    repeated: bool,
    leased: Vec<JobId>,
    /// Whom this step has changed, and how: they are packed anew before COMMIT.
    pub changed: Vec<(UserKey, Change)>,
    /// People whose rows are locked, with what was packed of them: see [`repack::lock`].
    pub locked: BTreeMap<i64, Option<Vec<u8>>>,
    /// People whom the step changes, with what is packed of them as it was read without a lock.
    pub seen: BTreeMap<i64, Vec<u8>>,
}

impl Tx {
    pub fn conn(&mut self) -> &mut AsyncPgConnection {
        self.session.0.as_mut().expect("held until the end")
    }

    /// The number of rows that a writing statement touched.
    pub fn execute<'a, Q>(&'a mut self, query: Q) -> BoxFuture<'a, Attempt<usize>>
    where
        Q: ExecuteDsl<AsyncPgConnection> + RunQuery + diesel::query_builder::QueryId + 'a,
    {
        let running = query.execute(self.conn());
        Box::pin(async move { Ok(running.await?) })
    }

    /// An earlier run of this step may have been committed.
    pub fn is_repeated(&self) -> bool {
        self.repeated
    }

    pub fn cache(&self) -> MutexGuard<'_, NotificationCache> {
        self.context.cache.lock().expect("no panic while held")
    }

    pub fn next_id(&mut self, now: UnixMs) -> i64 {
        self.ids.next(&self.context.ids, now)
    }

    pub fn deny(&mut self, key: DenyKey) {
        self.effects.deny.push(key);
    }

    /// The engine is about to get this job.
    pub fn leases(&mut self, job: JobId) {
        self.leased.push(job);
    }

    pub fn hand_over(&mut self, engine: &Arc<dyn HandOff>, job: HandedOver) {
        self.leased.push(job.job.id);
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

    /// What is left to do before COMMIT.
    async fn finish(&mut self) -> Attempt<()> {
        repack::pack_changed(self).await?;
        self.log_denied().await
    }

    /// The "no"s of this step, for the other replicas: the last statement before COMMIT, so that little time passes
    /// between a row's time and its becoming visible. That time is bounded by the statement timeout, which must stay
    /// below the overlap of their polls.
    async fn log_denied(&mut self) -> Attempt<()> {
        if self.effects.deny.is_empty() {
            return Ok(());
        }
        self.conn().batch_execute("SET LOCAL statement_timeout = 2000").await?;
        let now = self.context.runtime.now();
        let keys: Vec<(i16, i64)> = self.effects.deny.iter().map(super::deny::code).collect();
        let ids: Vec<i64> = keys.iter().map(|_| self.context.ids.next(now)).collect();
        let (kinds, subjects): (Vec<i16>, Vec<i64>) = keys.into_iter().unzip();
        self.execute(constant!(
            ();
            "INSERT INTO deny (id, app, kind, subject, at) SELECT d.id, 0, d.kind, d.subject, \
             (extract(epoch FROM clock_timestamp()) * 1000)::BIGINT FROM unnest($1, $2, $3) AS d(id, kind, subject)",
            Array<BigInt> => ids, Array<SmallInt> => kinds, Array<BigInt> => subjects,
        ))
        .await?;
        Ok(())
    }
}

/// What to do after a failed run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Remedy {
    /// The server refused it for a reason of timing: it was rolled back, run it again.
    Again,
    /// The connection is gone, or of no use any more; before COMMIT nothing happened.
    Reconnect,
    GiveUp,
}

pub(super) fn remedy(error: &DieselError) -> Remedy {
    match error {
        DieselError::DatabaseError(DatabaseErrorKind::SerializationFailure | DatabaseErrorKind::UniqueViolation, _) => {
            Remedy::Again
        }
        DieselError::DatabaseError(DatabaseErrorKind::Unknown, info) if info.message() == "deadlock detected" => {
            Remedy::Again
        }
        // A standby by now, or one shutting down: another server, or this one later.
        DieselError::DatabaseError(
            DatabaseErrorKind::UnableToSendCommand
            | DatabaseErrorKind::ClosedConnection
            | DatabaseErrorKind::ReadOnlyTransaction,
            _,
        ) => Remedy::Reconnect,
        DieselError::DatabaseError(DatabaseErrorKind::Unknown, info)
            if info.message().starts_with("terminating connection")
                || info.message().contains("is shutting down")
                // Prepared before a migration changed a column that it returns: for the life of the session.
                || info.message() == "cached plan must not change result type" =>
        {
            Remedy::Reconnect
        }
        _ => Remedy::GiveUp,
    }
}

/// The server cannot be reached.
pub(super) fn unreachable(error: &diesel::ConnectionError) -> DieselError {
    DieselError::DatabaseError(DatabaseErrorKind::UnableToSendCommand, Box::new(error.to_string()))
}

/// Ends a run that must simply be repeated.
pub(super) fn again() -> DieselError {
    DieselError::DatabaseError(DatabaseErrorKind::SerializationFailure, Box::new("somebody was faster".to_owned()))
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Plain,
    /// Loses leases when its outcome is unknown.
    Leasing,
    /// Its only writing statement is the transaction: no BEGIN, no COMMIT, and nothing left to do before that.
    Bare,
}

/// The runs of one step; see [`step!`].
pub(super) struct Runs<'a> {
    inner: &'a Inner,
    doing: &'static str,
    ids: Ids,
    denied: Vec<DenyKey>,
    deadline: Instant,
    timing: u32,
    repeated: bool,
    kind: Kind,
    /// Its caller has the answer.
    answered: bool,
}

impl Drop for Runs<'_> {
    /// A caller that went away meanwhile, as the API's do, is told of no lease that was taken for it.
    fn drop(&mut self) {
        if self.kind == Kind::Leasing && !self.answered {
            self.inner.context.sweep.ask();
        }
    }
}

impl<'a> Runs<'a> {
    pub fn new(inner: &'a Inner, doing: &'static str, kind: Kind) -> Self {
        let deadline = inner.context.runtime.instant() + PATIENCE;
        let ids = Ids::default();
        Self { inner, doing, ids, denied: Vec::new(), deadline, timing: 0, repeated: false, kind, answered: false }
    }

    /// Goes on with what was tried another way, with the ids it had: that may have been written without an answer.
    pub fn after(mut self, ids: Option<Ids>) -> Self {
        if let Some(ids) = ids {
            self.ids = ids;
            self.repeated = true;
        }
        self
    }

    /// Nothing is awaited any more.
    pub fn answer(&mut self) {
        self.answered = true;
    }

    pub async fn begin(&mut self) -> Result<Tx> {
        let context = Arc::clone(&self.inner.context);
        loop {
            let gated = context.deny.position();
            let gated_at = context.runtime.instant().into_std();
            let failed = match self.inner.connection(self.doing).await {
                Ok(object) => {
                    let mut session = Session(Some(object));
                    let conn = session.0.as_mut().expect("just put there");
                    let begun = if self.kind == Kind::Bare {
                        Some(Ok(()))
                    } else {
                        context.runtime.timeout(RUN_LIMIT, conn.batch_execute("BEGIN")).await
                    };
                    match begun {
                        Some(Ok(())) => {
                            self.ids.restart();
                            return Ok(Tx {
                                session,
                                context,
                                gated,
                                gated_at,
                                ids: std::mem::take(&mut self.ids),
                                effects: Effects { deny: self.denied.clone(), ..Effects::default() },
                                repeated: self.repeated,
                                leased: Vec::new(),
                                changed: Vec::new(),
                                locked: BTreeMap::new(),
                                seen: BTreeMap::new(),
                            });
                        }
                        Some(Err(error)) => Fail::from(error).into_store(self.doing),
                        None => unavailable(self.doing),
                    }
                }
                Err(error) => error,
            };
            self.wait(failed).await?;
        }
    }

    async fn wait(&self, failed: StoreError) -> Result<()> {
        let runtime = &self.inner.context.runtime;
        if runtime.instant() + RECONNECT >= self.deadline || self.inner.context.is_stopping() {
            return Err(failed);
        }
        runtime.sleep(RECONNECT).await;
        Ok(())
    }

    /// `None`: run it again. `result`: `None` when the run took too long.
    pub async fn end<T>(&mut self, mut tx: Tx, result: Option<Attempt<T>>) -> Option<Result<T>> {
        if self.kind == Kind::Bare {
            return self.end_bare(tx, result).await;
        }
        let context = Arc::clone(&self.inner.context);
        let result = match result {
            Some(Ok(value)) => match context.runtime.timeout(RUN_LIMIT, tx.finish()).await {
                Some(Ok(())) => Some(Ok(value)),
                Some(Err(fail)) => Some(Err(fail)),
                None => None,
            },
            other => other,
        };
        self.ids = std::mem::take(&mut tx.ids);
        match result {
            None => Some(Err(unavailable(self.doing))),
            Some(Ok(value)) => self.commit(tx, value).await,
            Some(Err(fail)) => {
                let ended = context.runtime.timeout(RUN_LIMIT, tx.conn().batch_execute("ROLLBACK")).await;
                let is_spent = matches!(&fail, Fail::Database(error) if remedy(error) == Remedy::Reconnect);
                if matches!(ended, Some(Ok(()))) && !is_spent {
                    drop(tx.session.0.take());
                }
                drop(tx);
                self.failed(fail).await
            }
        }
    }

    async fn commit<T>(&mut self, mut tx: Tx, value: T) -> Option<Result<T>> {
        let context = Arc::clone(&self.inner.context);
        let answer = context.runtime.timeout(RUN_LIMIT, tx.conn().batch_execute("COMMIT")).await;
        match answer {
            Some(Ok(())) => {
                committed(tx);
                Some(Ok(value))
            }
            // The server itself said no: rolled back.
            Some(Err(error)) if remedy(&error) == Remedy::Again => self.failed(Fail::Database(error)).await,
            Some(Err(error)) => self.lost(tx, Some(error)).await,
            None => self.lost(tx, None).await,
        }
    }

    /// The answer to the statement is the answer to the COMMIT that it was.
    async fn end_bare<T>(&mut self, mut tx: Tx, result: Option<Attempt<T>>) -> Option<Result<T>> {
        self.ids = std::mem::take(&mut tx.ids);
        match result {
            Some(Ok(value)) => {
                debug_assert!(tx.changed.is_empty() && tx.effects.deny.is_empty(), "what COMMIT would wait for");
                committed(tx);
                Some(Ok(value))
            }
            None => self.lost(tx, None).await,
            Some(Err(Fail::Database(error))) if remedy(&error) == Remedy::Reconnect => self.lost(tx, Some(error)).await,
            Some(Err(fail)) => {
                drop(tx.session.0.take());
                drop(tx);
                self.failed(fail).await
            }
        }
    }

    /// Whether it was committed is not known. What it leased nobody holds.
    async fn lost<T>(&mut self, mut tx: Tx, error: Option<DieselError>) -> Option<Result<T>> {
        let context = Arc::clone(&self.inner.context);
        self.repeated = true;
        self.denied.append(&mut tx.effects.deny);
        if self.kind == Kind::Leasing || !tx.leased.is_empty() {
            context.sweep.ask();
        }
        let error = match error {
            Some(error) => Fail::Database(error).into_store(self.doing),
            None => unavailable(self.doing),
        };
        drop(tx);
        tracing::warn!(doing = self.doing, "the answer to a COMMIT was lost; asking again");
        match self.wait(error).await {
            Ok(()) => None,
            Err(error) => {
                // Better a "no" too many.
                context.deny.publish(&self.denied, context.runtime.instant().into_std());
                Some(Err(error))
            }
        }
    }

    async fn failed<T>(&mut self, fail: Fail) -> Option<Result<T>> {
        let Fail::Database(error) = fail else { return Some(Err(fail.into_store(self.doing))) };
        match remedy(&error) {
            Remedy::Again if self.timing < MAX_TIMING => {
                self.timing += 1;
                let runtime = &self.inner.context.runtime;
                // Soon at first. Where a default isolation above READ COMMITTED refuses everybody who comes to a person at
                // once but one, they must come far enough apart.
                let spread = f64::from(self.timing * self.timing) * runtime.random_unit() * 0.001;
                runtime.sleep(Duration::from_secs_f64(spread)).await;
                None
            }
            Remedy::Reconnect => match self.wait(Fail::Database(error).into_store(self.doing)).await {
                Ok(()) => None,
                Err(error) => Some(Err(error)),
            },
            Remedy::Again | Remedy::GiveUp => {
                tracing::warn!(doing = self.doing, %error, "a step of the store failed");
                Some(Err(Fail::Database(error).into_store(self.doing)))
            }
        }
    }
}

/// What is left to do after COMMIT.
fn committed(mut tx: Tx) {
    drop(tx.session.0.take());
    let context = Arc::clone(&tx.context);
    if !tx.leased.is_empty() {
        context.held.lock().expect("no panic while held").extend(tx.leased.drain(..).map(|job| job.0));
    }
    std::mem::take(&mut tx.effects).apply(&context.deny, &context.runtime);
}

/// `step!(inner, doing, |tx| work)`: the answer of `work`, a future that borrows `tx` and what it likes, once its
/// transaction is durable. A macro, for no closure can say that its future is `Send` and borrows its argument.
macro_rules! step {
    ($inner:expr, $doing:expr, |$tx:ident| $work:expr) => {
        $crate::storage::postgres::tx::step!(as Plain; $inner, $doing, |$tx| $work)
    };
    (leasing; $inner:expr, $doing:expr, |$tx:ident| $work:expr) => {
        $crate::storage::postgres::tx::step!(as Leasing; $inner, $doing, |$tx| $work)
    };
    (leasing after $ids:expr; $inner:expr, $doing:expr, |$tx:ident| $work:expr) => {
        $crate::storage::postgres::tx::step!(@ $inner, $doing, Leasing, $ids, |$tx| $work)
    };
    (as $kind:ident; $inner:expr, $doing:expr, |$tx:ident| $work:expr) => {
        $crate::storage::postgres::tx::step!(@ $inner, $doing, $kind, None, |$tx| $work)
    };
    (@ $inner:expr, $doing:expr, $kind:ident, $ids:expr, |$tx:ident| $work:expr) => {{
        use $crate::storage::postgres::tx::{Kind, Runs};
        let inner = $inner;
        let _leasing = if Kind::$kind == Kind::Leasing { Some(inner.context.leasing.read().await) } else { None };
        let mut runs = Runs::new(inner, $doing, Kind::$kind).after($ids);
        loop {
            let mut transaction = match runs.begin().await {
                Ok(transaction) => transaction,
                Err(error) => {
                    runs.answer();
                    break Err(error);
                }
            };
            let result = {
                let $tx = &mut transaction;
                inner.context.runtime.timeout($crate::storage::postgres::tx::RUN_LIMIT, async { $work.await }).await
            };
            if let Some(answer) = runs.end(transaction, result).await {
                runs.answer();
                break answer;
            }
        }
    }};
}
pub(super) use step;

/// `in_transaction!(conn, work)` on a connection of one's own, each statement of which sees the latest.
macro_rules! in_transaction {
    ($conn:expr, $work:expr) => {
        async {
            $conn.batch_execute("BEGIN ISOLATION LEVEL READ COMMITTED").await?;
            let result: $crate::storage::postgres::fail::Attempt<_> = $work.await;
            $conn.batch_execute(if result.is_ok() { "COMMIT" } else { "ROLLBACK" }).await?;
            result
        }
        .await
    };
}
pub(super) use in_transaction;

/// What [`Context`] keeps of leases that this process's engine has.
pub(super) type Held = Mutex<std::collections::HashSet<i64>>;
