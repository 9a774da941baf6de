//! Deliveries, read back: a fold over a notification's blocks and open jobs.
//!
//! A delivery has no row. The last block that names a target is its state; a target that no block names and an open
//! job holds is QUEUED. Blocks and jobs are read in the order of their first user and folded into the smallest keys
//! only, so that a page takes as much memory for a million people as for ten.

use std::collections::{BTreeMap, HashMap};

use super::query::RunQuery;
use diesel::sql_types::{Array, BigInt, Binary, Integer, Nullable, SmallInt, Text};
use diesel_async::AsyncPgConnection;

use super::device_reads;
use super::fail::{Attempt, Fail};
use super::fanout;
use super::ids;
use super::notifications::{self, history_from};
use super::opt_in;
use super::rows::{JobRow, JobTypes, count, job_columns};
use super::statement::constant;
use super::users::{user_key, user_names};
use crate::domain::ids::{AppKey, BlockId, DeviceId, NotificationId, RouteId, UserId, UserKey};
use crate::domain::outcome::{self, OutcomeBlock, ResultCode, State};
use crate::domain::sending::ProviderAnswer;
use crate::domain::targets::Target;
use crate::domain::time::UnixMs;
use crate::storage::{Attempt as SendAttempt, Delivery, DeliveryFilter, DeliveryKey, Page, PersonHistory};

/// The reason of a delivery that no block names yet.
const QUEUED: &str = "QUEUED";
/// Keys looked at for one page when only some states are wanted: few of many may match.
const FILTERED_WINDOW: usize = 4_096;
/// The newest attempts of one person that an explanation shows.
const MAX_ATTEMPTS: i64 = 1_000;

/// What is known of one key so far.
#[derive(Clone, Copy)]
struct Known {
    /// 0: a job, older than any block.
    block: i64,
    /// `None`: queued.
    code: Option<ResultCode>,
    route: Option<RouteId>,
    at: UnixMs,
}

/// The smallest keys met, at most `most` of them. A key that fell out has `most` smaller ones and is of a later page.
struct Smallest {
    after: Option<DeliveryKey>,
    most: usize,
    keys: BTreeMap<DeliveryKey, Known>,
}

impl Smallest {
    fn is_beyond(&self, user: UserKey) -> bool {
        self.keys.len() >= self.most && self.keys.last_key_value().is_some_and(|(last, _)| last.user < user)
    }

    fn add(&mut self, key: DeliveryKey, known: Known) {
        if self.after.is_some_and(|after| key <= after) {
            return;
        }
        if self.keys.len() >= self.most && self.keys.last_key_value().is_some_and(|(last, _)| *last < key) {
            return;
        }
        let stands = self.keys.entry(key).or_insert(known);
        if known.block >= stands.block {
            *stands = known;
        }
        if self.keys.len() > self.most {
            self.keys.pop_last();
        }
    }
}

pub(super) async fn deliveries(
    conn: &mut AsyncPgConnection,
    app: AppKey,
    id: NotificationId,
    filter: &DeliveryFilter,
    after: Option<DeliveryKey>,
    limit: usize,
) -> Attempt<Page<Delivery, DeliveryKey>> {
    notifications::read(conn, app, id).await?;
    let empty = Page { items: Vec::new(), next: None };
    let (first, last) = match &filter.user {
        None => (after.map_or(0, |after| after.user.0), i64::MAX),
        Some(user) => match user_key(conn, app, user).await? {
            Some(user) if after.is_none_or(|after| after.user <= user) => (user.0, user.0),
            _ => return Ok(empty),
        },
    };
    let limit = limit.max(1);
    let window = if filter.states.is_empty() { limit } else { limit.max(FILTERED_WINDOW) };
    let mut smallest = Smallest { after, most: window + 1, keys: BTreeMap::new() };
    fold_jobs(conn, id, first, last, &mut smallest).await?;
    fold_blocks(conn, id, first, last, &mut smallest).await?;

    let known_keys = smallest.keys.len();
    let wanted = |state: State| filter.states.is_empty() || filter.states.contains(&state);
    let (mut chosen, mut examined) = (Vec::new(), None);
    for (position, (key, known)) in smallest.keys.into_iter().enumerate() {
        if position == window || chosen.len() == limit {
            break;
        }
        examined = Some((position, key));
        let state = known.code.map_or(State::Open, ResultCode::state);
        if wanted(state) {
            chosen.push((key, known, state));
        }
    }
    let next = examined.and_then(|(position, key)| (position + 1 < known_keys).then_some(key));
    let items = describe(conn, id, chosen).await?;
    Ok(Page { items, next })
}

