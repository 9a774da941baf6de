//! Jobs without rows: those that are handed over as their events are accepted.
//!
//! Nearly every job of an event for a few people is leased from birth, sent and answered within milliseconds. A row in `job`,
//! with its index entries, would be written and deleted for nothing but a crash in between. So the jobs that a group of events
//! hands over are one row in `handed`, written with the events; it is deleted when the last of them has ended. Until then a job
//! of it is open if no outcome block names its notification and its route: of that kind it is the only one (the view
//! `handed_job`; `open_job` are these and the rows of `job`).
//!
//! The group's row is their lease. Who records results locks it against deletion, and records nothing where it is gone.
//! Whatever is not the plain course gives all jobs of the group that are open rows, and deletes it ([`to_rows`]): progress before the
//! end, a release, an age of [`ROWLESS_FOR`]; and so do the others when the replica's heart stops, and it itself when it leaves. A
//! lease that is not found here any more is therefore looked for among the rows. What is open here is younger than some seconds,
//! or its replica is dead.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use diesel::sql_types::{Array, BigInt, Bool, Integer, Nullable};
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection as _};

use super::batch::JobColumns;
use super::fail::Attempt;
use super::jobs::Lease;
use super::query::RunQuery;
use super::statement::constant;
use super::tx::{Tx, step};
use super::{Context, Inner};
use crate::domain::ids::{AppKey, JobId, NotificationId, first_id_at};
use crate::domain::notification::NewJob;
use crate::planted;
use crate::storage::{BootId, JobUpdate, Result};

/// The most targets of a job without a row.
const MAX_TARGETS: usize = 16;
/// The fence of a job that is leased from birth.
const FENCE: i64 = 1;
/// How long a job goes without a row: what a slow provider has in flight is counted and found by what indexes there are.
const ROWLESS_FOR: Duration = Duration::from_secs(2);
/// How often it is looked for older ones.
const AGE_EVERY: Duration = Duration::from_millis(500);
/// In which of these turns it is looked for groups that were written after all, by a statement that was given up.
const LATE_EVERY: u32 = 10;
/// Older than this they are: far beyond any try of a group and the server's own time for a statement.
const LATE: Duration = Duration::from_secs(30);

/// The row of a group: its jobs, of which not every column is stored.
pub(super) struct HandedColumns {
    pub id: i64,
    pub owner: BootId,
    pub jobs: JobColumns,
}

impl HandedColumns {
    /// `false`: it must have a row. `others`: the jobs of its notification.
    pub fn push(&mut self, id: JobId, app: AppKey, job: &NewJob, others: &[(JobId, NewJob, Lease)]) -> Attempt<bool> {
        let of_route = others.iter().filter(|(_, other, _)| other.route == job.route).count();
        if job.targets.len() > MAX_TARGETS || of_route != 1 {
            return Ok(false);
        }
        self.jobs.push(id, app, job, Lease::first(self.owner))?;
        Ok(true)
    }
}

/// `INSERT INTO handed SELECT …`, these being the parameters: its SQL up to WHERE.
macro_rules! insert_handed {
    () => {
        "INSERT INTO handed (id, owner, format, job, notification, route, first_user, last_user, target_count, targets) \
         SELECT $26, $27, $28, $29, $30, $31, $32, $33, $34, $35"
    };
}
pub(super) use insert_handed;

/// The parameters of [`insert_handed!`], as the statement's next.
macro_rules! bind_handed {
    ($statement:expr, $handed:expr) => {{
        use diesel::sql_types::{Array, BigInt, Binary, Integer, SmallInt};
        let $crate::storage::postgres::handed::HandedColumns { id, owner, jobs } = $handed;
        $statement
            .bind::<BigInt, _>(id)
            .bind::<BigInt, _>(owner.0)
            .bind::<SmallInt, _>(jobs.format)
            .bind::<Array<BigInt>, _>(jobs.id)
            .bind::<Array<BigInt>, _>(jobs.notification)
            .bind::<Array<BigInt>, _>(jobs.route)
            .bind::<Array<BigInt>, _>(jobs.first_user)
            .bind::<Array<BigInt>, _>(jobs.last_user)
            .bind::<Array<Integer>, _>(jobs.target_count)
            .bind::<Array<Binary>, _>(jobs.targets)
    }};
}
pub(super) use bind_handed;

