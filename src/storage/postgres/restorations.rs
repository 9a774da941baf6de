//! Restores from a backup.

use diesel::sql_types::{Array, BigInt, Nullable, Text};
use diesel_async::AsyncPgConnection;

use super::fail::Attempt;
use super::query::RunQuery;
use super::statement::constant;
use super::tx::Tx;
use crate::domain::ids::{NotificationId, first_id_at};
use crate::domain::time::UnixMs;
use crate::storage::Restoration;

type Row = (String, i64, Option<i64>);

fn restoration((name, since, confirmed_at): Row) -> Restoration {
    Restoration { name, since: UnixMs(since), confirmed_at: confirmed_at.map(UnixMs) }
}

pub(super) async fn begin(tx: &mut Tx, name: &str, now: UnixMs) -> Attempt<Restoration> {
    tx.execute(constant!(
        (); "INSERT INTO restoration (name, since) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING",
        Text => name, BigInt => now.0,
    ))
    .await?;
    let row: Row = constant!(
        (Text, BigInt, Nullable<BigInt>); "SELECT name, since, confirmed_at FROM restoration WHERE name = $1",
        Text => name,
    )
    .get_result(tx.conn())
    .await?;
    Ok(restoration(row))
}

pub(super) async fn cancel_open(
    tx: &mut Tx,
    before: UnixMs,
    after: NotificationId,
    limit: usize,
    now: UnixMs,
) -> Attempt<(Option<NotificationId>, u64)> {
    // job_by_notification, and the primary key of fanout.
    let found: Vec<i64> = constant!(
        BigInt;
        "SELECT notification_id FROM (SELECT DISTINCT notification_id FROM job WHERE notification_id > $1 \
         AND notification_id < $2 ORDER BY notification_id LIMIT $3) AS jobs UNION \
         SELECT notification_id FROM (SELECT DISTINCT notification_id FROM handed_job WHERE notification_id > $1 \
         AND notification_id < $2 ORDER BY notification_id LIMIT $3) AS handed UNION \
         SELECT notification_id FROM (SELECT notification_id FROM fanout WHERE notification_id > $1 \
         AND notification_id < $2 ORDER BY notification_id LIMIT $3) AS fanouts ORDER BY 1 LIMIT $3",
        BigInt => after.0, BigInt => first_id_at(before), BigInt => i64::try_from(limit).unwrap_or(i64::MAX),
    )
    .load(tx.conn())
    .await?;
    let last = found.last().copied().map(NotificationId);
    for id in &found {
        tx.cache().forget(NotificationId(*id));
    }
    let cancelled = tx
        .execute(constant!(
            (); "UPDATE notification SET cancelled_at = $2 WHERE id = ANY ($1) AND cancelled_at IS NULL",
            Array<BigInt> => found, BigInt => now.0,
        ))
        .await?;
    Ok((last, cancelled as u64))
}

pub(super) async fn open(conn: &mut AsyncPgConnection) -> Attempt<Vec<Restoration>> {
    let rows: Vec<Row> = constant!(
        (Text, BigInt, Nullable<BigInt>);
        "SELECT name, since, confirmed_at FROM restoration WHERE confirmed_at IS NULL ORDER BY since, name"
    )
    .load(conn)
    .await?;
    Ok(rows.into_iter().map(restoration).collect())
}

pub(super) async fn confirm(tx: &mut Tx, now: UnixMs) -> Attempt<bool> {
    let confirmed = tx
        .execute(constant!(
            (); "UPDATE restoration SET confirmed_at = $1 WHERE confirmed_at IS NULL", BigInt => now.0,
        ))
        .await?;
    // The run before this one may have done it.
    Ok(confirmed > 0 || tx.is_repeated())
}
