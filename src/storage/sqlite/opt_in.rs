//! Choices: the latest observed one stands, a tie is a "no", and every one ever asked for is kept.

use diesel::sql_types::{BigInt, Nullable, SmallInt, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{OptionalExtension, RunQueryDsl};

use super::devices;
use super::fail::Attempt;
use super::group::Tx;
use super::people::{ensure_user, user_key};
use super::rows::flag;
use super::statement::constant;
use crate::domain::deny::DenyKey;
use crate::domain::ids::{AppKey, DeviceId, EventType, UserId, UserKey};
use crate::domain::time::UnixMs;
use crate::planted;
use crate::storage::reach::Change;
use crate::storage::{ImportEffect, NewOptIn, OptIn, OptInChange, StoreError};

/// The most choices listed of one person.
const MAX_LISTED: i64 = 1_000;
/// The newest lines of a person's consent history that an explanation shows.
const MAX_HISTORY: i64 = 10_000;

type ChoiceTypes = (BigInt, Text, SmallInt, BigInt, BigInt, Nullable<Text>, Nullable<Text>, Nullable<Text>);

#[derive(diesel::Queryable)]
struct ChoiceRow {
    device: i64,
    event_type: String,
    opted_in: i16,
    observed_at: i64,
    recorded_at: i64,
    source: Option<String>,
    policy_version: Option<String>,
    evidence: Option<String>,
}

impl ChoiceRow {
    fn into_domain(self) -> OptIn {
        OptIn {
            event_type: (!self.event_type.is_empty()).then(|| EventType::trusted(&self.event_type)),
            device: (self.device != 0).then_some(DeviceId(self.device)),
            opted_in: flag(self.opted_in),
            observed_at: UnixMs(self.observed_at),
            recorded_at: UnixMs(self.recorded_at),
            source: self.source,
            policy_version: self.policy_version,
            evidence: self.evidence,
        }
    }
}

/// The device's own user must be the one who chooses.
fn check_device(conn: &mut SqliteConnection, new: &NewOptIn) -> Attempt<()> {
    let Some(device) = new.device else { return Ok(()) };
    match devices::by_id(conn, device)? {
        Some(row) if row.app == new.app.0 && row.user == new.user.as_str() => Ok(()),
        _ => Err(StoreError::DeviceNotFound { devices: vec![device] }.into()),
    }
}

/// The device's number and the name of the type, as they are stored.
fn stored_key(new: &NewOptIn) -> (i64, &str) {
    (new.device.unwrap_or_default().0, new.event_type.as_ref().map_or("", EventType::as_str))
}

fn stored(conn: &mut SqliteConnection, user: UserKey, new: &NewOptIn) -> Attempt<Option<ChoiceRow>> {
    let (device, event_type) = stored_key(new);
    Ok(constant!(
        ChoiceTypes;
        "SELECT device, event_type, opted_in, observed_at, recorded_at, source, policy_version, evidence FROM opt_in \
         WHERE user_key = ?1 AND device = ?2 AND event_type = ?3",
        BigInt => user.0, BigInt => device, Text => event_type,
    )
    .get_result(conn)
    .optional()?)
}

/// Whether a choice takes the place of the one that stands: the later one does, and a "no" observed at the same time. And a
/// "no" that is said now: what was observed later than now was observed by another clock, or before this one was set back.
fn takes_effect(new: &NewOptIn, stored: Option<&ChoiceRow>, now: Option<UnixMs>) -> bool {
    stored.is_none_or(|stored| {
        if !new.opted_in && Some(new.observed_at) == now {
            return true;
        }
        let tie_says_no = !new.opted_in || flag(stored.opted_in);
        planted::is("late-choice-wins")
            || new.observed_at.0 > stored.observed_at
            || (new.observed_at.0 == stored.observed_at && tie_says_no)
    })
}

/// Whether the history has this very choice already, so that an import that is repeated does not fill it.
fn is_recorded(conn: &mut SqliteConnection, user: UserKey, new: &NewOptIn) -> Attempt<bool> {
    let (device, event_type) = stored_key(new);
    // opt_in_history_by_user
    let known: Option<i64> = constant!(
        BigInt;
        "SELECT 1 FROM opt_in_history WHERE user_key = ?1 AND device = ?2 AND event_type = ?3 AND observed_at = ?4 \
         AND opted_in = ?5 LIMIT 1",
        BigInt => user.0, BigInt => device, Text => event_type, BigInt => new.observed_at.0,
        SmallInt => i16::from(new.opted_in),
    )
    .get_result(conn)
    .optional()?;
    Ok(known.is_some())
}

/// A choice moved in from elsewhere: one that lost is recorded, and one that is recorded is not written again.
pub(super) fn import(tx: &mut Tx<'_>, new: &NewOptIn, now: UnixMs) -> Attempt<ImportEffect> {
    let (effect, recorded) = look(tx.conn, new)?;
    if !recorded {
        set(tx, new, now)?;
    }
    Ok(effect)
}

/// What [`import`] would do.
pub(super) fn assess(conn: &mut SqliteConnection, new: &NewOptIn) -> Attempt<ImportEffect> {
    Ok(look(conn, new)?.0)
}

/// What a choice comes to, and whether it is recorded already.
fn look(conn: &mut SqliteConnection, new: &NewOptIn) -> Attempt<(ImportEffect, bool)> {
    check_device(conn, new)?;
    let Some(user) = user_key(conn, new.app, &new.user)? else { return Ok((ImportEffect::Applied, false)) };
    let Some(stored) = stored(conn, user, new)? else { return Ok((ImportEffect::Applied, false)) };
    let recorded = is_recorded(conn, user, new)?;
    let applies = takes_effect(new, Some(&stored), None) && !recorded;
    Ok((if applies { ImportEffect::Applied } else { ImportEffect::Unchanged }, recorded))
}

pub(super) fn set(tx: &mut Tx<'_>, new: &NewOptIn, now: UnixMs) -> Attempt<(OptIn, bool)> {
    check_device(tx.conn, new)?;
    let user = ensure_user(tx, new.app, &new.user, now)?;
    let (device, event_type) = stored_key(new);
    let stored = stored(tx.conn, user, new)?;
    let applied = takes_effect(new, stored.as_ref(), Some(now));
    // Never goes back, so that nothing observed in between overturns it.
    let observed_at = stored.as_ref().map_or(new.observed_at, |stored| new.observed_at.max(UnixMs(stored.observed_at)));
    let history = tx.next_id(now);
    tx.execute(constant!(
        ();
        "INSERT INTO opt_in_history (id, app, user_key, device, event_type, opted_in, applied, observed_at, \
         recorded_at, caller, source, policy_version, evidence) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
        BigInt => history, BigInt => new.app.0, BigInt => user.0, BigInt => device, Text => event_type,
        SmallInt => i16::from(new.opted_in), SmallInt => i16::from(applied), BigInt => new.observed_at.0,
        BigInt => now.0, Nullable<Text> => new.caller.as_deref(), Nullable<Text> => new.source.as_deref(),
        Nullable<Text> => new.policy_version.as_deref(), Nullable<Text> => new.evidence.as_deref(),
    ))?;
    if let Some(stored) = stored
        && !applied
    {
        return Ok((stored.into_domain(), false));
    }
    tx.execute(constant!(
        ();
        "INSERT INTO opt_in (user_key, device, event_type, app, opted_in, observed_at, recorded_at, source, \
         policy_version, evidence) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10) \
         ON CONFLICT (user_key, device, event_type) DO UPDATE SET opted_in = excluded.opted_in, \
         observed_at = excluded.observed_at, recorded_at = excluded.recorded_at, source = excluded.source, \
         policy_version = excluded.policy_version, evidence = excluded.evidence",
        BigInt => user.0, BigInt => device, Text => event_type, BigInt => new.app.0,
        SmallInt => i16::from(new.opted_in), BigInt => observed_at.0, BigInt => now.0,
        Nullable<Text> => new.source.as_deref(), Nullable<Text> => new.policy_version.as_deref(),
        Nullable<Text> => new.evidence.as_deref(),
    ))?;
    if device != 0 {
        tx.execute(constant!(
            (); "UPDATE device SET has_choice = 1 WHERE id = ?1 AND has_choice = 0", BigInt => device,
        ))?;
    }
    tx.changed.push((user, Change::Choice(DeviceId(device), event_type.to_owned(), new.opted_in)));
    if !new.opted_in && !planted::is("no-not-published") {
        tx.deny(new.device.map_or(DenyKey::User(user), DenyKey::Device));
    }
    let stands = OptIn {
        event_type: new.event_type.clone(),
        device: new.device,
        opted_in: new.opted_in,
        observed_at,
        recorded_at: now,
        source: new.source.clone(),
        policy_version: new.policy_version.clone(),
        evidence: new.evidence.clone(),
    };
    Ok((stands, true))
}

pub(super) fn list(conn: &mut SqliteConnection, app: AppKey, user: &UserId) -> Attempt<Vec<OptIn>> {
    let Some(user) = user_key(conn, app, user)? else { return Ok(Vec::new()) };
    let rows: Vec<ChoiceRow> = constant!(
        ChoiceTypes;
        "SELECT device, event_type, opted_in, observed_at, recorded_at, source, policy_version, evidence FROM opt_in \
         WHERE user_key = ?1 ORDER BY device, event_type LIMIT ?2 + 0",
        BigInt => user.0, BigInt => MAX_LISTED,
    )
    .load(conn)?;
    Ok(rows.into_iter().map(ChoiceRow::into_domain).collect())
}

/// Oldest first.
pub(super) fn history(conn: &mut SqliteConnection, user: UserKey) -> Attempt<Vec<OptInChange>> {
    // opt_in_history_by_user
    let rows: Vec<(ChoiceRow, (i16, Option<String>))> = constant!(
        (ChoiceTypes, (SmallInt, Nullable<Text>));
        "SELECT device, event_type, opted_in, observed_at, recorded_at, source, policy_version, evidence, applied, \
         caller FROM opt_in_history WHERE user_key = ?1 ORDER BY id DESC LIMIT ?2 + 0",
        BigInt => user.0, BigInt => MAX_HISTORY,
    )
    .load(conn)?;
    let change = |(choice, (applied, caller)): (ChoiceRow, _)| OptInChange {
        choice: choice.into_domain(),
        applied: flag(applied),
        caller,
    };
    Ok(rows.into_iter().rev().map(change).collect())
}
