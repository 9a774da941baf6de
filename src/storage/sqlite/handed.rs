//! Jobs without a row: those that are handed over as their event is accepted.
//!
//! Nearly every job of an event for a few people is leased from birth, sent and answered within milliseconds. A row in
//! `job` would be written and deleted for nothing but a crash in between, and cost more than the event's notification. So
//! these jobs are a packed column of their notification, written with it in the same transaction, and are open until
//! outcome blocks name their targets. What is open is known to the writer ([`Open`]); readers derive it from the row and
//! the blocks.
//!
//! Whatever is not the plain course turns the jobs of a notification into rows first ([`to_rows`]) and clears the column:
//! progress that is written before the end, a release, an end that does not name every target, or an age of
//! [`ROWLESS_FOR`]. After a crash the next start does so with all that no block names ([`recover`]): it looks at
//! notifications behind a stored id, the floor, which follows the oldest open one by about a second. Up to the floor all
//! have ended, also those whose blocks retention has deleted before them.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use diesel::sql_types::{BigInt, Binary, Nullable, SmallInt, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{OptionalExtension, QueryResult, RunQueryDsl};

use super::fail::{Attempt, Fail};
use super::group::Tx;
use super::jobs::{self, Lease};
use super::rows::lane;
use super::statement::constant;
use crate::domain::ids::{AppKey, JobId, NotificationId, RouteId};
use crate::domain::notification::{NewJob, Notification};
use crate::domain::outcome::{self, Entry};
use crate::domain::platform::Lane;
use crate::domain::targets::{self, Target, read_varint, write_varint};
use crate::domain::time::UnixMs;
use crate::planted;
use crate::storage::{Backlog, BootId, JobUpdate};

/// The most targets of a notification's jobs without rows.
pub(super) const MAX_TARGETS: usize = 16;
/// The fence of a job that is leased from birth.
pub(super) const FENCE: i64 = 1;

/// How long a job goes without a row: what a slow provider has in flight must not make the next start look far back.
const ROWLESS_FOR: Duration = Duration::from_secs(2);
/// Jobs that get rows for their age in one transaction.
const AGED_AT_ONCE: usize = 256;
/// How often the id is stored from which the next start looks.
const FLOOR_EVERY: Duration = Duration::from_secs(1);
/// The name of that id among the watermarks.
const FLOOR: &str = "handed";
/// How the column is packed.
const FORMAT: u8 = 1;

/// One job, as the column tells of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Handed {
    pub job: JobId,
    pub route: RouteId,
    pub targets: Vec<Target>,
}

/// A format byte; then for each job its id, its route, the length of its targets, and these, packed as in a row.
pub(super) fn pack(jobs: &[Handed]) -> Vec<u8> {
    let targets: usize = jobs.iter().map(|job| job.targets.len()).sum();
    let mut bytes = Vec::with_capacity(1 + 24 * jobs.len() + 20 * targets);
    bytes.push(FORMAT);
    for job in jobs {
        write_varint(&mut bytes, job.job.0.cast_unsigned());
        write_varint(&mut bytes, job.route.0.cast_unsigned());
        let packed = targets::pack(targets::NEWEST, &job.targets);
        bytes.push(u8::try_from(targets::NEWEST).expect("formats are counted from 1"));
        write_varint(&mut bytes, packed.len() as u64);
        bytes.extend_from_slice(&packed);
    }
    bytes
}

pub(super) fn unpack(bytes: &[u8]) -> Attempt<Vec<Handed>> {
    let Some((&FORMAT, mut rest)) = bytes.split_first() else {
        return Err(Fail::corrupt("handed jobs of an unknown format"));
    };
    let short = || Fail::corrupt("handed jobs end too early");
    let mut jobs = Vec::new();
    while !rest.is_empty() {
        let (job, route) = (read_varint(&mut rest)?, read_varint(&mut rest)?);
        let (format, tail) = rest.split_first().ok_or_else(short)?;
        rest = tail;
        let length = usize::try_from(read_varint(&mut rest)?).map_err(|_| short())?;
        let (packed, tail) = rest.split_at_checked(length).ok_or_else(short)?;
        rest = tail;
        let targets = targets::unpack(i16::from(*format), packed)?;
        jobs.push(Handed { job: JobId(job.cast_signed()), route: RouteId(route.cast_signed()), targets });
    }
    Ok(jobs)
}

/// A notification's jobs without rows: those that no block names are open.
pub(super) fn of(conn: &mut SqliteConnection, id: NotificationId) -> Attempt<Vec<Handed>> {
    let stored: Option<Vec<u8>> = constant!(
        Binary;
        "SELECT handed FROM notification WHERE id = ?1 AND handed IS NOT NULL \
         AND id > (SELECT value FROM watermark WHERE name = ?2)",
        BigInt => id.0, Text => FLOOR,
    )
    .get_result(conn)
    .optional()?;
    stored.map_or(Ok(Vec::new()), |bytes| unpack(&bytes))
}

