//! Users and topics by name, and devices with their people's choices: what resolving and gating read.

use std::collections::HashSet;

use diesel::sql_types::{BigInt, Binary, Nullable, SmallInt, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{OptionalExtension, QueryResult, RunQueryDsl};

use super::dead::state;
use super::fail::{Attempt, Fail};
use super::group::Tx;
use super::homes::{by_name, home};
use super::rows::{choice, device_state, json_ids, token};
use super::statement::constant;
use crate::domain::consent::{DeviceChoice, UserChoice};
use crate::domain::device::Labels;
use crate::domain::ids::{AppKey, DeviceId, EventType, Locale, RouteId, Topic, UserId, UserKey};
use crate::domain::notification::TargetFacts;
use crate::domain::targets::Target;
use crate::domain::time::UnixMs;
use crate::storage::StoreError;
use crate::storage::people::People;
use crate::storage::reach;

pub(super) fn user_key(conn: &mut SqliteConnection, app: AppKey, user: &UserId) -> QueryResult<Option<UserKey>> {
    // app_user's primary key; app_user_by_name
    let key: Option<i64> = constant!(
        BigInt; by_name!("id"),
        BigInt => home(app, user).0, BigInt => app.0, Text => user.as_str(),
    )
    .get_result(conn)
    .optional()?;
    Ok(key.map(UserKey))
}

/// The key that somebody without a row is to get: their home, unless another has it, or is `promised` it.
pub(super) fn new_key(
    tx: &mut Tx<'_>,
    app: AppKey,
    user: &UserId,
    promised: &mut HashSet<UserKey>,
    now: UnixMs,
) -> Attempt<UserKey> {
    let home = home(app, user);
    // app_user's primary key
    let is_taken: i64 = constant!(BigInt; "SELECT EXISTS (SELECT 1 FROM app_user WHERE id = ?1)", BigInt => home.0)
        .get_result(tx.conn)?;
    Ok(if is_taken == 0 && promised.insert(home) { home } else { UserKey(tx.next_id(now)) })
}

/// The user's row, made on mention. Writes: only after every refusal.
pub(super) fn ensure_user(tx: &mut Tx<'_>, app: AppKey, user: &UserId, now: UnixMs) -> Attempt<UserKey> {
    if let Some(key) = user_key(tx.conn, app, user)? {
        return Ok(key);
    }
    let key = new_key(tx, app, user, &mut HashSet::new(), now)?;
    insert_user(tx, app, key, user, now)?;
    Ok(key)
}

pub(super) fn insert_user(tx: &mut Tx<'_>, app: AppKey, key: UserKey, user: &UserId, now: UnixMs) -> Attempt<()> {
    tx.execute(constant!(
        (); "INSERT INTO app_user (id, app, external_id, created_at, reach) VALUES (?1, ?2, ?3, ?4, ?5)",
        BigInt => key.0, BigInt => app.0, Text => user.as_str(), BigInt => now.0, Binary => &reach::NOBODY[..],
    ))?;
    Ok(())
}

/// The names of users, in the order of `keys`; `None` for an erased one.
pub(super) fn user_names(conn: &mut SqliteConnection, keys: &[UserKey]) -> QueryResult<Vec<Option<UserId>>> {
    let names: Vec<Option<String>> = constant!(
        Nullable<Text>;
        "SELECT u.external_id FROM json_each(?1) AS e LEFT JOIN app_user u ON u.id = e.value ORDER BY e.id",
        Text => json_ids(keys.iter().map(|key| key.0)),
    )
    .load(conn)?;
    Ok(names.into_iter().map(|name| name.as_deref().map(UserId::trusted)).collect())
}

pub(super) fn topic_key(conn: &mut SqliteConnection, app: AppKey, topic: &Topic) -> QueryResult<Option<i64>> {
    // topic_by_name
    constant!(BigInt; "SELECT id FROM topic WHERE app = ?1 AND name = ?2", BigInt => app.0, Text => topic.as_str())
        .get_result(conn)
        .optional()
}

/// Which user each of these devices of the app belongs to, sorted and distinct.
///
/// # Errors
/// `DeviceNotFound` with every id that is unknown or another app's.
pub(super) fn device_owners(conn: &mut SqliteConnection, app: AppKey, devices: &[DeviceId]) -> Attempt<Vec<Target>> {
    if devices.is_empty() {
        return Ok(Vec::new());
    }
    let rows: Vec<(i64, Option<i64>)> = constant!(
        (BigInt, Nullable<BigInt>);
        "SELECT e.value, d.user_key FROM json_each(?1) AS e LEFT JOIN device d ON d.id = e.value AND d.app = ?2",
        Text => json_ids(devices.iter().map(|device| device.0)), BigInt => app.0,
    )
    .load(conn)?;
    let unknown: Vec<DeviceId> =
        rows.iter().filter(|(_, owner)| owner.is_none()).map(|(device, _)| DeviceId(*device)).collect();
    if !unknown.is_empty() {
        return Err(StoreError::DeviceNotFound { devices: unknown }.into());
    }
    let mut targets: Vec<Target> = rows
        .into_iter()
        .filter_map(|(device, owner)| Some(Target { user: UserKey(owner?), device: DeviceId(device) }))
        .collect();
    targets.sort_unstable();
    targets.dedup();
    Ok(targets)
}

/// Choices of the row's user and device, as columns; `?2` is the event type. The user's come from joins, for a sub-query
/// opens its cursor anew in every row; the device's are looked up only where `has_choice` says that there are any.
macro_rules! choices {
    () => {
        "all_types.opted_in, this_type.opted_in, \
         CASE d.has_choice WHEN 1 THEN (SELECT o.opted_in FROM opt_in o \
         WHERE o.user_key = d.user_key AND o.device = d.id AND o.event_type = '') END, \
         CASE d.has_choice WHEN 1 THEN (SELECT o.opted_in FROM opt_in o \
         WHERE o.user_key = d.user_key AND o.device = d.id AND o.event_type = ?2) END"
    };
}

type FactTypes = (
    BigInt,
    BigInt,
    BigInt,
    SmallInt,
    BigInt,
    SmallInt,
    Binary,
    Nullable<Text>,
    Nullable<SmallInt>,
    Nullable<SmallInt>,
    Nullable<SmallInt>,
    Nullable<SmallInt>,
);

#[derive(diesel::Queryable)]
struct FactRow {
    /// Position in what was asked for.
    position: i64,
    device: i64,
    user: i64,
    state: i16,
    route: i64,
    seal_key: i16,
    token: Vec<u8>,
    locale: Option<String>,
    user_all: Option<i16>,
    user_type: Option<i16>,
    device_all: Option<i16>,
    device_type: Option<i16>,
}

impl FactRow {
    fn into_facts(self) -> Attempt<TargetFacts> {
        Ok(TargetFacts {
            target: Target { user: UserKey(self.user), device: DeviceId(self.device) },
            state: device_state(self.state)?,
            route: RouteId(self.route),
            token: token(self.seal_key, self.token)?,
            locale: self.locale.as_deref().map(Locale::trusted),
            user_choice: UserChoice { all: choice(self.user_all), this_type: choice(self.user_type) },
            device_choice: DeviceChoice { all: choice(self.device_all), this_type: choice(self.device_type) },
        })
    }
}

/// What the gate needs of each device, by position; a missing row, or one of another user than the target's, is
/// `None`. One query: device by its key, choices by theirs.
pub(super) fn facts_of_targets(
    conn: &mut SqliteConnection,
    event_type: &EventType,
    targets: &[Target],
) -> Attempt<Vec<Option<TargetFacts>>> {
    let mut facts: Vec<Option<TargetFacts>> = vec![None; targets.len()];
    let rows = constant!(
        FactTypes;
        concat!(
            "SELECT e.key, d.id, d.user_key, ",
            state!(),
            ", d.route, d.seal_key, d.token_sealed, d.locale, ",
            choices!(),
            " FROM json_each(?1) AS e CROSS JOIN device d ON d.id = e.value LEFT JOIN app_user u ON u.id = d.user_key \
             LEFT JOIN opt_in all_types ON all_types.user_key = d.user_key AND all_types.device = 0 \
             AND all_types.event_type = '' LEFT JOIN opt_in this_type ON this_type.user_key = d.user_key \
             AND this_type.device = 0 AND this_type.event_type = ?2"
        ),
        Text => json_ids(targets.iter().map(|target| target.device.0)), Text => event_type.as_str(),
    )
    .load_iter::<FactRow, diesel::connection::DefaultLoadingMode>(conn)?;
    for row in rows {
        let row = row?;
        let position = usize::try_from(row.position).unwrap_or(usize::MAX);
        let slot = facts.get_mut(position).ok_or_else(|| Fail::corrupt("a position out of range"))?;
        if targets[position].user.0 == row.user {
            *slot = Some(row.into_facts()?);
        }
    }
    Ok(facts)
}

/// See `Queue::names_and_labels`.
pub(super) fn names_and_labels(
    conn: &mut SqliteConnection,
    targets: &[Target],
) -> Attempt<Vec<Option<(UserId, Labels)>>> {
    let rows: Vec<(i64, Option<String>, String)> = constant!(
        (BigInt, Nullable<Text>, Text);
        "SELECT e.key, u.external_id, d.labels FROM json_each(?1) AS e CROSS JOIN device d ON d.id = e.value \
         JOIN app_user u ON u.id = d.user_key",
        Text => json_ids(targets.iter().map(|target| target.device.0)),
    )
    .load(conn)?;
    let mut found = vec![None; targets.len()];
    for (position, name, labels) in rows {
        let position = usize::try_from(position).unwrap_or(usize::MAX);
        let slot = found.get_mut(position).ok_or_else(|| Fail::corrupt("a position out of range"))?;
        if let Some(name) = name {
            *slot = Some((UserId::trusted(&name), serde_json::from_str(&labels)?));
        }
    }
    Ok(found)
}

/// People named by device only, on just those devices whatever their state. `targets`: sorted.
pub(super) fn of_devices(conn: &mut SqliteConnection, event_type: &EventType, targets: &[Target]) -> Attempt<People> {
    let mut found = People::default();
    if targets.is_empty() {
        return Ok(found);
    }
    for facts in facts_of_targets(conn, event_type, targets)?.into_iter().flatten() {
        found.add_named(facts);
    }
    Ok(found)
}
