//! Users and topics by name, and users' rows.

use diesel::sql_types::{Array, BigInt, Binary, Bool, Nullable, Text};
use diesel::{OptionalExtension, QueryResult};
use diesel_async::AsyncPgConnection;

use super::batch::rows_of;
use super::fail::{Attempt, Fail};
use super::ids;
use super::query::RunQuery;
use super::reach::Packed;
use super::statement::constant;
use super::tx::Tx;
use crate::domain::ids::{AppKey, IdMaker, Topic, UserId, UserKey};
use crate::domain::time::UnixMs;
use crate::storage::reach::NOBODY;

pub(super) async fn user_key(conn: &mut AsyncPgConnection, app: AppKey, user: &UserId) -> QueryResult<Option<UserKey>> {
    // app_user_by_name
    let key: Option<i64> = constant!(
        BigInt; "SELECT id FROM app_user WHERE app = $1 AND external_id = $2", BigInt => app.0, Text => user.as_str(),
    )
    .get_result(conn)
    .await
    .optional()?;
    Ok(key.map(UserKey))
}

/// The user's row, made on mention. Writes: only after every refusal.
pub(super) async fn ensure_user(tx: &mut Tx, app: AppKey, user: &UserId, now: UnixMs) -> Attempt<UserKey> {
    if let Some(key) = user_key(tx.conn(), app, user).await? {
        return Ok(key);
    }
    let id = tx.next_id(now);
    insert_user(tx, app, UserKey(id), user, now).await?;
    Ok(UserKey(id))
}

pub(super) async fn insert_user(tx: &mut Tx, app: AppKey, key: UserKey, user: &UserId, now: UnixMs) -> Attempt<()> {
    tx.execute(constant!(
        (); "INSERT INTO app_user (id, app, external_id, created_at, reach) VALUES ($1, $2, $3, $4, $5)",
        BigInt => key.0, BigInt => app.0, Text => user.as_str(), BigInt => now.0, Binary => &NOBODY[..],
    ))
    .await?;
    Ok(())
}

/// Names as columns.
fn columns<'a>(names: &[(AppKey, &'a str)]) -> (Vec<i64>, Vec<&'a str>) {
    names.iter().map(|(app, name)| (app.0, *name)).unzip()
}

/// The users of these names, each of an app, by their place.
pub(super) async fn users_by_name(
    conn: &mut AsyncPgConnection,
    names: &[(AppKey, &str)],
) -> Attempt<Vec<Option<UserKey>>> {
    Ok(people_by_name(conn, &[], names).await?.1)
}

/// The same, and a row for each who has none, made at the time given. Writes: only after every refusal.
pub(super) async fn ensure_users(
    conn: &mut AsyncPgConnection,
    makes: &IdMaker,
    named: &[(AppKey, &str, UnixMs)],
) -> Attempt<Vec<UserKey>> {
    let known = users_by_name(conn, &names(named)).await?;
    let made = insert_missing(conn, makes, named, &known).await?;
    let found = users_by_name(conn, &made.names).await?;
    made.add(found, known)
}

/// As [`ensure_users`], with what is packed of the named. Nobody makes a row for the `others`.
pub(super) async fn ensure_people(
    conn: &mut AsyncPgConnection,
    makes: &IdMaker,
    named: &[(AppKey, &str, UnixMs)],
    others: &[(AppKey, &str)],
) -> Attempt<(Vec<Packed>, Vec<Option<UserKey>>)> {
    let (known, others) = people_by_name(conn, &names(named), others).await?;
    let made = insert_missing(conn, makes, named, &known).await?;
    let (found, _) = people_by_name(conn, &made.names, &[]).await?;
    Ok((made.add(found, known)?, others))
}

fn names<'a>(named: &[(AppKey, &'a str, UnixMs)]) -> Vec<(AppKey, &'a str)> {
    named.iter().map(|(app, name, _)| (*app, *name)).collect()
}

/// Those who have a row now, to be looked up: another replica may have been faster.
struct Made<'a> {
    places: Vec<usize>,
    names: Vec<(AppKey, &'a str)>,
}

impl Made<'_> {
    /// Everybody, with those found among the known.
    fn add<T>(self, found: Vec<Option<T>>, mut known: Vec<Option<T>>) -> Attempt<Vec<T>> {
        for (place, found) in self.places.into_iter().zip(found) {
            known[place] = found;
        }
        known.into_iter().map(|user| user.ok_or_else(|| Fail::corrupt("a user's row vanished"))).collect()
    }
}

/// Rows for those of the named who are not known.
async fn insert_missing<'a, T: Sync>(
    conn: &mut AsyncPgConnection,
    makes: &IdMaker,
    named: &[(AppKey, &'a str, UnixMs)],
    known: &[Option<T>],
) -> Attempt<Made<'a>> {
    let places: Vec<usize> = (0..named.len()).filter(|place| known[*place].is_none()).collect();
    let missing: Vec<_> = places.iter().map(|place| named[*place]).collect();
    let names = names(&missing);
    if !missing.is_empty() {
        insert_users(conn, makes, missing).await?;
    }
    Ok(Made { places, names })
}

