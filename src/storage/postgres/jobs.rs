//! Open work: inserting, claiming, recording, releasing. Every write of a lease's holder is guarded by its fence.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use diesel::OptionalExtension;
use diesel::sql_types::{Array, BigInt, Binary, Bool, Integer, Nullable, SmallInt, Text};
use diesel_async::AsyncPgConnection;

use super::batch::{BlockColumns, DetailColumns, JobColumns, insert_blocks, insert_jobs, rows_of};
use super::fail::{Attempt, Fail};
use super::providers;
use super::query::RunQuery;
use super::rows::notification_columns;
use super::rows::{JobRow, JobTypes, NotificationRow, NotificationTypes, job_columns, stored_count};
use super::statement::constant;
use super::tx::Tx;
use crate::domain::device::Retirement;
use crate::domain::ids::{DeviceId, JobId, NotificationId, RouteId, UserKey};
use crate::domain::notification::Notification;
use crate::domain::outcome::ResultCode;
use crate::domain::platform::Lane;
use crate::domain::time::UnixMs;
use crate::planted;
use crate::storage::reach::Change;
use crate::storage::{Attempt as SendAttempt, BootId, ClaimRequest, Claimed, JobUpdate, PUT_OFF_MS, SUSPECT_CLAIMS};

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
    tx.execute(constant!(
        ();
        insert_jobs!("$1", "$2", "$3", "$4", "$5", "$6", "$7", "$8", "$9", "$10", "$11", "$12", "$13", "$14", "$15",
            "$16", "$17"),
        Array<BigInt> => jobs.id, Array<BigInt> => jobs.app, Array<BigInt> => jobs.notification,
        Array<BigInt> => jobs.route, Array<SmallInt> => jobs.lane, Array<BigInt> => jobs.ready_at,
        Array<BigInt> => jobs.due_at, Array<BigInt> => jobs.owner, Array<BigInt> => jobs.fence,
        Array<Integer> => jobs.attempt, Array<Integer> => jobs.claims,
        Array<Nullable<BigInt>> => jobs.first_attempt_at, Array<BigInt> => jobs.first_user,
        Array<BigInt> => jobs.last_user, Array<Integer> => jobs.target_count, Array<Binary> => jobs.targets,
        SmallInt => jobs.format,
    ))
    .await?;
    Ok(())
}

