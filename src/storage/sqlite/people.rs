//! Users and topics by name, and people with their devices and choices: what resolving, planning and gating read.

use diesel::sql_types::{BigInt, Binary, Nullable, SmallInt, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{OptionalExtension, QueryResult, RunQueryDsl};

use super::fail::{Attempt, Fail};
use super::group::Tx;
use super::rows::{choice, device_state, json_ids, token};
use super::statement::constant;
use crate::domain::consent::{DeviceChoice, DeviceFacts, DeviceState, UserChoice};
use crate::domain::device::Labels;
use crate::domain::ids::{AppKey, DeviceId, EventType, Locale, RouteId, Topic, UserId, UserKey};
use crate::domain::notification::TargetFacts;
use crate::domain::plan::Person;
use crate::domain::platform::DeviceToken;
use crate::domain::targets::Target;
use crate::domain::time::UnixMs;
use crate::storage::StoreError;

pub(super) fn user_key(conn: &mut SqliteConnection, app: AppKey, user: &UserId) -> QueryResult<Option<UserKey>> {
    // app_user_by_name
    let key: Option<i64> = constant!(
        BigInt; "SELECT id FROM app_user WHERE app = ?1 AND external_id = ?2", BigInt => app.0, Text => user.as_str(),
    )
    .get_result(conn)
    .optional()?;
    Ok(key.map(UserKey))
}

/// The user's row, made on mention. Writes: only after every refusal.
pub(super) fn ensure_user(tx: &mut Tx<'_>, app: AppKey, user: &UserId, now: UnixMs) -> Attempt<UserKey> {
    if let Some(key) = user_key(tx.conn, app, user)? {
        return Ok(key);
    }
    let id = tx.next_id(now);
    insert_user(tx, app, UserKey(id), user, now)?;
    Ok(UserKey(id))
}

pub(super) fn insert_user(tx: &mut Tx<'_>, app: AppKey, key: UserKey, user: &UserId, now: UnixMs) -> Attempt<()> {
    tx.execute(constant!(
        (); "INSERT INTO app_user (id, app, external_id, created_at) VALUES (?1, ?2, ?3, ?4)",
        BigInt => key.0, BigInt => app.0, Text => user.as_str(), BigInt => now.0,
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

/// Choices of the row's user and device, as columns. `?2` is the event type. The user's come from `choice_joins`.
macro_rules! choices {
    () => {
        concat!("all_types.opted_in, this_type.opted_in, ", device_choices!())
    };
}

/// Looked up only where `has_choice` says that there are any.
macro_rules! device_choices {
    () => {
        "CASE d.has_choice WHEN 1 THEN (SELECT o.opted_in FROM opt_in o \
         WHERE o.user_key = d.user_key AND o.device = d.id AND o.event_type = '') END, \
         CASE d.has_choice WHEN 1 THEN (SELECT o.opted_in FROM opt_in o \
         WHERE o.user_key = d.user_key AND o.device = d.id AND o.event_type = ?2) END"
    };
}

/// What [`choices`] reads; `$user` is SQL. Joins, for a sub-query opens its cursor anew in every row.
macro_rules! choice_joins {
    ($user:literal) => {
        concat!(
            " LEFT JOIN opt_in all_types ON all_types.user_key = ",
            $user,
            " AND all_types.device = 0 AND all_types.event_type = '' LEFT JOIN opt_in this_type ON this_type.user_key = ",
            $user,
            " AND this_type.device = 0 AND this_type.event_type = ?2"
        )
    };
}

/// The user's own choices, a row each: which of the two it is, and the answer. One way down the tree for both, where
/// [`choice_joins`] goes two: the plus sign keeps SQLite from looking for each of them. The rows of a device follow each
/// other, and [`People::collect`] makes one of them.
macro_rules! own_choices {
    () => {
        concat!("(own.event_type = ''), own.opted_in, ", device_choices!())
    };
}

/// What [`own_choices`] reads; `$user` is SQL.
macro_rules! own_choice_join {
    ($user:literal) => {
        concat!(
            " LEFT JOIN opt_in own ON own.user_key = ",
            $user,
            " AND own.device = 0 AND +own.event_type IN ('', ?2)"
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
pub(super) fn facts_of_targets(
    conn: &mut SqliteConnection,
    event_type: &EventType,
    targets: &[Target],
) -> Attempt<Vec<Option<TargetFacts>>> {
    let mut facts: Vec<Option<TargetFacts>> = vec![None; targets.len()];
    let rows = constant!(
        FactTypes;
        concat!(
            "SELECT e.key, d.id, d.user_key, d.state, d.route, d.seal_key, d.token_sealed, d.locale, ",
            choices!(),
            " FROM json_each(?1) AS e CROSS JOIN device d ON d.id = e.value",
            choice_joins!("d.user_key")
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

/// A person's choice: 1 for all event types, 2 for this one, 0 another.
type ChoiceRow = (i64, i16, i16);

type RangeTypes =
    (BigInt, BigInt, SmallInt, BigInt, SmallInt, Binary, Nullable<Text>, Nullable<SmallInt>, Nullable<SmallInt>);

type RangeRow = (i64, i64, i16, i64, i16, Vec<u8>, Option<String>, Option<i16>, Option<i16>);

/// Rows in a range of users, for each of those wanted, beyond which it is not read.
const ROWS_A_PERSON: usize = 3;
/// People in the middle of a page by whom it is told whether strangers lie between them.
const SAMPLE: usize = 16;
/// With more people than this among the sample, each is looked up: half of a range's rows in vain cost as much.
const CROWDED: usize = SAMPLE + SAMPLE / 2;

/// People ascending by user, and the facts of every device they may be reached on, ascending by (user, device).
#[derive(Default)]
pub(super) struct People {
    pub people: Vec<Person>,
    pub facts: Vec<TargetFacts>,
}

impl People {
    /// `users` (ascending, distinct) on all their active devices, with tokens: most are handed over at once.
    pub fn of_users(conn: &mut SqliteConnection, event_type: &EventType, users: &[UserKey]) -> Attempt<Self> {
        // device_by_user holds every column of `d`
        let rows = constant!(
            PersonTypes;
            concat!(
                "SELECT e.value, d.id, d.route, d.seal_key, d.token_sealed, d.locale, ",
                own_choices!(),
                " FROM json_each(?1) AS e LEFT JOIN device d ON d.user_key = e.value AND d.state = 1",
                own_choice_join!("e.value")
            ),
            Text => json_ids(users.iter().map(|user| user.0)), Text => event_type.as_str(),
        )
        .load_iter::<PersonRow, diesel::connection::DefaultLoadingMode>(conn)?;
        Self::collect(rows)
    }

    /// The person with this name, as [`People::of_users`]; nobody when there is no such row. What a comment's event asks
    /// for: one statement, without JSON.
    pub fn of_name(conn: &mut SqliteConnection, app: AppKey, event_type: &EventType, user: &UserId) -> Attempt<Self> {
        // app_user_by_name; device_by_user
        let rows = constant!(
            PersonTypes;
            concat!(
                "SELECT e.id, d.id, d.route, d.seal_key, d.token_sealed, d.locale, ",
                own_choices!(),
                " FROM app_user e LEFT JOIN device d ON d.user_key = e.id AND d.state = 1",
                own_choice_join!("e.id"),
                " WHERE e.app = ?1 AND e.external_id = ?3"
            ),
            BigInt => app.0, Text => event_type.as_str(), Text => user.as_str(),
        )
        .load_iter::<PersonRow, diesel::connection::DefaultLoadingMode>(conn)?;
        Self::collect(rows)
    }

    /// People of a page (ascending, distinct), as [`People::of_users`].
    pub fn of_page(conn: &mut SqliteConnection, event_type: &EventType, users: &[UserKey]) -> Attempt<Self> {
        match Self::of_range(conn, event_type, users)? {
            Some(found) => Ok(found),
            None => Self::of_users(conn, event_type, users),
        }
    }

    /// The same for people who follow each other closely, as nearly all of a broadcast do: everything between the first and
    /// the last is read in the order of the keys, for a step to the next row costs a fraction of a look-up. `None` when too
    /// much else lies between them; every row counts for that, so that what is read is bounded.
    pub fn of_range(conn: &mut SqliteConnection, event_type: &EventType, users: &[UserKey]) -> Attempt<Option<Self>> {
        let (Some(first), Some(last)) = (users.first(), users.last()) else { return Ok(Some(Self::default())) };
        if is_crowded(conn, users)? {
            return Ok(None);
        }
        let most = ROWS_A_PERSON * users.len();
        let limit = i64::try_from(most).unwrap_or(i64::MAX).saturating_add(1);
        // opt_in's primary key
        let choices: Vec<ChoiceRow> = constant!(
            (BigInt, SmallInt, SmallInt);
            "SELECT c.user_key, CASE WHEN c.device <> 0 THEN 0 WHEN c.event_type = '' THEN 1 WHEN c.event_type = ?2 THEN 2 \
             ELSE 0 END, c.opted_in FROM opt_in c WHERE c.user_key >= ?1 AND c.user_key <= ?3 ORDER BY c.user_key \
             LIMIT ?4 + 0",
            BigInt => first.0, Text => event_type.as_str(), BigInt => last.0, BigInt => limit,
        )
        .load(conn)?;
        if choices.len() > most {
            return Ok(None);
        }
        // device_by_user holds every column
        let devices: Vec<RangeRow> = constant!(
            RangeTypes;
            concat!(
                "SELECT d.user_key, d.id, d.state, d.route, d.seal_key, d.token_sealed, d.locale, ",
                device_choices!(),
                " FROM device d WHERE d.user_key >= ?1 AND d.user_key <= ?3 ORDER BY d.user_key, d.id LIMIT ?4 + 0"
            ),
            BigInt => first.0, Text => event_type.as_str(), BigInt => last.0, BigInt => limit,
        )
        .load(conn)?;
        if devices.len() > most {
            return Ok(None);
        }
        Ok(Some(Self::merge(users, choices, devices)?))
    }

    /// All three ascending by user; rows of people who were not asked for are passed over.
    fn merge(users: &[UserKey], choices: Vec<ChoiceRow>, devices: Vec<RangeRow>) -> Attempt<Self> {
        let mut found = Self { people: Vec::with_capacity(users.len()), facts: Vec::with_capacity(devices.len()) };
        let (mut choices, mut devices) = (choices.into_iter().peekable(), devices.into_iter().peekable());
        for user in users {
            let mut user_choice = UserChoice { all: None, this_type: None };
            while let Some((of, which, opted_in)) = choices.next_if(|(of, ..)| *of <= user.0) {
                match which {
                    1 if of == user.0 => user_choice.all = choice(Some(opted_in)),
                    2 if of == user.0 => user_choice.this_type = choice(Some(opted_in)),
                    _ => {}
                }
            }
            found.people.push(Person { user: *user, choice: user_choice, devices: Vec::new() });
            while let Some(row) = devices.next_if(|row| row.0 <= user.0) {
                let (of, device, state, route, seal_key, sealed, locale, device_all, device_type) = row;
                if of == user.0 && device_state(state)? == DeviceState::Active {
                    let choice = DeviceChoice { all: choice(device_all), this_type: choice(device_type) };
                    found.add_device(
                        DeviceId(device),
                        RouteId(route),
                        token(seal_key, sealed)?,
                        locale.as_deref(),
                        choice,
                    );
                }
            }
        }
        Ok(found)
    }

    fn collect(rows: impl Iterator<Item = QueryResult<PersonRow>>) -> Attempt<Self> {
        let mut found = Self::default();
        for row in rows {
            let (user, device, route, seal_key, sealed, locale, is_of_all, opted_in, device_all, device_type) = row?;
            let person = found.person(UserKey(user));
            match is_of_all {
                None => {}
                Some(0) => person.choice.this_type = choice(opted_in),
                Some(_) => person.choice.all = choice(opted_in),
            }
            let (Some(device), Some(route)) = (device.map(DeviceId), route.map(RouteId)) else { continue };
            if person.devices.last().is_some_and(|(last, _)| *last == device) {
                // Another choice of theirs.
                continue;
            }
            let device_choice = DeviceChoice { all: choice(device_all), this_type: choice(device_type) };
            let token = token(seal_key.unwrap_or(0), sealed.unwrap_or_default())?;
            found.add_device(device, route, token, locale.as_deref(), device_choice);
        }
        // Both are by user, in the order asked.
        let mut people = found.people.iter();
        let mut person = people.next();
        for facts in &mut found.facts {
            while person.is_some_and(|person| person.user != facts.target.user) {
                person = people.next();
            }
            if let Some(person) = person {
                facts.user_choice = person.choice;
            }
        }
        found.sort();
        Ok(found)
    }

    /// A left join yields one user's rows together and users in the order asked; nothing promises it for devices, and
    /// sorting what is sorted costs less here than an ORDER BY does in SQLite.
    fn sort(&mut self) {
        for person in &mut self.people {
            person.devices.sort_unstable_by_key(|(device, _)| *device);
        }
        self.people.sort_by_key(|person| person.user);
        self.facts.sort_unstable_by_key(|facts| facts.target);
    }

    /// Adds people named by device only, on just those devices whatever their state. `targets`: sorted, of people who
    /// are not here yet.
    pub fn add_devices(
        &mut self,
        conn: &mut SqliteConnection,
        event_type: &EventType,
        targets: &[Target],
    ) -> Attempt<()> {
        if targets.is_empty() {
            return Ok(());
        }
        let mut others = Self::default();
        for found in facts_of_targets(conn, event_type, targets)?.into_iter().flatten() {
            let person = others.person(found.target.user);
            person.choice = found.user_choice;
            person.devices.push((found.target.device, facts(found.state, found.route, found.device_choice)));
            others.facts.push(found);
        }
        self.people.append(&mut others.people);
        self.facts.append(&mut others.facts);
        self.sort();
        Ok(())
    }

    pub fn facts_of(&self, target: Target) -> Option<&TargetFacts> {
        let at = self.facts.binary_search_by_key(&target, |facts| facts.target).ok()?;
        self.facts.get(at)
    }

    /// Somebody who has no row yet, and so neither devices nor choices.
    pub fn stranger(user: UserKey) -> Self {
        let choice = UserChoice { all: None, this_type: None };
        Self { people: vec![Person { user, choice, devices: Vec::new() }], facts: Vec::new() }
    }

    /// An active device of the last person.
    fn add_device(
        &mut self,
        device: DeviceId,
        route: RouteId,
        token: DeviceToken,
        locale: Option<&str>,
        device_choice: DeviceChoice,
    ) {
        let person = self.people.last_mut().expect("a person comes before their devices");
        person.devices.push((device, facts(DeviceState::Active, route, device_choice)));
        self.facts.push(TargetFacts {
            target: Target { user: person.user, device },
            state: DeviceState::Active,
            route,
            token,
            locale: locale.map(Locale::trusted),
            user_choice: person.choice,
            device_choice,
        });
    }

    /// The last one, or a new one without choices.
    fn person(&mut self, user: UserKey) -> &mut Person {
        if self.people.last().is_none_or(|last| last.user != user) {
            let choice = UserChoice { all: None, this_type: None };
            self.people.push(Person { user, choice, devices: Vec::new() });
        }
        self.people.last_mut().expect("pushed above when it was not there")
    }
}

/// Whether many others lie between these people (ascending, distinct), as far as they have made choices. A few microseconds
/// a page.
fn is_crowded(conn: &mut SqliteConnection, users: &[UserKey]) -> QueryResult<bool> {
    let middle = (users.len() / 2).saturating_sub(SAMPLE / 2);
    let Some([first, .., last]) = users.get(middle..middle + SAMPLE) else { return Ok(false) };
    let limit = i64::try_from(ROWS_A_PERSON * SAMPLE).unwrap_or(i64::MAX);
    // opt_in's primary key
    let (rows, people): (i64, i64) = constant!(
        (BigInt, BigInt);
        "SELECT count(*), count(DISTINCT user_key) FROM (SELECT user_key FROM opt_in WHERE user_key >= ?1 AND user_key <= ?2 \
         ORDER BY user_key LIMIT ?3 + 0)",
        BigInt => first.0, BigInt => last.0, BigInt => limit,
    )
    .get_result(conn)?;
    Ok(rows == limit || usize::try_from(people).is_ok_and(|people| people > CROWDED))
}

/// Planning decides about the route and the allow-list; until then they are taken for good.
fn facts(state: DeviceState, route: RouteId, choice: DeviceChoice) -> DeviceFacts {
    DeviceFacts { state, route, route_known: true, allowed_here: true, choice }
}
