//! Pauses. Few, and read whole.

use diesel::sql_types::{BigInt, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{OptionalExtension, RunQueryDsl};

use super::fail::Attempt;
use super::group::Tx;
use super::statement::constant;
use crate::domain::pause::{MAX_PAUSES, Pause, PauseScope};
use crate::storage::{StoreError, restoration_reason, rows};

pub(super) fn pause(tx: &mut Tx<'_>, pause: &Pause) -> Attempt<bool> {
    let name = pause.scope.to_string();
    let known: Option<i64> = constant!(BigInt; "SELECT since FROM pause WHERE name = ?1", Text => name.as_str())
        .get_result(tx.conn)
        .optional()?;
    if known.is_some() {
        return Ok(false);
    }
    let count: i64 = constant!(BigInt; "SELECT count(*) FROM pause").get_result(tx.conn)?;
    if count >= i64::try_from(MAX_PAUSES).unwrap_or(i64::MAX) {
        return Err(StoreError::Overloaded { what: "as many pauses as there may be" }.into());
    }
    tx.execute(constant!(
        (); "INSERT INTO pause (name, since, reason) VALUES (?1, ?2, ?3)",
        Text => name.as_str(), BigInt => pause.since.0, Text => pause.reason.as_str(),
    ))?;
    Ok(true)
}

pub(super) fn resume(tx: &mut Tx<'_>, scope: &PauseScope) -> Attempt<bool> {
    Ok(tx.execute(constant!((); "DELETE FROM pause WHERE name = ?1", Text => scope.to_string()))? > 0)
}

pub(super) fn all(conn: &mut SqliteConnection) -> Attempt<Vec<Pause>> {
    let found: Vec<(String, i64, String)> =
        constant!((Text, BigInt, Text); concat!("SELECT name, since, reason FROM pause UNION ALL \
             SELECT '*/*/*', since, '", restoration_reason!(), "' FROM restoration WHERE confirmed_at IS NULL ORDER BY 1")).load(conn)?;
    Ok(rows::pauses(found))
}
