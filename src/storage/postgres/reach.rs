//! Reads people by their packed reach. See [`crate::storage::reach`]; [`super::repack`] keeps it true.
//!
//! Who is not packed is read by rows: nobody has packed them yet, they are too large, or somebody who does not pack has
//! changed them. So is who was packed by a later version in a way that is not known here.

use std::collections::BTreeMap;

use diesel::sql_types::{Array, BigInt, Binary, Nullable, SmallInt, Text};
use diesel_async::AsyncPgConnection;

use super::fail::Attempt;
use super::query::RunQuery;
use super::rows::{flag, token};
use super::statement::constant;
use super::{dead, ids};
use crate::domain::ids::{EventType, UserKey};
use crate::storage::people::People;
use crate::storage::reach::{self, Reach, ReachDevice};

/// People in a range of keys, for each of those wanted, up to which it is worth reading the whole.
const CROWDED: usize = 3;

/// Somebody's key, and their reach where it is packed.
pub(super) type Packed = (UserKey, Option<Vec<u8>>);

/// As it is read.
type Row = (i64, Option<Vec<u8>>);

/// `users` (ascending, distinct) on all their active devices, with tokens, for a hand-over.
pub(super) async fn of_users(
    conn: &mut AsyncPgConnection,
    event_type: &EventType,
    users: &[UserKey],
) -> Attempt<People> {
    if users.is_empty() {
        return Ok(People::default());
    }
    // app_user's primary key
    let mut rows: Vec<Row> = constant!(
        (BigInt, Nullable<Binary>); "SELECT id, reach FROM app_user WHERE id = ANY ($1)",
        Array<BigInt> => ids(users.iter().map(|user| user.0)),
    )
    .load(conn)
    .await?;
    rows.sort_unstable_by_key(|row| row.0);
    collect(conn, event_type, wanted(users, rows)).await
}

/// The same for users who follow each other closely: everything between the first and the last is read in the order of
/// the keys, at a fraction of the cost of looking each of them up. `None` when too many others lie between them.
pub(super) async fn of_range(
    conn: &mut AsyncPgConnection,
    event_type: &EventType,
    users: &[UserKey],
) -> Attempt<Option<People>> {
    let (Some(first), Some(last)) = (users.first(), users.last()) else { return Ok(Some(People::default())) };
    let most = CROWDED * users.len();
    // app_user's primary key
    let rows: Vec<Row> = constant!(
        (BigInt, Nullable<Binary>);
        "SELECT id, reach FROM app_user WHERE id >= $1 AND id <= $2 ORDER BY id LIMIT $3 + 1",
        BigInt => first.0, BigInt => last.0, BigInt => i64::try_from(most).unwrap_or(i64::MAX - 1),
    )
    .load(conn)
    .await?;
    if rows.len() > most {
        return Ok(None);
    }
    collect(conn, event_type, wanted(users, rows)).await.map(Some)
}

/// Both ascending. Who has no row has nothing packed; who was not asked for is passed over.
fn wanted(users: &[UserKey], rows: Vec<Row>) -> Vec<Packed> {
    let mut rows = rows.into_iter().peekable();
    let mut wanted = Vec::with_capacity(users.len());
    for user in users {
        while rows.next_if(|(id, _)| *id < user.0).is_some() {}
        wanted.push((*user, rows.next_if(|(id, _)| *id == user.0).and_then(|(_, packed)| packed)));
    }
    wanted
}

/// `users` ascending and distinct.
async fn collect(conn: &mut AsyncPgConnection, event_type: &EventType, users: Vec<Packed>) -> Attempt<People> {
    let mut found =
        People { people: Vec::with_capacity(users.len()), facts: Vec::with_capacity(users.len() + users.len() / 4) };
    let mut unpacked = Vec::new();
    for (user, packed) in users {
        if !unpack(&mut found, user, event_type, packed.as_deref()) {
            unpacked.push(user);
        }
    }
    found.append(by_rows(conn, event_type, &unpacked).await?);
    Ok(found)
}

