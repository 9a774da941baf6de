//! Results in the order in which they became durable, for watchers.
//!
//! There is one writer, so transactions end in the order in which they begin: the numbers that it gives them are ids of
//! their time, which no restart repeats. [`Horizon`] knows the last that ended.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};

use diesel::sql_types::{BigInt, Binary, Integer, Nullable, SmallInt, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{OptionalExtension, RunQueryDsl};

use super::explain::AttemptRow;
use super::fail::{Attempt, Fail};
use super::people::{user_key, user_names};
use super::statement::constant;
use super::watch_rows::{self, DeliveryOf, HEAD, MAX_BLOCK_BYTES, MAX_BLOCKS, MAX_RETIREMENTS, WatchRow};
use crate::domain::ids::{AppKey, NotificationId, UserId, UserKey};
use crate::domain::time::UnixMs;
use crate::domain::watch::WatchPosition;
use crate::runtime::Runtime;
use crate::storage::{Attempt as SendAttempt, WatchFilter, WatchPage};

const EPOCH: &str = "watch_epoch";

/// How far watchers can read.
pub(super) struct Horizon {
    /// Of this database.
    epoch: i64,
    /// Every transaction up to this one is visible to whoever begins to read after it was looked at.
    ended: AtomicI64,
}

impl Horizon {
    /// `ended`: no transaction in the database has a higher number.
    pub fn new(epoch: i64, ended: i64) -> Self {
        Self { epoch, ended: AtomicI64::new(ended) }
    }

    pub fn advance(&self, transaction: i64) {
        self.ended.store(transaction, Ordering::Release);
    }
}

/// The database's epoch, made at the first start.
pub(super) fn epoch(conn: &mut SqliteConnection, runtime: &Runtime) -> diesel::QueryResult<i64> {
    let stored: Option<i64> =
        constant!(BigInt; "SELECT value FROM watermark WHERE name = ?1", Text => EPOCH).get_result(conn).optional()?;
    if let Some(epoch) = stored {
        return Ok(epoch);
    }
    let epoch = i64::from_le_bytes(runtime.secret_bytes());
    constant!((); "INSERT INTO watermark (name, value) VALUES (?1, ?2)", Text => EPOCH, BigInt => epoch)
        .execute(conn)?;
    Ok(epoch)
}

pub(super) fn page(
    conn: &mut SqliteConnection,
    horizon: &Horizon,
    app: AppKey,
    after: Option<WatchPosition>,
    filter: &WatchFilter,
    limit: usize,
    now: UnixMs,
) -> Attempt<WatchPage> {
    let epoch = horizon.epoch;
    // Before the first statement, which begins the snapshot.
    let ended = horizon.ended.load(Ordering::Acquire);
    let end = WatchPosition::after_transaction(epoch, ended, now);
    let Some(after) = after else { return Ok(WatchPage { events: Vec::new(), position: end, more: false }) };
    let user = match &filter.user {
        None => None,
        Some(user) => user_key(conn, app, user)?,
    };
    let (transaction, row) = after.read_after();
    let mut rows: Vec<WatchRow> = constant!(
        (Integer, BigInt, BigInt, BigInt, BigInt, Nullable<BigInt>, BigInt, BigInt, Nullable<Binary>, Nullable<Text>);
        // outcome_block_by_commit and device_retirement_by_commit
        "SELECT 0, 0, coalesce((SELECT value FROM watermark WHERE name = 'history'), 0), 0, 0, NULL, 0, 0, NULL, NULL \
         UNION ALL SELECT * FROM (SELECT 1, xid, id, notification_id, 0, route, at, examined, \
         CASE WHEN wanted THEN entries END, NULL FROM (SELECT xid, id, notification_id, route, at, wanted, entries, \
         CASE WHEN wanted THEN length(entries) ELSE 0 END AS bytes, \
         sum(CASE WHEN wanted THEN length(entries) ELSE 0 END) OVER (ORDER BY xid, id ROWS UNBOUNDED PRECEDING) AS total, \
         count(*) OVER () AS examined FROM (SELECT xid, id, notification_id, route, at, entries, \
         (?7 = 0 OR notification_id = ?7) AND (?8 = 0 OR (first_user <= ?8 AND last_user >= ?8)) AS wanted \
         FROM outcome_block WHERE ?9 AND app = ?1 AND (xid, id) > (?2, ?3) ORDER BY xid, id LIMIT ?4 + 0)) \
         WHERE total - bytes < ?5) \
         UNION ALL SELECT * FROM (SELECT 2, xid, id, device, user_key, NULL, at, 0, NULL, reason \
         FROM device_retirement WHERE ?10 AND app = ?1 AND (xid, id) > (?2, ?3) ORDER BY xid, id LIMIT ?6 + 0)",
        BigInt => app.0, BigInt => transaction, BigInt => row, BigInt => MAX_BLOCKS, BigInt => MAX_BLOCK_BYTES,
        BigInt => MAX_RETIREMENTS, BigInt => filter.notification.map_or(0, |id| id.0),
        BigInt => watch_rows::user_number(filter, user), Integer => i32::from(filter.deliveries),
        Integer => i32::from(filter.retirements),
    )
    .load(conn)?;
    let head = rows.iter().position(|row| row.kind == HEAD).ok_or_else(|| Fail::corrupt("no head of a page"))?;
    let deleted = rows.swap_remove(head).id;
    watch_rows::check(&after, epoch, deleted, i64::MAX)?;
    // The reader may see more than had ended when it began, never less.
    let seen = rows.iter().map(|row| row.xid).max().unwrap_or(0).max(ended);
    let end = if seen < after.transaction { after } else { WatchPosition::after_transaction(epoch, seen, now) };
    let chosen = watch_rows::choose(rows, &after, end, filter, user, limit)?;
    let users = chosen.users();
    let names: HashMap<UserKey, UserId> =
        users.iter().copied().zip(user_names(conn, &users)?).filter_map(|(user, name)| Some((user, name?))).collect();
    let attempts = attempts(conn, &chosen.failures())?;
    Ok(chosen.describe(&names, &attempts))
}

#[derive(diesel::Queryable)]
struct FailureRow {
    notification: i64,
    attempt: AttemptRow,
}

/// Of these deliveries, oldest first.
fn attempts(conn: &mut SqliteConnection, of: &[DeliveryOf]) -> Attempt<HashMap<DeliveryOf, Vec<SendAttempt>>> {
    let mut attempts: HashMap<DeliveryOf, Vec<SendAttempt>> = HashMap::new();
    if of.is_empty() {
        return Ok(attempts);
    }
    // attempt_detail_by_user
    let rows: Vec<FailureRow> = constant!(
        (BigInt, (BigInt, BigInt, Integer, BigInt, SmallInt, Integer, Text, Nullable<BigInt>));
        "SELECT a.notification_id, a.user_key, a.device, a.attempt, a.at, a.code, a.status, a.reason, a.next_at \
         FROM json_each(?1) AS e CROSS JOIN attempt_detail a ON a.notification_id = json_extract(e.value, '$[0]') \
         AND a.user_key = json_extract(e.value, '$[1]') AND a.device = json_extract(e.value, '$[2]') \
         ORDER BY a.id LIMIT ?2 + 0",
        Text => serde_json::to_string(&of.iter().map(|of| [of.0.0, of.1.0, of.2.0]).collect::<Vec<_>>())?,
        BigInt => watch_rows::most_attempts(of),
    )
    .load(conn)?;
    for FailureRow { notification, attempt } in rows {
        let attempt = attempt.into_domain()?;
        attempts.entry((NotificationId(notification), attempt.user, attempt.device)).or_default().push(attempt);
    }
    Ok(attempts)
}
