//! Restores from a backup.

use diesel::RunQueryDsl;
use diesel::sql_types::{BigInt, Nullable, Text};
use diesel::sqlite::SqliteConnection;

use super::fail::Attempt;
use super::group::Tx;
use super::handed;
use super::rows::json_ids;
use super::statement::constant;
use crate::domain::ids::{NotificationId, first_id_at};
use crate::domain::time::UnixMs;
use crate::storage::Restoration;

type Row = (String, i64, Option<i64>);

fn restoration((name, since, confirmed_at): Row) -> Restoration {
    Restoration { name, since: UnixMs(since), confirmed_at: confirmed_at.map(UnixMs) }
}

pub(super) fn begin(tx: &mut Tx<'_>, name: &str, now: UnixMs) -> Attempt<Restoration> {
    tx.execute(constant!(
        (); "INSERT INTO restoration (name, since) VALUES (?1, ?2) ON CONFLICT (name) DO NOTHING",
        Text => name, BigInt => now.0,
    ))?;
    let row: Row = constant!(
        (Text, BigInt, Nullable<BigInt>); "SELECT name, since, confirmed_at FROM restoration WHERE name = ?1",
        Text => name,
    )
    .get_result(tx.conn)?;
    Ok(restoration(row))
}

pub(super) fn cancel_open(
    tx: &mut Tx<'_>,
    before: UnixMs,
    after: NotificationId,
    limit: usize,
    now: UnixMs,
) -> Attempt<(Option<NotificationId>, u64)> {
    handed::age(tx, tx.gated_at, Some(NotificationId(first_id_at(before))))?;
    // job_by_notification, and the primary key of fanout.
    let found: Vec<i64> = constant!(
        BigInt;
        "SELECT notification_id FROM (SELECT DISTINCT notification_id FROM job WHERE notification_id > ?1 \
         AND notification_id < ?2 ORDER BY notification_id LIMIT ?3 + 0) UNION \
         SELECT notification_id FROM (SELECT notification_id FROM fanout WHERE notification_id > ?1 \
         AND notification_id < ?2 ORDER BY notification_id LIMIT ?3 + 0) ORDER BY 1 LIMIT ?3 + 0",
        BigInt => after.0, BigInt => first_id_at(before), BigInt => i64::try_from(limit).unwrap_or(i64::MAX),
    )
    .load(tx.conn)?;
    let last = found.last().copied().map(NotificationId);
    for id in &found {
        tx.cache.forget(NotificationId(*id));
    }
    let cancelled = tx.execute(constant!(
        ();
        "UPDATE notification SET cancelled_at = ?2 WHERE id IN (SELECT value FROM json_each(?1)) \
         AND cancelled_at IS NULL",
        Text => json_ids(found.into_iter()), BigInt => now.0,
    ))?;
    Ok((last, cancelled as u64))
}

pub(super) fn open(conn: &mut SqliteConnection) -> Attempt<Vec<Restoration>> {
    let rows: Vec<Row> = constant!(
        (Text, BigInt, Nullable<BigInt>);
        "SELECT name, since, confirmed_at FROM restoration WHERE confirmed_at IS NULL ORDER BY since, name"
    )
    .load(conn)?;
    Ok(rows.into_iter().map(restoration).collect())
}

pub(super) fn confirm(tx: &mut Tx<'_>, now: UnixMs) -> Attempt<bool> {
    let confirmed = tx.execute(constant!(
        (); "UPDATE restoration SET confirmed_at = ?1 WHERE confirmed_at IS NULL", BigInt => now.0,
    ))?;
    Ok(confirmed > 0)
}
