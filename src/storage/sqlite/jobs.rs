//! Open work: inserting, claiming, recording, releasing. Every write of a lease's holder is guarded by its fence.

use std::collections::HashMap;
use std::sync::Arc;

use diesel::sql_types::{BigInt, Binary, Integer, Nullable, SmallInt, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{OptionalExtension, RunQueryDsl};

use super::devices;
use super::fail::{Attempt, Fail};
use super::group::Tx;
use super::handed;
use super::history::History;
use super::providers;
use super::rows::notification_columns;
use super::rows::{JobRow, JobTypes, NotificationRow, NotificationTypes, job_columns, json_ids, stored_count};
use super::statement::constant;
use crate::domain::ids::{AppKey, JobId, NotificationId, RouteId};
use crate::domain::notification::{NewJob, Notification};
use crate::domain::platform::Lane;
use crate::domain::targets;
use crate::domain::time::UnixMs;
use crate::planted;
use crate::storage::{BootId, ClaimRequest, Claimed, JobUpdate, PUT_OFF_MS, SUSPECT_CLAIMS};

/// A job that cannot be read is put off by this, so that it does not stand in the way of those behind it.
const UNREADABLE_FOR_MS: i64 = 3_600_000;

/// Whose a new job is.
#[derive(Clone, Copy)]
pub(super) struct Lease {
    owner: i64,
    fence: i64,
}

impl Lease {
    pub const FREE: Self = Self { owner: 0, fence: 0 };

    /// Leased from birth: counts as the first claim.
    pub const fn first(owner: BootId) -> Self {
        Self { owner: owner.0, fence: handed::FENCE }
    }

    /// Free again after a lease with this fence.
    pub const fn freed(fence: i64) -> Self {
        Self { owner: 0, fence: fence + 1 }
    }
}

pub(super) fn insert(tx: &mut Tx<'_>, app: AppKey, job: &NewJob, lease: Lease, now: UnixMs) -> Attempt<JobId> {
    let id = JobId(tx.next_id(now));
    insert_row(tx.writes(), id, app, job, lease)?;
    Ok(id)
}

pub(super) fn insert_row(
    conn: &mut SqliteConnection,
    id: JobId,
    app: AppKey,
    job: &NewJob,
    lease: Lease,
) -> Attempt<()> {
    let (Some(first), Some(last)) = (job.targets.first(), job.targets.last()) else {
        return Err(Fail::corrupt("a job without targets"));
    };
    constant!(
        ();
        "INSERT INTO job (id, app, notification_id, route, lane, format, ready_at, due_at, owner, fence, attempt, \
         claims, first_attempt_at, first_user, last_user, target_count, targets) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17)",
        BigInt => id.0, BigInt => app.0, BigInt => job.notification.0, BigInt => job.route.0,
        SmallInt => job.lane.code(), SmallInt => targets::NEWEST, BigInt => job.ready_at.0, BigInt => job.due_at.0,
        BigInt => lease.owner, BigInt => lease.fence, Integer => stored_count(job.attempt),
        Integer => stored_count(job.claims), Nullable<BigInt> => job.first_attempt_at.map(|at| at.0),
        BigInt => first.user.0, BigInt => last.user.0,
        Integer => i32::try_from(job.targets.len()).unwrap_or(i32::MAX), Binary => targets::pack(targets::NEWEST, &job.targets),
    )
    .execute(conn)?;
    Ok(())
}

pub(super) fn claim(tx: &mut Tx<'_>, request: ClaimRequest, owner: BootId, now: UnixMs) -> Attempt<Vec<Claimed>> {
    // job_by_due. The window adds up targets in the order of the claim.
    let mut rows: Vec<JobRow> = constant!(
        JobTypes;
        concat!(
            "UPDATE job SET owner = ?1, fence = fence + 1, claims = max(claims, min(claims + 1, ?8)) WHERE id IN ( \
             SELECT id FROM (SELECT id, row_number() OVER claim AS position, \
             sum(target_count) OVER (claim ROWS UNBOUNDED PRECEDING) AS total FROM \
             (SELECT id, due_at, target_count FROM job WHERE owner = 0 AND route = ?2 AND lane = ?3 AND due_at <= ?4 \
             AND format <= ?5 ORDER BY due_at, id LIMIT ?6 + 0) WINDOW claim AS (ORDER BY due_at, id)) \
             WHERE position = 1 OR total <= ?7) RETURNING ",
            job_columns!()
        ),
        BigInt => owner.0, BigInt => request.route.0, SmallInt => request.lane.code(), BigInt => now.0,
        SmallInt => targets::NEWEST, BigInt => i64::try_from(request.max_jobs).unwrap_or(i64::MAX),
        BigInt => i64::try_from(request.max_targets).unwrap_or(i64::MAX), Integer => stored_count(SUSPECT_CLAIMS),
    )
    .load(tx.writes())?;
    rows.sort_unstable_by_key(|row| (row.due_at, row.id));
    let notifications = notifications(tx, &rows)?;
    let mut claimed = Vec::with_capacity(rows.len());
    for row in rows {
        match (row.to_domain(), notifications.get(&row.notification_id)) {
            (Ok(job), Some(notification)) => claimed.push(Claimed { job, notification: Arc::clone(notification) }),
            (read, _) => {
                let detail =
                    read.err().map_or_else(|| "its notification is gone".to_owned(), |fail| format!("{fail:?}"));
                tracing::error!(job_id = row.id, detail, "a job cannot be read and is put off");
                tx.execute(constant!(
                    (); "UPDATE job SET owner = 0, fence = fence + 1, due_at = ?2 WHERE id = ?1",
                    BigInt => row.id, BigInt => now.0 + UNREADABLE_FOR_MS,
                ))?;
            }
        }
    }
    Ok(claimed)
}

/// The notifications of these jobs, from the cache or the table; those that are gone or unreadable are left out.
fn notifications(tx: &mut Tx<'_>, rows: &[JobRow]) -> Attempt<HashMap<i64, Arc<Notification>>> {
    let mut found = HashMap::with_capacity(rows.len());
    let mut missing = Vec::new();
    for row in rows {
        if found.contains_key(&row.notification_id) || missing.contains(&row.notification_id) {
            continue;
        }
        match tx.cache.get(NotificationId(row.notification_id)) {
            Some(notification) => {
                found.insert(row.notification_id, Arc::clone(notification));
            }
            None => missing.push(row.notification_id),
        }
    }
    if missing.is_empty() {
        return Ok(found);
    }
    let loaded: Vec<NotificationRow> = constant!(
        NotificationTypes;
        concat!("SELECT ", notification_columns!(), " FROM notification WHERE id IN (SELECT value FROM json_each(?1))"),
        Text => json_ids(missing.into_iter()),
    )
    .load(tx.conn)?;
    for row in loaded {
        let (id, bytes) = (row.id, row.content.len());
        match row.into_domain() {
            Ok(notification) => {
                let notification = Arc::new(notification);
                tx.cache.insert(Arc::clone(&notification), bytes);
                found.insert(id, notification);
            }
            Err(fail) => tracing::error!(notification_id = id, detail = ?fail, "a notification cannot be read"),
        }
    }
    Ok(found)
}

/// For a fan-out: from the cache or the table.
pub(super) fn notification(tx: &mut Tx<'_>, id: NotificationId) -> Attempt<Option<Arc<Notification>>> {
    if let Some(notification) = tx.cache.get(id) {
        return Ok(Some(Arc::clone(notification)));
    }
    let Some(row) = super::notifications::row(tx.conn, id)? else { return Ok(None) };
    let bytes = row.content.len();
    let notification = Arc::new(row.into_domain()?);
    tx.cache.insert(Arc::clone(&notification), bytes);
    Ok(Some(notification))
}

pub(super) fn next_due(conn: &mut SqliteConnection, route: RouteId, lane: Lane) -> Attempt<Option<UnixMs>> {
    // job_by_due
    let due: Option<i64> = constant!(
        BigInt; "SELECT due_at FROM job WHERE owner = 0 AND route = ?1 AND lane = ?2 ORDER BY due_at LIMIT 1",
        BigInt => route.0, SmallInt => lane.code(),
    )
    .get_result(conn)
    .optional()?;
    Ok(due.map(UnixMs))
}

pub(super) fn record(tx: &mut Tx<'_>, updates: &[JobUpdate], now: UnixMs) -> Attempt<Vec<bool>> {
    let mut history = History::default();
    let held = updates.iter().map(|update| record_one(tx, update, &mut history, now)).collect::<Attempt<_>>()?;
    history.write(tx, now)?;
    Ok(held)
}

fn record_one<'a>(tx: &mut Tx<'_>, update: &'a JobUpdate, history: &mut History<'a>, now: UnixMs) -> Attempt<bool> {
    let held = match &update.progress {
        _ if handed::finish(tx, update)? => 1,
        None => tx.execute(constant!(
            (); "DELETE FROM job WHERE id = ?1 AND fence = ?2", BigInt => update.job.0, BigInt => update.fence,
        ))?,
        // `claims` counts claims without progress. What finishes nothing new was written before.
        Some(progress) => tx.execute(constant!(
            ();
            "UPDATE job SET progress = ?3, claims = CASE WHEN ?4 THEN 0 ELSE claims END WHERE id = ?1 AND fence = ?2 \
             AND NOT (?4 AND progress IS ?3)",
            BigInt => update.job.0, BigInt => update.fence, Binary => progress.as_bytes(),
            SmallInt => i16::from(!update.entries.is_empty()),
        ))?,
    };
    if held == 0 && update.progress.is_some() && is_held(tx, update)? {
        return Ok(true);
    }
    if held == 0 && !planted::is("record-without-fence") {
        return Ok(false);
    }
    if planted::is("job-ends-before-its-outcome") {
        tx.commit_early()?;
    }
    let times = if planted::is("outcome-block-twice") { 2 } else { 1 };
    for _ in 0..times {
        history.results(tx, update.app, update.notification, Some(update.route), &update.entries, now);
    }
    for detail in &update.details {
        history.attempt(tx, update.app, update.notification, detail, now)?;
    }
    for follower in update.followers.iter().filter(|_| !planted::is("followers-lost")) {
        insert(tx, update.app, follower, Lease::FREE, now)?;
    }
    for dead in &update.retirements {
        if let Some(user) = devices::retire_dead(tx, update.app, dead, now)? {
            history.retirement(tx, update.app, user, dead, now);
        }
    }
    for change in &update.device_changes {
        providers::change_device(tx, update.app, *change, now)?;
    }
    Ok(true)
}

