//! Devices: registration, rotation, moves, tombstones.
//!
//! A row belongs to one user for life, so queued pushes to it can never reach somebody else: the same token (or the
//! same app install) under another user retires the old row as MOVED and makes a new one. A retired row is a tombstone:
//! what was observed before it was retired no longer counts.

use super::query::RunQuery;
use diesel::sql_types::{BigInt, Binary, Nullable, SmallInt, Text};
use diesel_async::AsyncPgConnection;
use sha2::{Digest, Sha256};

use super::device_reads::{active_by_token, by_installation, by_token, look_by_id, read, read_row};
use super::fail::{Attempt, Fail};
use super::people::{ensure_user, user_key};
use super::rows::DeviceRow;
use super::statement::constant;
use super::tx::Tx;
use crate::domain::deny::DenyKey;
use crate::domain::device::{DeviceRef, MAX_DEVICES_PER_USER, Registered, Registration, UNCHANGED_FOR_MS};
use crate::domain::ids::{AppKey, DeviceId, UserId, UserKey};
use crate::domain::platform::DeviceToken;
use crate::domain::time::UnixMs;
use crate::storage::{ImportEffect, StoreError};

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
pub(super) async fn unchanged(
    conn: &mut AsyncPgConnection,
    registration: &Registration,
    now: UnixMs,
) -> Attempt<Option<Registered>> {
    let hash = token_hash(&registration.token);
    let row = active_by_token(conn, registration.app, registration.platform, &hash).await?;
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

/// What a registration comes to.
enum Decision {
    /// Something observed later stands. Their own row, where they ever had one.
    Stale(Option<i64>),
    /// The active row of the token says the same, and that is enough.
    Stands(i64),
    Write {
        /// Rows that let go of the token or the install first, with state and reason.
        retired: Vec<(DeviceId, i16, &'static str)>,
        /// Other users' rows of the token that are retired already. A platform may have done that, of which nobody was
        /// told: what was gated before still waits for this phone.
        dead: Vec<DeviceId>,
        /// Their own row that it goes into; `None`: a new one.
        target: Option<i64>,
        /// `None`: never seen before.
        user: Option<UserKey>,
    },
}

/// When a registration that says the same is not written.
#[derive(Clone, Copy)]
enum Repeat {
    /// It was confirmed within the hour.
    Within(UnixMs),
    /// It was observed at the same time.
    SameTime,
}

/// `locked`: for a change. Nobody else changes the rows before our transaction ends.
async fn decide(
    conn: &mut AsyncPgConnection,
    registration: &Registration,
    hash: &[u8; 16],
    repeat: Repeat,
    locked: bool,
) -> Attempt<Decision> {
    let app = registration.app;
    let user = user_key(conn, app, &registration.user).await?;
    let is_theirs = |row: &DeviceRow| Some(UserKey(row.user_key)) == user;

    let named = match registration.device {
        None => None,
        Some(device) => match look_by_id(conn, device, locked).await? {
            Some(row) if row.app == app.0 && is_theirs(&row) && row.platform == registration.platform.code() => {
                Some(row)
            }
            _ => return Err(StoreError::DeviceNotFound { devices: vec![device] }.into()),
        },
    };
    let of_token = by_token(conn, app, registration.platform, hash, locked).await?;
    let of_install = match &registration.installation_id {
        None => Vec::new(),
        Some(install) => by_installation(conn, app, registration, install, locked).await?,
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
    let let_go = of_token.iter().chain(&of_install).filter(|row| row.is_active() && Some(row.id) != target);
    let retired = let_go
        .map(|row| {
            let (state, reason) = if is_theirs(row) { (2, REPLACED) } else { (3, MOVED) };
            (DeviceId(row.id), state, reason)
        })
        .collect();
    let dead = of_token.iter().filter(|row| row.state == 2 && !is_theirs(row)).map(|row| DeviceId(row.id)).collect();
    Ok(Decision::Write { retired, dead, target, user })
}

/// The times of a row that a registration writes.
#[derive(Clone, Copy)]
struct Written {
    created_at: UnixMs,
    confirmed_at: UnixMs,
}

/// Two tokens of one install at the same time: no unique index stands between them.
async fn lock_install(tx: &mut Tx, registration: &Registration) -> Attempt<()> {
    if let Some(install) = &registration.installation_id {
        tx.execute(constant!(
            (); "SELECT pg_advisory_xact_lock(hashtextextended($1, $2))",
            Text => install, BigInt => registration.app.0,
        ))
        .await?;
    }
    Ok(())
}

pub(super) async fn register(tx: &mut Tx, registration: &Registration, now: UnixMs) -> Attempt<Registered> {
    lock_install(tx, registration).await?;
    let hash = token_hash(&registration.token);
    let written = Written { created_at: now, confirmed_at: now };
    match decide(tx.conn(), registration, &hash, Repeat::Within(now), true).await? {
        Decision::Stands(id) | Decision::Stale(Some(id)) => {
            Ok(Registered { device: read(tx.conn(), id).await?, created: false })
        }
        // Theirs once, and somebody else's by now: kept as such, so that the caller learns of it.
        Decision::Stale(None) => {
            let id = insert(tx, registration, &hash, Some(MOVED), written, now).await?;
            Ok(Registered { device: read(tx.conn(), id).await?, created: true })
        }
        Decision::Write { retired, dead, target, user: _ } => {
            recall(tx, &dead);
            let id = write(tx, registration, &hash, (retired, target), written, now).await?;
            let device = read_row(tx.conn(), id).await?;
            evict(tx, UserKey(device.user_key), Some(id), now).await?;
            report(tx, UserKey(device.user_key), registration).await?;
            Ok(Registered { device: device.into_domain()?, created: target.is_none() })
        }
    }
}

/// A device moved in from elsewhere, with its own times. Unlike a call it leaves no row where something later stands: there
/// is nobody to be told of one.
pub(super) async fn import(
    tx: &mut Tx,
    registration: &Registration,
    created_at: UnixMs,
    now: UnixMs,
) -> Attempt<ImportEffect> {
    lock_install(tx, registration).await?;
    let hash = token_hash(&registration.token);
    let Decision::Write { retired, dead, target, user } =
        decide(tx.conn(), registration, &hash, Repeat::SameTime, true).await?
    else {
        return Ok(ImportEffect::Unchanged);
    };
    recall(tx, &dead);
    let written = Written { created_at, confirmed_at: registration.observed_at };
    write(tx, registration, &hash, (retired, target), written, now).await?;
    if let Some(user) = user {
        evict(tx, user, None, now).await?;
    }
    let user = match user {
        None => user_key(tx.conn(), registration.app, &registration.user).await?,
        known => known,
    };
    report(tx, user.ok_or_else(|| Fail::corrupt("a user's row vanished"))?, registration).await?;
    Ok(ImportEffect::Applied)
}

/// What [`import`] would do.
pub(super) async fn assess(conn: &mut AsyncPgConnection, registration: &Registration) -> Attempt<ImportEffect> {
    let hash = token_hash(&registration.token);
    Ok(match decide(conn, registration, &hash, Repeat::SameTime, false).await? {
        Decision::Write { .. } => ImportEffect::Applied,
        Decision::Stale(_) | Decision::Stands(_) => ImportEffect::Unchanged,
    })
}

/// What waits for these devices passes its gate again, which ends it.
fn recall(tx: &mut Tx, devices: &[DeviceId]) {
    for device in devices {
        tx.deny(DenyKey::Device(*device));
    }
}

/// The old rows let go of the token before the new one takes it. The row written.
async fn write(
    tx: &mut Tx,
    registration: &Registration,
    hash: &[u8; 16],
    (retired, target): (Vec<(DeviceId, i16, &'static str)>, Option<i64>),
    written: Written,
    now: UnixMs,
) -> Attempt<i64> {
    for (device, state, reason) in retired {
        retire(tx, device, state, reason, now).await?;
    }
    let Some(id) = target else { return insert(tx, registration, hash, None, written, now).await };
    update(tx, id, registration, hash, written.confirmed_at).await?;
    // What was queued holds the old token or route: the gate reads the new one.
    tx.deny(DenyKey::Device(DeviceId(id)));
    Ok(id)
}

async fn insert(
    tx: &mut Tx,
    registration: &Registration,
    hash: &[u8; 16],
    retired: Option<&str>,
    written: Written,
    now: UnixMs,
) -> Attempt<i64> {
    let user = ensure_user(tx, registration.app, &registration.user, now).await?;
    let id = tx.next_device(now).0;
    let details = &registration.details;
    tx.execute(constant!(
        ();
        "INSERT INTO device (id, app, platform, user_key, route, kind, installation_id, token_hash, token_sealed, \
         locale, time_zone, app_version, os_version, permission, labels, observed_at, confirmed_at, state, \
         retired_reason, retired_at, created_at) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21)",
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
    ))
    .await?;
    if let Some(reason) = retired {
        let line = tx.next_id(now);
        tx.execute(constant!(
            ();
            "INSERT INTO device_retirement (id, app, device, user_key, reason, at) VALUES ($1, $2, $3, $4, $5, $6)",
            BigInt => line, BigInt => registration.app.0, BigInt => id, BigInt => user.0, Text => reason,
            BigInt => now.0,
        ))
        .await?;
    }
    Ok(id)
}

/// Also brings a retired row back to life. `confirmed_at` never goes back.
async fn update(
    tx: &mut Tx,
    id: i64,
    registration: &Registration,
    hash: &[u8; 16],
    confirmed_at: UnixMs,
) -> Attempt<()> {
    let details = &registration.details;
    tx.execute(constant!(
        ();
        "UPDATE device SET route = $2, kind = $3, installation_id = $4, token_hash = $5, token_sealed = $6, \
         seal_key = 0, locale = $7, time_zone = $8, app_version = $9, os_version = $10, permission = $11, labels = $12, \
         observed_at = greatest(observed_at, $13), confirmed_at = greatest(confirmed_at, $14), state = 1, retired_reason = NULL, \
         retired_at = NULL, hold_until = CASE WHEN doubted_at IS NULL THEN hold_until END, doubted_at = NULL WHERE id = $1",
        BigInt => id, BigInt => registration.route.0, SmallInt => registration.kind as i16,
        Nullable<Text> => registration.installation_id.as_deref(), Binary => &hash[..],
        Binary => registration.token.expose().as_bytes(),
        Nullable<Text> => details.locale.as_ref().map(crate::domain::ids::Locale::as_str),
        Nullable<Text> => details.time_zone.as_deref(), Nullable<Text> => details.app_version.as_deref(),
        Nullable<Text> => details.os_version.as_deref(), SmallInt => details.permission as i16,
        Text => serde_json::to_string(&details.labels)?, BigInt => registration.observed_at.0,
        BigInt => confirmed_at.0,
    ))
    .await?;
    Ok(())
}

async fn retire(tx: &mut Tx, device: DeviceId, state: i16, reason: &str, now: UnixMs) -> Attempt<()> {
    let id = tx.next_id(now);
    tx.execute(constant!(
        ();
        "WITH retired AS (UPDATE device SET state = $2, retired_reason = $3, retired_at = $4 WHERE id = $1 \
         RETURNING id, app, user_key) \
         INSERT INTO device_retirement (id, app, device, user_key, reason, at) \
         SELECT $5, app, id, user_key, $3, $4 FROM retired",
        BigInt => device.0, SmallInt => state, Text => reason, BigInt => now.0, BigInt => id,
    ))
    .await?;
    tx.deny(DenyKey::Device(device));
    Ok(())
}

/// Retires the devices seen longest ago beyond the limit; never the one that just registered (`kept`).
async fn evict(tx: &mut Tx, user: UserKey, kept: Option<i64>, now: UnixMs) -> Attempt<()> {
    let room = i64::try_from(MAX_DEVICES_PER_USER).unwrap_or(i64::MAX) - i64::from(kept.is_some());
    // device_by_user
    let surplus: Vec<i64> = constant!(
        BigInt;
        "SELECT id FROM device WHERE user_key = $1 AND state + 0 = 1 AND id <> $2 \
         ORDER BY confirmed_at DESC, id DESC OFFSET $3 + 0",
        BigInt => user.0, BigInt => kept.unwrap_or(0), BigInt => room,
    )
    .load(tx.conn())
    .await?;
    for device in surplus {
        retire(tx, DeviceId(device), 2, TOO_MANY_DEVICES, now).await?;
    }
    Ok(())
}

/// The person's time zone and language are the latest that any of their devices reported.
async fn report(tx: &mut Tx, user: UserKey, registration: &Registration) -> Attempt<()> {
    let details = &registration.details;
    if details.time_zone.is_none() && details.locale.is_none() {
        return Ok(());
    }
    tx.execute(constant!(
        ();
        "UPDATE app_user SET time_zone = coalesce($2, time_zone), locale = coalesce($3, locale), time_zone_at = $4 \
         WHERE id = $1 AND coalesce(time_zone_at, 0) <= $4",
        BigInt => user.0, Nullable<Text> => details.time_zone.as_deref(),
        Nullable<Text> => details.locale.as_ref().map(crate::domain::ids::Locale::as_str),
        BigInt => registration.observed_at.0,
    ))
    .await?;
    Ok(())
}

pub(super) async fn unregister(
    tx: &mut Tx,
    app: AppKey,
    user: Option<&UserId>,
    device: &DeviceRef,
    observed_at: UnixMs,
    now: UnixMs,
) -> Attempt<bool> {
    let row = match device {
        DeviceRef::Id(id) => match look_by_id(tx.conn(), *id, true).await? {
            Some(row) if row.app != app.0 => return Err(StoreError::DeviceNotFound { devices: vec![*id] }.into()),
            row => row,
        },
        DeviceRef::Token(platform, token) => {
            let rows = by_token(tx.conn(), app, *platform, &token_hash(token), true).await?;
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
        retire(tx, id, 2, UNREGISTERED, now).await?;
    }
    // Also on a tombstone: an even later "no" outlives what was observed before it.
    if row.observed_at < observed_at.0 {
        tx.execute(constant!(
            (); "UPDATE device SET observed_at = $2 WHERE id = $1", BigInt => id.0, BigInt => observed_at.0,
        ))
        .await?;
    }
    Ok(row.is_active())
}