/// Every target that a block of the notification names.
pub(super) fn named(conn: &mut SqliteConnection, id: NotificationId) -> Attempt<HashSet<Target>> {
    // outcome_block_by_notification
    let blocks: Vec<Vec<u8>> =
        constant!(Binary; "SELECT entries FROM outcome_block WHERE notification_id = ?1", BigInt => id.0).load(conn)?;
    let mut named = HashSet::new();
    for entries in blocks {
        named.extend(outcome::unpack(&entries)?.iter().map(target_of));
    }
    Ok(named)
}

fn target_of(entry: &Entry) -> Target {
    Target { user: entry.user, device: entry.device }
}

/// Jobs of one notification.
struct Jobs {
    app: AppKey,
    /// Who leased them.
    owner: BootId,
    lane: Lane,
    ready_at: UnixMs,
    open: Vec<Handed>,
}

#[derive(Default)]
struct Known {
    open: HashMap<NotificationId, Jobs>,
    /// In the order they were accepted; some have ended since.
    by_age: VecDeque<(Instant, NotificationId)>,
    /// What was stored last, and when.
    floor: i64,
    floor_at: Option<Instant>,
}

/// What is open and has no row. Changed by the writer alone, after its commits.
#[derive(Default)]
pub(super) struct Open(Mutex<Known>);

/// What a transaction does to it.
#[derive(Default)]
pub(super) struct Changes {
    born: Vec<(NotificationId, Jobs)>,
    ended: HashSet<(NotificationId, JobId)>,
}

/// For the counts of open work.
#[derive(Default)]
pub(super) struct Summary {
    pub jobs: u64,
    pub targets: u64,
    /// Of each lane.
    pub oldest_ready: [Option<UnixMs>; 2],
    pub by_app: BTreeMap<AppKey, u64>,
}

impl Summary {
    pub fn add_to(&self, rows: Backlog) -> Backlog {
        let [interactive, bulk] = rows.oldest_ready;
        let earlier = |row: Option<UnixMs>, other: Option<UnixMs>| match (row, other) {
            (Some(row), Some(other)) => Some(row.min(other)),
            (row, other) => row.or(other),
        };
        let oldest_ready = [earlier(interactive, self.oldest_ready[0]), earlier(bulk, self.oldest_ready[1])];
        Backlog { jobs: rows.jobs + self.jobs, targets: rows.targets + self.targets, oldest_ready, ..rows }
    }
}

impl Open {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().expect("no panic while held")
    }

    /// After COMMIT.
    pub fn apply(&self, changes: Changes, now: Instant) {
        if changes.born.is_empty() && changes.ended.is_empty() {
            return;
        }
        let mut known = self.known();
        let Known { open, by_age, .. } = &mut *known;
        for (id, jobs) in changes.born {
            by_age.push_back((now, id));
            open.insert(id, jobs);
        }
        for (id, job) in changes.ended {
            let Some(jobs) = open.get_mut(&id) else { continue };
            jobs.open.retain(|known| known.job != job);
            if jobs.open.is_empty() {
                open.remove(&id);
            }
        }
        while by_age.front().is_some_and(|(_, id)| !open.contains_key(id)) {
            by_age.pop_front();
        }
    }

    pub fn summary(&self) -> Summary {
        let mut summary = Summary::default();
        for jobs in self.known().open.values() {
            let targets = jobs.open.iter().map(|job| job.targets.len() as u64).sum::<u64>();
            summary.jobs += jobs.open.len() as u64;
            summary.targets += targets;
            *summary.by_app.entry(jobs.app).or_default() += targets;
            let oldest = &mut summary.oldest_ready[jobs.lane.index()];
            *oldest = Some(oldest.map_or(jobs.ready_at, |at| at.min(jobs.ready_at)));
        }
        summary
    }
}

/// Jobs of this transaction's notification that are handed over and get no rows.
pub(super) fn born(tx: &mut Tx<'_>, new: &Notification, ready_at: UnixMs, jobs: Vec<Handed>) {
    if !jobs.is_empty() {
        let owner = tx.context.boot();
        tx.handed.born.push((new.id, Jobs { app: new.app, owner, lane: new.lane, ready_at, open: jobs }));
    }
}

/// Whether the notification has such jobs that are open.
pub(super) fn is_open(tx: &Tx<'_>, id: NotificationId) -> bool {
    let known = tx.context.handed.known();
    known.open.get(&id).is_some_and(|jobs| jobs.open.iter().any(|job| !tx.handed.ended.contains(&(id, job.job))))
}

