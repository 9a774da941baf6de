//! People with their devices and choices: what resolving, planning and gating read.

use super::query::RunQuery;
use diesel::sql_types::{Array, BigInt, Binary, Bool, Integer, Nullable, SmallInt, Text};
use diesel_async::AsyncPgConnection;

use super::fail::{Attempt, Fail};
use super::ids;
use super::rows::{choice, device_state, token};
use super::statement::constant;
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

/// Choices of the row's device, as columns, looked up only where `has_choice` says that there are any. `$2` is the event
/// type.
macro_rules! device_choices {
    () => {
        "CASE d.has_choice WHEN 1 THEN (SELECT o.opted_in FROM opt_in o \
         WHERE o.user_key = d.user_key AND o.device = d.id AND o.event_type = '') END, \
         CASE d.has_choice WHEN 1 THEN (SELECT o.opted_in FROM opt_in o \
         WHERE o.user_key = d.user_key AND o.device = d.id AND o.event_type = $2) END"
    };
}

/// The choices of a user; `$user` is SQL. Joins, for a sub-query opens its cursor anew in every row.
macro_rules! choice_joins {
    ($user:literal) => {
        concat!(
            " LEFT JOIN opt_in all_types ON all_types.user_key = ",
            $user,
            " AND all_types.device = 0 AND all_types.event_type = '' LEFT JOIN opt_in this_type ON this_type.user_key = ",
            $user,
            " AND this_type.device = 0 AND this_type.event_type = $2"
        )
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
pub(super) async fn facts_of_targets(
    conn: &mut AsyncPgConnection,
    event_type: &EventType,
    targets: &[Target],
) -> Attempt<Vec<Option<TargetFacts>>> {
    let mut facts: Vec<Option<TargetFacts>> = vec![None; targets.len()];
    let rows = constant!(
        FactTypes;
        concat!(
            "SELECT e.n - 1, d.id, d.user_key, d.state, d.route, d.seal_key, d.token_sealed, d.locale, \
             all_types.opted_in, this_type.opted_in, ",
            device_choices!(),
            " FROM unnest($1) WITH ORDINALITY AS e(value, n) JOIN device d ON d.id = e.value",
            choice_joins!("d.user_key")
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

type PersonTypes = (
    BigInt,
    Nullable<BigInt>,
    Nullable<BigInt>,
    Nullable<SmallInt>,
    Nullable<Binary>,
    Nullable<Text>,
    Nullable<SmallInt>,
    Nullable<SmallInt>,
    Nullable<SmallInt>,
    Nullable<SmallInt>,
);

type PersonRow = (
    i64,
    Option<i64>,
    Option<i64>,
    Option<i16>,
    Option<Vec<u8>>,
    Option<String>,
    Option<i16>,
    Option<i16>,
    Option<i16>,
    Option<i16>,
);

/// [`PersonRow`] without the device's own choices.
type UserRow = (i64, Option<i64>, Option<i64>, Option<i16>, Option<Vec<u8>>, Option<String>, Option<i16>, Option<i16>);

/// A person's choice: for all event types or for this one.
type ChoiceTypes = (BigInt, Bool, SmallInt);

type ChoiceRow = (i64, bool, i16);

type RangeTypes = (BigInt, BigInt, BigInt, SmallInt, Binary, Nullable<Text>, Nullable<SmallInt>, Nullable<SmallInt>);

type RangeRow = (i64, i64, i64, i16, Vec<u8>, Option<String>, Option<i16>, Option<i16>);

impl People {
    /// Users who are not packed ([`super::reach`]; ascending, distinct) on all their active devices, with tokens. Joined
    /// and sorted by the server they would cost a third more. Only the indexes named begin with what is asked for, so that
    /// there is no other plan to choose, whatever it was made for.
    pub async fn of_rows(conn: &mut AsyncPgConnection, event_type: &EventType, users: &[UserKey]) -> Attempt<Self> {
        let keys = ids(users.iter().map(|user| user.0));
        // opt_in's primary key, which holds the answer
        let mut choices: Vec<ChoiceRow> = constant!(
            ChoiceTypes;
            "SELECT c.user_key, c.event_type = '', c.opted_in FROM opt_in c WHERE c.user_key = ANY ($1) \
             AND c.device = 0 AND (c.event_type = '' OR c.event_type = $2)",
            Array<BigInt> => &keys, Text => event_type.as_str(),
        )
        .load(conn)
        .await?;
        // device_by_user
        let mut devices: Vec<RangeRow> = constant!(
            RangeTypes;
            concat!(
                "SELECT d.user_key, d.id, d.route, d.seal_key, d.token_sealed, d.locale, ",
                device_choices!(),
                " FROM device d WHERE d.user_key = ANY ($1) AND d.state + 0 = 1"
            ),
            Array<BigInt> => &keys, Text => event_type.as_str(),
        )
        .load(conn)
        .await?;
        choices.sort_by_key(|row| row.0);
        devices.sort_by_key(|row| row.0);
        Self::merge(users, choices, devices)
    }

    /// All three ascending by user; people who were not asked for are passed over.
    fn merge(users: &[UserKey], choices: Vec<ChoiceRow>, devices: Vec<RangeRow>) -> Attempt<Self> {
        let mut found = Self { people: Vec::with_capacity(users.len()), facts: Vec::with_capacity(devices.len()) };
        let (mut choices, mut devices) = (choices.into_iter().peekable(), devices.into_iter().peekable());
        for user in users {
            let (mut all, mut this_type) = (None, None);
            while let Some((of, is_all, opted_in)) = choices.next_if(|(of, ..)| *of <= user.0) {
                if of == user.0 {
                    *(if is_all { &mut all } else { &mut this_type }) = Some(opted_in);
                }
            }
            let mut is_reachable = false;
            while let Some(row) = devices.next_if(|row| row.0 <= user.0) {
                let (of, device, route, seal_key, sealed, locale, device_all, device_type) = row;
                if of == user.0 {
                    is_reachable = true;
                    let row = (of, Some(device), Some(route), Some(seal_key), Some(sealed), locale, all, this_type);
                    found.add(row, (device_all, device_type))?;
                }
            }
            if !is_reachable {
                found.add((user.0, None, None, None, None, None, all, this_type), (None, None))?;
            }
        }
        found.sort();
        Ok(found)
    }

    /// The same for many events at once: each wanted person with the place of the event and its type. In the order of
    /// the places; an event without people is left out. Laterals, for a join whose plan was made for few rows may read all
    /// choices of everybody for each person; a person's own are few, and found with one way down the index.
    pub async fn of_event_rows(
        conn: &mut AsyncPgConnection,
        places: &[i32],
        users: &[i64],
        event_types: &[&str],
    ) -> Attempt<Vec<(usize, Self)>> {
        let rows: Vec<(i32, PersonRow)> = constant!(
            (Integer, PersonTypes);
            "SELECT e.place, e.value, d.id, d.route, d.seal_key, d.token_sealed, d.locale, \
                 own.all_types, own.this_type, \
                 CASE d.has_choice WHEN 1 THEN (SELECT o.opted_in FROM opt_in o \
                 WHERE o.user_key = d.user_key AND o.device = d.id AND o.event_type = '') END, \
                 CASE d.has_choice WHEN 1 THEN (SELECT o.opted_in FROM opt_in o \
                 WHERE o.user_key = d.user_key AND o.device = d.id AND o.event_type = e.event_type) END \
                 FROM unnest($1, $2, $3) AS e(place, value, event_type) \
                 LEFT JOIN LATERAL (SELECT * FROM device WHERE user_key = e.value AND state + 0 = 1 OFFSET 0) AS d ON TRUE \
                 LEFT JOIN LATERAL (SELECT max(opted_in) FILTER (WHERE event_type = '') AS all_types, \
                 max(opted_in) FILTER (WHERE event_type = e.event_type) AS this_type \
                 FROM opt_in WHERE user_key = e.value AND device = 0) AS own ON TRUE ORDER BY e.place, e.value",
            Array<Integer> => places, Array<BigInt> => users, Array<Text> => event_types,
        )
        .load(conn)
        .await?;
        let mut events: Vec<(usize, Self)> = Vec::new();
        for (place, row) in rows {
            let place = usize::try_from(place).map_err(|_| Fail::corrupt("a negative place"))?;
            if events.last().is_none_or(|(last, _)| *last != place) {
                events.push((place, Self::default()));
            }
            let (user, device, route, seal_key, sealed, locale, all, this_type, device_all, device_type) = row;
            let found = &mut events.last_mut().expect("pushed above when it was not there").1;
            found.add((user, device, route, seal_key, sealed, locale, all, this_type), (device_all, device_type))?;
        }
        for (_, found) in &mut events {
            found.sort();
        }
        Ok(events)
    }

    fn add(&mut self, row: UserRow, of_device: (Option<i16>, Option<i16>)) -> Attempt<()> {
        let (user, device, route, seal_key, sealed, locale, all, this_type) = row;
        let (device_all, device_type) = of_device;
        let user_choice = UserChoice { all: choice(all), this_type: choice(this_type) };
        self.person(UserKey(user), user_choice);
        let (Some(device), Some(route)) = (device, route) else { return Ok(()) };
        let device_choice = DeviceChoice { all: choice(device_all), this_type: choice(device_type) };
        let token = token(seal_key.unwrap_or(0), sealed.unwrap_or_default())?;
        self.add_device(DeviceId(device), RouteId(route), token, locale.as_deref(), device_choice);
        Ok(())
    }

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
