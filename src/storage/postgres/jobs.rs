//! Open work: inserting, claiming, releasing. Every write of a lease's holder is guarded by its fence; its results: [`super::record`].

use std::collections::HashMap;
use std::sync::Arc;

use diesel::OptionalExtension;
use diesel::sql_types::{Array, BigInt, Integer, SmallInt};
use diesel_async::AsyncPgConnection;

use super::batch::{BlockColumns, JobColumns, bind_blocks, bind_jobs, insert_blocks, insert_jobs};
use super::fail::Attempt;
use super::query::RunQuery;
use super::rows::notification_columns;
use super::rows::{JobRow, JobTypes, NotificationRow, NotificationTypes, job_columns, stored_count};
use super::statement::constant;
use super::tx::Tx;
use crate::domain::ids::{JobId, NotificationId, RouteId};
use crate::domain::notification::Notification;
use crate::domain::platform::Lane;
use crate::domain::time::UnixMs;
use crate::storage::{BootId, ClaimRequest, Claimed, PUT_OFF_MS, SUSPECT_CLAIMS};

/// A job that cannot be read is put off by this, so that it does not stand in the way of those behind it.
const UNREADABLE_FOR_MS: i64 = 3_600_000;

/// Whose a new job is.
#[derive(Clone, Copy)]
pub(super) struct Lease {
    pub owner: i64,
    pub fence: i64,
}

impl Lease {
    pub const FREE: Self = Self { owner: 0, fence: 0 };

    /// Leased from birth: counts as the first claim.
    pub const fn first(owner: BootId) -> Self {
        Self { owner: owner.0, fence: 1 }
    }
}

/// Inserts jobs, each with its id and lease.
pub(super) async fn insert(tx: &mut Tx, jobs: JobColumns) -> Attempt<()> {
    if jobs.id.is_empty() {
        return Ok(());
    }
    let insert = constant!(
        ();
        insert_jobs!("$1", "$2", "$3", "$4", "$5", "$6", "$7", "$8", "$9", "$10", "$11", "$12", "$13", "$14", "$15",
            "$16", "$17")
    );
    tx.execute(bind_jobs!(insert, jobs)).await?;
    Ok(())
}

/// Appends blocks.
pub(super) async fn append(tx: &mut Tx, blocks: BlockColumns) -> Attempt<()> {
    if blocks.id.is_empty() {
        return Ok(());
    }
    let insert = constant!((); insert_blocks!("$1", "$2", "$3", "$4", "$5", "$6", "$7", "$8", "$9"));
    tx.execute(bind_blocks!(insert, blocks)).await?;
    Ok(())
}