/// Appends blocks.
pub(super) async fn append(tx: &mut Tx, blocks: BlockColumns) -> Attempt<()> {
    if blocks.id.is_empty() {
        return Ok(());
    }
    tx.execute(constant!(
        ();
        insert_blocks!("$1", "$2", "$3", "$4", "$5", "$6", "$7", "$8", "$9"),
        Array<BigInt> => blocks.id, Array<BigInt> => blocks.app, Array<BigInt> => blocks.notification,
        Array<Nullable<BigInt>> => blocks.route, Array<BigInt> => blocks.first_user,
        Array<BigInt> => blocks.last_user, Array<BigInt> => blocks.at, Array<Binary> => blocks.entries,
        Array<BigInt> => blocks.place,
    ))
    .await?;
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

/// Every update under its fence, all in one statement. Jobs are locked in the order of their ids, so that two
/// statements cannot wait for each other.
///
/// The queue is empty most of the time, and that is what the planner then believes for the life of a prepared statement:
/// to it one look at all of `job` costs no more than a look at one row. Hence LATERAL and ANY (ARRAY(…)), and no join,
/// here and wherever jobs are found by a list: they leave it nothing but the primary key.
pub(super) async fn record(tx: &mut Tx, updates: &[JobUpdate], now: UnixMs) -> Attempt<Vec<bool>> {
    let (mut ids, mut fences, mut progress, mut places) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut moved, mut blocks) = (Vec::new(), BlockColumns::default());
    let (mut details, mut followers, mut parents) =
        (DetailColumns::default(), JobColumns::of(tx.context.packing.written()), Vec::new());
    let mut dead = RetirementColumns::default();
    for (place, update) in (0_i64..).zip(updates) {
        places.push(place);
        ids.push(update.job.0);
        fences.push(update.fence + i64::from(planted::is("pg-record-with-another-fence")));
        progress.push(update.progress.as_ref().map(|progress| progress.as_bytes().to_vec()));
        // `claims` counts claims without progress.
        moved.push(!update.entries.is_empty());
        let from = Some((update.route, place));
        blocks.push(|| tx.next_id(now), update.app, update.notification, from, &update.entries, now);
        for detail in &update.details {
            let id = tx.next_id(now);
            push_detail(&mut details, id, place, update, detail)?;
        }
        for follower in &update.followers {
            followers.push(JobId(tx.next_id(now)), update.app, follower, Lease::FREE)?;
            parents.push(place);
        }
        for retirement in &update.retirements {
            dead.push(tx.next_id(now), place, update, retirement, now);
        }
    }
    let written: Vec<(i64, i64, i64)> = constant!(
        (BigInt, BigInt, BigInt);
        concat!(
            "WITH locked AS MATERIALIZED (SELECT j.id, u.place, u.progress, u.moved FROM (SELECT * ",
            rows_of!("$1" "id", "$2" "fence", "$3" "progress", "$4" "moved", "$33" "place"),
            " AS u ORDER BY id) AS u CROSS JOIN LATERAL (SELECT id FROM job WHERE id = u.id AND fence = u.fence \
             AND (u.moved AND progress = u.progress) IS NOT TRUE FOR NO KEY UPDATE) AS j), \
             ended AS (DELETE FROM job WHERE id = ANY (ARRAY(SELECT id FROM locked WHERE progress IS NULL))), \
             advanced AS (UPDATE job SET progress = (SELECT progress FROM locked WHERE locked.id = job.id), \
             claims = CASE WHEN (SELECT moved FROM locked WHERE locked.id = job.id) THEN 0 ELSE claims END \
             WHERE id = ANY (ARRAY(SELECT id FROM locked WHERE progress IS NOT NULL))), \
             blocks AS (",
            insert_blocks!("$5", "$6", "$7", "$8", "$9", "$10", "$11", "$12", "$13"),
            " WHERE (b.place IN (SELECT place FROM locked)) IS TRUE ON CONFLICT (id) DO NOTHING), \
             details AS (INSERT INTO attempt_detail (id, app, notification_id, user_key, device, attempt, at, code, \
             status, reason, next_at) SELECT d.id, d.app, d.notification_id, d.user_key, d.device, d.attempt, d.at, \
             d.code, d.status, d.reason, d.next_at ",
            rows_of!(
                "$14" "id", "$15" "app", "$16" "notification_id", "$17" "user_key", "$18" "device", "$19" "attempt",
                "$20" "at", "$21" "code", "$22" "status", "$23" "reason", "$24" "next_at", "$25" "place",
            ),
            " AS d WHERE (d.place IN (SELECT place FROM locked)) IS TRUE ON CONFLICT (id) DO NOTHING), \
             dead AS (UPDATE device SET state = 2, retired_reason = r.reason, retired_at = r.at ",
            rows_of!(
                "$26" "device", "$27" "app", "$28" "since", "$29" "reason", "$30" "at", "$31" "place", "$32" "line",
            ),
            " AS r WHERE device.id = r.device AND device.app = r.app AND device.state + 0 = 1 \
             AND device.confirmed_at <= r.since AND (r.place IN (SELECT place FROM locked)) IS TRUE \
             RETURNING r.line, device.app, device.id, device.user_key, r.reason, r.at), \
             retired AS (INSERT INTO device_retirement (id, app, device, user_key, reason, at) \
             SELECT line, app, id, user_key, reason, at FROM dead ON CONFLICT (id) DO NOTHING) \
             SELECT place, 0::BIGINT, 0::BIGINT FROM locked UNION ALL SELECT -1, user_key, id FROM dead"
        ),
        Array<BigInt> => &ids, Array<BigInt> => fences, Array<Nullable<Binary>> => progress, Array<Bool> => moved,
        Array<BigInt> => blocks.id, Array<BigInt> => blocks.app, Array<BigInt> => blocks.notification,
        Array<Nullable<BigInt>> => blocks.route, Array<BigInt> => blocks.first_user,
        Array<BigInt> => blocks.last_user, Array<BigInt> => blocks.at, Array<Binary> => blocks.entries,
        Array<BigInt> => blocks.place,
        Array<BigInt> => details.id, Array<BigInt> => details.app, Array<BigInt> => details.notification,
        Array<BigInt> => details.user, Array<BigInt> => details.device, Array<Integer> => details.attempt,
        Array<BigInt> => details.at, Array<SmallInt> => details.code, Array<Integer> => details.status,
        Array<Text> => details.reason, Array<Nullable<BigInt>> => details.next_at, Array<BigInt> => details.place,
        Array<BigInt> => dead.device, Array<BigInt> => dead.app, Array<BigInt> => dead.since,
        Array<Text> => dead.reason, Array<BigInt> => dead.at, Array<BigInt> => dead.place, Array<BigInt> => dead.line,
        Array<BigInt> => places,
    )
    .load(tx.conn())
    .await?;
    let mut held = HashSet::with_capacity(updates.len());
    for (place, user, device) in written {
        if place < 0 {
            tx.changed.push((UserKey(user), Change::Without(DeviceId(device))));
        } else {
            held.insert(place);
        }
    }
    followers.retain(|row| held.contains(&parents[row]));
    insert(tx, followers).await?;
    // Few and far between.
    for (_, update) in (0_i64..).zip(updates).filter(|(place, _)| held.contains(place)) {
        for change in &update.device_changes {
            providers::change_device(tx, update.app, *change, now).await?;
        }
    }
    let mut answers = Vec::with_capacity(updates.len());
    for (place, update) in (0_i64..).zip(updates) {
        let ours = held.contains(&place)
            // The run before this one may have finished it: only the holder of the fence deletes.
            || (tx.is_repeated() && update.progress.is_none() && is_gone(tx, update.job).await?)
            // A checkpoint that finishes nothing new was written before, and not answered.
            || (update.progress.is_some() && is_held(tx, update).await?);
        answers.push(ours);
    }
    Ok(answers)
}

