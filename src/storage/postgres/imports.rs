//! Imports: some items in one transaction, with how far they have come.
//!
//! An item is looked at before its first write, so that one that is refused leaves nothing although its transaction goes
//! on.

use super::query::RunQuery;
use diesel::OptionalExtension;
use diesel::sql_types::{BigInt, Text};
use diesel_async::AsyncPgConnection;

use super::fail::{Attempt, Fail};
use super::statement::constant;
use super::tx::Tx;
use super::{devices, opt_in, registering, subscriptions};
use crate::domain::ids::AppKey;
use crate::domain::time::UnixMs;
use crate::storage::{ImportEffect, ImportItem, Imported};

/// Items of one transaction: it holds its people's and devices' rows for as long as it takes.
pub(super) const CHUNK: usize = 20;

pub(super) async fn position(conn: &mut AsyncPgConnection, app: AppKey, name: &str) -> Attempt<i64> {
    let position: Option<i64> = constant!(
        BigInt; "SELECT position FROM import_progress WHERE app = $1 AND name = $2", BigInt => app.0, Text => name,
    )
    .get_result(conn)
    .await
    .optional()?;
    Ok(position.unwrap_or(0))
}

pub(super) async fn apply(tx: &mut Tx, items: &[ImportItem], now: UnixMs) -> Attempt<Vec<Imported>> {
    let mut imported = Vec::with_capacity(items.len());
    for item in items {
        imported.push(refusable(match item {
            ImportItem::Device { registration, created_at } => {
                registering::import(tx, registration, *created_at, now).await.map(effect)
            }
            ImportItem::OptIn(choice) => opt_in::import(tx, choice, now).await,
            ImportItem::Subscription(subscription) => subscriptions::import(tx, subscription, now).await.map(effect),
        })?);
    }
    Ok(imported)
}

/// How far it has come, once everything before is durable.
pub(super) async fn advance(tx: &mut Tx, app: AppKey, name: &str, position: i64, now: UnixMs) -> Attempt<()> {
    tx.execute(constant!(
        ();
        "INSERT INTO import_progress AS p (app, name, position, updated_at) VALUES ($1, $2, $3, $4) \
         ON CONFLICT (app, name) DO UPDATE SET position = greatest(p.position, excluded.position), \
         updated_at = excluded.updated_at",
        BigInt => app.0, Text => name, BigInt => position, BigInt => now.0,
    ))
    .await?;
    Ok(())
}

pub(super) async fn assess(conn: &mut AsyncPgConnection, items: &[ImportItem]) -> Attempt<Vec<Imported>> {
    let mut assessed = Vec::with_capacity(items.len());
    for item in items {
        assessed.push(refusable(match item {
            ImportItem::Device { registration, .. } => devices::assess(conn, registration).await,
            ImportItem::OptIn(choice) => opt_in::assess(conn, choice).await,
            ImportItem::Subscription(subscription) => subscriptions::assess(conn, subscription).await.map(effect),
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
