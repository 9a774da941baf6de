//! Devices: registration, rotation, moves, tombstones.
//!
//! A row belongs to one user for life, so queued pushes to it can never reach somebody else: the same token (or the
//! same app install) under another user retires the old row as MOVED and makes a new one. A retired row is a tombstone:
//! what was observed before it was retired no longer counts.

use std::collections::HashSet;

use diesel::sql_types::{Array, BigInt, SmallInt, Text};
use diesel_async::AsyncPgConnection;
use sha2::{Digest, Sha256};

use super::Inner;
use super::batch::rows_of;
use super::dead::IN_PLACE;
use super::device_reads::{by_id, by_installation, by_token, lock_by_ids, lock_by_tokens};
use super::fail::Attempt;
use super::gather::{Answers, Work};
use super::rows::DeviceRow;
use super::statement::constant;
use super::tx::{Tx, step};
use super::users::user_key;
use crate::domain::deny::DenyKey;
use crate::domain::device::{DeviceRef, Registration, UNCHANGED_FOR_MS};
use crate::domain::ids::{AppKey, DeviceId, UserId, UserKey};
use crate::domain::platform::DeviceToken;
use crate::domain::time::UnixMs;
use crate::storage::reach::Change;
use crate::storage::{ImportEffect, Result, StoreError};

pub(super) const MOVED: &str = "MOVED";
const REPLACED: &str = "REPLACED";
const UNREGISTERED: &str = "UNREGISTERED";
pub(super) const TOO_MANY_DEVICES: &str = "TOO_MANY_DEVICES";

/// Half of a SHA-256: what makes a token findable without its bytes in an index.
pub(super) fn token_hash(token: &DeviceToken) -> [u8; 16] {
    let digest = Sha256::digest(token.expose().as_bytes());
    let mut half = [0; 16];
    half.copy_from_slice(&digest[..16]);
    half
}

