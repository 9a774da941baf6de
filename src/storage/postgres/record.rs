//! Results of sending, written under the fences of the jobs that they are of.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use diesel::OptionalExtension;
use diesel::sql_types::{Array, BigInt, Binary, Bool, Integer, Nullable, SmallInt, Text};

use super::batch::{BlockColumns, DetailColumns, JobColumns, bind_blocks, insert_blocks, inserting, rows_of};
use super::fail::{Attempt, Fail};
use super::jobs::{self, Lease};
use super::providers;
use super::query::RunQuery;
use super::rows::stored_count;
use super::statement::constant;
use super::tx::Tx;
use super::{dead, handed};
use crate::domain::device::Retirement;
use crate::domain::ids::{DeviceId, JobId, UserKey};
use crate::domain::outcome::ResultCode;
use crate::domain::time::UnixMs;
use crate::planted;
use crate::storage::reach::Change;
use crate::storage::{Attempt as SendAttempt, JobUpdate};

/// Whether [`record`] writes by [`end`] alone.
pub(super) fn is_one_statement(updates: &[JobUpdate]) -> bool {
    let fence = updates.first().map(|update| update.fence);
    updates.iter().all(|update| {
        Some(update.fence) == fence
            && update.progress.is_none()
            && update.details.is_empty()
            && update.followers.is_empty()
            && update.retirements.is_empty()
            && update.device_changes.is_empty()
    })
}

/// Every update under its fence, all in one statement; under its group's row where it has a group.
///
/// The queue is empty most of the time, and that is what the planner then believes for the life of a prepared statement:
/// to it one look at all of `job` costs no more than a look at one row. Hence LATERAL and ANY (ARRAY(…)), and no join,
/// here and wherever jobs are found by a list: they leave it nothing but the primary key.
pub(super) async fn record(
    tx: &mut Tx,
    updates: &[JobUpdate],
    groups: &[Option<i64>],
    now: UnixMs,
) -> Attempt<Vec<bool>> {
    let mut leases = LeaseColumns::default();
    let mut blocks = BlockColumns::default();
    let (there, mut held) = (handed::hold(tx, groups).await?, Vec::new());
    let (mut details, mut followers, mut parents) =
        (DetailColumns::default(), JobColumns::of(tx.context.packing.written()), Vec::new());
    let mut retirements = RetirementColumns::default();
    for ((place, update), group) in (0_i64..).zip(updates).zip(groups) {
        if group.is_some_and(|group| there.contains(&group)) {
            held.push(place);
        } else {
            leases.push(place, update);
        }
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
            retirements.push(tx.next_id(now), place, update, retirement, now);
        }
    }
    let held: HashSet<i64> = if held.is_empty() && is_one_statement(updates) {
        end(tx, leases, blocks).await?
    } else {
        let (held, retired): (Vec<Written>, Vec<Written>) = write(tx, leases, held, blocks, details, retirements)
            .await?
            .into_iter()
            .partition(|(place, ..)| *place >= 0);
        for (_, user, device, packed) in retired {
            let (user, change) = (UserKey(user), Change::Without(DeviceId(device)));
            tx.seen.extend(packed.map(|packed| (user.0, packed)));
            tx.changed.push((user, change));
        }
        held.into_iter().map(|(place, ..)| place).collect()
    };
    followers.retain(|row| held.contains(&parents[row]));
    jobs::insert(tx, followers).await?;
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

/// The plain course: every job ends, all are held under the same fence (nearly always their first), and all there is to say
/// is their results. The places of those that were held. What [`write`] does besides costs the server more to get ready,
/// for nothing, than this takes for a few rows; and who only deletes need not lock before.
async fn end(tx: &mut Tx, leases: LeaseColumns, mut blocks: BlockColumns) -> Attempt<HashSet<i64>> {
    let LeaseColumns { id: jobs, fence, .. } = leases;
    let Some(fence) = fence.first().copied() else { return Ok(HashSet::new()) };
    // Here they are told apart by their jobs.
    for place in &mut blocks.place {
        *place = usize::try_from(*place).ok().and_then(|at| jobs.get(at)).copied().unwrap_or(-1);
    }
    macro_rules! end {
        ($on_conflict:literal) => {{
            let end = constant!(
                Array<BigInt>;
                concat!(
                    "WITH ended AS (DELETE FROM job WHERE id = ANY ($1) AND fence = $2 RETURNING id), blocks AS (",
                    insert_blocks!("$3", "$4", "$5", "$6", "$7", "$8", "$9", "$10", "$11"),
                    " WHERE (b.place IN (SELECT id FROM ended)) IS TRUE ",
                    $on_conflict,
                    // One row for all.
                    ") SELECT coalesce(array_agg(id), '{}') FROM ended"
                ),
                Array<BigInt> => &jobs, BigInt => fence,
            );
            bind_blocks!(end, blocks).get_result(tx.conn()).await?
        }};
    }
    let ended: Vec<i64> = inserting!(tx.is_repeated(), end);
    let ended: HashSet<i64> = ended.into_iter().collect();
    Ok((0..).zip(jobs).filter(|(_, job)| ended.contains(job)).map(|(place, _)| place).collect())
}

