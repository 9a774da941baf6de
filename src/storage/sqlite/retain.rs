//! Retention, in batches small enough to run beside traffic, and how much waits.
//!
//! The history is gone through by ranges of ids, a bounded number of rows a step, whether they can go or belong to open work:
//! what has to stay at the old end is not looked at again with every step. At the new end it begins anew.

use std::collections::BTreeMap;

use diesel::sql_types::{BigInt, Nullable, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{OptionalExtension, RunQueryDsl};
use metrics::counter;

use super::fail::Attempt;
use super::group::Tx;
use super::statement::constant;
use crate::domain::ids::{AppKey, first_id_at};
use crate::domain::time::UnixMs;
use crate::planted;
use crate::storage::{Backlog, IMPORT_KEPT_MS, RETAIN_BATCH, TROUBLE_KEPT_MS};
use crate::telemetry::names;

/// Keys that a step looks at, whether they have expired or not: two milliseconds of the writer.
const KEYS: i64 = 5_000;
/// Such steps in one call, until they have deleted a batch. A call is every ten seconds where little is to be deleted, and so a round
/// of eighteen million keys takes an hour: as long may a key's row stay after it has expired.
pub(super) const KEY_STEPS: usize = 10;

/// Where the next ranges begin.
#[derive(Default)]
pub(super) struct Sweep {
    pub keys: Option<Key>,
    pub history: HistorySweep,
}

/// Where each table's next range begins: after this id.
#[derive(Clone, Copy, Default)]
pub(super) struct HistorySweep {
    attempts: i64,
    blocks: i64,
    retirements: i64,
    notifications: i64,
}

/// An idempotency key, and whose.
pub(super) type Key = (i64, String);

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

/// `range!(tx, "table", from, end)`: ids after `from` up to and with the answer's first, and where the next range begins
/// after. `end` is not in it.
macro_rules! range {
    ($tx:expr, $table:literal, $from:expr, $end:expr) => {{
        let last: Option<i64> = constant!(
            BigInt;
            concat!("SELECT id FROM ", $table, " WHERE id > ?1 AND id < ?2 ORDER BY id LIMIT 1 OFFSET ?3 + 0"),
            BigInt => $from, BigInt => $end, BigInt => RETAIN_BATCH.cast_signed() - 1,
        )
        .get_result($tx.conn)
        .optional()?;
        last.map_or(($end - 1, 0), |last| (last, last))
    }};
}

/// The consent history stays: it is proof. So does what belongs to open work.
pub(super) fn retain(
    tx: &mut Tx<'_>,
    from: HistorySweep,
    history_before: UnixMs,
    now: UnixMs,
) -> Attempt<(Deleted, HistorySweep)> {
    let (end, batch) = (first_id_at(history_before), RETAIN_BATCH.cast_signed());
    let (mut deleted, mut next) = (Deleted::default(), from);
    // Open work without rows would not be seen below.
    super::handed::end_before(tx, end)?;
    let last;
    (last, next.attempts) = range!(tx, "attempt_detail", from.attempts, end);
    let rows = tx.execute(constant!(
        ();
        "DELETE FROM attempt_detail WHERE id > ?1 AND id <= ?2 \
         AND NOT EXISTS (SELECT 1 FROM job j WHERE j.notification_id = attempt_detail.notification_id)",
        BigInt => from.attempts, BigInt => last,
    ))?;
    deleted.0.push(("attempt_detail", rows));
    let last;
    (last, next.blocks) = range!(tx, "outcome_block", from.blocks, end);
    let blocks: Vec<i64> = constant!(
        BigInt;
        "DELETE FROM outcome_block WHERE id > ?1 AND id <= ?2 \
         AND NOT EXISTS (SELECT 1 FROM job j WHERE j.notification_id = outcome_block.notification_id) \
         AND NOT EXISTS (SELECT 1 FROM fanout f WHERE f.notification_id = outcome_block.notification_id) RETURNING xid",
        BigInt => from.blocks, BigInt => last,
    )
    .load(tx.writes())?;
    deleted.0.push(("outcome_block", blocks.len()));
    let last;
    (last, next.retirements) = range!(tx, "device_retirement", from.retirements, end);
    let retirements: Vec<i64> = constant!(
        BigInt; "DELETE FROM device_retirement WHERE id > ?1 AND id <= ?2 RETURNING xid",
        BigInt => from.retirements, BigInt => last,
    )
    .load(tx.writes())?;
    deleted.0.push(("device_retirement", retirements.len()));
    // Watchers who have not read that far are told.
    if let Some(newest) = blocks.into_iter().chain(retirements).max() {
        tx.execute(constant!(
            ();
            "INSERT INTO watermark (name, value) VALUES (?1, ?2) \
             ON CONFLICT (name) DO UPDATE SET value = max(value, excluded.value)",
            Text => "history", BigInt => newest,
        ))?;
    }
    let last;
    (last, next.notifications) = range!(tx, "notification", from.notifications, end);
    let rows = tx.execute(constant!(
        ();
        "DELETE FROM notification WHERE id > ?1 AND id <= ?2 \
         AND NOT EXISTS (SELECT 1 FROM job j WHERE j.notification_id = notification.id) \
         AND NOT EXISTS (SELECT 1 FROM fanout f WHERE f.notification_id = notification.id)",
        BigInt => from.notifications, BigInt => last,
    ))?;
    deleted.0.push(("notification", rows));
    if planted::is("retention-deletes-open-work") {
        let (from, last) = (from.notifications, last);
        tx.execute(constant!(
            (); "DELETE FROM notification WHERE id > ?1 AND id <= ?2", BigInt => from, BigInt => last,
        ))?;
    }
    // Few rows: one for each import.
    let rows = tx.execute(constant!(
        ();
        "DELETE FROM import_progress WHERE (app, name) IN \
         (SELECT app, name FROM import_progress WHERE updated_at < ?1 AND name LIKE 'import/%' LIMIT ?2 + 0)",
        BigInt => now.0 - IMPORT_KEPT_MS, BigInt => batch,
    ))?;
    deleted.0.push(("import_progress", rows));
    // Few rows, too.
    let rows = tx.execute(constant!(
        ();
        "DELETE FROM provider_trouble WHERE seen_at < ?1 AND coalesce(confirmed_until, 0) < ?2",
        BigInt => now.0 - TROUBLE_KEPT_MS, BigInt => now.0,
    ))?;
    deleted.0.push(("provider_trouble", rows));
    Ok((deleted, next))
}

/// Expired keys of the next range, and where the one after it begins: in the order of the keys, in which neighbours share a page.
pub(super) fn retain_keys(tx: &mut Tx<'_>, from: Option<Key>, now: UnixMs) -> Attempt<(Deleted, Option<Key>)> {
    let (app, key) = from.unwrap_or_else(|| (i64::MIN, String::new()));
    // idempotency's primary key
    let expired: Vec<Key> = constant!(
        (BigInt, Text);
        "SELECT app, key FROM (SELECT app, key, expires_at FROM idempotency WHERE (app, key) > (?1, ?2) \
         ORDER BY app, key LIMIT ?3 + 0) WHERE expires_at <= ?4 LIMIT ?5 + 0",
        BigInt => app, Text => key.as_str(), BigInt => KEYS, BigInt => now.0, BigInt => RETAIN_BATCH.cast_signed(),
    )
    .load(tx.conn)?;
    let full = expired.len() as u64 == RETAIN_BATCH;
    let last = if full {
        expired.iter().max().cloned()
    } else {
        constant!(
            (BigInt, Text);
            "SELECT app, key FROM idempotency WHERE (app, key) > (?1, ?2) ORDER BY app, key LIMIT 1 OFFSET ?3 + 0",
            BigInt => app, Text => key.as_str(), BigInt => KEYS - 1,
        )
        .get_result(tx.conn)
        .optional()?
    };
    for (app, key) in &expired {
        tx.execute(constant!(
            (); "DELETE FROM idempotency WHERE app = ?1 AND key = ?2", BigInt => *app, Text => key.as_str(),
        ))?;
    }
    Ok((Deleted(vec![("idempotency", expired.len())]), last))
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

/// Pages in use.
pub(super) fn size_bytes(conn: &mut SqliteConnection) -> Attempt<u64> {
    let pages: i64 = constant!(BigInt; "SELECT page_count FROM pragma_page_count").get_result(conn)?;
    let free: i64 = constant!(BigInt; "SELECT freelist_count FROM pragma_freelist_count").get_result(conn)?;
    let size: i64 = constant!(BigInt; "SELECT page_size FROM pragma_page_size").get_result(conn)?;
    Ok(u64::try_from((pages - free).saturating_mul(size)).unwrap_or(0))
}