/// Ends a job without a row. `false`: it has none to end, or has a row by now, and the update is for the table.
pub(super) fn finish(tx: &mut Tx<'_>, update: &JobUpdate) -> Attempt<bool> {
    let (id, ended) = (update.notification, (update.notification, update.job));
    if update.fence != FENCE || tx.handed.ended.contains(&ended) {
        return Ok(false);
    }
    let is_told = {
        let known = tx.context.handed.known();
        let job = known.open.get(&id).and_then(|jobs| jobs.open.iter().find(|job| job.job == update.job));
        let Some(job) = job else { return Ok(false) };
        let is_named = |target: &Target| update.entries.iter().any(|entry| target_of(entry) == *target);
        update.progress.is_none() && job.targets.iter().all(is_named)
    };
    if is_told {
        if planted::is("job-ends-before-its-outcome") {
            clear(tx.writes(), id)?;
        }
        // The blocks of this update are its end.
        tx.handed.ended.insert(ended);
    } else {
        to_rows(tx, id)?;
    }
    Ok(is_told)
}

/// Gives these jobs, held under these fences, rows, as far as they have none: for what only rows can tell. One look at all
/// that is open, however many they are.
pub(super) fn rows_of(tx: &mut Tx<'_>, jobs: &[(JobId, i64)]) -> Attempt<()> {
    let jobs: HashSet<JobId> = jobs.iter().filter(|(_, fence)| *fence == FENCE).map(|(job, _)| *job).collect();
    if jobs.is_empty() {
        return Ok(());
    }
    let mut of: Vec<NotificationId> = {
        let known = tx.context.handed.known();
        let has_one = |known: &Jobs| known.open.iter().any(|known| jobs.contains(&known.job));
        known.open.iter().filter(|(_, known)| has_one(known)).map(|(id, _)| *id).collect()
    };
    of.sort_unstable();
    of.into_iter().try_for_each(|id| to_rows(tx, id))
}

/// Gives all open jobs of a notification rows.
fn to_rows(tx: &mut Tx<'_>, id: NotificationId) -> Attempt<()> {
    let (app, lease, new_jobs) = {
        let known = tx.context.handed.known();
        let Some(jobs) = known.open.get(&id) else { return Ok(()) };
        let is_open = |job: &&Handed| !tx.handed.ended.contains(&(id, job.job));
        let rows =
            jobs.open.iter().filter(is_open).map(|job| (job.job, row(id, job.clone(), jobs.lane, jobs.ready_at)));
        (jobs.app, Lease::first(jobs.owner), rows.collect::<Vec<_>>())
    };
    for (job, new) in new_jobs {
        jobs::insert_row(tx.writes(), job, app, &new, lease)?;
        tx.handed.ended.insert((id, job));
    }
    clear(tx.writes(), id)?;
    Ok(())
}

fn row(notification: NotificationId, handed: Handed, lane: Lane, ready_at: UnixMs) -> NewJob {
    let Handed { route, targets, .. } = handed;
    NewJob {
        notification,
        route,
        lane,
        targets,
        attempt: 0,
        claims: 1,
        ready_at,
        due_at: ready_at,
        first_attempt_at: None,
    }
}

fn clear(conn: &mut SqliteConnection, id: NotificationId) -> Attempt<()> {
    constant!((); "UPDATE notification SET handed = NULL WHERE id = ?1", BigInt => id.0).execute(conn)?;
    Ok(())
}

/// Gives rows to jobs that have been without for long, or, for what only rows can tell, to those of all notifications up to
/// an id.
pub(super) fn age(tx: &mut Tx<'_>, now: Instant, before: Option<NotificationId>) -> Attempt<()> {
    let old: Vec<NotificationId> = {
        let known = tx.context.handed.known();
        let is_old = |(at, id): &&(Instant, NotificationId)| {
            now.saturating_duration_since(*at) >= ROWLESS_FOR || before.is_some_and(|before| *id < before)
        };
        let most = if before.is_some() { usize::MAX } else { AGED_AT_ONCE };
        known.by_age.iter().take_while(is_old).map(|(_, id)| *id).take(most).collect()
    };
    for id in old {
        to_rows(tx, id)?;
    }
    Ok(())
}