/// What [`end_handed`] did.
pub(super) struct Ended {
    /// Of each update.
    pub held: Vec<bool>,
    /// Groups whose rows are deleted.
    pub gone: Vec<i64>,
}

/// The ends of jobs without rows, and nothing else: each under its group. Groups that end with them go, and with them those that
/// had ended before.
pub(super) async fn end_handed(
    tx: &mut Tx,
    updates: &[JobUpdate],
    groups: &[Option<i64>],
    now: UnixMs,
) -> Attempt<Ended> {
    let context = Arc::clone(&tx.context);
    let mut blocks = BlockColumns::default();
    // The group of each, and its first block.
    let mut places = Vec::with_capacity(updates.len());
    let mut counts: HashMap<i64, usize> = HashMap::new();
    let (mut written_before, mut distinct) = (HashSet::new(), HashSet::new());
    for (update, group) in updates.iter().zip(groups) {
        // No id is 0.
        let group = group.unwrap_or(0);
        let from = Some((update.route, group));
        let first = blocks.id.len();
        blocks.push(|| tx.next_id(now), update.app, update.notification, from, &update.entries, now);
        places.push((group, blocks.id.get(first).copied()));
        *counts.entry(group).or_default() += usize::from(distinct.insert(update.job));
    }
    if tx.is_repeated() {
        // A run before this one may have been committed: then its blocks are there.
        let there: Vec<i64> = constant!(
            BigInt; "SELECT id FROM outcome_block WHERE id = ANY ($1)", Array<BigInt> => &blocks.id,
        )
        .load(tx.conn())
        .await?;
        written_before.extend(there);
    }
    let spent = context.handed.take_spent();
    let mut gone = context.handed.ending(&counts);
    let kept: Vec<i64> = counts.keys().filter(|group| !gone.contains(group)).copied().collect();
    gone.extend(&spent.groups);
    let owner = context.boot.0 + i64::from(planted::is("pg-record-with-another-fence"));
    macro_rules! end {
        ($on_conflict:literal) => {{
            // `place` is the group here.
            let end = constant!(
                Array<BigInt>;
                concat!(
                    "WITH kept AS MATERIALIZED (SELECT id FROM handed WHERE id = ANY ($1) AND owner = $3 ORDER BY id \
                     FOR KEY SHARE), gone AS (DELETE FROM handed WHERE id = ANY ($2) AND owner = $3 RETURNING id), \
                     ours AS MATERIALIZED (SELECT id FROM kept UNION ALL SELECT id FROM gone), blocks AS (",
                    insert_blocks!("$4", "$5", "$6", "$7", "$8", "$9", "$10", "$11", "$12"),
                    " WHERE (b.place IN (SELECT id FROM ours)) IS TRUE ",
                    $on_conflict,
                    // One row for all.
                    ") SELECT coalesce(array_agg(id), '{}') FROM ours"
                ),
                Array<BigInt> => &kept, Array<BigInt> => &gone, BigInt => owner,
            );
            bind_blocks!(end, blocks).get_result(tx.conn()).await?
        }};
    }
    let ours: Vec<i64> = inserting!(tx.is_repeated(), end);
    let ours: HashSet<i64> = ours.into_iter().collect();
    spent.deleted();
    let is_held = |(group, block): &(i64, Option<i64>)| {
        ours.contains(group) || block.is_some_and(|block| written_before.contains(&block))
    };
    Ok(Ended { held: places.iter().map(is_held).collect(), gone })
}

/// The place of an update that was held, or -1 with somebody, their device that was retired, and what is packed of them.
type Written = (i64, i64, i64, Option<Vec<u8>>);