/// The named with what is packed of them, and the keys of the others, by their places.
async fn people_by_name(
    conn: &mut AsyncPgConnection,
    named: &[(AppKey, &str)],
    others: &[(AppKey, &str)],
) -> Attempt<(Vec<Option<Packed>>, Vec<Option<UserKey>>)> {
    let (mut people, mut keys) = (vec![None; named.len()], vec![None; others.len()]);
    if named.is_empty() && others.is_empty() {
        return Ok((people, keys));
    }
    let ((apps, texts), (other_apps, other_texts)) = (columns(named), columns(others));
    // app_user_by_name, which alone tells the others' keys
    let rows: Vec<(i64, bool, i64, Option<Vec<u8>>)> = constant!(
        (BigInt, Bool, BigInt, Nullable<Binary>);
        concat!(
            "SELECT e.place, TRUE, u.id, u.reach ",
            rows_of!("$1" "app", "$2" "name", "$5" "place"),
            " AS e CROSS JOIN LATERAL \
             (SELECT id, reach FROM app_user WHERE app = e.app AND external_id = e.name OFFSET 0) AS u \
             UNION ALL SELECT e.place, FALSE, u.id, NULL ",
            rows_of!("$3" "app", "$4" "name", "$6" "place"),
            " AS e CROSS JOIN LATERAL (SELECT id FROM app_user WHERE app = e.app AND external_id = e.name OFFSET 0) AS u"
        ),
        Array<BigInt> => apps, Array<Text> => texts, Array<BigInt> => other_apps, Array<Text> => other_texts,
        Array<BigInt> => places(named.len()), Array<BigInt> => places(others.len()),
    )
    .load(conn)
    .await?;
    let out_of_range = || Fail::corrupt("a position out of range");
    for (place, is_named, key, packed) in rows {
        let place = usize::try_from(place).map_err(|_| out_of_range())?;
        if is_named {
            *people.get_mut(place).ok_or_else(out_of_range)? = Some((UserKey(key), packed));
        } else {
            *keys.get_mut(place).ok_or_else(out_of_range)? = Some(UserKey(key));
        }
    }
    Ok((people, keys))
}

/// 0, 1, 2 …: the places of as many rows.
fn places(count: usize) -> Vec<i64> {
    (0..i64::try_from(count).unwrap_or(i64::MAX)).collect()
}

/// Rows for those who have none, made at the time given; of a name there may be several.
async fn insert_users(
    conn: &mut AsyncPgConnection,
    makes: &IdMaker,
    mut missing: Vec<(AppKey, &str, UnixMs)>,
) -> Attempt<()> {
    // In one order on every replica, and each once.
    missing.sort_unstable();
    missing.dedup_by_key(|(app, name, _)| (*app, *name));
    let (mut ids, mut apps, mut texts, mut times) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (app, name, now) in missing {
        ids.push(makes.next(now));
        apps.push(app.0);
        texts.push(name);
        times.push(now.0);
    }
    constant!(
        ();
        "INSERT INTO app_user (id, app, external_id, created_at, reach) SELECT u.id, u.app, u.name, u.now, $5 \
         FROM unnest($1, $2, $3, $4) WITH ORDINALITY AS u(id, app, name, now, n) ORDER BY u.n \
         ON CONFLICT (app, external_id) DO NOTHING",
        Array<BigInt> => ids, Array<BigInt> => apps, Array<Text> => texts, Array<BigInt> => times,
        Binary => &NOBODY[..],
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Until the end of the transaction nobody else changes these people's subscriptions.
pub(super) async fn lock_users(tx: &mut Tx, users: impl Iterator<Item = UserKey>) -> Attempt<()> {
    let users = ids(users.map(|user| user.0));
    tx.execute(constant!(
        (); "SELECT id FROM app_user WHERE id = ANY ($1) ORDER BY id FOR NO KEY UPDATE", Array<BigInt> => users,
    ))
    .await?;
    Ok(())
}

/// The names of users, in the order of `keys`; `None` for an erased one.
pub(super) async fn user_names(conn: &mut AsyncPgConnection, keys: &[UserKey]) -> QueryResult<Vec<Option<UserId>>> {
    let names: Vec<Option<String>> = constant!(
        Nullable<Text>;
        "SELECT u.external_id FROM unnest($1) WITH ORDINALITY AS e(value, n) LEFT JOIN app_user u ON u.id = e.value ORDER BY e.n",
        Array<BigInt> => ids(keys.iter().map(|key| key.0)),
    )
    .load(conn).await?;
    Ok(names.into_iter().map(|name| name.as_deref().map(UserId::trusted)).collect())
}

pub(super) async fn topic_key(conn: &mut AsyncPgConnection, app: AppKey, topic: &Topic) -> QueryResult<Option<i64>> {
    // topic_by_name
    constant!(BigInt; "SELECT id FROM topic WHERE app = $1 AND name = $2", BigInt => app.0, Text => topic.as_str())
        .get_result(conn)
        .await
        .optional()
}