pub(super) async fn claim(
    tx: &mut Tx,
    request: ClaimRequest,
    owner: BootId,
    from: i64,
    now: UnixMs,
) -> Attempt<Vec<Claimed>> {
    // job_by_due. The window adds up targets in the order of the claim.
    let mut rows: Vec<JobRow> = constant!(
        JobTypes;
        concat!(
            "WITH head AS MATERIALIZED (SELECT id, due_at, target_count FROM job WHERE owner = 0 AND route = $2 \
             AND lane = $3 AND due_at <= $4 AND due_at >= $8 AND format <= $5 ORDER BY due_at, id LIMIT $6 \
             FOR UPDATE SKIP LOCKED), \
             chosen AS (SELECT id FROM (SELECT id, row_number() OVER claim AS position, \
             sum(target_count) OVER (claim ROWS UNBOUNDED PRECEDING) AS total FROM head \
             WINDOW claim AS (ORDER BY due_at, id)) AS head WHERE position = 1 OR total <= $7) \
             UPDATE job SET owner = $1, fence = fence + 1, claims = greatest(claims, least(claims + 1, $9)) \
             WHERE job.id = ANY (ARRAY(SELECT id FROM chosen)) RETURNING job.",
            job_columns!()
        ),
        BigInt => owner.0, BigInt => request.route.0, SmallInt => request.lane.code(), BigInt => now.0,
        SmallInt => tx.context.packing.read, BigInt => i64::try_from(request.max_jobs).unwrap_or(i64::MAX),
        BigInt => i64::try_from(request.max_targets).unwrap_or(i64::MAX), BigInt => from,
        Integer => stored_count(SUSPECT_CLAIMS),
    )
    .load(tx.conn())
    .await?;
    rows.sort_unstable_by_key(|row| (row.due_at, row.id));
    let notifications = notifications(tx, &rows).await?;
    let mut claimed = Vec::with_capacity(rows.len());
    for row in rows {
        match (row.to_domain(), notifications.get(&row.notification_id)) {
            (Ok(job), Some(notification)) => {
                tx.leases(job.id);
                claimed.push(Claimed { job, notification: Arc::clone(notification) });
            }
            (read, _) => {
                let detail =
                    read.err().map_or_else(|| "its notification is gone".to_owned(), |fail| format!("{fail:?}"));
                tracing::error!(job_id = row.id, detail, "a job cannot be read and is put off");
                tx.execute(constant!(
                    (); "UPDATE job SET owner = 0, fence = fence + 1, due_at = $2 WHERE id = $1",
                    BigInt => row.id, BigInt => now.0 + UNREADABLE_FOR_MS,
                ))
                .await?;
            }
        }
    }
    Ok(claimed)
}

/// The notifications of these jobs, from the cache or the table; those that are gone or unreadable are left out.
async fn notifications(tx: &mut Tx, rows: &[JobRow]) -> Attempt<HashMap<i64, Arc<Notification>>> {
    let mut found = HashMap::with_capacity(rows.len());
    let mut missing = Vec::new();
    for row in rows {
        if found.contains_key(&row.notification_id) || missing.contains(&row.notification_id) {
            continue;
        }
        match tx.cache().get(NotificationId(row.notification_id)) {
            Some(notification) => {
                found.insert(row.notification_id, Arc::clone(notification));
            }
            None => missing.push(row.notification_id),
        }
    }
    if missing.is_empty() {
        return Ok(found);
    }
    // The bounds spare the partitions outside.
    let (first, last) = (missing.iter().min().copied().unwrap_or(0), missing.iter().max().copied().unwrap_or(0));
    let loaded: Vec<NotificationRow> = constant!(
        NotificationTypes;
        concat!("SELECT ", notification_columns!(), " FROM notification WHERE id = ANY ($1) AND id BETWEEN $2 AND $3"),
        Array<BigInt> => &missing, BigInt => first, BigInt => last,
    )
    .load(tx.conn())
    .await?;
    for row in loaded {
        let (id, bytes) = (row.id, row.content.len());
        match row.into_domain() {
            Ok(notification) => {
                let notification = Arc::new(notification);
                tx.cache().insert(Arc::clone(&notification), bytes);
                found.insert(id, notification);
            }
            Err(fail) => tracing::error!(notification_id = id, detail = ?fail, "a notification cannot be read"),
        }
    }
    Ok(found)
}

/// For a fan-out: from the cache or the table.
pub(super) async fn notification(tx: &mut Tx, id: NotificationId) -> Attempt<Option<Arc<Notification>>> {
    if let Some(notification) = tx.cache().get(id) {
        return Ok(Some(Arc::clone(notification)));
    }
    let Some(row) = super::notifications::row(tx.conn(), id).await? else { return Ok(None) };
    let bytes = row.content.len();
    let notification = Arc::new(row.into_domain()?);
    tx.cache().insert(Arc::clone(&notification), bytes);
    Ok(Some(notification))
}