pub(super) fn run_alone(tx: &mut Tx<'_>, job: JobId, fence: i64) -> Attempt<bool> {
    handed::rows_of(tx, &[(job, fence)])?;
    let held = tx.execute(constant!(
        (); "UPDATE job SET claims = claims + 1 WHERE id = ?1 AND fence = ?2 AND owner <> 0",
        BigInt => job.0, BigInt => fence,
    ))?;
    Ok(held > 0)
}

fn is_held(tx: &mut Tx<'_>, update: &JobUpdate) -> Attempt<bool> {
    let held: Option<i64> = constant!(
        BigInt; "SELECT id FROM job WHERE id = ?1 AND fence = ?2", BigInt => update.job.0, BigInt => update.fence,
    )
    .get_result(tx.conn)
    .optional()?;
    Ok(held.is_some())
}

/// An orderly return is no crash: the claim does not count.
pub(super) fn release(tx: &mut Tx<'_>, jobs: &[(JobId, i64)], now: UnixMs) -> Attempt<()> {
    handed::rows_of(tx, jobs)?;
    for (job, fence) in jobs {
        tx.execute(constant!(
            ();
            "UPDATE job SET owner = 0, fence = fence + 1, claims = max(claims - 1, 0), due_at = min(due_at, ?3) \
             WHERE id = ?1 AND fence = ?2 AND owner <> 0",
            BigInt => job.0, BigInt => *fence, BigInt => now.0,
        ))?;
        if planted::is("release-keeps-the-fence") {
            tx.execute(constant!((); "UPDATE job SET fence = fence - 1 WHERE id = ?1", BigInt => job.0))?;
        }
    }
    Ok(())
}

