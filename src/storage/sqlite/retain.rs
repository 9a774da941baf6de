//! Retention, in batches small enough to run beside traffic, and how much waits.

use std::collections::BTreeMap;

use diesel::RunQueryDsl;
use diesel::sql_types::{BigInt, Nullable};
use diesel::sqlite::SqliteConnection;

use super::fail::Attempt;
use super::group::Tx;
use super::statement::constant;
use crate::domain::ids::{AppKey, EPOCH_MS};
use crate::domain::time::UnixMs;
use crate::storage::{Backlog, IMPORT_KEPT_MS};

/// Rows deleted of each table at once.
const BATCH: i64 = 500;
/// Bits of an id below its milliseconds.
const ID_SHIFT: u32 = 22;

/// The consent history stays: it is proof. So does what belongs to open work.
pub(super) fn retain(tx: &mut Tx<'_>, history_before: UnixMs, now: UnixMs) -> Attempt<u64> {
    let oldest_kept = (history_before.0 - EPOCH_MS).max(0) << ID_SHIFT;
    // idempotency_by_expiry
    let mut rows = tx.execute(constant!(
        ();
        "DELETE FROM idempotency WHERE (app, key) IN \
         (SELECT app, key FROM idempotency WHERE expires_at <= ?1 ORDER BY expires_at LIMIT ?2 + 0)",
        BigInt => now.0, BigInt => BATCH,
    ))?;
    rows += tx.execute(constant!(
        ();
        "DELETE FROM attempt_detail WHERE id IN (SELECT id FROM attempt_detail a WHERE id < ?1 \
         AND NOT EXISTS (SELECT 1 FROM job j WHERE j.notification_id = a.notification_id) ORDER BY id LIMIT ?2 + 0)",
        BigInt => oldest_kept, BigInt => BATCH,
    ))?;
    rows += tx.execute(constant!(
        ();
        "DELETE FROM outcome_block WHERE id IN (SELECT id FROM outcome_block b WHERE id < ?1 \
         AND NOT EXISTS (SELECT 1 FROM job j WHERE j.notification_id = b.notification_id) \
         AND NOT EXISTS (SELECT 1 FROM fanout f WHERE f.notification_id = b.notification_id) ORDER BY id LIMIT ?2 + 0)",
        BigInt => oldest_kept, BigInt => BATCH,
    ))?;
    rows += tx.execute(constant!(
        ();
        "DELETE FROM notification WHERE id IN (SELECT id FROM notification n WHERE id < ?1 \
         AND NOT EXISTS (SELECT 1 FROM job j WHERE j.notification_id = n.id) \
         AND NOT EXISTS (SELECT 1 FROM fanout f WHERE f.notification_id = n.id) ORDER BY id LIMIT ?2 + 0)",
        BigInt => oldest_kept, BigInt => BATCH,
    ))?;
    // Few rows: one for each import.
    rows += tx.execute(constant!(
        ();
        "DELETE FROM import_progress WHERE (app, name) IN \
         (SELECT app, name FROM import_progress WHERE updated_at < ?1 AND name LIKE 'import/%' LIMIT ?2 + 0)",
        BigInt => now.0 - IMPORT_KEPT_MS, BigInt => BATCH,
    ))?;
    Ok(rows as u64)
}

pub(super) fn open_targets(conn: &mut SqliteConnection) -> Attempt<BTreeMap<AppKey, u64>> {
    let rows: Vec<(i64, i64)> =
        constant!((BigInt, BigInt); "SELECT app, sum(target_count) FROM job GROUP BY app").load(conn)?;
    Ok(rows.into_iter().map(|(app, count)| (AppKey(app), u64::try_from(count).unwrap_or(0))).collect())
}

pub(super) fn backlog(conn: &mut SqliteConnection, now: UnixMs) -> Attempt<Backlog> {
    let (jobs, targets, interactive, bulk): (i64, i64, Option<i64>, Option<i64>) = constant!(
        (BigInt, BigInt, Nullable<BigInt>, Nullable<BigInt>);
        "SELECT count(*), coalesce(sum(target_count), 0), min(CASE WHEN lane = 0 AND due_at <= ?1 THEN ready_at END), \
         min(CASE WHEN lane = 1 AND due_at <= ?1 THEN ready_at END) FROM job",
        BigInt => now.0,
    )
    .get_result(conn)?;
    let fanouts: i64 = constant!(BigInt; "SELECT count(*) FROM fanout").get_result(conn)?;
    let count = |stored: i64| u64::try_from(stored).unwrap_or(0);
    Ok(Backlog {
        jobs: count(jobs),
        targets: count(targets),
        fanouts: count(fanouts),
        oldest_ready: [interactive.map(UnixMs), bulk.map(UnixMs)],
    })
}
