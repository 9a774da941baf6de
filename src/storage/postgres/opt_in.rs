//! Choices: the latest observed one stands, a tie is a "no", and every one ever asked for is kept.

use super::query::RunQuery;
use diesel::OptionalExtension;
use diesel::sql_types::{BigInt, Nullable, SmallInt, Text};
use diesel_async::AsyncPgConnection;

use super::device_reads;
use super::fail::Attempt;
use super::people::{ensure_user, lock_user, user_key};
use super::rows::flag;
use super::statement::constant;
use super::tx::Tx;
use crate::domain::deny::DenyKey;
use crate::domain::ids::{AppKey, DeviceId, EventType, UserId, UserKey};
use crate::domain::time::UnixMs;
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
async fn check_device(conn: &mut AsyncPgConnection, new: &NewOptIn) -> Attempt<()> {
    let Some(device) = new.device else { return Ok(()) };
    match device_reads::by_id(conn, device).await? {
        Some(row) if row.app == new.app.0 && row.user == new.user.as_str() => Ok(()),
        _ => Err(StoreError::DeviceNotFound { devices: vec![device] }.into()),
    }
}

/// The device's number and the name of the type, as they are stored.
fn stored_key(new: &NewOptIn) -> (i64, &str) {
    (new.device.unwrap_or_default().0, new.event_type.as_ref().map_or("", EventType::as_str))
}

async fn stored(conn: &mut AsyncPgConnection, user: UserKey, new: &NewOptIn) -> Attempt<Option<ChoiceRow>> {
    let (device, event_type) = stored_key(new);
    Ok(constant!(
        ChoiceTypes;
        "SELECT device, event_type, opted_in, observed_at, recorded_at, source, policy_version, evidence FROM opt_in \
         WHERE user_key = $1 AND device = $2 AND event_type = $3",
        BigInt => user.0, BigInt => device, Text => event_type,
    )
    .get_result(conn)
    .await
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
        new.observed_at.0 > stored.observed_at || (new.observed_at.0 == stored.observed_at && tie_says_no)
    })
}

/// Whether the history has this very choice already, so that an import that is repeated does not fill it.
async fn is_recorded(conn: &mut AsyncPgConnection, user: UserKey, new: &NewOptIn) -> Attempt<bool> {
    let (device, event_type) = stored_key(new);
    // opt_in_history_by_user
    let known: Option<i64> = constant!(
        BigInt;
        "SELECT id FROM opt_in_history WHERE user_key = $1 AND device = $2 AND event_type = $3 AND observed_at = $4 \
         AND opted_in = $5 LIMIT 1",
        BigInt => user.0, BigInt => device, Text => event_type, BigInt => new.observed_at.0,
        SmallInt => i16::from(new.opted_in),
    )
    .get_result(conn)
    .await
    .optional()?;
    Ok(known.is_some())
}

/// A choice moved in from elsewhere: one that lost is recorded, and one that is recorded is not written again.
pub(super) async fn import(tx: &mut Tx, new: &NewOptIn, now: UnixMs) -> Attempt<ImportEffect> {
    let (effect, recorded) = look(tx.conn(), new).await?;
    if !recorded {
        set(tx, new, now).await?;
    }
    Ok(effect)
}

/// What [`import`] would do.
pub(super) async fn assess(conn: &mut AsyncPgConnection, new: &NewOptIn) -> Attempt<ImportEffect> {
    Ok(look(conn, new).await?.0)
}

/// What a choice comes to, and whether it is recorded already.
async fn look(conn: &mut AsyncPgConnection, new: &NewOptIn) -> Attempt<(ImportEffect, bool)> {
    check_device(conn, new).await?;
    let Some(user) = user_key(conn, new.app, &new.user).await? else { return Ok((ImportEffect::Applied, false)) };
    let Some(stored) = stored(conn, user, new).await? else { return Ok((ImportEffect::Applied, false)) };
    let recorded = is_recorded(conn, user, new).await?;
    let applies = takes_effect(new, Some(&stored), None) && !recorded;
    Ok((if applies { ImportEffect::Applied } else { ImportEffect::Unchanged }, recorded))
}