struct Group {
    born: Instant,
    /// All that were handed over.
    jobs: Vec<i64>,
    /// How many of them are open.
    open: usize,
}

#[derive(Default)]
struct Known {
    groups: HashMap<i64, Group>,
    /// The group of each open job.
    of: HashMap<i64, i64>,
    /// Groups of which nothing is open and whose rows are still there.
    spent: Vec<i64>,
    /// Groups under which results may have been recorded without an answer. A job's row would be gone then; they are still
    /// there, and would take the same again.
    doubtful: HashSet<i64>,
}

impl Known {
    fn group_of(&self, job: JobId, fence: i64) -> Option<i64> {
        (fence == FENCE).then(|| self.of.get(&job.0).copied()).flatten()
    }
}

/// Ascending, each once.
fn distinct(groups: impl Iterator<Item = i64>) -> Vec<i64> {
    groups.collect::<BTreeSet<i64>>().into_iter().collect()
}

/// What this replica has open without rows. It may be behind the database, where others give jobs rows; never ahead.
#[derive(Default)]
pub(super) struct Open(Mutex<Known>);

impl Open {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().expect("no panic while held")
    }

    /// A group's row was written; these jobs of it were handed over.
    pub fn born(&self, group: i64, jobs: Vec<i64>, now: Instant) {
        let mut known = self.known();
        if jobs.is_empty() {
            known.spent.push(group);
            return;
        }
        known.of.extend(jobs.iter().map(|job| (*job, group)));
        known.groups.insert(group, Group { born: now, open: jobs.len(), jobs });
    }

    /// The group of each update's job that may be without a row.
    pub fn of(&self, updates: &[JobUpdate]) -> Vec<Option<i64>> {
        let known = self.known();
        updates.iter().map(|update| known.group_of(update.job, update.fence)).collect()
    }

    /// The groups of these leases, each once.
    fn of_leases(&self, leases: impl Iterator<Item = (JobId, i64)>) -> Vec<i64> {
        let known = self.known();
        distinct(leases.filter_map(|(job, fence)| known.group_of(job, fence)))
    }

    /// The groups without whose rows these updates cannot be written, each once.
    fn in_need(&self, updates: &[JobUpdate]) -> Vec<i64> {
        let known = self.known();
        let groups = updates.iter().filter_map(|update| Some((update, known.group_of(update.job, update.fence)?)));
        let in_need = groups.filter(|(update, group)| !is_told(update) || known.doubtful.contains(group));
        distinct(in_need.map(|(_, group)| group))
    }

    /// These jobs have ended, or are somebody else's. `gone`: groups whose rows were deleted already.
    pub fn ended(&self, jobs: impl Iterator<Item = JobId>, gone: &[i64]) {
        let mut known = self.known();
        for job in jobs {
            let Some(group) = known.of.remove(&job.0) else { continue };
            let Some(open) = known.groups.get_mut(&group) else { continue };
            open.open -= 1;
            if open.open == 0 {
                known.groups.remove(&group);
                known.doubtful.remove(&group);
                if !gone.contains(&group) {
                    known.spent.push(group);
                }
            }
        }
    }

    /// Has no rows any more: all that was open has rows, or is somebody else's.
    pub fn forget(&self, group: i64) {
        let mut known = self.known();
        known.doubtful.remove(&group);
        for job in known.groups.remove(&group).into_iter().flat_map(|group| group.jobs) {
            known.of.remove(&job);
        }
    }

    /// Those that end when so many jobs of each do.
    pub fn ending(&self, counts: &HashMap<i64, usize>) -> Vec<i64> {
        let known = self.known();
        let is_last =
            |(group, count): &(&i64, &usize)| known.groups.get(group).is_some_and(|known| known.open == **count);
        counts.iter().filter(is_last).map(|(group, _)| *group).collect()
    }

    /// Groups of which nothing is open, whose rows are to be deleted.
    pub fn take_spent(&self) -> Spent<'_> {
        Spent { open: self, groups: std::mem::take(&mut self.known().spent) }
    }

    /// Until [`Doubt::settled`] says otherwise, results under these groups may have been written without an answer.
    pub fn doubt(&self, groups: &[Option<i64>]) -> Doubt<'_> {
        Doubt { open: self, groups: distinct(groups.iter().flatten().copied()) }
    }

    fn older_than(&self, before: Instant) -> Vec<i64> {
        let known = self.known();
        let mut old: Vec<(Instant, i64)> = known
            .groups
            .iter()
            .filter(|(_, group)| group.born <= before)
            .map(|(id, group)| (group.born, *id))
            .collect();
        old.sort_unstable();
        old.into_iter().map(|(_, id)| id).collect()
    }

    /// Groups that this replica knows of.
    pub fn groups(&self) -> Vec<i64> {
        let known = self.known();
        known.groups.keys().chain(&known.spent).copied().collect()
    }
}

