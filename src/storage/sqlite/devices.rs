//! Devices: registration, rotation, moves, tombstones.
//!
//! A row belongs to one user for life, so queued pushes to it can never reach somebody else: the same token (or the
//! same app install) under another user retires the old row as MOVED and makes a new one. A retired row is a tombstone:
//! what was observed before it was retired no longer counts.

use diesel::sql_types::{BigInt, Binary, Nullable, SmallInt, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{OptionalExtension, RunQueryDsl};
use sha2::{Digest, Sha256};

use super::dead::{self, is_active, select_devices};
use super::fail::{Attempt, Fail};
use super::group::Tx;
use super::history::log_retirement;
use super::people::{ensure_user, user_key};
use super::rows::{DeviceRow, DeviceTypes};
use super::statement::constant;
use crate::domain::deny::DenyKey;
use crate::domain::device::{
    Device, DeviceRef, MAX_DEVICES_PER_USER, Registered, Registration, Retirement, UNCHANGED_FOR_MS,
};
use crate::domain::ids::{AppKey, DeviceId, UserId, UserKey};
use crate::domain::platform::{DeviceToken, Platform};
use crate::domain::time::UnixMs;
use crate::planted;
use crate::storage::reach::{Change, ReachDevice};
use crate::storage::{ImportEffect, Page, StoreError};

/// Rows of one token, or of one install, that are looked at. There is one per user who ever had it.
const MAX_ROWS: i64 = 64;

const MOVED: &str = "MOVED";
const REPLACED: &str = "REPLACED";
const UNREGISTERED: &str = "UNREGISTERED";
const TOO_MANY_DEVICES: &str = "TOO_MANY_DEVICES";

/// Half of a SHA-256: what makes a token findable without its bytes in an index.
pub(super) fn token_hash(token: &DeviceToken) -> [u8; 16] {
    let digest = Sha256::digest(token.expose().as_bytes());
    let mut half = [0; 16];
    half.copy_from_slice(&digest[..16]);
    half
}

/// The row a registration would leave as it is, read without the writer: most registrations repeat.
pub(super) fn unchanged(
    conn: &mut SqliteConnection,
    registration: &Registration,
    now: UnixMs,
) -> Attempt<Option<Registered>> {
    let hash = token_hash(&registration.token);
    let row = active_by_token(conn, registration.app, registration.platform, &hash)?;
    match row {
        Some(row) if row.user == registration.user.as_str() && stands(&row, registration, now)? => {
            Ok(Some(Registered { device: row.into_domain()?, created: false }))
        }
        _ => Ok(None),
    }
}

/// The row says the same, was written less than an hour ago, and not by something observed later.
fn stands(row: &DeviceRow, registration: &Registration, now: UnixMs) -> Attempt<bool> {
    Ok(row.observed_at <= registration.observed_at.0
        && now.0 - row.confirmed_at < UNCHANGED_FOR_MS
        && says_the_same(row, registration)?)
}

fn says_the_same(row: &DeviceRow, registration: &Registration) -> Attempt<bool> {
    if registration.device.is_some_and(|device| device.0 != row.id) {
        return Ok(false);
    }
    let details = &registration.details;
    let labels: crate::domain::device::Labels = serde_json::from_str(&row.labels)?;
    Ok(row.route == registration.route.0
        && row.kind == registration.kind as i16
        && row.installation_id == registration.installation_id
        && row.locale.as_deref() == details.locale.as_ref().map(crate::domain::ids::Locale::as_str)
        && row.time_zone == details.time_zone
        && row.app_version == details.app_version
        && row.os_version == details.os_version
        && row.permission == details.permission as i16
        && labels == details.labels)
}

/// A device and whose it is.
type Owned = (DeviceId, UserKey);

/// What a registration comes to.
enum Decision {
    /// Something observed later stands. Their own row, where they ever had one.
    Stale(Option<i64>),
    /// The active row of the token says the same, and that is enough.
    Stands(i64),
    Write {
        rows: Rows,
        /// Other users' rows of the token that are retired already. A platform may have done that, of which nobody was
        /// told: what was gated before still waits for this phone.
        dead: Vec<DeviceId>,
        /// `None`: never seen before.
        user: Option<UserKey>,
    },
}

/// The rows that a registration changes.
struct Rows {
    /// Let go of the token or the install first, with state and reason.
    retired: Vec<(Owned, i16, &'static str)>,
    /// Their own row that it goes into; `None`: a new one.
    target: Option<i64>,
    /// It is retired, and lives again.
    revives: bool,
}

/// When a registration that says the same is not written.
#[derive(Clone, Copy)]
enum Repeat {
    /// It was confirmed within the hour.
    Within(UnixMs),
    /// It was observed at the same time.
    SameTime,
}

fn decide(
    conn: &mut SqliteConnection,
    registration: &Registration,
    hash: &[u8; 16],
    repeat: Repeat,
) -> Attempt<Decision> {
    let app = registration.app;
    let user = user_key(conn, app, &registration.user)?;
    let is_theirs = |row: &DeviceRow| Some(UserKey(row.user_key)) == user;

    let named = match registration.device {
        None => None,
        Some(device) => match by_id(conn, device)? {
            Some(row) if row.app == app.0 && is_theirs(&row) && row.platform == registration.platform.code() => {
                Some(row)
            }
            _ => return Err(StoreError::DeviceNotFound { devices: vec![device] }.into()),
        },
    };
    let of_token = by_token(conn, app, registration.platform, hash)?;
    let of_install = match &registration.installation_id {
        None => Vec::new(),
        Some(install) => by_installation(conn, app, registration, install)?,
    };

    let observed_at = registration.observed_at.0;
    // What is said now is later than anything, whatever another clock, or this one before it was set back, has observed.
    let said_now = matches!(repeat, Repeat::Within(now) if now.0 == observed_at);
    let newer = |row: &&DeviceRow| row.observed_at > observed_at && !said_now;
    // Somebody else's row that was only moved on says nothing about this user's claim; one that was unregistered does.
    let speaks = |row: &&DeviceRow| row.is_active() || is_theirs(row) || row.state == 2;
    let stale = named.iter().any(|row| newer(&row))
        || of_token.iter().filter(speaks).any(|row| newer(&row))
        || of_install.iter().any(|row| newer(&row));

    let own = |rows: &[DeviceRow], active: bool| {
        rows.iter().filter(|row| row.is_active() == active && is_theirs(row)).map(|row| row.id).next()
    };
    let target = named
        .as_ref()
        .map(|row| row.id)
        .or_else(|| own(&of_token, true))
        .or_else(|| own(&of_install, true))
        .or_else(|| own(&of_token, false));
    if stale {
        return Ok(Decision::Stale(target));
    }
    if let Some(row) = of_token.iter().find(|row| Some(row.id) == target && row.is_active()) {
        let stands = match repeat {
            Repeat::Within(now) => stands(row, registration, now)?,
            Repeat::SameTime => row.observed_at == observed_at && says_the_same(row, registration)?,
        };
        if stands {
            return Ok(Decision::Stands(row.id));
        }
    }
    let revives = named.iter().chain(&of_token).any(|row| Some(row.id) == target && !row.is_active());
    let dead = of_token.iter().filter(|row| row.state == 2 && !is_theirs(row)).map(|row| DeviceId(row.id)).collect();
    let let_go = of_token.into_iter().chain(of_install).filter(|row| row.is_active() && Some(row.id) != target);
    let retired = let_go
        .map(|row| {
            let (state, reason) = if is_theirs(&row) { (2, REPLACED) } else { (3, MOVED) };
            ((DeviceId(row.id), UserKey(row.user_key)), state, reason)
        })
        .collect();
    Ok(Decision::Write { rows: Rows { retired, target, revives }, dead, user })
}

/// The times of a row that a registration writes.
#[derive(Clone, Copy)]
struct Written {
    created_at: UnixMs,
    confirmed_at: UnixMs,
}

pub(super) fn register(tx: &mut Tx<'_>, registration: &Registration, now: UnixMs) -> Attempt<Registered> {
    let hash = token_hash(&registration.token);
    let written = Written { created_at: now, confirmed_at: now };
    match decide(tx.conn, registration, &hash, Repeat::Within(now))? {
        Decision::Stands(id) | Decision::Stale(Some(id)) => {
            Ok(Registered { device: read(tx.conn, id)?, created: false })
        }
        // Theirs once, and somebody else's by now: kept as such, so that the caller learns of it.
        Decision::Stale(None) => {
            let id = insert(tx, registration, &hash, Some(MOVED), written, now)?;
            Ok(Registered { device: read(tx.conn, id)?, created: true })
        }
        Decision::Write { rows, dead, user: _ } => {
            recall(tx, &dead);
            let target = rows.target;
            let id = write(tx, registration, &hash, rows, written, now)?;
            let device = read_row(tx.conn, id)?;
            let user = UserKey(device.user_key);
            tx.changed.push((user, change(id, registration, target)));
            evict(tx, user, Some(id), now)?;
            report(tx, user, registration)?;
            Ok(Registered { device: device.into_domain()?, created: target.is_none() })
        }
    }
}

/// A device moved in from elsewhere, with its own times. Unlike a call it leaves no row where something later stands: there
/// is nobody to be told of one.
pub(super) fn import(
    tx: &mut Tx<'_>,
    registration: &Registration,
    created_at: UnixMs,
    now: UnixMs,
) -> Attempt<ImportEffect> {
    let hash = token_hash(&registration.token);
    let Decision::Write { rows, dead, user } = decide(tx.conn, registration, &hash, Repeat::SameTime)? else {
        return Ok(ImportEffect::Unchanged);
    };
    recall(tx, &dead);
    let target = rows.target;
    let written = Written { created_at, confirmed_at: registration.observed_at };
    let id = write(tx, registration, &hash, rows, written, now)?;
    let known = user;
    let user = match known {
        None => user_key(tx.conn, registration.app, &registration.user)?,
        known => known,
    };
    let user = user.ok_or_else(|| Fail::corrupt("a user's row vanished"))?;
    // Before others go, for it may be among them.
    tx.changed.push((user, change(id, registration, target)));
    if known.is_some() {
        evict(tx, user, None, now)?;
    }
    report(tx, user, registration)?;
    Ok(ImportEffect::Applied)
}

/// What a registration changes of its person, by the row it took the place of.
fn change(id: i64, registration: &Registration, target: Option<i64>) -> Change {
    Change::With { device: ReachDevice::of(DeviceId(id), registration), is_new: target.is_none() }
}

/// What [`import`] would do.
pub(super) fn assess(conn: &mut SqliteConnection, registration: &Registration) -> Attempt<ImportEffect> {
    let hash = token_hash(&registration.token);
    Ok(match decide(conn, registration, &hash, Repeat::SameTime)? {
        Decision::Write { .. } => ImportEffect::Applied,
        Decision::Stale(_) | Decision::Stands(_) => ImportEffect::Unchanged,
    })
}

/// What waits for these devices passes its gate again, which ends it.
fn recall(tx: &mut Tx<'_>, devices: &[DeviceId]) {
    for device in devices {
        tx.deny(DenyKey::Device(*device));
    }
}

/// The old rows let go of the token before the new one takes it. The row written, whose person is to be packed anew.
fn write(
    tx: &mut Tx<'_>,
    registration: &Registration,
    hash: &[u8; 16],
    Rows { retired, target, revives }: Rows,
    written: Written,
    now: UnixMs,
) -> Attempt<i64> {
    for (device, state, reason) in retired {
        if state == 3 && planted::is("moved-token-stays") {
            continue;
        }
        retire(tx, device, state, reason, now)?;
    }
    let Some(id) = target else { return insert(tx, registration, hash, None, written, now) };
    update(tx, id, registration, hash, written.confirmed_at)?;
    if revives && !planted::is("dead-not-forgotten") {
        dead::forget(tx, DeviceId(id))?;
    }
    // What was queued holds the old token or route: the gate reads the new one.
    tx.deny(DenyKey::Device(DeviceId(id)));
    Ok(id)
}

fn insert(
    tx: &mut Tx<'_>,
    registration: &Registration,
    hash: &[u8; 16],
    retired: Option<&str>,
    written: Written,
    now: UnixMs,
) -> Attempt<i64> {
    let user = ensure_user(tx, registration.app, &registration.user, now)?;
    let id = tx.next_device(now).0;
    let details = &registration.details;
    tx.execute(constant!(
        ();
        "INSERT INTO device (id, app, platform, user_key, route, kind, installation_id, token_hash, token_sealed, \
         locale, time_zone, app_version, os_version, permission, labels, observed_at, confirmed_at, state, \
         retired_reason, retired_at, created_at) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21)",
        BigInt => id, BigInt => registration.app.0, SmallInt => registration.platform.code(), BigInt => user.0,
        BigInt => registration.route.0, SmallInt => registration.kind as i16,
        Nullable<Text> => registration.installation_id.as_deref(), Binary => &hash[..],
        Binary => registration.token.expose().as_bytes(),
        Nullable<Text> => details.locale.as_ref().map(crate::domain::ids::Locale::as_str),
        Nullable<Text> => details.time_zone.as_deref(), Nullable<Text> => details.app_version.as_deref(),
        Nullable<Text> => details.os_version.as_deref(), SmallInt => details.permission as i16,
        Text => serde_json::to_string(&details.labels)?, BigInt => registration.observed_at.0,
        BigInt => written.confirmed_at.0, SmallInt => if retired.is_some() { 3 } else { 1 },
        Nullable<Text> => retired, Nullable<BigInt> => retired.map(|_| now.0), BigInt => written.created_at.0,
    ))?;
    if let Some(reason) = retired {
        log_retirement(tx, DeviceId(id), reason, now)?;
    }
    Ok(id)
}

/// Also brings a retired row back to life. `confirmed_at` never goes back.
fn update(tx: &mut Tx<'_>, id: i64, registration: &Registration, hash: &[u8; 16], confirmed_at: UnixMs) -> Attempt<()> {
    let details = &registration.details;
    tx.execute(constant!(
        ();
        "UPDATE device SET route = ?2, kind = ?3, installation_id = ?4, token_hash = ?5, token_sealed = ?6, \
         seal_key = 0, locale = ?7, time_zone = ?8, app_version = ?9, os_version = ?10, permission = ?11, labels = ?12, \
         observed_at = max(observed_at, ?13), confirmed_at = max(confirmed_at, ?14), state = 1, retired_reason = NULL, \
         retired_at = NULL, hold_until = CASE WHEN doubted_at IS NULL THEN hold_until END, doubted_at = NULL WHERE id = ?1",
        BigInt => id, BigInt => registration.route.0, SmallInt => registration.kind as i16,
        Nullable<Text> => registration.installation_id.as_deref(), Binary => &hash[..],
        Binary => registration.token.expose().as_bytes(),
        Nullable<Text> => details.locale.as_ref().map(crate::domain::ids::Locale::as_str),
        Nullable<Text> => details.time_zone.as_deref(), Nullable<Text> => details.app_version.as_deref(),
        Nullable<Text> => details.os_version.as_deref(), SmallInt => details.permission as i16,
        Text => serde_json::to_string(&details.labels)?, BigInt => registration.observed_at.0,
        BigInt => confirmed_at.0,
    ))?;
    Ok(())
}

fn retire(tx: &mut Tx<'_>, (device, user): Owned, state: i16, reason: &str, now: UnixMs) -> Attempt<()> {
    tx.execute(constant!(
        (); "UPDATE device SET state = ?2, retired_reason = ?3, retired_at = ?4 WHERE id = ?1",
        BigInt => device.0, SmallInt => state, Text => reason, BigInt => now.0,
    ))?;
    log_retirement(tx, device, reason, now)?;
    tx.changed.push((user, Change::Without(device)));
    tx.deny(DenyKey::Device(device));
    Ok(())
}

/// Retires the devices seen longest ago beyond the limit; never the one that just registered (`kept`).
fn evict(tx: &mut Tx<'_>, user: UserKey, kept: Option<i64>, now: UnixMs) -> Attempt<()> {
    let room = i64::try_from(MAX_DEVICES_PER_USER).unwrap_or(i64::MAX) - i64::from(kept.is_some());
    // device_by_user
    let surplus: Vec<i64> = constant!(
        BigInt;
        concat!(
            "SELECT d.id FROM device d JOIN app_user u ON u.id = d.user_key WHERE d.user_key = ?1 AND ", is_active!(),
            " AND d.id <> ?2 ORDER BY d.confirmed_at DESC, d.id DESC LIMIT -1 OFFSET ?3 + 0"
        ),
        BigInt => user.0, BigInt => kept.unwrap_or(0), BigInt => room,
    )
    .load(tx.conn)?;
    for device in surplus.into_iter().filter(|_| !planted::is("no-limit-of-devices")) {
        retire(tx, (DeviceId(device), user), 2, TOO_MANY_DEVICES, now)?;
    }
    Ok(())
}

/// The person's time zone and language are the latest that any of their devices reported.
fn report(tx: &mut Tx<'_>, user: UserKey, registration: &Registration) -> Attempt<()> {
    let details = &registration.details;
    if details.time_zone.is_none() && details.locale.is_none() {
        return Ok(());
    }
    tx.execute(constant!(
        ();
        "UPDATE app_user SET time_zone = coalesce(?2, time_zone), locale = coalesce(?3, locale), time_zone_at = ?4 \
         WHERE id = ?1 AND coalesce(time_zone_at, 0) <= ?4",
        BigInt => user.0, Nullable<Text> => details.time_zone.as_deref(),
        Nullable<Text> => details.locale.as_ref().map(crate::domain::ids::Locale::as_str),
        BigInt => registration.observed_at.0,
    ))?;
    Ok(())
}

pub(super) fn unregister(
    tx: &mut Tx<'_>,
    app: AppKey,
    user: Option<&UserId>,
    device: &DeviceRef,
    observed_at: UnixMs,
    now: UnixMs,
) -> Attempt<bool> {
    let row = match device {
        DeviceRef::Id(id) => match by_id(tx.conn, *id)? {
            Some(row) if row.app != app.0 => return Err(StoreError::DeviceNotFound { devices: vec![*id] }.into()),
            row => row,
        },
        DeviceRef::Token(platform, token) => {
            let rows = by_token(tx.conn, app, *platform, &token_hash(token))?;
            // The active one, else the tombstone that the user (if named) left last.
            let theirs = |row: &DeviceRow| row.is_active() || user.is_none_or(|user| row.user == user.as_str());
            rows.into_iter().filter(theirs).max_by_key(|row| (row.is_active(), row.observed_at, row.id))
        }
    };
    let Some(row) = row else { return Ok(false) };
    let id = DeviceId(row.id);
    if user.is_some_and(|user| row.user != user.as_str()) {
        return Err(StoreError::DeviceNotFound { devices: vec![id] }.into());
    }
    // What is said now is later than anything, whatever another clock, or this one before it was set back, has observed.
    if row.observed_at > observed_at.0 && observed_at != now {
        return Ok(false);
    }
    if row.is_active() {
        retire(tx, (id, UserKey(row.user_key)), 2, UNREGISTERED, now)?;
    }
    // Also on a tombstone: an even later "no" outlives what was observed before it.
    if row.observed_at < observed_at.0 {
        tx.execute(constant!(
            (); "UPDATE device SET observed_at = ?2 WHERE id = ?1", BigInt => id.0, BigInt => observed_at.0,
        ))?;
    }
    Ok(row.is_active())
}

/// A platform found the token dead. A registration confirmed later than it knew survives; else whose device it was.
/// Publishes nothing: there is no push to a dead token to hold back, unless somebody else registers it (see [`recall`]).
/// Its line in the history is the caller's to write.
pub(super) fn retire_dead(tx: &mut Tx<'_>, app: AppKey, dead: &Retirement, now: UnixMs) -> Attempt<Option<UserKey>> {
    let since = if planted::is("retired-in-spite-of-registration") { i64::MAX } else { dead.since.unwrap_or(now).0 };
    dead::name(tx, app, dead, since, now)
}

pub(super) fn list(
    conn: &mut SqliteConnection,
    app: AppKey,
    user: &UserId,
    after: Option<DeviceId>,
    limit: usize,
) -> Attempt<Page<Device, DeviceId>> {
    let Some(user) = user_key(conn, app, user)? else { return Ok(Page { items: Vec::new(), next: None }) };
    // device_by_user
    let rows: Vec<DeviceRow> = constant!(
        DeviceTypes; select_devices!("WHERE d.user_key = ?1 AND d.id > ?2 ORDER BY d.id LIMIT ?3 + 0"),
        BigInt => user.0, BigInt => after.unwrap_or_default().0, BigInt => super::page_limit(limit),
    )
    .load(conn)?;
    let items = rows.into_iter().map(DeviceRow::into_domain).collect::<Attempt<Vec<_>>>()?;
    Ok(super::page(items, limit, |device| device.id))
}

pub(super) fn owner(conn: &mut SqliteConnection, app: AppKey, device: DeviceId) -> Attempt<UserId> {
    match by_id(conn, device)? {
        Some(row) if row.app == app.0 => Ok(UserId::trusted(&row.user)),
        _ => Err(StoreError::DeviceNotFound { devices: vec![device] }.into()),
    }
}

/// The newest rows of one user, oldest first, for an explanation.
pub(super) fn of_user(conn: &mut SqliteConnection, user: UserKey) -> Attempt<Vec<Device>> {
    let mut rows: Vec<DeviceRow> = constant!(
        DeviceTypes; select_devices!("WHERE d.user_key = ?1 ORDER BY d.id DESC LIMIT 200"), BigInt => user.0,
    )
    .load(conn)?;
    rows.reverse();
    rows.into_iter().map(DeviceRow::into_domain).collect()
}

pub(super) fn by_id(conn: &mut SqliteConnection, device: DeviceId) -> Attempt<Option<DeviceRow>> {
    Ok(constant!(DeviceTypes; select_devices!("WHERE d.id = ?1"), BigInt => device.0).get_result(conn).optional()?)
}

fn read_row(conn: &mut SqliteConnection, id: i64) -> Attempt<DeviceRow> {
    by_id(conn, DeviceId(id))?.ok_or_else(|| Fail::corrupt("a device row vanished"))
}

fn read(conn: &mut SqliteConnection, id: i64) -> Attempt<Device> {
    read_row(conn, id)?.into_domain()
}

fn active_by_token(
    conn: &mut SqliteConnection,
    app: AppKey,
    platform: Platform,
    hash: &[u8; 16],
) -> Attempt<Option<DeviceRow>> {
    // device_by_token
    Ok(constant!(
        DeviceTypes;
        select_devices!(
            "WHERE d.app = ?1 AND d.platform = ?2 AND d.plugin = '' AND d.token_hash = ?3 AND ", is_active!()
        ),
        BigInt => app.0, SmallInt => platform.code(), Binary => &hash[..],
    )
    .get_result(conn)
    .optional()?)
}

/// The active row of a token, if any, and then the retired ones, newest first.
fn by_token(conn: &mut SqliteConnection, app: AppKey, platform: Platform, hash: &[u8; 16]) -> Attempt<Vec<DeviceRow>> {
    // device_by_token
    let mut rows: Vec<DeviceRow> = constant!(
        DeviceTypes;
        select_devices!(
            "WHERE d.app = ?1 AND d.platform = ?2 AND d.plugin = '' AND d.token_hash = ?3 ORDER BY d.id DESC \
             LIMIT ?4 + 0"
        ),
        BigInt => app.0, SmallInt => platform.code(), Binary => &hash[..], BigInt => MAX_ROWS,
    )
    .load(conn)?;
    match rows.iter().position(DeviceRow::is_active) {
        Some(at) => rows[..=at].rotate_right(1),
        // A phone that more people than that have had, and an old one has it again.
        None if i64::try_from(rows.len()).is_ok_and(|rows| rows == MAX_ROWS) => {
            rows.splice(..0, active_by_token(conn, app, platform, hash)?);
        }
        None => {}
    }
    Ok(rows)
}

/// Active rows of an app install, on the platform and of the kind that registers.
fn by_installation(
    conn: &mut SqliteConnection,
    app: AppKey,
    registration: &Registration,
    install: &str,
) -> Attempt<Vec<DeviceRow>> {
    // device_by_installation
    Ok(constant!(
        DeviceTypes;
        select_devices!(
            "WHERE d.app = ?1 AND d.installation_id = ?2 AND ", is_active!(), " AND d.platform = ?3 AND d.kind = ?4 \
             ORDER BY d.id DESC LIMIT ?5 + 0"
        ),
        BigInt => app.0, Text => install, SmallInt => registration.platform.code(),
        SmallInt => registration.kind as i16, BigInt => MAX_ROWS,
    )
    .load(conn)?)
}
