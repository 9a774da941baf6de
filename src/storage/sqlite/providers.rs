//! What is known of the providers. Rates are this process's alone, for no other uses the database: they are in memory.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Mutex;

use diesel::sql_types::{BigInt, Binary, Nullable, SmallInt, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{Connection, OptionalExtension, RunQueryDsl};

use super::dead::{is_active, is_unnamed};
use super::fail::{Attempt, Fail};
use super::group::Tx;
use super::history;
use super::jobs::{self, Lease};
use super::people;
use super::redrive::{self, Block};
use super::rows::{json_ids, lane};
use super::statement::constant;
use crate::domain::ids::{AppKey, DeviceId, UserKey};
use crate::domain::pacing::{Bucket, PermitBlock, PermitRequest};
use crate::domain::time::UnixMs;
use crate::storage::providers::RouteRow;
use crate::storage::reach::Change;
use crate::storage::{
    DeviceChange, DeviceTimes, Providers, RedriveBatch, Redriven, Result, TROUBLE_KEPT_MS, Trouble, TroubleCause,
    TroubleRow,
};

use super::readers::Asker;
use super::writer::Class;
use super::{SMALL, SqliteStore};

/// By credential; as many as are configured.
#[derive(Default)]
pub(super) struct Paces(Mutex<HashMap<String, Bucket>>);

impl Paces {
    fn take(&self, credential: &str, request: PermitRequest, now: UnixMs) -> PermitBlock {
        let mut buckets = self.0.lock().expect("no panic while held");
        let known = buckets.get(credential).copied().unwrap_or_else(|| Bucket::fresh(request.rate, now));
        let (bucket, block) = known.take(request, now);
        buckets.insert(credential.to_owned(), bucket);
        block
    }
}

#[async_trait::async_trait]
impl Providers for SqliteStore {
    async fn lease_permits(&self, credential: &str, request: PermitRequest, now: UnixMs) -> Result<PermitBlock> {
        Ok(self.paces.take(credential, request, now))
    }

    async fn troubles(&self, now: UnixMs) -> Result<Vec<Trouble>> {
        self.read(Asker::Engine, "reading what stops providers", move |conn| troubles(conn, now)).await
    }

    async fn report_trouble(&self, trouble: Trouble) -> Result<()> {
        let doing = "recording what stops a provider";
        self.write(Class::Outcome, SMALL, doing, move |tx| {
            tx.execute(constant!(
                ();
                "INSERT INTO provider_trouble (name, cause, reason, since, seen_at) VALUES (?1, ?2, ?3, ?4, ?5) \
                 ON CONFLICT (name) DO UPDATE SET cause = excluded.cause, reason = excluded.reason, \
                 since = CASE WHEN seen_at < excluded.seen_at - ?6 THEN excluded.since ELSE since END, \
                 seen_at = max(seen_at, excluded.seen_at)",
                Text => &*trouble.name, SmallInt => trouble.cause.code(), Text => &*trouble.reason,
                BigInt => trouble.since.0, BigInt => trouble.seen_at.0, BigInt => TROUBLE_KEPT_MS,
            ))?;
            Ok(())
        })
        .await
    }

    async fn end_trouble(&self, name: &str, now: UnixMs) -> Result<()> {
        let name = name.to_owned();
        self.write(Class::Outcome, SMALL, "recording that a provider works", move |tx| {
            tx.execute(constant!(
                ();
                "DELETE FROM provider_trouble WHERE name = ?1 AND coalesce(confirmed_until, 0) <= ?2",
                Text => &*name, BigInt => now.0,
            ))?;
            tx.execute(constant!(
                (); "UPDATE provider_trouble SET seen_at = 0 WHERE name = ?1", Text => &*name,
            ))?;
            Ok(())
        })
        .await
    }

    async fn confirm_trouble(&self, name: &str, until: UnixMs) -> Result<bool> {
        let name = name.to_owned();
        self.write(Class::Consent, SMALL, "confirming that tokens are gone", move |tx| {
            let known = tx.execute(constant!(
                (); "UPDATE provider_trouble SET confirmed_until = ?2 WHERE name = ?1", Text => &*name, BigInt => until.0,
            ))?;
            Ok(known > 0)
        })
        .await
    }

    async fn held_devices(&self, now: UnixMs, limit: usize) -> Result<Vec<(DeviceId, UnixMs)>> {
        self.read(Asker::Engine, "reading which devices are left alone", move |conn| {
            // device_by_hold
            let rows: Vec<(i64, i64)> = constant!(
                (BigInt, BigInt);
                concat!(
                    "SELECT d.id, d.hold_until FROM device d CROSS JOIN app_user u ON u.id = d.user_key \
                     WHERE d.hold_until > ?1 AND ", is_active!(), " ORDER BY d.hold_until DESC LIMIT ?2 + 0"
                ),
                BigInt => now.0, BigInt => i64::try_from(limit).unwrap_or(i64::MAX),
            )
            .load(conn)?;
            Ok(rows.into_iter().map(|(device, until)| (DeviceId(device), UnixMs(until))).collect())
        })
        .await
    }

    async fn device_times(&self, devices: &[DeviceId]) -> Result<Vec<Option<DeviceTimes>>> {
        let devices = devices.to_vec();
        // By the writer: what it is asked about it will change in a moment, and its map of the file stands, while a
        // reader's cache is empty after each write of anybody's.
        let bytes = SMALL + 16 * devices.len();
        let doing = "reading when devices registered";
        self.write(Class::Outcome, bytes, doing, move |tx| device_times(tx.conn, &devices)).await
    }

    async fn redrive(&self, batch: RedriveBatch, now: UnixMs) -> Result<Redriven> {
        self.write(Class::Import, SMALL, "opening dead deliveries again", move |tx| redrive_step(tx, &batch, now)).await
    }
}

/// What stops providers by a database that another process may be using, for `nudged check`. Nothing is changed.
pub(super) fn inspect(path: &Path, now: UnixMs) -> Result<Vec<TroubleRow>, String> {
    let uri = format!("file:{}?mode=ro", path.display());
    let mut conn = SqliteConnection::establish(&uri).map_err(|error| error.to_string())?;
    describe(&mut conn, now).map_err(|fail| format!("{fail:?}"))
}

fn describe(conn: &mut SqliteConnection, now: UnixMs) -> Attempt<Vec<TroubleRow>> {
    let apps: Vec<(i64, String)> = constant!((BigInt, Text); "SELECT id, name FROM app").load(conn)?;
    let routes: Vec<(i64, i64, i16, String, i16)> = constant!(
        (BigInt, BigInt, SmallInt, Text, SmallInt); "SELECT id, app, platform, credential, environment FROM route",
    )
    .load(conn)?;
    let route = |(id, app, platform, credential, environment)| RouteRow { id, app, platform, credential, environment };
    let routes: Vec<RouteRow> = routes.into_iter().map(route).collect();
    let rows = troubles(conn, now)?.into_iter().filter(|trouble| now.0 - trouble.seen_at.0 < TROUBLE_KEPT_MS);
    Ok(rows.map(|trouble| TroubleRow::new(trouble, &apps, &routes)).collect())
}

fn troubles(conn: &mut SqliteConnection, now: UnixMs) -> Attempt<Vec<Trouble>> {
    let rows: Vec<(String, i16, String, i64, i64, Option<i64>)> = constant!(
        (Text, SmallInt, Text, BigInt, BigInt, Nullable<BigInt>);
        "SELECT name, cause, reason, since, seen_at, confirmed_until FROM provider_trouble \
         WHERE seen_at > ?1 OR confirmed_until > ?2 ORDER BY name LIMIT 10000",
        BigInt => now.0 - TROUBLE_KEPT_MS, BigInt => now.0,
    )
    .load(conn)?;
    rows.into_iter()
        .map(|(name, cause, reason, since, seen_at, confirmed_until)| {
            let cause =
                TroubleCause::from_code(cause).ok_or_else(|| Fail::corrupt(format!("trouble of cause {cause}")))?;
            let confirmed_until = confirmed_until.map(UnixMs);
            Ok(Trouble { name, cause, reason, since: UnixMs(since), seen_at: UnixMs(seen_at), confirmed_until })
        })
        .collect()
}

fn device_times(conn: &mut SqliteConnection, devices: &[DeviceId]) -> Attempt<Vec<Option<DeviceTimes>>> {
    let rows: Vec<(i64, i64, Option<i64>)> = constant!(
        (BigInt, BigInt, Nullable<BigInt>);
        "SELECT e.key, d.confirmed_at, d.doubted_at FROM json_each(?1) AS e CROSS JOIN device d ON d.id = e.value",
        Text => json_ids(devices.iter().map(|device| device.0)),
    )
    .load(conn)?;
    let mut times = vec![None; devices.len()];
    for (position, confirmed_at, doubted_at) in rows {
        if let Some(slot) = usize::try_from(position).ok().and_then(|at| times.get_mut(at)) {
            *slot = Some(DeviceTimes { confirmed_at: UnixMs(confirmed_at), doubted_at: doubted_at.map(UnixMs) });
        }
    }
    Ok(times)
}

/// What platforms said of devices, beside that they are gone.
pub(super) fn change_device(tx: &mut Tx<'_>, app: AppKey, change: DeviceChange, now: UnixMs) -> Attempt<()> {
    match change {
        DeviceChange::Hold { device, until, doubted } => {
            tx.execute(constant!(
            ();
            concat!(
                "UPDATE device SET hold_until = max(coalesce(hold_until, 0), ?3), doubted_at = coalesce(?4, doubted_at) \
                 WHERE id = ?1 AND app = ?2 AND state = 1 \
                 AND EXISTS (SELECT 1 FROM app_user u WHERE u.id = user_key AND ", is_unnamed!("?1"), ")"
            ),
            BigInt => device.0, BigInt => app.0, BigInt => until.0, Nullable<BigInt> => doubted.then_some(now.0),
        ))?;
        }
        DeviceChange::Reroute { device, from, to } => {
            let user: Option<i64> = constant!(
                BigInt;
                concat!(
                    "UPDATE device SET route = ?4 WHERE id = ?1 AND app = ?2 AND route = ?3 AND state = 1 \
                     AND EXISTS (SELECT 1 FROM app_user u WHERE u.id = user_key AND ", is_unnamed!("?1"), ") \
                     RETURNING user_key"
                ),
                BigInt => device.0, BigInt => app.0, BigInt => from.0, BigInt => to.0,
            )
            .get_result(tx.writes())
            .optional()?;
            tx.changed.extend(user.map(|user| (UserKey(user), Change::Anything)));
        }
    }
    Ok(())
}

type BlockTypes = (BigInt, BigInt, BigInt, Nullable<BigInt>, BigInt, Binary);
type BlockRow = (i64, i64, i64, Option<i64>, i64, Vec<u8>);

fn blocks(conn: &mut SqliteConnection, batch: &RedriveBatch) -> Attempt<Vec<Block>> {
    let most = i64::try_from(batch.max_blocks).unwrap_or(i64::MAX);
    let rows: Vec<BlockRow> = match batch.filter.notification {
        // outcome_block_by_notification
        Some(notification) => constant!(
            BlockTypes;
            "SELECT id, app, notification_id, route, at, entries FROM outcome_block \
             WHERE notification_id = ?1 AND id > ?2 ORDER BY id LIMIT ?3 + 0",
            BigInt => notification.0, BigInt => batch.after, BigInt => most,
        )
        .load(conn)?,
        None => constant!(
            BlockTypes;
            "SELECT id, app, notification_id, route, at, entries FROM outcome_block WHERE id > ?1 ORDER BY id LIMIT ?2 + 0",
            BigInt => batch.after, BigInt => most,
        )
        .load(conn)?,
    };
    let block = |(id, app, notification, route, at, entries)| Block { id, app, notification, route, at, entries };
    Ok(rows.into_iter().map(block).collect())
}

fn redrive_step(tx: &mut Tx<'_>, batch: &RedriveBatch, now: UnixMs) -> Attempt<Redriven> {
    let mut answer = Redriven { after: batch.after, done: true, ..Redriven::default() };
    let user = match &batch.filter.user {
        None => None,
        Some(user) => match people::user_key(tx.conn, batch.app, user)? {
            None => return Ok(answer),
            known => known,
        },
    };
    let blocks = blocks(tx.conn, batch)?;
    let found = redrive::find(batch, user, &blocks)?;
    (answer.after, answer.done) = (found.after, found.done);
    for (notification, dead) in found.dead {
        let row: Option<(i64, i16, i64, Option<i64>)> = constant!(
            (BigInt, SmallInt, BigInt, Nullable<BigInt>);
            "SELECT app, lane, expires_at, cancelled_at FROM notification WHERE id = ?1", BigInt => notification.0,
        )
        .get_result(tx.conn)
        .optional()?;
        let (first, first_user, last_user) = redrive::span(&dead);
        // outcome_block_by_notification
        let later: Vec<(i64, Vec<u8>)> = constant!(
            (BigInt, Binary);
            "SELECT id, entries FROM outcome_block WHERE notification_id = ?1 AND id > ?2 AND first_user <= ?4 \
             AND last_user >= ?3",
            BigInt => notification.0, BigInt => first, BigInt => first_user.0, BigInt => last_user.0,
        )
        .load(tx.conn)?;
        let dead = redrive::still_dead(dead, &later)?;
        let count = dead.len() as u64;
        let Some((owner, stored_lane, expires_at, cancelled_at)) = row else { continue };
        if !redrive::in_time(batch.app, owner, expires_at, cancelled_at, now) {
            answer.too_late += count;
            continue;
        }
        let (jobs, entries) = redrive::reopen(notification, lane(stored_lane)?, dead, now);
        for job in &jobs {
            jobs::insert(tx, batch.app, job, Lease::FREE, now)?;
            answer.routes.push((job.route, job.lane));
        }
        history::insert_results(tx, batch.app, notification, None, &entries, now)?;
        answer.redriven += count;
    }
    answer.routes.sort_unstable();
    answer.routes.dedup();
    Ok(answer)
}