/// See [`Open::doubt`].
pub(super) struct Doubt<'a> {
    open: &'a Open,
    groups: Vec<i64>,
}

impl Doubt<'_> {
    /// There was an answer.
    pub fn settled(mut self) {
        self.groups.clear();
    }
}

impl Drop for Doubt<'_> {
    fn drop(&mut self) {
        let mut known = self.open.known();
        let there: Vec<i64> = self.groups.drain(..).filter(|group| known.groups.contains_key(group)).collect();
        known.doubtful.extend(there);
    }
}

/// Groups whose rows are being deleted. Dropped before [`Spent::deleted`], they are still to be.
pub(super) struct Spent<'a> {
    open: &'a Open,
    pub groups: Vec<i64>,
}

impl Spent<'_> {
    pub fn deleted(mut self) {
        self.groups.clear();
    }
}

impl Drop for Spent<'_> {
    fn drop(&mut self) {
        self.open.known().spent.append(&mut self.groups);
    }
}

/// Whether the plain course can be gone with a job without a row: it ends, and blocks tell of it. What goes on by another route is
/// told of there by blocks that could be another job's of this notification: see the view.
fn is_told(update: &JobUpdate) -> bool {
    update.progress.is_none()
        && !update.entries.is_empty()
        && update.followers.iter().all(|follower| follower.route == update.route)
}

/// Gives those jobs rows that these updates cannot be written without.
pub(super) async fn prepare(inner: &Inner, updates: &[JobUpdate]) -> Result<()> {
    rows_of_groups(inner, inner.context.handed.in_need(updates)).await
}

/// Gives these jobs, held under these fences, rows, as far as they have none.
pub(super) async fn rows_for(inner: &Inner, leases: impl Iterator<Item = (JobId, i64)>) -> Result<()> {
    rows_of_groups(inner, inner.context.handed.of_leases(leases)).await
}

async fn rows_of_groups(inner: &Inner, groups: Vec<i64>) -> Result<()> {
    for group in groups {
        rows_of_group(inner, group).await?;
    }
    Ok(())
}

/// One at a time: whoever waits for one lock has no other.
async fn rows_of_group(inner: &Inner, group: i64) -> Result<()> {
    let groups = [group];
    step!(inner, "giving jobs rows", |tx| async {
        see_the_latest(tx.conn()).await?;
        let locked = lock(tx.conn(), &groups).await?;
        to_rows(tx.conn(), &locked, Rows::Leased).await
    })?;
    inner.context.handed.forget(group);
    Ok(())
}