/// Stores from where the next start must look, if that was long ago.
pub(super) fn raise_floor(tx: &mut Tx<'_>, now: Instant) -> Attempt<()> {
    if tx.handed.born.is_empty() {
        return Ok(());
    }
    let floor = {
        let mut known = tx.context.handed.known();
        if known.floor_at.is_some_and(|at| now.saturating_duration_since(at) < FLOOR_EVERY) {
            return Ok(());
        }
        let floor = known.open.keys().map(|id| id.0 - 1).min().unwrap_or(tx.before);
        if floor <= known.floor {
            return Ok(());
        }
        (known.floor, known.floor_at) = (floor, Some(now));
        floor
    };
    set_floor(tx.writes(), floor)
}

/// Everything before `end` is history and may be deleted bit by bit: what is open of it gets rows, and the rest has ended.
pub(super) fn end_before(tx: &mut Tx<'_>, end: i64) -> Attempt<()> {
    age(tx, tx.gated_at, Some(NotificationId(end)))?;
    // A clock that was ahead must not put it before what is still to come.
    let floor = tx.before.min(end - 1);
    set_floor(tx.writes(), floor)
}

fn set_floor(conn: &mut SqliteConnection, floor: i64) -> Attempt<()> {
    constant!(
        ();
        "INSERT INTO watermark (name, value) VALUES (?1, ?2) \
         ON CONFLICT (name) DO UPDATE SET value = max(value, excluded.value)",
        Text => FLOOR, BigInt => floor,
    )
    .execute(conn)?;
    Ok(())
}

/// At a start, before anything else is written and before ids are made (a job's id may be the newest there is, and only
/// here): what was open without a row when the process before ended gets one, free to be claimed.
pub(super) fn recover(conn: &mut SqliteConnection) -> QueryResult<u64> {
    conn.immediate_transaction(|conn| {
        let floor: Option<i64> = constant!(BigInt; "SELECT value FROM watermark WHERE name = ?1", Text => FLOOR)
            .get_result(conn)
            .optional()?;
        let mut jobs = 0;
        // Without a floor nothing was ever handed over without a row.
        if let Some(floor) = floor
            && !planted::is("handed-jobs-lost")
        {
            jobs = recover_after(conn, floor)?;
        }
        let newest: Option<i64> = constant!(Nullable<BigInt>; "SELECT max(id) FROM notification").get_result(conn)?;
        set_floor(conn, newest.unwrap_or(0))?;
        Ok(jobs)
    })
    .map_err(|fail| match fail {
        Fail::Database(error) => error,
        other => diesel::result::Error::DeserializationError(format!("{other:?}").into()),
    })
}

fn recover_after(conn: &mut SqliteConnection, floor: i64) -> Attempt<u64> {
    let rows: Vec<(i64, i64, i16, i64, Vec<u8>)> = constant!(
        (BigInt, BigInt, SmallInt, BigInt, Binary);
        "SELECT id, app, lane, accepted_at, handed FROM notification WHERE id > ?1 AND handed IS NOT NULL",
        BigInt => floor,
    )
    .load(conn)?;
    let mut count = 0;
    for (id, app, lane_code, accepted_at, handed) in rows {
        let id = NotificationId(id);
        let jobs = match unpack(&handed) {
            Ok(jobs) => jobs,
            // Nothing can be sent of it, and nobody is helped by a start that fails.
            Err(fail) => {
                tracing::error!(notification_id = id.0, detail = ?fail, "handed jobs cannot be read and are lost");
                continue;
            }
        };
        let named = named(conn, id)?;
        let mut open =
            jobs.into_iter().filter(|job| !job.targets.iter().any(|target| named.contains(target))).peekable();
        if open.peek().is_none() {
            continue;
        }
        for job in open {
            let job_id = job.job;
            let new = row(id, job, lane(lane_code)?, UnixMs(accepted_at));
            jobs::insert_row(conn, job_id, AppKey(app), &new, Lease::freed(FENCE))?;
            count += 1;
        }
        clear(conn, id)?;
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::{DeviceId, UserKey};

    #[test]
    fn what_is_packed_is_read_and_what_is_cut_is_refused() {
        let target = |user, device| Target { user: UserKey(user), device: DeviceId(device) };
        let jobs = [
            Handed { job: JobId(i64::MAX), route: RouteId(3), targets: vec![target(1, 5), target(1, 6), target(9, 1)] },
            Handed { job: JobId(8), route: RouteId(1 << 50), targets: vec![target(1 << 60, 7)] },
        ];
        let bytes = pack(&jobs);
        assert_eq!(unpack(&bytes).unwrap(), jobs);
        assert_eq!(unpack(&[FORMAT]).unwrap(), []);
        for end in 0..bytes.len() {
            // At the end of a job the rest is whole; anywhere else it is not.
            assert!(unpack(&bytes[..end]).map_or(true, |read| read.len() < jobs.len()), "{end}");
        }
        assert!(unpack(&[FORMAT + 1]).is_err());
    }
}