/// Tokens that a platform found dead. A registration confirmed later than it knew survives. Publishes nothing: there is
/// no push to a dead token to hold back.
#[derive(Default)]
struct RetirementColumns {
    device: Vec<i64>,
    app: Vec<i64>,
    since: Vec<i64>,
    reason: Vec<String>,
    at: Vec<i64>,
    place: Vec<i64>,
    /// Its line in `device_retirement`.
    line: Vec<i64>,
}

impl RetirementColumns {
    fn push(&mut self, line: i64, place: i64, update: &JobUpdate, dead: &Retirement, now: UnixMs) {
        self.device.push(dead.device.0);
        self.app.push(update.app.0);
        self.since.push(dead.since.unwrap_or(now).0);
        self.reason.push(dead.reason.clone());
        self.at.push(now.0);
        self.place.push(place);
        self.line.push(line);
    }
}

fn push_detail(
    details: &mut DetailColumns,
    id: i64,
    place: i64,
    update: &JobUpdate,
    detail: &SendAttempt,
) -> Attempt<()> {
    let code = ResultCode::ALL
        .iter()
        .find(|code| code.name() == detail.result)
        .ok_or_else(|| Fail::corrupt(format!("no result is called {}", detail.result)))?;
    details.id.push(id);
    details.app.push(update.app.0);
    details.notification.push(update.notification.0);
    details.user.push(detail.user.0);
    details.device.push(detail.device.0);
    details.attempt.push(stored_count(detail.attempt));
    details.at.push(detail.at.0);
    details.code.push(i16::from(code.code()));
    details.status.push(i32::from(detail.answer.status));
    details.reason.push(detail.answer.reason.to_string());
    details.next_at.push(detail.next_at.map(|at| at.0));
    details.place.push(place);
    Ok(())
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

async fn is_held(tx: &mut Tx, update: &JobUpdate) -> Attempt<bool> {
    let held: Option<i64> = constant!(
        BigInt; "SELECT id FROM job WHERE id = $1 AND fence = $2", BigInt => update.job.0, BigInt => update.fence,
    )
    .get_result(tx.conn())
    .await
    .optional()?;
    Ok(held.is_some())
}

async fn is_gone(tx: &mut Tx, job: JobId) -> Attempt<bool> {
    let there: Option<i64> = constant!(BigInt; "SELECT id FROM job WHERE id = $1", BigInt => job.0)
        .get_result(tx.conn())
        .await
        .optional()?;
    Ok(there.is_none())
}