/// Gives rows to what has been without for long, and deletes what is left of groups.
pub(super) async fn age(inner: Arc<Inner>) {
    let runtime = inner.context.runtime.clone();
    let mut turn = 0_u32;
    loop {
        tokio::select! {
            biased;
            () = inner.context.stopping.cancelled() => return,
            () = runtime.sleep(AGE_EVERY) => {}
        }
        let Some(before) = runtime.instant().into_std().checked_sub(ROWLESS_FOR) else { continue };
        if let Err(error) = rows_of_groups(&inner, inner.context.handed.older_than(before)).await {
            tracing::debug!(%error, "jobs stay without rows for now");
        }
        turn = turn.wrapping_add(1);
        if turn.is_multiple_of(LATE_EVERY)
            && let Err(error) = free_late(&inner).await
        {
            tracing::debug!(%error, "groups that were written late stay for now");
        }
        // Where nothing is recorded any more.
        let spent = inner.context.handed.take_spent();
        if spent.groups.is_empty() {
            continue;
        }
        let deleted = step!(&inner, "deleting what is left of groups", |tx| async {
            let groups = &spent.groups;
            tx.execute(constant!((); "DELETE FROM handed WHERE id = ANY ($1)", Array<BigInt> => groups)).await
        });
        if deleted.is_ok() {
            spent.deleted();
        }
    }
}

/// Groups of ours that were written after the sweep for them, and so are leased to nobody.
async fn free_late(inner: &Inner) -> Result<()> {
    let context = &inner.context;
    let before = first_id_at(inner.clock(context.runtime.now()).minus(LATE));
    let which = Which { before, ..Which::unknown(context) };
    let freed = step!(inner, "freeing what was leased late", |tx| async {
        see_the_latest(tx.conn()).await?;
        free(tx.conn(), &which, Rows::Unclaimed).await
    })?;
    if freed > 0 {
        inner.forget_bounds();
        tracing::info!(jobs = freed, "freed leases that were taken after all, and answered to nobody");
    }
    Ok(())
}

/// Before a transaction's first query: each statement sees what was committed before it, whatever the server's default. Under
/// a snapshot from before a lock, what was recorded until the lock would be sent again.
pub(super) async fn see_the_latest(conn: &mut AsyncPgConnection) -> diesel::QueryResult<()> {
    conn.batch_execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED").await
}

/// Groups that are there, locked: nobody records results of them meanwhile.
async fn lock(conn: &mut AsyncPgConnection, groups: &[i64]) -> diesel::QueryResult<Vec<i64>> {
    constant!(
        BigInt; "SELECT id FROM handed WHERE id = ANY ($1) ORDER BY id FOR UPDATE", Array<BigInt> => groups,
    )
    .load(conn)
    .await
}

/// Whose the rows are that jobs get.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rows {
    /// Of whom they are leased to.
    Leased,
    /// Whoever claims them: their replica is gone. Its claim counts.
    Free,
    /// The same, where they were handed to nobody.
    Unclaimed,
}

/// Gives all open jobs of groups, which must be locked, rows, and deletes the groups. In a statement after that of the lock: what
/// was recorded until then must be seen.
async fn to_rows(conn: &mut AsyncPgConnection, groups: &[i64], rows: Rows) -> Attempt<u64> {
    if groups.is_empty() {
        return Ok(0);
    }
    let jobs = constant!(
        ();
        "INSERT INTO job (id, app, notification_id, route, lane, format, ready_at, due_at, owner, fence, attempt, claims, \
         first_user, last_user, target_count, targets) SELECT id, app, notification_id, route, lane, format, ready_at, due_at, \
         CASE WHEN $2 THEN 0 ELSE owner END, CASE WHEN $2 THEN fence + 1 ELSE fence END, attempt, $3, first_user, last_user, \
         target_count, targets FROM handed_job WHERE handed = ANY ($1) ON CONFLICT (id) DO NOTHING",
        Array<BigInt> => groups, Bool => rows != Rows::Leased, Integer => i32::from(rows != Rows::Unclaimed),
    )
    .execute(conn)
    .await?;
    constant!((); "DELETE FROM handed WHERE id = ANY ($1)", Array<BigInt> => groups).execute(conn).await?;
    Ok(jobs as u64)
}