/// As [`release`], but not due before `until`. `ready_at` keeps when it truly is.
pub(super) fn put_off(tx: &mut Tx<'_>, jobs: &[(JobId, i64)], until: UnixMs) -> Attempt<()> {
    handed::rows_of(tx, jobs)?;
    for (job, fence) in jobs {
        tx.execute(constant!(
            ();
            "UPDATE job SET owner = 0, fence = fence + 1, claims = max(claims - 1, 0), due_at = max(due_at, ?3) \
             WHERE id = ?1 AND fence = ?2 AND owner <> 0",
            BigInt => job.0, BigInt => *fence, BigInt => until.0,
        ))?;
    }
    Ok(())
}

/// A retry's `due_at` is less than [`PUT_OFF_MS`] after its `ready_at`: it lies on a grid.
pub(super) fn pull_forward(tx: &mut Tx<'_>, route: RouteId, lane: Lane, now: UnixMs, limit: usize) -> Attempt<u64> {
    // job_by_due
    let jobs = tx.execute(constant!(
        ();
        "UPDATE job SET due_at = ready_at WHERE id IN (SELECT id FROM job WHERE owner = 0 AND route = ?1 AND lane = ?2 \
         AND due_at > ?3 AND due_at - ready_at >= ?4 LIMIT ?5 + 0)",
        BigInt => route.0, SmallInt => lane.code(), BigInt => now.0, BigInt => PUT_OFF_MS,
        BigInt => i64::try_from(limit).unwrap_or(i64::MAX),
    ))?;
    Ok(jobs as u64)
}

pub(super) fn release_others(tx: &mut Tx<'_>, owner: BootId) -> Attempt<u64> {
    if planted::is("dead-owners-keep-their-jobs") {
        return Ok(0);
    }
    // job_by_owner
    let jobs = tx.execute(constant!(
        (); "UPDATE job SET owner = 0, fence = fence + 1 WHERE owner <> 0 AND owner <> ?1", BigInt => owner.0,
    ))?;
    tx.execute(constant!(
        (); "UPDATE fanout SET owner = 0, fence = fence + 1 WHERE owner <> 0 AND owner <> ?1", BigInt => owner.0,
    ))?;
    Ok(jobs as u64)
}
