//! Results in the order in which they became durable, for watchers.
//!
//! Ids are made before commits, sequences and clocks too, so none of them tells what a reader has already seen. A row knows
//! the transaction that wrote it, and a page shows only rows of transactions below the snapshot's xmin: every one of them
//! has ended, so nothing can appear behind it later. The price: a transaction that writes and stays open, in whatever
//! database of the server, holds watchers up (nothing else, and nothing is lost). One statement reads a page, for then xmin
//! and rows are of one snapshot, and partitions are locked before it is taken.
//!
//! Transaction numbers mean nothing in another server. [`open`] finds out when the database has come to another one
//! (a restored dump): it makes a new epoch, which ends every cursor, and hides what is there, for its numbers may lie ahead.
//!
//! A block's id is never much older than its commit (ids follow the server's clock), so partitions far behind the position
//! are not looked at.

use std::collections::HashMap;

use diesel::OptionalExtension;
use diesel::sql_types::{Array, BigInt, Binary, Bool, Integer, Nullable, SmallInt, Text};
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection};

use super::explain::AttemptRow;
use super::fail::{Attempt, Fail};
use super::ids;
use super::notifications::history_from;
use super::query::RunQuery;
use super::statement::constant;
use super::users::{user_key, user_names};
use super::watch_rows::{self, DeliveryOf, HEAD, MAX_BLOCK_BYTES, MAX_BLOCKS, MAX_RETIREMENTS, WatchRow};
use crate::domain::ids::{AppKey, NotificationId, UserId, UserKey, first_id_at};
use crate::domain::time::UnixMs;
use crate::domain::watch::WatchPosition;
use crate::runtime::Runtime;
use crate::storage::{Attempt as SendAttempt, WatchFilter, WatchPage};

/// Ids are at most this much older than the commit of their row. By the server's clock, which all follow: seconds.
pub(super) const ID_LAG_MS: i64 = 2 * 24 * 3_600_000;

/// What positions count from.
#[derive(Clone, Copy)]
pub(super) struct Origin {
    /// Of this database on this server.
    pub epoch: i64,
    /// Rows up to this id were written on another server.
    pub floor: i64,
}

/// The database's origin; a new one when it has come to another server.
pub(super) async fn open(conn: &mut AsyncPgConnection, runtime: &Runtime) -> diesel::QueryResult<Origin> {
    if let Some(origin) = standing(conn).await? {
        return Ok(origin);
    }
    conn.batch_execute("BEGIN; LOCK TABLE watermark IN EXCLUSIVE MODE").await?;
    // Somebody else may have been faster.
    if standing(conn).await?.is_none() {
        constant!(
            ();
            "INSERT INTO watermark (name, value) SELECT 'watch_server', system_identifier FROM pg_control_system() \
             UNION ALL SELECT 'watch_epoch', $1 UNION ALL SELECT 'watch_floor', greatest(0, \
             (SELECT max(id) FROM outcome_block), (SELECT max(id) FROM device_retirement)) \
             ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            BigInt => i64::from_le_bytes(runtime.secret_bytes()),
        )
        .execute(conn)
        .await?;
        // Numbers of the other server.
        constant!((); "DELETE FROM watermark WHERE name = 'history'").execute(conn).await?;
    }
    conn.batch_execute("COMMIT").await?;
    standing(conn).await?.ok_or(diesel::result::Error::NotFound)
}

async fn standing(conn: &mut AsyncPgConnection) -> diesel::QueryResult<Option<Origin>> {
    let found: Option<(i64, i64)> = constant!(
        (BigInt, BigInt);
        "SELECT e.value, f.value FROM watermark e, watermark f, watermark s, pg_control_system() c \
         WHERE e.name = 'watch_epoch' AND f.name = 'watch_floor' AND s.name = 'watch_server' \
         AND s.value = c.system_identifier"
    )
    .get_result(conn)
    .await
    .optional()?;
    Ok(found.map(|(epoch, floor)| Origin { epoch, floor }))
}

