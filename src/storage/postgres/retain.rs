//! Retention of what is in no partition, in batches small enough to run beside traffic, and how much waits.

use std::collections::BTreeMap;

use diesel::sql_types::{BigInt, Bool, Nullable, Text};
use diesel_async::AsyncPgConnection;
use metrics::counter;

use super::fail::Attempt;
use super::notifications::history_from;
use super::query::RunQuery;
use super::statement::constant;
use super::tx::Tx;
use crate::domain::ids::{AppKey, NotificationId, first_id_at};
use crate::domain::time::UnixMs;
use crate::storage::{Backlog, IMPORT_KEPT_MS, RETAIN_BATCH, TROUBLE_KEPT_MS};
use crate::telemetry::names;

/// Whoever deletes or drops holds this until its transaction's end.
pub(super) const RETENTION_LOCK: i64 = 0x6e75_6467_6565;

pub(super) async fn try_lock(conn: &mut AsyncPgConnection) -> diesel::QueryResult<bool> {
    constant!(Bool; "SELECT pg_try_advisory_xact_lock($1)", BigInt => RETENTION_LOCK).get_result(conn).await
}

/// Rows deleted of each table.
#[derive(Default)]
pub(super) struct Deleted(Vec<(&'static str, usize)>);

impl Deleted {
    pub fn count(&self) -> u64 {
        for (table, rows) in &self.0 {
            counter!(names::HISTORY_ROWS_DELETED, "table" => *table).increment(*rows as u64);
        }
        self.0.iter().map(|(_, rows)| *rows as u64).sum()
    }
}

/// The consent history stays: it is proof. So does what belongs to open work. Nothing when another replica is at it.
pub(super) async fn retain(tx: &mut Tx, history_before: UnixMs, now: UnixMs) -> Attempt<Deleted> {
    let mut deleted = Deleted::default();
    if !try_lock(tx.conn()).await? {
        return Ok(deleted);
    }
    // Nothing that belongs to jobs without rows, the oldest of which are some seconds old.
    let handed: Option<i64> = constant!(
        Nullable<BigInt>; "SELECT min(n.id) FROM handed, unnest(notification) AS n(id)"
    )
    .get_result(tx.conn())
    .await?;
    let handed = handed.map_or(i64::MAX, |id| history_from(NotificationId(id)));
    let (oldest_kept, batch) = (first_id_at(history_before).min(handed), RETAIN_BATCH.cast_signed());
    // idempotency_by_expiry
    let rows = tx
        .execute(constant!(
            ();
            "DELETE FROM idempotency WHERE (app, key) IN \
             (SELECT app, key FROM idempotency WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2 + 0)",
            BigInt => now.0, BigInt => batch,
        ))
        .await?;
    deleted.0.push(("idempotency", rows));
    // deny_by_time
    let rows = tx
        .execute(constant!(
            ();
            "DELETE FROM deny WHERE id IN (SELECT id FROM deny WHERE at < \
             (extract(epoch FROM statement_timestamp()) * 1000)::BIGINT - $1 ORDER BY at LIMIT $2 + 0)",
            BigInt => super::deny::KEPT_MS, BigInt => batch,
        ))
        .await?;
    deleted.0.push(("deny", rows));
    let rows = tx
        .execute(constant!(
            ();
            "DELETE FROM attempt_detail_default WHERE id IN (SELECT id FROM attempt_detail_default a WHERE id < $1 \
             AND NOT EXISTS (SELECT 1 FROM job j WHERE j.notification_id = a.notification_id) ORDER BY id LIMIT $2 + 0)",
            BigInt => oldest_kept, BigInt => batch,
        ))
        .await?;
    deleted.0.push(("attempt_detail", rows));
    let blocks: Vec<i64> = constant!(
        BigInt;
        "DELETE FROM outcome_block_default WHERE id IN (SELECT id FROM outcome_block_default b WHERE id < $1 \
         AND NOT EXISTS (SELECT 1 FROM job j WHERE j.notification_id = b.notification_id) \
         AND NOT EXISTS (SELECT 1 FROM fanout f WHERE f.notification_id = b.notification_id) ORDER BY id LIMIT $2 + 0) \
         RETURNING xid",
        BigInt => oldest_kept, BigInt => batch,
    )
    .load(tx.conn())
    .await?;
    deleted.0.push(("outcome_block", blocks.len()));
    let retirements: Vec<i64> = constant!(
        BigInt;
        "DELETE FROM device_retirement WHERE id IN \
         (SELECT id FROM device_retirement WHERE id < $1 ORDER BY id LIMIT $2 + 0) RETURNING xid",
        BigInt => oldest_kept, BigInt => batch,
    )
    .load(tx.conn())
    .await?;
    deleted.0.push(("device_retirement", retirements.len()));
    // Watchers who have not read that far are told.
    if let Some(newest) = blocks.into_iter().chain(retirements).max() {
        tx.execute(constant!(
            ();
            "INSERT INTO watermark AS w (name, value) VALUES ($1, $2) \
             ON CONFLICT (name) DO UPDATE SET value = greatest(w.value, excluded.value)",
            Text => "history", BigInt => newest,
        ))
        .await?;
    }
    let rows = tx
        .execute(constant!(
            ();
            "DELETE FROM notification_default WHERE id IN (SELECT id FROM notification_default n WHERE id < $1 \
             AND NOT EXISTS (SELECT 1 FROM job j WHERE j.notification_id = n.id) \
             AND NOT EXISTS (SELECT 1 FROM fanout f WHERE f.notification_id = n.id) ORDER BY id LIMIT $2 + 0)",
            BigInt => oldest_kept, BigInt => batch,
        ))
        .await?;
    deleted.0.push(("notification", rows));
    // Few rows: one for each import.
    let rows = tx
        .execute(constant!(
            ();
            "DELETE FROM import_progress WHERE (app, name) IN \
             (SELECT app, name FROM import_progress WHERE updated_at < $1 AND name LIKE 'import/%' LIMIT $2 + 0)",
            BigInt => now.0 - IMPORT_KEPT_MS, BigInt => batch,
        ))
        .await?;
    deleted.0.push(("import_progress", rows));
    // Few rows, too.
    let rows = tx
        .execute(constant!(
            ();
            "DELETE FROM provider_trouble WHERE seen_at < $1 AND coalesce(confirmed_until, 0) < $2",
            BigInt => now.0 - TROUBLE_KEPT_MS, BigInt => now.0,
        ))
        .await?;
    deleted.0.push(("provider_trouble", rows));
    Ok(deleted)
}

pub(super) async fn open_targets(conn: &mut AsyncPgConnection) -> Attempt<BTreeMap<AppKey, u64>> {
    let rows: Vec<(i64, i64)> =
        constant!((BigInt, BigInt); "SELECT app, sum(target_count) FROM open_job GROUP BY app").load(conn).await?;
    Ok(rows.into_iter().map(|(app, count)| (AppKey(app), u64::try_from(count).unwrap_or(0))).collect())
}

pub(super) async fn size_bytes(conn: &mut AsyncPgConnection) -> Attempt<u64> {
    let bytes: i64 = constant!(BigInt; "SELECT pg_database_size(current_database())").get_result(conn).await?;
    Ok(u64::try_from(bytes).unwrap_or(0))
}

pub(super) async fn backlog(conn: &mut AsyncPgConnection, now: UnixMs) -> Attempt<Backlog> {
    let (jobs, targets, interactive, bulk): (i64, i64, Option<i64>, Option<i64>) = constant!(
        (BigInt, BigInt, Nullable<BigInt>, Nullable<BigInt>);
        "SELECT count(*), coalesce(sum(target_count), 0), min(CASE WHEN lane = 0 AND due_at <= $1 THEN ready_at END), \
         min(CASE WHEN lane = 1 AND due_at <= $1 THEN ready_at END) FROM open_job",
        BigInt => now.0,
    )
    .get_result(conn)
    .await?;
    let fanouts: i64 = constant!(BigInt; "SELECT count(*) FROM fanout").get_result(conn).await?;
    let count = |stored: i64| u64::try_from(stored).unwrap_or(0);
    Ok(Backlog {
        jobs: count(jobs),
        targets: count(targets),
        fanouts: count(fanouts),
        oldest_ready: [interactive.map(UnixMs), bulk.map(UnixMs)],
    })
}
