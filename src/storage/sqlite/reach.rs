//! Reads people by their packed reach, and keeps it true. See [`crate::storage::reach`].

use diesel::sql_types::{BigInt, Binary, Nullable, SmallInt, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{Connection, OptionalExtension, RunQueryDsl};

use super::dead::is_active;
use super::fail::{Attempt, Fail};
use super::group::Tx;
use super::homes::{by_name, home};
use super::rows::{flag, json_ids, token};
use super::statement::constant;
use crate::domain::ids::{AppKey, DeviceId, EventType, UserId, UserKey};
use crate::planted;
use crate::storage::people::People;
use crate::storage::reach::{self, Change, Reach, ReachDevice};

/// Rows in a range of users, for each of those wanted, beyond which it is not read.
const ROWS_A_PERSON: usize = 3;
/// People in the middle of a page by whom it is told whether strangers lie between them.
const SAMPLE: usize = 16;
/// With more people than this among the sample, each is looked up: half of a range's rows in vain cost as much.
const CROWDED: usize = SAMPLE + SAMPLE / 2;
/// People packed at once where all are.
const CHUNK: i64 = 2_000;
/// That everybody was packed, in `watermark`.
const PACKED: &str = "reach";

/// A person's key, and their reach where it is packed.
type Row = (i64, Option<Vec<u8>>);

/// `users` (ascending, distinct) on all their active devices, with tokens: most are handed over at once.
pub(super) fn of_users(conn: &mut SqliteConnection, event_type: &EventType, users: &[UserKey]) -> Attempt<People> {
    // app_user's primary key
    let rows: Vec<Row> = constant!(
        (BigInt, Nullable<Binary>);
        "SELECT e.value, u.reach FROM json_each(?1) AS e LEFT JOIN app_user u ON u.id = e.value",
        Text => json_ids(users.iter().map(|user| user.0)),
    )
    .load(conn)?;
    collect(conn, event_type, rows)
}

/// The person with this name, as [`of_users`]; nobody when there is no such row. What a comment's event asks for: one
/// statement, without JSON.
pub(super) fn of_name(
    conn: &mut SqliteConnection,
    app: AppKey,
    event_type: &EventType,
    user: &UserId,
) -> Attempt<People> {
    // app_user's primary key; app_user_by_name
    let rows: Vec<Row> = constant!(
        (BigInt, Nullable<Binary>); by_name!("id, reach"),
        BigInt => home(app, user).0, BigInt => app.0, Text => user.as_str(),
    )
    .load(conn)?;
    collect(conn, event_type, rows)
}

/// People of a page (ascending, distinct), as [`of_users`].
pub(super) fn of_page(conn: &mut SqliteConnection, event_type: &EventType, users: &[UserKey]) -> Attempt<People> {
    match of_range(conn, event_type, users)? {
        Some(found) => Ok(found),
        None => of_users(conn, event_type, users),
    }
}

/// The same for people who follow each other closely, as nearly all of a broadcast do: everything between the first and
/// the last is read in the order of the keys, for a step to the next row costs a fraction of a look-up. `None` when too
/// much else lies between them; what is read is bounded.
pub(super) fn of_range(
    conn: &mut SqliteConnection,
    event_type: &EventType,
    users: &[UserKey],
) -> Attempt<Option<People>> {
    let (Some(first), Some(last)) = (users.first(), users.last()) else { return Ok(Some(People::default())) };
    if is_crowded(conn, users)? {
        return Ok(None);
    }
    let most = ROWS_A_PERSON * users.len();
    // app_user's primary key
    let rows: Vec<Row> = constant!(
        (BigInt, Nullable<Binary>);
        "SELECT id, reach FROM app_user WHERE id >= ?1 AND id <= ?2 ORDER BY id LIMIT ?3 + 0",
        BigInt => first.0, BigInt => last.0, BigInt => i64::try_from(most).unwrap_or(i64::MAX).saturating_add(1),
    )
    .load(conn)?;
    if rows.len() > most {
        return Ok(None);
    }
    let mut rows = rows.into_iter().peekable();
    let mut wanted = Vec::with_capacity(users.len());
    for user in users {
        while rows.next_if(|(id, _)| *id < user.0).is_some() {}
        wanted.push(rows.next_if(|(id, _)| *id == user.0).unwrap_or((user.0, None)));
    }
    collect(conn, event_type, wanted).map(Some)
}

/// Whether many others lie between these people (ascending, distinct). A few microseconds a page.
fn is_crowded(conn: &mut SqliteConnection, users: &[UserKey]) -> Attempt<bool> {
    let middle = (users.len() / 2).saturating_sub(SAMPLE / 2);
    let Some([first, .., last]) = users.get(middle..middle + SAMPLE) else { return Ok(false) };
    let limit = i64::try_from(CROWDED + 1).unwrap_or(i64::MAX);
    // app_user's primary key
    let people: i64 = constant!(
        BigInt; "SELECT count(*) FROM (SELECT 1 FROM app_user WHERE id >= ?1 AND id <= ?2 LIMIT ?3 + 0)",
        BigInt => first.0, BigInt => last.0, BigInt => limit,
    )
    .get_result(conn)?;
    Ok(people == limit)
}

/// `rows` ascending by user. Who is not packed, or has no row any more, is read from the rows of devices and choices.
fn collect(conn: &mut SqliteConnection, event_type: &EventType, rows: Vec<Row>) -> Attempt<People> {
    let mut found =
        People { people: Vec::with_capacity(rows.len()), facts: Vec::with_capacity(rows.len() + rows.len() / 4) };
    let mut unpacked = Vec::new();
    for (user, packed) in rows {
        match packed {
            None => unpacked.push(UserKey(user)),
            Some(packed) => reach::unpack(&mut found, UserKey(user), event_type, &packed)
                .ok_or_else(|| Fail::corrupt(format!("the reach of user {user}")))?,
        }
    }
    found.append(of_rows(conn, event_type, &unpacked)?);
    Ok(found)
}

/// As [`of_users`], by the rows that a reach repeats: for the few whose reach is too large to be packed.
pub(super) fn of_rows(conn: &mut SqliteConnection, event_type: &EventType, users: &[UserKey]) -> Attempt<People> {
    let mut found = People::default();
    for user in users {
        let reach = read(conn, *user, *user)?.pop().map(|(_, _, reach)| reach).unwrap_or_default();
        reach.add_to(&mut found, *user, event_type);
    }
    Ok(found)
}

/// A person's key, what is packed of them, and what should be.
type Found = (i64, Option<Vec<u8>>, Reach);

type DeviceTypes = (BigInt, BigInt, BigInt, SmallInt, Binary, Nullable<Text>);
type DeviceRow = (i64, i64, i64, i16, Vec<u8>, Option<String>);
type ChoiceRow = (i64, i64, String, i16);

/// Everybody between two keys.
fn read(conn: &mut SqliteConnection, first: UserKey, last: UserKey) -> Attempt<Vec<Found>> {
    // app_user's primary key
    let people: Vec<Row> = constant!(
        (BigInt, Nullable<Binary>); "SELECT id, reach FROM app_user WHERE id >= ?1 AND id <= ?2 ORDER BY id",
        BigInt => first.0, BigInt => last.0,
    )
    .load(conn)?;
    // device_by_user
    let devices: Vec<DeviceRow> = constant!(
        DeviceTypes;
        concat!(
            "SELECT d.user_key, d.id, d.route, d.seal_key, d.token_sealed, d.locale \
             FROM device d CROSS JOIN app_user u ON u.id = d.user_key \
             WHERE d.user_key >= ?1 AND d.user_key <= ?2 AND +", is_active!(), " ORDER BY d.user_key, d.id"
        ),
        BigInt => first.0, BigInt => last.0,
    )
    .load(conn)?;
    // opt_in's primary key
    let choices: Vec<ChoiceRow> = constant!(
        (BigInt, BigInt, Text, SmallInt);
        "SELECT user_key, device, event_type, opted_in FROM opt_in \
         WHERE user_key >= ?1 AND user_key <= ?2 ORDER BY user_key, device, event_type",
        BigInt => first.0, BigInt => last.0,
    )
    .load(conn)?;
    let (mut devices, mut choices) = (devices.into_iter().peekable(), choices.into_iter().peekable());
    let mut all = Vec::with_capacity(people.len());
    for (user, packed) in people {
        let mut reach = Reach::default();
        while let Some((of, id, route, seal_key, sealed, locale)) = devices.next_if(|row| row.0 <= user) {
            if of == user {
                let token = token(seal_key, sealed)?;
                reach.devices.push(ReachDevice { id, route, token, locale, choices: Vec::new() });
            }
        }
        while let Some((of, device, event_type, opted_in)) = choices.next_if(|row| row.0 <= user) {
            let choice = (event_type, flag(opted_in));
            if of != user {
            } else if device == 0 {
                reach.choices.push(choice);
            } else if let Ok(at) = reach.devices.binary_search_by_key(&device, |device| device.id) {
                reach.devices[at].choices.push(choice);
            }
        }
        all.push((user, packed, reach));
    }
    Ok(all)
}

/// Packs anew whom a step has changed, before anybody reads them.
pub(super) fn pack_changed(tx: &mut Tx<'_>) -> Attempt<()> {
    for (user, change) in std::mem::take(&mut tx.changed) {
        if !planted::is("reach-not-packed-anew") {
            pack_change(tx.conn, user, change)?;
        }
    }
    Ok(())
}

/// In what is packed where that is possible: the rows lie at random places.
fn pack_change(conn: &mut SqliteConnection, user: UserKey, change: Change) -> Attempt<()> {
    if matches!(change, Change::Anything) {
        return pack_between(conn, user, user);
    }
    let before: Option<Option<Vec<u8>>> =
        constant!(Nullable<Binary>; "SELECT reach FROM app_user WHERE id = ?1", BigInt => user.0)
            .get_result(conn)
            .optional()?;
    // Too large until now.
    let Some(before) = before.flatten() else { return pack_between(conn, user, user) };
    let mut reach = packed_reach(user, &before)?;
    if !reach.apply(change) {
        return pack_between(conn, user, user);
    }
    let packed = reach.pack();
    if packed.as_deref() == Some(&before[..]) {
        return Ok(());
    }
    write(conn, user, packed.as_deref())
}

fn packed_reach(user: UserKey, packed: &[u8]) -> Attempt<Reach> {
    Reach::read(packed).ok_or_else(|| Fail::corrupt(format!("the reach of user {}", user.0)))
}

/// What was packed of somebody, without a device. `None` for what was not packed.
pub(super) fn without(user: UserKey, packed: Option<&[u8]>, device: DeviceId) -> Attempt<Option<Vec<u8>>> {
    let Some(packed) = packed else { return Ok(None) };
    let mut reach = packed_reach(user, packed)?;
    reach.apply(Change::Without(device));
    Ok(reach.pack())
}

fn write(conn: &mut SqliteConnection, user: UserKey, packed: Option<&[u8]>) -> Attempt<()> {
    constant!(
        (); "UPDATE app_user SET reach = ?2 WHERE id = ?1", BigInt => user.0, Nullable<Binary> => packed,
    )
    .execute(conn)?;
    Ok(())
}

fn pack_between(conn: &mut SqliteConnection, first: UserKey, last: UserKey) -> Attempt<()> {
    for (user, before, reach) in read(conn, first, last)? {
        let packed = reach.pack();
        if packed != before {
            write(conn, UserKey(user), packed.as_deref())?;
        }
    }
    Ok(())
}

/// Everybody, once: in a database that was filled before there was such a thing. Some microseconds a person.
pub(super) fn pack_all_once(conn: &mut SqliteConnection) -> Attempt<()> {
    let packed: i64 =
        constant!(BigInt; "SELECT count(*) FROM watermark WHERE name = ?1", Text => PACKED).get_result(conn)?;
    if packed > 0 {
        return Ok(());
    }
    // app_user's primary key
    let anybody: i64 = constant!(BigInt; "SELECT EXISTS (SELECT 1 FROM app_user)").get_result(conn)?;
    if anybody > 0 {
        tracing::info!("packing how people can be reached, once: some ten seconds for a million");
    }
    pack_all(conn)?;
    constant!((); "INSERT INTO watermark (name, value) VALUES (?1, 1)", Text => PACKED).execute(conn)?;
    Ok(())
}

pub(super) fn pack_all(conn: &mut SqliteConnection) -> Attempt<()> {
    let mut after = i64::MIN;
    loop {
        // app_user's primary key
        let users: Vec<i64> = constant!(
            BigInt; "SELECT id FROM app_user WHERE id > ?1 ORDER BY id LIMIT ?2 + 0", BigInt => after, BigInt => CHUNK,
        )
        .load(conn)?;
        let (Some(first), Some(last)) = (users.first(), users.last()) else { return Ok(()) };
        conn.transaction(|conn| pack_between(conn, UserKey(*first), UserKey(*last)))?;
        after = *last;
    }
}

/// Whose packed reach is not what their rows say.
#[cfg(test)]
pub(super) fn differing(conn: &mut SqliteConnection) -> Attempt<Vec<i64>> {
    let all = read(conn, UserKey(i64::MIN), UserKey(i64::MAX))?;
    Ok(all.into_iter().filter(|(_, packed, reach)| *packed != reach.pack()).map(|(user, ..)| user).collect())
}