async fn fold_jobs(
    conn: &mut AsyncPgConnection,
    id: NotificationId,
    first: i64,
    last: i64,
    smallest: &mut Smallest,
) -> Attempt<()> {
    // job_by_notification, and what is handed over
    let jobs = constant!(
        JobTypes;
        concat!("SELECT ", job_columns!(), " FROM open_job WHERE notification_id = $1 AND first_user <= $3 \
         AND last_user >= $2 ORDER BY first_user"),
        BigInt => id.0, BigInt => first, BigInt => last,
    )
    .load::<JobRow>(conn)
    .await?;
    for row in jobs {
        let job = row.to_domain()?;
        if job.targets.first().is_some_and(|target| smallest.is_beyond(target.user)) {
            break;
        }
        let known = Known { block: 0, code: None, route: Some(job.route), at: job.ready_at };
        for (index, target) in job.targets.iter().enumerate() {
            if !job.progress.is_finished(index) && (first..=last).contains(&target.user.0) {
                smallest.add(DeliveryKey { user: target.user, device: target.device }, known);
            }
        }
    }
    Ok(())
}

async fn fold_blocks(
    conn: &mut AsyncPgConnection,
    id: NotificationId,
    first: i64,
    last: i64,
    smallest: &mut Smallest,
) -> Attempt<()> {
    // outcome_block_by_notification
    let blocks = constant!(
        (BigInt, Nullable<BigInt>, BigInt, BigInt, Binary);
        "SELECT id, route, first_user, at, entries FROM outcome_block WHERE notification_id = $1 AND first_user <= $3 \
         AND last_user >= $2 AND id >= $4 ORDER BY first_user",
        BigInt => id.0, BigInt => first, BigInt => last, BigInt => history_from(id),
    )
    .load::<(i64, Option<i64>, i64, i64, Vec<u8>)>(conn)
    .await?;
    for row in blocks {
        let (block, route, first_user, at, entries) = row;
        if smallest.is_beyond(UserKey(first_user)) {
            break;
        }
        for entry in outcome::unpack(&entries)? {
            if (first..=last).contains(&entry.user.0) {
                let known = Known { block, code: Some(entry.code), route: route.map(RouteId), at: UnixMs(at) };
                smallest.add(DeliveryKey { user: entry.user, device: entry.device }, known);
            }
        }
    }
    Ok(())
}

async fn describe(
    conn: &mut AsyncPgConnection,
    id: NotificationId,
    chosen: Vec<(DeliveryKey, Known, State)>,
) -> Attempt<Vec<Delivery>> {
    let mut users: Vec<UserKey> = chosen.iter().map(|(key, ..)| key.user).collect();
    users.dedup();
    let names: HashMap<UserKey, UserId> = users
        .iter()
        .copied()
        .zip(user_names(conn, &users).await?)
        .filter_map(|(user, name)| Some((user, name?)))
        .collect();
    let mut last: HashMap<DeliveryKey, SendAttempt> = HashMap::new();
    if !users.is_empty() {
        for attempt in attempts(conn, id, &users).await? {
            last.insert(DeliveryKey { user: attempt.user, device: attempt.device }, attempt);
        }
    }
    Ok(chosen
        .into_iter()
        .map(|(key, known, state)| Delivery {
            entry: key,
            // An erased person has no name any more.
            user: names.get(&key.user).cloned().unwrap_or_else(|| UserId::trusted("")),
            reason: known.code.map_or(QUEUED, ResultCode::name),
            state,
            route: known.route,
            at: known.at,
            last_attempt: last.remove(&key),
        })
        .collect())
}

/// A row of `attempt_detail`.
#[derive(diesel::Queryable)]
pub(super) struct AttemptRow {
    user: i64,
    device: i64,
    attempt: i32,
    at: i64,
    code: i16,
    status: i32,
    reason: String,
    next_at: Option<i64>,
}

