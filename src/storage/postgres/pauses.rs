//! Pauses. Few, and read whole. Every replica asks for them twice a second.

use diesel::sql_types::{BigInt, Text};
use diesel_async::AsyncPgConnection;

use super::fail::Attempt;
use super::query::RunQuery;
use super::statement::constant;
use super::tx::Tx;
use crate::domain::pause::{MAX_PAUSES, Pause, PauseScope};
use crate::storage::{StoreError, restoration_reason, rows};

/// Locks the table against other writers, so that its limit holds: a pause is set by hand.
pub(super) async fn pause(tx: &mut Tx, pause: &Pause) -> Attempt<bool> {
    tx.execute(constant!((); "LOCK TABLE pause IN SHARE ROW EXCLUSIVE MODE")).await?;
    let name = pause.scope.to_string();
    let known: Vec<i64> =
        constant!(BigInt; "SELECT since FROM pause WHERE name = $1", Text => name.as_str()).load(tx.conn()).await?;
    if let Some(since) = known.first() {
        // By the run before this one, whose answer was lost, or by somebody else before.
        return Ok(tx.is_repeated() && *since == pause.since.0);
    }
    let count: i64 = constant!(BigInt; "SELECT count(*) FROM pause").get_result(tx.conn()).await?;
    if count >= i64::try_from(MAX_PAUSES).unwrap_or(i64::MAX) {
        return Err(StoreError::Overloaded { what: "as many pauses as there may be" }.into());
    }
    tx.execute(constant!(
        (); "INSERT INTO pause (name, since, reason) VALUES ($1, $2, $3)",
        Text => name.as_str(), BigInt => pause.since.0, Text => pause.reason.as_str(),
    ))
    .await?;
    Ok(true)
}

pub(super) async fn resume(tx: &mut Tx, scope: &PauseScope) -> Attempt<bool> {
    let ended = tx.execute(constant!((); "DELETE FROM pause WHERE name = $1", Text => scope.to_string())).await? > 0;
    // The run before this one may have ended it.
    Ok(ended || tx.is_repeated())
}

pub(super) async fn all(conn: &mut AsyncPgConnection) -> Attempt<Vec<Pause>> {
    // In the order of bytes, as SQLite has it.
    let found: Vec<(String, i64, String)> =
        constant!((Text, BigInt, Text); concat!("SELECT name, since, reason FROM (SELECT name, since, reason FROM pause UNION ALL \
             SELECT '*/*/*', since, '", restoration_reason!(), "' FROM restoration WHERE confirmed_at IS NULL) AS held \
             ORDER BY name COLLATE \"C\""))
            .load(conn)
            .await?;
    Ok(rows::pauses(found))
}