/// The row says the same, was written less than an hour ago, and not by something observed later.
pub(super) fn stands(row: &DeviceRow, registration: &Registration, now: UnixMs) -> Attempt<bool> {
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
pub(super) enum Decision {
    /// Something observed later stands. Their own row, where they ever had one.
    Stale(Option<i64>),
    /// The active row of the token says the same, and that is enough.
    Stands(i64),
    Write {
        /// Rows that let go of the token or the install first.
        retired: Vec<Retired>,
        /// So does this one, which is retired in place.
        lets_go: Option<DeviceId>,
        /// Other users' rows of the token that are retired already. A platform may have done that, of which nobody was
        /// told: what was gated before still waits for this phone.
        dead: Vec<DeviceId>,
        /// Their own row that it goes into; `None`: a new one.
        target: Option<i64>,
        /// That row is retired.
        revives: bool,
        /// That row is active and says the same of what is packed of a person.
        reaches_alike: bool,
    },
}

/// A row that stops being active.
#[derive(Clone, Copy)]
pub(super) struct Retired {
    pub user: UserKey,
    pub device: DeviceId,
    pub state: i16,
    pub reason: &'static str,
}

/// When a registration that says the same is not written.
#[derive(Clone, Copy)]
pub(super) enum Repeat {
    /// It was confirmed within the hour.
    Within(UnixMs),
    /// It was observed at the same time.
    SameTime,
}

/// What a registration is judged by.
#[derive(Default)]
pub(super) struct Known {
    /// `None`: never seen before.
    pub user: Option<UserKey>,
    /// The row it names.
    pub named: Option<DeviceRow>,
    /// The row that holds the token, if any, and then the others, newest first.
    pub of_token: Vec<DeviceRow>,
    /// Active ones on its platform and of its kind.
    pub of_install: Vec<DeviceRow>,
}

impl Known {
    pub fn rows(&self) -> impl Iterator<Item = &DeviceRow> {
        self.named.iter().chain(&self.of_token).chain(&self.of_install)
    }

    pub fn take(self, id: i64) -> Option<DeviceRow> {
        self.named.into_iter().chain(self.of_token).chain(self.of_install).find(|row| row.id == id)
    }
}

pub(super) fn judge(registration: &Registration, known: &Known, repeat: Repeat) -> Attempt<Decision> {
    let is_theirs = |row: &DeviceRow| Some(UserKey(row.user_key)) == known.user;
    let fits = |row: &DeviceRow| {
        row.app == registration.app.0 && is_theirs(row) && row.platform == registration.platform.code()
    };
    let named = known.named.as_ref().filter(|row| fits(row));
    if let (Some(device), None) = (registration.device, named) {
        return Err(StoreError::DeviceNotFound { devices: vec![device] }.into());
    }
    let (of_token, of_install) = (&known.of_token, &known.of_install);

    let observed_at = registration.observed_at.0;
    // What is said now is later than anything, whatever another clock, or this one before it was set back, has observed.
    let said_now = matches!(repeat, Repeat::Within(now) if now.0 == observed_at);
    let newer = |row: &&DeviceRow| row.observed_at > observed_at && !said_now;
    // Somebody else's row that was only moved on says nothing about this user's claim; one that was unregistered does.
    let is_retired = |row: &DeviceRow| matches!(row.state, 2 | IN_PLACE);
    let speaks = |row: &&DeviceRow| row.is_active() || is_theirs(row) || is_retired(row);
    let stale = named.iter().any(newer)
        || of_token.iter().filter(speaks).any(|row| newer(&row))
        || of_install.iter().any(|row| newer(&row));

    let own = |rows: &[DeviceRow], active: bool| {
        rows.iter().filter(|row| row.is_active() == active && is_theirs(row)).map(|row| row.id).next()
    };
    let target = named
        .map(|row| row.id)
        .or_else(|| own(of_token, true))
        .or_else(|| own(of_install, true))
        .or_else(|| own(of_token, false));
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
    let let_go = of_token.iter().chain(of_install).filter(|row| row.is_active() && Some(row.id) != target);
    let mut retired: Vec<Retired> = Vec::new();
    for row in let_go {
        let (state, reason) = if is_theirs(row) { (2, REPLACED) } else { (3, MOVED) };
        // Found by its token and by its install it is one.
        if retired.iter().all(|other| other.device.0 != row.id) {
            retired.push(Retired { user: UserKey(row.user_key), device: DeviceId(row.id), state, reason });
        }
    }
    let dead = of_token.iter().filter(|row| is_retired(row) && !is_theirs(row)).map(|row| DeviceId(row.id)).collect();
    let lets_go =
        of_token.iter().find(|row| row.state == IN_PLACE && Some(row.id) != target).map(|row| DeviceId(row.id));
    let revives = target.is_some() && known.rows().all(|row| Some(row.id) != target || !row.is_active());
    let locale = registration.details.locale.as_ref().map(crate::domain::ids::Locale::as_str);
    let reaches_alike = of_token
        .iter()
        .filter(|row| Some(row.id) == target && row.is_active())
        .any(|row| row.route == registration.route.0 && row.locale.as_deref() == locale);
    Ok(Decision::Write { retired, lets_go, dead, target, revives, reaches_alike })
}

/// What waits for these devices passes its gate again, which ends it.
pub(super) fn recall(tx: &mut Tx, devices: &[DeviceId]) {
    for device in devices {
        tx.deny(DenyKey::Device(*device));
    }
}

/// What an import of it would do.
pub(super) async fn assess(conn: &mut AsyncPgConnection, registration: &Registration) -> Attempt<ImportEffect> {
    let app = registration.app;
    let known = Known {
        user: user_key(conn, app, &registration.user).await?,
        named: match registration.device {
            None => None,
            Some(device) => by_id(conn, device).await?,
        },
        of_token: by_token(conn, app, registration.platform, &token_hash(&registration.token)).await?,
        of_install: match &registration.installation_id {
            None => Vec::new(),
            Some(install) => by_installation(conn, app, registration, install).await?,
        },
    };
    Ok(match judge(registration, &known, Repeat::SameTime)? {
        Decision::Write { .. } => ImportEffect::Applied,
        Decision::Stale(_) | Decision::Stands(_) => ImportEffect::Unchanged,
    })
}

/// Each, which was active, with its time.
pub(super) async fn retire(tx: &mut Tx, mut retired: Vec<(Retired, UnixMs)>) -> Attempt<()> {
    if retired.is_empty() {
        return Ok(());
    }
    // In one order on every replica.
    retired.sort_unstable_by_key(|(retired, _)| retired.device);
    let (mut devices, mut states, mut reasons) = (Vec::new(), Vec::new(), Vec::new());
    let (mut times, mut lines) = (Vec::new(), Vec::new());
    for (Retired { user, device, state, reason }, now) in retired {
        devices.push(device.0);
        states.push(state);
        reasons.push(reason);
        times.push(now.0);
        lines.push(tx.context.ids.next(now));
        tx.deny(DenyKey::Device(device));
        tx.changed.push((user, Change::Without(device)));
    }
    tx.execute(constant!(
        ();
        concat!(
            "WITH retired AS (UPDATE device SET state = e.state, retired_reason = e.reason, retired_at = e.at ",
            rows_of!("$1" "id", "$2" "state", "$3" "reason", "$4" "at", "$5" "line"),
            " AS e WHERE device.id = e.id \
             RETURNING e.line, device.app, device.id, device.user_key, e.reason, e.at) \
             INSERT INTO device_retirement (id, app, device, user_key, reason, at) \
             SELECT line, app, id, user_key, reason, at FROM retired"
        ),
        Array<BigInt> => devices, Array<SmallInt> => states, Array<Text> => reasons, Array<BigInt> => times,
        Array<BigInt> => lines,
    ))
    .await?;
    Ok(())
}

/// Rows that were never active are told of as well: they were made as moved.
pub(super) async fn log_tombstones(tx: &mut Tx, made: Vec<(DeviceId, AppKey, UserKey, UnixMs)>) -> Attempt<()> {
    if made.is_empty() {
        return Ok(());
    }
    let (mut lines, mut devices, mut apps, mut users, mut times) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (device, app, user, now) in made {
        lines.push(tx.context.ids.next(now));
        devices.push(device.0);
        apps.push(app.0);
        users.push(user.0);
        times.push(now.0);
    }
    tx.execute(constant!(
        ();
        concat!(
            "INSERT INTO device_retirement (id, app, device, user_key, reason, at) \
             SELECT e.line, e.app, e.device, e.user_key, $6, e.at ",
            rows_of!("$1" "line", "$2" "app", "$3" "device", "$4" "user_key", "$5" "at"),
            " AS e"
        ),
        Array<BigInt> => lines, Array<BigInt> => apps, Array<BigInt> => devices, Array<BigInt> => users,
        Array<BigInt> => times, Text => MOVED,
    ))
    .await?;
    Ok(())
}

/// A call that ends a device.
pub(super) struct Unregister {
    pub app: AppKey,
    pub user: Option<UserId>,
    pub device: DeviceRef,
    pub observed_at: UnixMs,
    pub now: UnixMs,
}

impl Work for Unregister {
    type Answer = bool;
    const DOING: &'static str = "unregistering a device";

    fn bytes(&self) -> usize {
        let token = match &self.device {
            DeviceRef::Id(_) => 0,
            DeviceRef::Token(_, token) => token.expose().len(),
        };
        token + self.user.as_ref().map_or(0, |user| user.as_str().len())
    }

    async fn run(inner: &Inner, group: &[&Self]) -> Result<Answers<bool>> {
        step!(inner, Self::DOING, |tx| unregister(tx, group))
    }
}

async fn unregister(tx: &mut Tx, group: &[&Unregister]) -> Attempt<Answers<bool>> {
    let mut found: Vec<Vec<DeviceRow>> = group.iter().map(|_| Vec::new()).collect();
    let hashes: Vec<Option<[u8; 16]>> = group
        .iter()
        .map(|one| match &one.device {
            DeviceRef::Id(_) => None,
            DeviceRef::Token(_, token) => Some(token_hash(token)),
        })
        .collect();
    let (mut named, mut places, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
    for (place, one) in group.iter().enumerate() {
        match (&one.device, &hashes[place]) {
            (DeviceRef::Token(platform, _), Some(hash)) => {
                places.push(place);
                tokens.push((one.app, *platform, hash));
            }
            (DeviceRef::Id(id), _) => named.push((*id, place)),
            _ => {}
        }
    }
    if !named.is_empty() {
        let devices: Vec<DeviceId> = named.iter().map(|(id, _)| *id).collect();
        for row in lock_by_ids(tx.conn(), &devices).await? {
            if let Some((_, place)) = named.iter().find(|(id, _)| id.0 == row.id) {
                found[*place].push(row);
            }
        }
    }
    if !tokens.is_empty() {
        for (at, row) in lock_by_tokens(tx.conn(), &tokens).await? {
            found[places[at]].push(row);
        }
    }
    let mut touched = HashSet::new();
    let (mut answers, mut retired) = (Answers::with_capacity(group.len()), Vec::new());
    let (mut observed, mut times) = (Vec::new(), Vec::new());
    for (one, rows) in group.iter().zip(found) {
        let repeats = match &one.device {
            DeviceRef::Id(id) => !touched.insert(id.0),
            DeviceRef::Token(..) => rows.iter().any(|row| touched.contains(&row.id)),
        };
        if repeats {
            answers.push(None);
            continue;
        }
        touched.extend(rows.iter().map(|row| row.id));
        answers.push(Some(end(one, rows).map(|row| {
            let Some(row) = row else { return false };
            if row.is_active() {
                let (user, device) = (UserKey(row.user_key), DeviceId(row.id));
                let ended = Retired { user, device, state: 2, reason: UNREGISTERED };
                retired.push((ended, one.now));
            }
            // Also on a tombstone: an even later "no" outlives what was observed before it.
            if row.observed_at < one.observed_at.0 {
                observed.push(row.id);
                times.push(one.observed_at.0);
            }
            row.is_active()
        })));
    }
    retire(tx, retired).await?;
    if !observed.is_empty() {
        tx.execute(constant!(
            ();
            "UPDATE device SET observed_at = e.at FROM unnest($1, $2) AS e(id, at) WHERE device.id = e.id",
            Array<BigInt> => observed, Array<BigInt> => times,
        ))
        .await?;
    }
    Ok(answers)
}

/// The row that a call ends; `None`: there is nothing to end, or something later stands.
fn end(call: &Unregister, rows: Vec<DeviceRow>) -> Result<Option<DeviceRow>> {
    // Of a token the active one, else the tombstone that the user (if named) left last.
    let theirs = |row: &DeviceRow| call.user.as_ref().is_none_or(|user| row.user == user.as_str());
    let row = match &call.device {
        DeviceRef::Id(id) => match rows.into_iter().next() {
            Some(row) if row.app != call.app.0 => return Err(StoreError::DeviceNotFound { devices: vec![*id] }),
            row => row,
        },
        DeviceRef::Token(..) => rows
            .into_iter()
            .filter(|row| row.is_active() || theirs(row))
            .max_by_key(|row| (row.is_active(), row.observed_at, row.id)),
    };
    let Some(row) = row else { return Ok(None) };
    if !theirs(&row) {
        return Err(StoreError::DeviceNotFound { devices: vec![DeviceId(row.id)] });
    }
    // What is said now is later than anything, whatever another clock, or this one before it was set back, has observed.
    Ok((row.observed_at <= call.observed_at.0 || call.observed_at == call.now).then_some(row))
}