/// In a transaction: frees what nobody alive has. Who records results at this moment is alive, or will be dead the next time.
pub(super) async fn free_others(conn: &mut AsyncPgConnection, alive: &[i64]) -> Attempt<u64> {
    let groups: Vec<i64> = constant!(
        BigInt; "SELECT id FROM handed WHERE owner <> ALL ($1) ORDER BY id FOR UPDATE SKIP LOCKED", Array<BigInt> => alive,
    )
    .load(conn)
    .await?;
    if planted::is("pg-handed-jobs-lost") {
        return Ok(0);
    }
    to_rows(conn, &groups, Rows::Free).await
}

/// Which groups of a replica.
struct Which {
    owner: i64,
    /// All but these.
    except: Vec<i64>,
    /// Older than this id.
    before: i64,
    /// Only with jobs of this notification.
    of: Option<NotificationId>,
}

impl Which {
    fn all(owner: BootId) -> Self {
        Self { owner: owner.0, except: Vec::new(), before: i64::MAX, of: None }
    }

    /// Of ours, those that nobody here knows of, for their answer was lost.
    fn unknown(context: &Context) -> Self {
        Self { except: context.handed.groups(), ..Self::all(context.boot) }
    }
}

/// In a transaction.
async fn free(conn: &mut AsyncPgConnection, which: &Which, rows: Rows) -> Attempt<u64> {
    let groups: Vec<i64> = constant!(
        BigInt;
        "SELECT id FROM handed WHERE owner = $1 AND id <> ALL ($2) AND id < $3 \
         AND ($4 IS NULL OR notification @> ARRAY[$4]) ORDER BY id FOR UPDATE",
        BigInt => which.owner, Array<BigInt> => &which.except, BigInt => which.before,
        Nullable<BigInt> => which.of.map(|id| id.0),
    )
    .load(conn)
    .await?;
    to_rows(conn, &groups, rows).await
}

/// In a transaction, at the end of this replica: what it had is free.
pub(super) async fn free_own(conn: &mut AsyncPgConnection, owner: BootId) -> Attempt<u64> {
    free(conn, &Which::all(owner), Rows::Free).await
}

/// In a transaction: frees what is leased to us by groups that nobody here knows of. `of`: only by those with jobs of this
/// notification.
pub(super) async fn free_unknown(
    conn: &mut AsyncPgConnection,
    context: &Context,
    of: Option<NotificationId>,
) -> Attempt<u64> {
    free(conn, &Which { of, ..Which::unknown(context) }, Rows::Unclaimed).await
}

/// At the beginning of a transaction: those of these groups that are there and ours, locked against deletion until COMMIT.
pub(super) async fn hold(tx: &mut Tx, groups: &[Option<i64>]) -> Attempt<HashSet<i64>> {
    let groups = distinct(groups.iter().flatten().copied());
    if groups.is_empty() {
        return Ok(HashSet::new());
    }
    if tx.is_repeated() {
        // A run before this one may have been committed. Rows tell: what it ended has none.
        see_the_latest(tx.conn()).await?;
        let locked = lock(tx.conn(), &groups).await?;
        to_rows(tx.conn(), &locked, Rows::Leased).await?;
        return Ok(HashSet::new());
    }
    let boot = tx.context.boot.0;
    let held: Vec<i64> = constant!(
        BigInt; "SELECT id FROM handed WHERE id = ANY ($1) AND owner = $2 ORDER BY id FOR KEY SHARE",
        Array<BigInt> => groups, BigInt => boot,
    )
    .load(tx.conn())
    .await?;
    Ok(held.into_iter().collect())
}