/// Of these people, oldest first.
async fn attempts(conn: &mut AsyncPgConnection, id: NotificationId, users: &[UserKey]) -> Attempt<Vec<SendAttempt>> {
    // attempt_detail_by_user
    let mut rows: Vec<AttemptRow> = constant!(
        (BigInt, BigInt, Integer, BigInt, SmallInt, Integer, Text, Nullable<BigInt>);
        "SELECT a.user_key, a.device, a.attempt, a.at, a.code, a.status, a.reason, a.next_at \
         FROM unnest($2) AS e(value) JOIN attempt_detail a ON a.notification_id = $1 AND a.user_key = e.value \
         AND a.id >= $4 ORDER BY a.id DESC LIMIT $3 + 0",
        BigInt => id.0, Array<BigInt> => ids(users.iter().map(|user| user.0)),
        BigInt => MAX_ATTEMPTS.max(i64::try_from(users.len()).unwrap_or(i64::MAX).saturating_mul(32)),
        BigInt => history_from(id),
    )
    .load(conn)
    .await?;
    rows.reverse();
    rows.into_iter().map(AttemptRow::into_domain).collect()
}

impl AttemptRow {
    pub fn into_domain(self) -> Attempt<SendAttempt> {
        let code = u8::try_from(self.code).ok().and_then(ResultCode::from_code);
        Ok(SendAttempt {
            user: UserKey(self.user),
            device: DeviceId(self.device),
            attempt: count(self.attempt)?,
            at: UnixMs(self.at),
            result: code.ok_or_else(|| Fail::corrupt(format!("result code {}", self.code)))?.name(),
            answer: ProviderAnswer::new(u16::try_from(self.status).unwrap_or(0), &self.reason),
            next_at: self.next_at.map(UnixMs),
        })
    }
}

pub(super) async fn person(
    conn: &mut AsyncPgConnection,
    app: AppKey,
    id: NotificationId,
    user_id: &UserId,
) -> Attempt<PersonHistory> {
    let (notification, _) = notifications::read(conn, app, id).await?;
    let mut history = PersonHistory {
        notification,
        user: None,
        user_id: user_id.clone(),
        blocks: Vec::new(),
        open: Vec::new(),
        attempts: Vec::new(),
        devices: Vec::new(),
        choices: Vec::new(),
        expansion_pending: false,
    };
    let Some(user) = user_key(conn, app, user_id).await? else { return Ok(history) };
    history.user = Some(user);
    history.open = open_targets(conn, id, user).await?;
    history.blocks = blocks_of(conn, id, user).await?;
    history.attempts = attempts(conn, id, &[user]).await?;
    history.devices = device_reads::of_user(conn, user).await?;
    history.choices = opt_in::history(conn, user).await?;
    history.expansion_pending = fanout::is_pending(conn, app, id, user).await?;
    Ok(history)
}

async fn open_targets(
    conn: &mut AsyncPgConnection,
    id: NotificationId,
    user: UserKey,
) -> Attempt<Vec<(Target, RouteId, u32, UnixMs)>> {
    // job_by_notification, and what is handed over
    let rows: Vec<JobRow> = constant!(
        JobTypes;
        concat!("SELECT ", job_columns!(), " FROM open_job WHERE notification_id = $1 AND first_user <= $2 \
         AND last_user >= $2 ORDER BY first_user, id"),
        BigInt => id.0, BigInt => user.0,
    )
    .load(conn)
    .await?;
    let mut open = Vec::new();
    for row in rows {
        let job = row.to_domain()?;
        let theirs = job
            .targets
            .iter()
            .enumerate()
            .filter(|(index, target)| target.user == user && !job.progress.is_finished(*index));
        open.extend(theirs.map(|(_, target)| (*target, job.route, job.attempt, UnixMs(row.due_at))));
    }
    Ok(open)
}

async fn blocks_of(conn: &mut AsyncPgConnection, id: NotificationId, user: UserKey) -> Attempt<Vec<OutcomeBlock>> {
    // outcome_block_by_notification
    let rows: Vec<(i64, Option<i64>, i64, Vec<u8>)> = constant!(
        (BigInt, Nullable<BigInt>, BigInt, Binary);
        "SELECT id, route, at, entries FROM outcome_block WHERE notification_id = $1 AND first_user <= $2 \
         AND last_user >= $2 AND id >= $3 ORDER BY id",
        BigInt => id.0, BigInt => user.0, BigInt => history_from(id),
    )
    .load(conn)
    .await?;
    let mut blocks = Vec::new();
    for (block, route, at, entries) in rows {
        let mut entries = outcome::unpack(&entries)?;
        entries.retain(|entry| entry.user == user);
        if !entries.is_empty() {
            let route = route.map(RouteId);
            blocks.push(OutcomeBlock { id: BlockId(block), notification: id, route, at: UnixMs(at), entries });
        }
    }
    Ok(blocks)
}