pub(super) async fn set(tx: &mut Tx, new: &NewOptIn, now: UnixMs) -> Attempt<(OptIn, bool)> {
    check_device(tx.conn(), new).await?;
    let user = ensure_user(tx, new.app, &new.user, now).await?;
    // Two choices of one person at the same time take turns.
    lock_user(tx, user).await?;
    let (device, event_type) = stored_key(new);
    let stored = stored(tx.conn(), user, new).await?;
    let applied = takes_effect(new, stored.as_ref(), Some(now));
    // Never goes back, so that nothing observed in between overturns it.
    let observed_at = stored.as_ref().map_or(new.observed_at, |stored| new.observed_at.max(UnixMs(stored.observed_at)));
    let history = tx.next_id(now);
    tx.execute(constant!(
        ();
        "INSERT INTO opt_in_history (id, app, user_key, device, event_type, opted_in, applied, observed_at, \
         recorded_at, caller, source, policy_version, evidence) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13) ON CONFLICT (id) DO NOTHING",
        BigInt => history, BigInt => new.app.0, BigInt => user.0, BigInt => device, Text => event_type,
        SmallInt => i16::from(new.opted_in), SmallInt => i16::from(applied), BigInt => new.observed_at.0,
        BigInt => now.0, Nullable<Text> => new.caller.as_deref(), Nullable<Text> => new.source.as_deref(),
        Nullable<Text> => new.policy_version.as_deref(), Nullable<Text> => new.evidence.as_deref(),
    ))
    .await?;
    if let Some(stored) = stored
        && !applied
    {
        return Ok((stored.into_domain(), false));
    }
    tx.execute(constant!(
        ();
        "INSERT INTO opt_in (user_key, device, event_type, app, opted_in, observed_at, recorded_at, source, \
         policy_version, evidence) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) \
         ON CONFLICT (user_key, device, event_type) DO UPDATE SET opted_in = excluded.opted_in, \
         observed_at = excluded.observed_at, recorded_at = excluded.recorded_at, source = excluded.source, \
         policy_version = excluded.policy_version, evidence = excluded.evidence",
        BigInt => user.0, BigInt => device, Text => event_type, BigInt => new.app.0,
        SmallInt => i16::from(new.opted_in), BigInt => observed_at.0, BigInt => now.0,
        Nullable<Text> => new.source.as_deref(), Nullable<Text> => new.policy_version.as_deref(),
        Nullable<Text> => new.evidence.as_deref(),
    ))
    .await?;
    if device != 0 {
        tx.execute(constant!(
            (); "UPDATE device SET has_choice = 1 WHERE id = $1 AND has_choice = 0", BigInt => device,
        ))
        .await?;
    }
    if !new.opted_in {
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

pub(super) async fn list(conn: &mut AsyncPgConnection, app: AppKey, user: &UserId) -> Attempt<Vec<OptIn>> {
    let Some(user) = user_key(conn, app, user).await? else { return Ok(Vec::new()) };
    let rows: Vec<ChoiceRow> = constant!(
        ChoiceTypes;
        "SELECT device, event_type, opted_in, observed_at, recorded_at, source, policy_version, evidence FROM opt_in \
         WHERE user_key = $1 ORDER BY device, event_type LIMIT $2 + 0",
        BigInt => user.0, BigInt => MAX_LISTED,
    )
    .load(conn)
    .await?;
    Ok(rows.into_iter().map(ChoiceRow::into_domain).collect())
}

/// Oldest first.
pub(super) async fn history(conn: &mut AsyncPgConnection, user: UserKey) -> Attempt<Vec<OptInChange>> {
    // opt_in_history_by_user
    let rows: Vec<(ChoiceRow, (i16, Option<String>))> = constant!(
        (ChoiceTypes, (SmallInt, Nullable<Text>));
        "SELECT device, event_type, opted_in, observed_at, recorded_at, source, policy_version, evidence, applied, \
         caller FROM opt_in_history WHERE user_key = $1 ORDER BY id DESC LIMIT $2 + 0",
        BigInt => user.0, BigInt => MAX_HISTORY,
    )
    .load(conn)
    .await?;
    let change = |(choice, (applied, caller)): (ChoiceRow, _)| OptInChange {
        choice: choice.into_domain(),
        applied: flag(applied),
        caller,
    };
    Ok(rows.into_iter().rev().map(change).collect())
}
