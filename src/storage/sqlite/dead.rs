//! Devices whose tokens a platform called dead, named in their person's row.
//!
//! A dead token ends its device and takes it out of its person's packed reach ([`super::reach`]), which is one page of the
//! database. Written into the device's row it would be another, at a random place among millions: the dearest part of
//! what a dead token costs, where nothing that is sent ever looks. So the person's row says it, in JSON: why and when, by the
//! device's number. A device is active when its own row says so and its person's does not name it: whoever asks for a
//! device's state asks by the macros here.
//!
//! The device's row gets to say so itself when its person has many of them ([`name`]), and before a move to Postgres, where there is no
//! such thing ([`settle_all`]). It is forgotten when the device registers again ([`forget`]).

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use diesel::sql_types::{BigInt, Binary, Nullable, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{OptionalExtension, RunQueryDsl};

use super::fail::Attempt;
use super::group::Tx;
use super::reach;
use super::statement::constant;
use crate::domain::device::Retirement;
use crate::domain::ids::{AppKey, DeviceId, UserKey};
use crate::domain::time::UnixMs;
use crate::planted;
use crate::storage::reach::Change;

/// Longer than this, a list goes into the rows of its devices: some eight of them. A person's row is to stay within its page.
const MAX_BYTES: usize = 512;

/// Where the row `u` of `app_user` may name a device: its entry, or a part of it.
macro_rules! entry {
    ($device:literal, $part:literal) => {
        concat!("'$.\"' || ", $device, " || '\"", $part, "'")
    };
}
pub(super) use entry;

/// As a condition, of a device's number and the row `u` of its person: that it is not named there.
macro_rules! is_unnamed {
    ($device:literal) => {
        concat!(
            "(u.dead IS NULL OR json_type(u.dead, ",
            $crate::storage::sqlite::dead::entry!($device, ""),
            ") IS NULL)"
        )
    };
}
pub(super) use is_unnamed;

/// As a condition, of the rows `d` of a device and `u` of its person.
macro_rules! is_active {
    () => {
        concat!("d.state = 1 AND ", $crate::storage::sqlite::dead::is_unnamed!("d.id"))
    };
}
pub(super) use is_active;

/// As a column, of the same rows.
macro_rules! state {
    () => {
        concat!("CASE WHEN ", $crate::storage::sqlite::dead::is_unnamed!("d.id"), " THEN d.state ELSE 2 END")
    };
}
pub(super) use state;

/// [`super::rows::select_devices`], with the state of a device as it is.
macro_rules! select_devices {
    ($($tail:tt)+) => {
        $crate::storage::rows::select_devices!(
            [
                $crate::storage::sqlite::dead::state!(),
                ", CASE WHEN u.dead IS NULL THEN d.retired_reason ELSE coalesce(json_extract(u.dead, ",
                $crate::storage::sqlite::dead::entry!("d.id", "[0]"),
                "), d.retired_reason) END, CASE WHEN u.dead IS NULL THEN d.retired_at ELSE coalesce(json_extract(u.dead, ",
                $crate::storage::sqlite::dead::entry!("d.id", "[1]"),
                "), d.retired_at) END"
            ]
            $($tail)+
        )
    };
}
pub(super) use select_devices;

/// Why and when, by the device's number.
type List = BTreeMap<String, (String, i64)>;

/// Names an active device of the app that has not been confirmed since then, and takes it out of its person's reach: one write
/// of one row. Whose it is; `None` where there is none.
pub(super) fn name(
    tx: &mut Tx<'_>,
    app: AppKey,
    dead: &Retirement,
    since: i64,
    now: UnixMs,
) -> Attempt<Option<UserKey>> {
    let found: Option<(i64, Option<Vec<u8>>, Option<String>)> = constant!(
        (BigInt, Nullable<Binary>, Nullable<Text>);
        "SELECT u.id, u.reach, u.dead FROM device d JOIN app_user u ON u.id = d.user_key \
         WHERE d.id = ?1 AND d.app = ?2 AND d.state = 1 AND d.confirmed_at <= ?3",
        BigInt => dead.device.0, BigInt => app.0, BigInt => since,
    )
    .get_result(tx.conn)
    .optional()?;
    let Some((user, packed, list)) = found else { return Ok(None) };
    let mut list: List = list.map(|list| serde_json::from_str(&list)).transpose()?.unwrap_or_default();
    let Entry::Vacant(entry) = list.entry(dead.device.0.to_string()) else { return Ok(None) };
    entry.insert((dead.reason.clone(), now.0));
    let list = serde_json::to_string(&list)?;
    let user = UserKey(user);
    let packed = reach::without(user, packed.as_deref(), dead.device)?;
    tx.execute(constant!(
        (); "UPDATE app_user SET reach = ?2, dead = ?3 WHERE id = ?1",
        BigInt => user.0, Nullable<Binary> => packed.as_deref(), Text => &*list,
    ))?;
    if packed.is_none() {
        tx.changed.push((user, Change::Anything));
    }
    if list.len() > MAX_BYTES {
        settle(tx, user)?;
    }
    Ok(Some(user))
}

/// The device's row says again what it is.
pub(super) fn forget(tx: &mut Tx<'_>, device: DeviceId) -> Attempt<()> {
    tx.execute(constant!(
        ();
        concat!(
            "UPDATE app_user SET dead = nullif(json_remove(dead, ", entry!("?1", ""), "), '{}') \
             WHERE id = (SELECT user_key FROM device WHERE id = ?1) AND dead IS NOT NULL"
        ),
        BigInt => device.0,
    ))?;
    Ok(())
}

/// The rows of the devices whose people the condition names say it themselves.
macro_rules! into_rows {
    ($people:literal) => {
        concat!(
            "UPDATE device SET state = 2, retired_reason = (SELECT json_extract(u.dead, ",
            entry!("device.id", "[0]"),
            ") FROM app_user u WHERE u.id = device.user_key), retired_at = (SELECT json_extract(u.dead, ",
            entry!("device.id", "[1]"),
            ") FROM app_user u WHERE u.id = device.user_key) \
             WHERE id IN (SELECT CAST(e.key AS INTEGER) FROM app_user u, json_each(u.dead) e WHERE ",
            $people,
            ")"
        )
    };
}

fn settle(tx: &mut Tx<'_>, user: UserKey) -> Attempt<()> {
    tx.execute(constant!((); into_rows!("u.id = ?1"), BigInt => user.0))?;
    tx.execute(constant!((); "UPDATE app_user SET dead = NULL WHERE id = ?1", BigInt => user.0))?;
    Ok(())
}

/// Everybody's, in a transaction of the caller's. Goes through all people.
pub(super) fn settle_all(conn: &mut SqliteConnection) -> Attempt<()> {
    if planted::is("moved-with-the-dead-alive") {
        return Ok(());
    }
    constant!((); into_rows!("u.dead IS NOT NULL")).execute(conn)?;
    constant!((); "UPDATE app_user SET dead = NULL WHERE dead IS NOT NULL").execute(conn)?;
    Ok(())
}