/// `held`: the places of those that are held already.
async fn write(
    tx: &mut Tx,
    leases: LeaseColumns,
    held: Vec<i64>,
    blocks: BlockColumns,
    details: DetailColumns,
    retired: RetirementColumns,
) -> Attempt<Vec<Written>> {
    // See [`super::dead`].
    let state: i16 = if tx.context.packing.dead_in_place() { 1 } else { 2 };
    macro_rules! written {
        ($on_conflict:literal) => {{
            let write = constant!(
                (BigInt, BigInt, BigInt, Nullable<Binary>);
                concat!(
                    "WITH locked AS MATERIALIZED (SELECT j.id, u.place, u.progress, u.moved FROM (SELECT * ",
                    rows_of!("$1" "id", "$2" "fence", "$3" "progress", "$4" "moved", "$5" "place"),
                    " AS u ORDER BY id) AS u CROSS JOIN LATERAL (SELECT id FROM job WHERE id = u.id AND fence = u.fence \
                     AND (u.moved AND progress = u.progress) IS NOT TRUE FOR NO KEY UPDATE) AS j \
                     UNION ALL SELECT 0, p.place, NULL, FALSE FROM (SELECT unnest($34) AS place) AS p), \
                     ended AS (DELETE FROM job WHERE id = ANY (ARRAY(SELECT id FROM locked WHERE progress IS NULL))), \
                     advanced AS (UPDATE job SET progress = (SELECT progress FROM locked WHERE locked.id = job.id), \
                     claims = CASE WHEN (SELECT moved FROM locked WHERE locked.id = job.id) THEN 0 ELSE claims END \
                     WHERE id = ANY (ARRAY(SELECT id FROM locked WHERE progress IS NOT NULL))), \
                     blocks AS (",
                    insert_blocks!("$25", "$26", "$27", "$28", "$29", "$30", "$31", "$32", "$33"),
                    " WHERE (b.place IN (SELECT place FROM locked)) IS TRUE ",
                    $on_conflict,
                    "), \
                     details AS (INSERT INTO attempt_detail (id, app, notification_id, user_key, device, attempt, at, code, \
                     status, reason, next_at) SELECT d.id, d.app, d.notification_id, d.user_key, d.device, d.attempt, d.at, \
                     d.code, d.status, d.reason, d.next_at ",
                    rows_of!(
                        "$6" "id", "$7" "app", "$8" "notification_id", "$9" "user_key", "$10" "device", "$11" "attempt",
                        "$12" "at", "$13" "code", "$14" "status", "$15" "reason", "$16" "next_at", "$17" "place",
                    ),
                    " AS d WHERE (d.place IN (SELECT place FROM locked)) IS TRUE ",
                    $on_conflict,
                    "), \
                     dead AS (UPDATE device SET state = $35, retired_reason = r.reason, retired_at = r.at ",
                    rows_of!(
                        "$18" "device", "$19" "app", "$20" "since", "$21" "reason", "$22" "at", "$23" "place", "$24" "line",
                    ),
                    " AS r WHERE device.id = r.device AND device.app = r.app AND ",
                    dead::is_active!("device."),
                    " AND device.confirmed_at <= r.since AND (r.place IN (SELECT place FROM locked)) IS TRUE \
                     RETURNING r.line, device.app, device.id, device.user_key, r.reason, r.at), \
                     retired AS (INSERT INTO device_retirement (id, app, device, user_key, reason, at) \
                     SELECT line, app, id, user_key, reason, at FROM dead ",
                    $on_conflict,
                    ") \
                     SELECT place, 0::BIGINT, 0::BIGINT, NULL::BYTEA FROM locked UNION ALL \
                     SELECT -1, user_key, id, (SELECT reach FROM app_user WHERE id = dead.user_key) FROM dead"
                ),
                Array<BigInt> => leases.id, Array<BigInt> => leases.fence, Array<Nullable<Binary>> => leases.progress,
                Array<Bool> => leases.moved, Array<BigInt> => leases.place,
                Array<BigInt> => details.id, Array<BigInt> => details.app, Array<BigInt> => details.notification,
                Array<BigInt> => details.user, Array<BigInt> => details.device, Array<Integer> => details.attempt,
                Array<BigInt> => details.at, Array<SmallInt> => details.code, Array<Integer> => details.status,
                Array<Text> => details.reason, Array<Nullable<BigInt>> => details.next_at, Array<BigInt> => details.place,
                Array<BigInt> => retired.device, Array<BigInt> => retired.app, Array<BigInt> => retired.since,
                Array<Text> => retired.reason, Array<BigInt> => retired.at, Array<BigInt> => retired.place,
                Array<BigInt> => retired.line,
            );
            bind_blocks!(write, blocks)
                .bind::<Array<BigInt>, _>(held)
                .bind::<SmallInt, _>(state)
                .load(tx.conn())
                .await?
        }};
    }
    Ok(inserting!(tx.is_repeated(), written))
}

/// The leases that updates are of.
#[derive(Default)]
struct LeaseColumns {
    id: Vec<i64>,
    fence: Vec<i64>,
    /// `None` where the job ends.
    progress: Vec<Option<Vec<u8>>>,
    /// `claims` counts claims without progress.
    moved: Vec<bool>,
    place: Vec<i64>,
}

impl LeaseColumns {
    fn push(&mut self, place: i64, update: &JobUpdate) {
        self.id.push(update.job.0);
        self.fence.push(update.fence + i64::from(planted::is("pg-record-with-another-fence")));
        self.progress.push(update.progress.as_ref().map(|progress| progress.as_bytes().to_vec()));
        self.moved.push(!update.entries.is_empty());
        self.place.push(place);
    }
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
    let code = ResultCode::named(detail.result)
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