pub(super) async fn page(
    conn: &mut AsyncPgConnection,
    origin: Origin,
    server_clock: bool,
    app: AppKey,
    after: Option<WatchPosition>,
    filter: &WatchFilter,
    limit: usize,
) -> Attempt<WatchPage> {
    let epoch = origin.epoch;
    let user = match &filter.user {
        None => None,
        Some(user) => user_key(conn, app, user).await?,
    };
    let from = after.unwrap_or(WatchPosition::after_transaction(epoch, i64::MAX, UnixMs(0)));
    let (transaction, row) = from.read_after();
    let oldest = if server_clock { first_id_at(UnixMs(from.at.0 - ID_LAG_MS)) } else { 0 };
    let oldest = oldest.max(origin.floor.saturating_add(1));
    let mut rows: Vec<WatchRow> = constant!(
        (Integer, BigInt, BigInt, BigInt, BigInt, Nullable<BigInt>, BigInt, BigInt, Nullable<Binary>, Nullable<Text>);
        // outcome_block_by_commit and device_retirement_by_commit
        "SELECT 0, pg_snapshot_xmin(pg_current_snapshot())::TEXT::BIGINT - 1, \
         coalesce((SELECT value FROM watermark WHERE name = 'history'), 0), 0::BIGINT, 0::BIGINT, NULL::BIGINT, \
         (extract(epoch FROM clock_timestamp()) * 1000)::BIGINT, 0::BIGINT, NULL::BYTEA, NULL::TEXT \
         UNION ALL (SELECT 1, xid, id, notification_id, 0, route, at, examined, CASE WHEN wanted THEN entries END, NULL \
         FROM (SELECT xid, id, notification_id, route, at, wanted, entries, \
         CASE WHEN wanted THEN octet_length(entries) ELSE 0 END AS bytes, \
         sum(CASE WHEN wanted THEN octet_length(entries) ELSE 0 END) OVER (ORDER BY xid, id ROWS UNBOUNDED PRECEDING) \
         AS total, count(*) OVER () AS examined FROM (SELECT xid, id, notification_id, route, at, entries, \
         ($7 = 0 OR notification_id = $7) AND ($8 = 0 OR (first_user <= $8 AND last_user >= $8)) AS wanted \
         FROM outcome_block WHERE $9 AND app = $1 AND (xid, id) > ($2, $3) AND id >= $11 \
         AND xid < (SELECT pg_snapshot_xmin(pg_current_snapshot())::TEXT::BIGINT) ORDER BY xid, id LIMIT $4 + 0) AS b) AS s \
         WHERE total - bytes < $5) \
         UNION ALL (SELECT 2, xid, id, device, user_key, NULL, at, 0, NULL, reason FROM device_retirement \
         WHERE $10 AND app = $1 AND (xid, id) > ($2, $3) AND id >= $11 \
         AND xid < (SELECT pg_snapshot_xmin(pg_current_snapshot())::TEXT::BIGINT) ORDER BY xid, id LIMIT $6 + 0)",
        BigInt => app.0, BigInt => transaction, BigInt => row, BigInt => MAX_BLOCKS, BigInt => MAX_BLOCK_BYTES,
        BigInt => MAX_RETIREMENTS, BigInt => filter.notification.map_or(0, |id| id.0),
        BigInt => watch_rows::user_number(filter, user), Bool => filter.deliveries, Bool => filter.retirements,
        BigInt => oldest,
    )
    .load(conn)
    .await?;
    let head = rows.iter().position(|row| row.kind == HEAD).ok_or_else(|| Fail::corrupt("no head of a page"))?;
    let head = rows.swap_remove(head);
    let end = WatchPosition::after_transaction(epoch, head.xid, UnixMs(head.at));
    let Some(after) = after else { return Ok(WatchPage { events: Vec::new(), position: end, more: false }) };
    watch_rows::check(&after, epoch, head.id, head.xid)?;
    let chosen = watch_rows::choose(rows, &after, end, filter, user, limit)?;
    let users = chosen.users();
    let names: HashMap<UserKey, UserId> = match users.as_slice() {
        [] => HashMap::new(),
        users => {
            let names = user_names(conn, users).await?;
            users.iter().copied().zip(names).filter_map(|(user, name)| Some((user, name?))).collect()
        }
    };
    let attempts = attempts(conn, &chosen.failures()).await?;
    Ok(chosen.describe(&names, &attempts))
}

#[derive(diesel::Queryable)]
struct FailureRow {
    notification: i64,
    attempt: AttemptRow,
}

/// Of these deliveries, oldest first.
async fn attempts(conn: &mut AsyncPgConnection, of: &[DeliveryOf]) -> Attempt<HashMap<DeliveryOf, Vec<SendAttempt>>> {
    let mut attempts: HashMap<DeliveryOf, Vec<SendAttempt>> = HashMap::new();
    if of.is_empty() {
        return Ok(attempts);
    }
    let oldest = of.iter().map(|(notification, ..)| history_from(*notification)).min().unwrap_or(0);
    // attempt_detail_by_user
    let rows: Vec<FailureRow> = constant!(
        (BigInt, (BigInt, BigInt, Integer, BigInt, SmallInt, Integer, Text, Nullable<BigInt>));
        "SELECT a.notification_id, a.user_key, a.device, a.attempt, a.at, a.code, a.status, a.reason, a.next_at \
         FROM unnest($1, $2, $3) AS e(notification_id, user_key, device) JOIN attempt_detail a \
         ON a.notification_id = e.notification_id AND a.user_key = e.user_key AND a.device = e.device \
         AND a.id >= $5 ORDER BY a.id LIMIT $4 + 0",
        Array<BigInt> => ids(of.iter().map(|(notification, ..)| notification.0)),
        Array<BigInt> => ids(of.iter().map(|(_, user, _)| user.0)),
        Array<BigInt> => ids(of.iter().map(|(.., device)| device.0)),
        BigInt => watch_rows::most_attempts(of), BigInt => oldest,
    )
    .load(conn)
    .await?;
    for FailureRow { notification, attempt } in rows {
        let attempt = attempt.into_domain()?;
        attempts.entry((NotificationId(notification), attempt.user, attempt.device)).or_default().push(attempt);
    }
    Ok(attempts)
}