/// `users` (ascending, distinct) who are not packed, as [`of_users`].
pub(super) async fn by_rows(
    conn: &mut AsyncPgConnection,
    event_type: &EventType,
    users: &[UserKey],
) -> Attempt<People> {
    let mut reaches = of_rows(conn, users.iter().map(|user| user.0).collect()).await?;
    let mut found = People::default();
    for user in users {
        reaches.remove(&user.0).unwrap_or_default().add_to(&mut found, *user, event_type);
    }
    Ok(found)
}

/// Whether that could be read.
fn unpack(found: &mut People, user: UserKey, event_type: &EventType, packed: Option<&[u8]>) -> bool {
    let Some(packed) = packed else { return false };
    let (people, facts) = (found.people.len(), found.facts.len());
    if reach::unpack(found, user, event_type, packed).is_some() {
        return true;
    }
    found.people.truncate(people);
    found.facts.truncate(facts);
    false
}

/// The people of many events at once: each event's (distinct) and its type. In the order of the events.
pub(super) async fn of_events(
    conn: &mut AsyncPgConnection,
    events: Vec<(Vec<Packed>, &EventType)>,
) -> Attempt<Vec<People>> {
    let mut all = Vec::with_capacity(events.len());
    let mut unpacked = Vec::new();
    for (at, (users, event_type)) in events.into_iter().enumerate() {
        let mut found = People::default();
        for (user, packed) in users {
            if !unpack(&mut found, user, event_type, packed.as_deref()) {
                unpacked.push((at, user, event_type));
            }
        }
        all.push(found);
    }
    let reaches = of_rows(conn, unpacked.iter().map(|(_, user, _)| user.0).collect()).await?;
    for (at, user, event_type) in unpacked {
        reaches.get(&user.0).cloned().unwrap_or_default().add_to(&mut all[at], user, event_type);
    }
    all.iter_mut().for_each(People::sort);
    Ok(all)
}

type DetailTypes = (
    BigInt,
    BigInt,
    Nullable<BigInt>,
    Nullable<SmallInt>,
    Nullable<Binary>,
    Nullable<Text>,
    Nullable<Text>,
    Nullable<SmallInt>,
);

/// An active device (with a route) or a choice (with an event type).
type Detail = (i64, i64, Option<i64>, Option<i16>, Option<Vec<u8>>, Option<String>, Option<String>, Option<i16>);

/// By the rows that a reach repeats: what is to be packed of these people; nothing of who has neither devices nor choices.
/// Only the indexes named begin with what is asked for, so that there is no other plan to choose, whatever it was made for.
pub(super) async fn of_rows(conn: &mut AsyncPgConnection, users: Vec<i64>) -> Attempt<BTreeMap<i64, Reach>> {
    let mut found: BTreeMap<i64, Reach> = BTreeMap::new();
    if users.is_empty() {
        return Ok(found);
    }
    // device_by_user, opt_in's primary key
    let mut rows: Vec<Detail> = constant!(
        DetailTypes;
        concat!(
            "SELECT user_key, id, route, seal_key, token_sealed, locale, NULL, NULL FROM device \
             WHERE user_key = ANY ($1) AND ",
            dead::is_active!(""),
            " UNION ALL SELECT user_key, device, NULL, NULL, NULL, NULL, event_type, opted_in FROM opt_in \
             WHERE user_key = ANY ($1)"
        ),
        Array<BigInt> => users,
    )
    .load(conn)
    .await?;
    // Devices before choices.
    rows.sort_unstable_by(|a, b| (a.2.is_none(), a.1, &a.6).cmp(&(b.2.is_none(), b.1, &b.6)));
    for (user, device, route, seal_key, sealed, locale, event_type, opted_in) in rows {
        let reach = found.entry(user).or_default();
        if let Some(route) = route {
            let token = token(seal_key.unwrap_or(0), sealed.unwrap_or_default())?;
            reach.devices.push(ReachDevice { id: device, route, token, locale, choices: Vec::new() });
            continue;
        }
        let choice = (event_type.unwrap_or_default(), opted_in.is_some_and(flag));
        if device == 0 {
            reach.choices.push(choice);
        } else if let Ok(at) = reach.devices.binary_search_by_key(&device, |device| device.id) {
            reach.devices[at].choices.push(choice);
        }
    }
    Ok(found)
}
