//! People with their devices and choices: what resolving, planning and gating read.

use super::query::RunQuery;
use diesel::sql_types::{Array, BigInt, Binary, Nullable, SmallInt, Text};
use diesel_async::AsyncPgConnection;

use super::fail::{Attempt, Fail};
use super::rows::{choice, device_state, token};
use super::statement::constant;
use super::{dead, ids};
use crate::domain::allow::AllowList;
use crate::domain::consent::{DeviceChoice, UserChoice};
use crate::domain::device::Labels;
use crate::domain::ids::{AppKey, DeviceId, EventType, Locale, RouteId, UserId, UserKey};
use crate::domain::notification::TargetFacts;
use crate::domain::plan;
use crate::domain::targets::Target;
use crate::storage::people::People;
use crate::storage::{GateFacts, GateQuestion, StoreError};

/// Which user each of these devices of the app belongs to, sorted and distinct.
///
/// # Errors
/// `DeviceNotFound` with every id that is unknown or another app's.
pub(super) async fn device_owners(
    conn: &mut AsyncPgConnection,
    app: AppKey,
    devices: &[DeviceId],
) -> Attempt<Vec<Target>> {
    if devices.is_empty() {
        return Ok(Vec::new());
    }
    let rows: Vec<(i64, Option<i64>)> = constant!(
        (BigInt, Nullable<BigInt>);
        "SELECT e.value, d.user_key FROM unnest($1) AS e(value) LEFT JOIN device d ON d.id = e.value AND d.app = $2",
        Array<BigInt> => ids(devices.iter().map(|device| device.0)), BigInt => app.0,
    )
    .load(conn)
    .await?;
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
/// `None`. One query: device by its key, choices by theirs: the user's by joins, for a sub-query opens its cursor anew in every
/// row, the device's only where `has_choice` says that there are any.
pub(super) async fn facts_of_targets(
    conn: &mut AsyncPgConnection,
    event_type: &EventType,
    targets: &[Target],
) -> Attempt<Vec<Option<TargetFacts>>> {
    let mut facts: Vec<Option<TargetFacts>> = vec![None; targets.len()];
    let rows = constant!(
        FactTypes;
        concat!(
            "SELECT e.n - 1, d.id, d.user_key, ",
            dead::state!("2::SMALLINT"),
            ", d.route, d.seal_key, d.token_sealed, d.locale, \
         all_types.opted_in, this_type.opted_in, \
         CASE d.has_choice WHEN 1 THEN (SELECT o.opted_in FROM opt_in o \
         WHERE o.user_key = d.user_key AND o.device = d.id AND o.event_type = '') END, \
         CASE d.has_choice WHEN 1 THEN (SELECT o.opted_in FROM opt_in o \
         WHERE o.user_key = d.user_key AND o.device = d.id AND o.event_type = $2) END \
         FROM unnest($1) WITH ORDINALITY AS e(value, n) JOIN device d ON d.id = e.value \
         LEFT JOIN opt_in all_types ON all_types.user_key = d.user_key AND all_types.device = 0 \
         AND all_types.event_type = '' LEFT JOIN opt_in this_type ON this_type.user_key = d.user_key \
         AND this_type.device = 0 AND this_type.event_type = $2"
        ),
        Array<BigInt> => ids(targets.iter().map(|target| target.device.0)), Text => event_type.as_str(),
    )
    .load::<FactRow>(conn)
    .await?;
    for row in rows {
        let position = usize::try_from(row.position).unwrap_or(usize::MAX);
        let slot = facts.get_mut(position).ok_or_else(|| Fail::corrupt("a position out of range"))?;
        if targets[position].user.0 == row.user {
            *slot = Some(row.into_facts()?);
        }
    }
    Ok(facts)
}

/// What the gate needs for several notifications: a query for each event type there is, and one for the notifications.
pub(super) async fn gates(conn: &mut AsyncPgConnection, questions: &[GateQuestion]) -> Attempt<Vec<GateFacts>> {
    let mut types: Vec<&EventType> = questions.iter().map(|asked| &asked.event_type).collect();
    types.sort_unstable();
    types.dedup();
    let mut facts: Vec<Vec<Option<TargetFacts>>> = questions.iter().map(|_| Vec::new()).collect();
    for event_type in types {
        let of_type = || questions.iter().zip(0..).filter(|(asked, _)| asked.event_type == *event_type);
        let targets: Vec<Target> = of_type().flat_map(|(asked, _)| asked.targets.iter().copied()).collect();
        if targets.is_empty() {
            continue;
        }
        let mut found = facts_of_targets(conn, event_type, &targets).await?.into_iter();
        for (asked, place) in of_type() {
            let place: usize = place;
            facts[place] = found.by_ref().take(asked.targets.len()).collect();
        }
    }
    // A notification that is gone must not be sent. notification's primary key
    let mut wanted: Vec<i64> = constant!(
        BigInt; "SELECT id FROM notification WHERE id = ANY ($1) AND cancelled_at IS NULL",
        Array<BigInt> => ids(questions.iter().map(|asked| asked.notification.0)),
    )
    .load(conn)
    .await?;
    wanted.sort_unstable();
    let is_wanted = |asked: &GateQuestion| wanted.binary_search(&asked.notification.0).is_ok();
    Ok(questions.iter().zip(facts).map(|(asked, facts)| GateFacts { cancelled: !is_wanted(asked), facts }).collect())
}

/// See `Queue::names_and_labels`.
pub(super) async fn names_and_labels(
    conn: &mut AsyncPgConnection,
    targets: &[Target],
) -> Attempt<Vec<Option<(UserId, Labels)>>> {
    let rows: Vec<(i64, Option<String>, String)> = constant!(
        (BigInt, Nullable<Text>, Text);
        "SELECT e.n - 1, u.external_id, d.labels FROM unnest($1) WITH ORDINALITY AS e(value, n) \
         JOIN device d ON d.id = e.value JOIN app_user u ON u.id = d.user_key",
        Array<BigInt> => ids(targets.iter().map(|target| target.device.0)),
    )
    .load(conn)
    .await?;
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

impl People {
    /// Adds people named by device only, on just those devices whatever their state. `targets`: sorted, of people who
    /// are not here yet.
    pub async fn add_devices(
        &mut self,
        conn: &mut AsyncPgConnection,
        event_type: &EventType,
        targets: &[Target],
    ) -> Attempt<()> {
        if targets.is_empty() {
            return Ok(());
        }
        let mut others = Self::default();
        for found in facts_of_targets(conn, event_type, targets).await?.into_iter().flatten() {
            others.add_named(found);
        }
        self.append(others);
        Ok(())
    }

    /// Bars every device that the app's allow-list does not name.
    pub async fn restrict(&mut self, conn: &mut AsyncPgConnection, list: &AllowList) -> Attempt<()> {
        let targets = plan::targets(&self.people);
        let known = names_and_labels(conn, &targets).await?;
        plan::restrict(&mut self.people, list, &targets, &known);
        Ok(())
    }
}
