//! Imports: some items in one transaction, with how far they have come.
//!
//! An item is looked at before its first write, so that one that is refused leaves nothing although its transaction goes
//! on; see [`super::group`] for why that matters.

use diesel::sql_types::{BigInt, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{OptionalExtension, RunQueryDsl};

use super::fail::{Attempt, Fail};
use super::group::Tx;
use super::statement::constant;
use super::{devices, opt_in, subscriptions};
use crate::domain::ids::AppKey;
use crate::domain::time::UnixMs;
use crate::storage::{ImportEffect, ImportItem, Imported};

/// Items of one transaction, which whoever comes next waits for: some 3 ms' worth of new devices.
pub(super) const CHUNK: usize = 64;

pub(super) fn position(conn: &mut SqliteConnection, app: AppKey, name: &str) -> Attempt<i64> {
    let position: Option<i64> = constant!(
        BigInt; "SELECT position FROM import_progress WHERE app = ?1 AND name = ?2", BigInt => app.0, Text => name,
    )
    .get_result(conn)
    .optional()?;
    Ok(position.unwrap_or(0))
}

/// `progress`: the import and how far it has come with these items.
pub(super) fn apply(
    tx: &mut Tx<'_>,
    items: &[ImportItem],
    progress: Option<&(AppKey, String, i64)>,
    now: UnixMs,
) -> Attempt<Vec<Imported>> {
    let mut imported = Vec::with_capacity(items.len());
    for item in items {
        imported.push(refusable(match item {
            ImportItem::Device { registration, created_at } => devices::import(tx, registration, *created_at, now),
            ImportItem::OptIn(choice) => opt_in::import(tx, choice, now),
            ImportItem::Subscription(subscription) => subscriptions::set(tx, subscription, now).map(effect),
        })?);
    }
    let Some((app, name, position)) = progress else { return Ok(imported) };
    tx.execute(constant!(
        ();
        "INSERT INTO import_progress (app, name, position, updated_at) VALUES (?1, ?2, ?3, ?4) \
         ON CONFLICT (app, name) DO UPDATE SET position = max(position, excluded.position), \
         updated_at = excluded.updated_at",
        BigInt => app.0, Text => &**name, BigInt => *position, BigInt => now.0,
    ))?;
    Ok(imported)
}

pub(super) fn assess(conn: &mut SqliteConnection, items: &[ImportItem]) -> Attempt<Vec<Imported>> {
    let mut assessed = Vec::with_capacity(items.len());
    for item in items {
        assessed.push(refusable(match item {
            ImportItem::Device { registration, .. } => devices::assess(conn, registration),
            ImportItem::OptIn(choice) => opt_in::assess(conn, choice),
            ImportItem::Subscription(subscription) => subscriptions::assess(conn, subscription).map(effect),
        })?);
    }
    Ok(assessed)
}

fn refusable(result: Attempt<ImportEffect>) -> Attempt<Imported> {
    match result {
        Ok(effect) => Ok(Ok(effect)),
        Err(Fail::Refused(error)) if error.is_refusal() => Ok(Err(error)),
        Err(fail) => Err(fail),
    }
}

fn effect(changed: bool) -> ImportEffect {
    if changed { ImportEffect::Applied } else { ImportEffect::Unchanged }
}