pub(super) async fn next_due(conn: &mut AsyncPgConnection, route: RouteId, lane: Lane) -> Attempt<Option<UnixMs>> {
    // job_by_due
    let due: Option<i64> = constant!(
        BigInt; "SELECT due_at FROM job WHERE owner = 0 AND route = $1 AND lane = $2 ORDER BY due_at LIMIT 1",
        BigInt => route.0, SmallInt => lane.code(),
    )
    .get_result(conn)
    .await
    .optional()?;
    Ok(due.map(UnixMs))
}

pub(super) async fn run_alone(tx: &mut Tx, job: JobId, fence: i64) -> Attempt<bool> {
    let held = tx
        .execute(constant!(
            (); "UPDATE job SET claims = claims + 1 WHERE id = $1 AND fence = $2 AND owner <> 0",
            BigInt => job.0, BigInt => fence,
        ))
        .await?;
    Ok(held > 0)
}

/// An orderly return is no crash: the claim does not count.
pub(super) async fn release(tx: &mut Tx, jobs: &[(JobId, i64)], now: UnixMs) -> Attempt<()> {
    let (ids, fences): (Vec<i64>, Vec<i64>) = jobs.iter().map(|(job, fence)| (job.0, *fence)).unzip();
    tx.execute(constant!(
        ();
        "WITH locked AS MATERIALIZED (SELECT j.id FROM (SELECT * FROM unnest($1, $2) AS u(id, fence) ORDER BY id) AS u \
         CROSS JOIN LATERAL (SELECT id FROM job WHERE id = u.id AND fence = u.fence AND owner <> 0 \
         FOR NO KEY UPDATE) AS j) \
         UPDATE job SET owner = 0, fence = fence + 1, claims = greatest(claims - 1, 0), due_at = least(due_at, $3) \
         WHERE id = ANY (ARRAY(SELECT id FROM locked))",
        Array<BigInt> => ids, Array<BigInt> => fences, BigInt => now.0,
    ))
    .await?;
    Ok(())
}

/// As [`release`], but not due before `until`. `ready_at` keeps when it truly is.
pub(super) async fn put_off(tx: &mut Tx, jobs: &[(JobId, i64)], until: UnixMs) -> Attempt<()> {
    let (ids, fences): (Vec<i64>, Vec<i64>) = jobs.iter().map(|(job, fence)| (job.0, *fence)).unzip();
    tx.execute(constant!(
        ();
        "WITH locked AS MATERIALIZED (SELECT j.id FROM unnest($1, $2) AS u(id, fence) JOIN job j ON j.id = u.id \
         AND j.fence = u.fence AND j.owner <> 0 ORDER BY j.id FOR NO KEY UPDATE OF j) \
         UPDATE job SET owner = 0, fence = fence + 1, claims = greatest(claims - 1, 0), due_at = greatest(due_at, $3) \
         FROM locked WHERE job.id = locked.id",
        Array<BigInt> => ids, Array<BigInt> => fences, BigInt => until.0,
    ))
    .await?;
    Ok(())
}

/// A retry's `due_at` is less than [`PUT_OFF_MS`] after its `ready_at`: it lies on a grid. What somebody claims at this
/// moment is skipped: it is looked at anyway.
pub(super) async fn pull_forward(tx: &mut Tx, route: RouteId, lane: Lane, now: UnixMs, limit: usize) -> Attempt<u64> {
    // job_by_due
    let jobs = tx
        .execute(constant!(
            ();
            "WITH held AS MATERIALIZED (SELECT id FROM job WHERE owner = 0 AND route = $1 AND lane = $2 \
             AND due_at > $3 AND due_at - ready_at >= $4 ORDER BY due_at, id LIMIT $5 FOR UPDATE SKIP LOCKED) \
             UPDATE job SET due_at = ready_at FROM held WHERE job.id = held.id",
            BigInt => route.0, SmallInt => lane.code(), BigInt => now.0, BigInt => PUT_OFF_MS,
            BigInt => i64::try_from(limit).unwrap_or(i64::MAX),
        ))
        .await?;
    Ok(jobs as u64)
}
