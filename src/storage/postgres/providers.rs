//! What is known of the providers, shared by all replicas.
//!
//! A rate's bucket is a row, and a lease of permits one statement on it: the arithmetic of [`Bucket::take`] in SQL, for
//! the row must be locked no longer than a round trip of nobody. The conformance suite holds the two to each other.

use diesel::OptionalExtension;
use diesel::sql_types::{Array, BigInt, Binary, Bool, Double, Integer, Nullable, SmallInt, Text};
use diesel_async::AsyncPgConnection;

use super::batch::{BlockColumns, JobColumns};
use super::fail::{Attempt, Fail};
use super::jobs::{self, Lease};
use super::query::RunQuery;
use super::read::read;
use super::redrive::{self, Block};
use super::rows::lane;
use super::statement::constant;
use super::tx::{Tx, step};
use super::{PostgresStore, dead, users};
use crate::domain::ids::{AppKey, DeviceId, JobId, UserKey};
use crate::domain::pacing::{Bucket, IDLE_AFTER, PermitBlock, PermitRequest, RAMP_BEGINS_AT};
use crate::domain::time::UnixMs;
use crate::storage::providers::RouteRow;
use crate::storage::reach::Change;
use crate::storage::{
    DeviceChange, DeviceTimes, Providers, RedriveBatch, Redriven, Result, TROUBLE_KEPT_MS, Trouble, TroubleCause,
    TroubleRow,
};

#[async_trait::async_trait]
impl Providers for PostgresStore {
    async fn lease_permits(&self, credential: &str, request: PermitRequest, now: UnixMs) -> Result<PermitBlock> {
        let now = self.inner.clock(now);
        read!(&self.inner, "leasing a provider's permits", |conn| lease(conn, credential, request, now))
    }

    async fn troubles(&self, now: UnixMs) -> Result<Vec<Trouble>> {
        read!(&self.inner, "reading what stops providers", |conn| troubles(conn, now))
    }

    async fn report_trouble(&self, trouble: Trouble) -> Result<()> {
        step!(&self.inner, "recording what stops a provider", |tx| async {
            tx.execute(constant!(
                ();
                "INSERT INTO provider_trouble AS t (name, cause, reason, since, seen_at) VALUES ($1, $2, $3, $4, $5) \
                 ON CONFLICT (name) DO UPDATE SET cause = excluded.cause, reason = excluded.reason, \
                 since = CASE WHEN t.seen_at < excluded.seen_at - $6 THEN excluded.since ELSE t.since END, \
                 seen_at = greatest(t.seen_at, excluded.seen_at)",
                Text => &*trouble.name, SmallInt => trouble.cause.code(), Text => &*trouble.reason,
                BigInt => trouble.since.0, BigInt => trouble.seen_at.0, BigInt => TROUBLE_KEPT_MS,
            ))
            .await?;
            Ok(())
        })
    }

    async fn end_trouble(&self, name: &str, now: UnixMs) -> Result<()> {
        step!(&self.inner, "recording that a provider works", |tx| async {
            tx.execute(constant!(
                ();
                "DELETE FROM provider_trouble WHERE name = $1 AND coalesce(confirmed_until, 0) <= $2",
                Text => name, BigInt => now.0,
            ))
            .await?;
            tx.execute(constant!((); "UPDATE provider_trouble SET seen_at = 0 WHERE name = $1", Text => name)).await?;
            Ok(())
        })
    }

    async fn confirm_trouble(&self, name: &str, until: UnixMs) -> Result<bool> {
        step!(&self.inner, "confirming that tokens are gone", |tx| async {
            let known = tx
                .execute(constant!(
                    (); "UPDATE provider_trouble SET confirmed_until = $2 WHERE name = $1", Text => name,
                    BigInt => until.0,
                ))
                .await?;
            Ok(known > 0)
        })
    }

    async fn held_devices(&self, now: UnixMs, limit: usize) -> Result<Vec<(DeviceId, UnixMs)>> {
        read!(&self.inner, "reading which devices are left alone", |conn| async {
            // device_by_hold
            let rows: Vec<(i64, i64)> = constant!(
                (BigInt, BigInt);
                concat!(
                    "SELECT id, hold_until FROM device WHERE hold_until > $1 AND ",
                    dead::is_active!(""),
                    " ORDER BY hold_until DESC LIMIT $2"
                ),
                BigInt => now.0, BigInt => i64::try_from(limit).unwrap_or(i64::MAX),
            )
            .load(conn)
            .await?;
            Ok(rows.into_iter().map(|(device, until)| (DeviceId(device), UnixMs(until))).collect())
        })
    }

    async fn device_times(&self, devices: &[DeviceId]) -> Result<Vec<Option<DeviceTimes>>> {
        read!(&self.inner, "reading when devices registered", |conn| device_times(conn, devices))
    }

    async fn redrive(&self, batch: RedriveBatch, now: UnixMs) -> Result<Redriven> {
        let now = self.inner.clock(now);
        let redriven = step!(&self.inner, "opening dead deliveries again", |tx| redrive_step(tx, &batch, now))?;
        if redriven.redriven > 0 {
            self.inner.forget_bounds();
        }
        Ok(redriven)
    }
}

type LeaseTypes = (Double, BigInt, BigInt, Integer);

async fn lease(
    conn: &mut AsyncPgConnection,
    credential: &str,
    request: PermitRequest,
    now: UnixMs,
) -> Attempt<PermitBlock> {
    let rate = request.rate;
    let (first, granted) = Bucket::fresh(rate, now).take(request, now);
    // In words: fill by the ramp's integral from the last request to now, up to what the ramp has room for; begin anew
    // after idleness; empty on a complaint; grant what is there but for BULK's share. Every permit counts once, for the
    // row is locked, and read anew, by the conflict.
    let (permits, ramp_from, at, granted): (f64, i64, i64, i32) = constant!(
        LeaseTypes;
        "INSERT INTO pace AS p (name, permits, ramp_from, at, granted) VALUES ($1, $2, $3, $3, $4) \
         ON CONFLICT (name) DO UPDATE SET (permits, ramp_from, at, granted) = (\
         SELECT c.have - c.taken, c.ramp_from, c.at, c.taken FROM (\
         SELECT b.*, least($5, greatest(0, floor(b.have - CASE WHEN b.room >= 4 THEN b.room * $6 ELSE 0 END)))::INTEGER \
         AS taken FROM (\
         SELECT a.ramp_from, a.at, greatest(1, $7 * a.share) AS room, \
         CASE WHEN $12 THEN 0 ELSE least(greatest(1, $7 * a.share), a.permits + $8 * greatest(0, \
         CASE WHEN a.until >= $9 THEN a.until - (1 - $10) * $9 / 2 \
         ELSE $10 * a.until + (1 - $10) * a.until * a.until / (2 * $9) END \
         - CASE WHEN a.since >= $9 THEN a.since - (1 - $10) * $9 / 2 \
         ELSE $10 * a.since + (1 - $10) * a.since * a.since / (2 * $9) END)) END AS have FROM (\
         SELECT s.*, CASE WHEN s.until >= $9 THEN 1 ELSE $10 + (1 - $10) * s.until / $9 END AS share FROM (\
         SELECT r.permits, r.ramp_from, r.at, greatest(0, r.at - r.ramp_from)::DOUBLE PRECISION AS until, \
         greatest(0, r.was - r.ramp_from)::DOUBLE PRECISION AS since FROM (\
         SELECT CASE WHEN n.idle THEN $13 ELSE p.permits END AS permits, \
         CASE WHEN n.idle OR $12 THEN n.at ELSE p.ramp_from END AS ramp_from, n.at, \
         CASE WHEN n.idle THEN n.at ELSE p.at END AS was FROM (\
         SELECT greatest(p.at, $3) AS at, greatest(p.at, $3) - p.at > $11 AS idle) AS n) AS r) AS s) AS a) AS b) AS c) \
         RETURNING permits, ramp_from, at, granted",
        Text => credential, Double => first.permits, BigInt => now.0,
        Integer => i32::try_from(granted.granted).unwrap_or(i32::MAX), Double => f64::from(request.wanted),
        Double => request.kept(), Double => rate.burst(), Double => rate.refill_per_ms(),
        Double => rate.ramp_ms(), Double => RAMP_BEGINS_AT,
        BigInt => i64::try_from(IDLE_AFTER.as_millis()).unwrap_or(i64::MAX), Bool => request.slow_down,
        Double => Bucket::fresh(rate, now).permits,
    )
    .get_result(conn)
    .await?;
    let granted = u32::try_from(granted).unwrap_or(0);
    let bucket = Bucket { permits, ramp_from: UnixMs(ramp_from), at: UnixMs(at) };
    let wait = if granted >= request.wanted { std::time::Duration::ZERO } else { bucket.wait(request) };
    Ok(PermitBlock { granted, wait })
}

/// What stops providers, for `nudged check`.
pub(super) async fn describe(conn: &mut AsyncPgConnection, now: UnixMs) -> Attempt<Vec<TroubleRow>> {
    let apps: Vec<(i64, String)> = constant!((BigInt, Text); "SELECT id, name FROM app").load(conn).await?;
    let routes: Vec<(i64, i64, i16, String, i16)> = constant!(
        (BigInt, BigInt, SmallInt, Text, SmallInt); "SELECT id, app, platform, credential, environment FROM route",
    )
    .load(conn)
    .await?;
    let route = |(id, app, platform, credential, environment)| RouteRow { id, app, platform, credential, environment };
    let routes: Vec<RouteRow> = routes.into_iter().map(route).collect();
    let rows = troubles(conn, now).await?.into_iter().filter(|trouble| now.0 - trouble.seen_at.0 < TROUBLE_KEPT_MS);
    Ok(rows.map(|trouble| TroubleRow::new(trouble, &apps, &routes)).collect())
}

async fn troubles(conn: &mut AsyncPgConnection, now: UnixMs) -> Attempt<Vec<Trouble>> {
    let rows: Vec<(String, i16, String, i64, i64, Option<i64>)> = constant!(
        (Text, SmallInt, Text, BigInt, BigInt, Nullable<BigInt>);
        "SELECT name, cause, reason, since, seen_at, confirmed_until FROM provider_trouble \
         WHERE seen_at > $1 OR confirmed_until > $2 ORDER BY name LIMIT 10000",
        BigInt => now.0 - TROUBLE_KEPT_MS, BigInt => now.0,
    )
    .load(conn)
    .await?;
    rows.into_iter()
        .map(|(name, cause, reason, since, seen_at, confirmed_until)| {
            let cause =
                TroubleCause::from_code(cause).ok_or_else(|| Fail::corrupt(format!("trouble of cause {cause}")))?;
            let confirmed_until = confirmed_until.map(UnixMs);
            Ok(Trouble { name, cause, reason, since: UnixMs(since), seen_at: UnixMs(seen_at), confirmed_until })
        })
        .collect()
}

async fn device_times(conn: &mut AsyncPgConnection, devices: &[DeviceId]) -> Attempt<Vec<Option<DeviceTimes>>> {
    let rows: Vec<(i64, i64, Option<i64>)> = constant!(
        (BigInt, BigInt, Nullable<BigInt>);
        "SELECT e.place, d.confirmed_at, d.doubted_at FROM unnest($1) WITH ORDINALITY AS e(id, place) \
         JOIN device d ON d.id = e.id",
        Array<BigInt> => super::ids(devices.iter().map(|device| device.0)),
    )
    .load(conn)
    .await?;
    let mut times = vec![None; devices.len()];
    for (place, confirmed_at, doubted_at) in rows {
        if let Some(slot) = usize::try_from(place - 1).ok().and_then(|at| times.get_mut(at)) {
            *slot = Some(DeviceTimes { confirmed_at: UnixMs(confirmed_at), doubted_at: doubted_at.map(UnixMs) });
        }
    }
    Ok(times)
}

/// What platforms said of devices, beside that they are gone.
pub(super) async fn change_device(tx: &mut Tx, app: AppKey, change: DeviceChange, now: UnixMs) -> Attempt<()> {
    match change {
        DeviceChange::Hold { device, until, doubted } => {
            tx.execute(constant!(
                ();
                concat!(
                    "UPDATE device SET hold_until = greatest(coalesce(hold_until, 0), $3), \
                     doubted_at = coalesce($4, doubted_at) WHERE id = $1 AND app = $2 AND ",
                    dead::is_active!("")
                ),
                BigInt => device.0, BigInt => app.0, BigInt => until.0, Nullable<BigInt> => doubted.then_some(now.0),
            ))
            .await?;
        }
        DeviceChange::Reroute { device, from, to } => {
            let user: Option<i64> = constant!(
                BigInt;
                concat!(
                    "UPDATE device SET route = $4 WHERE id = $1 AND app = $2 AND route = $3 AND ",
                    dead::is_active!(""),
                    " RETURNING user_key"
                ),
                BigInt => device.0, BigInt => app.0, BigInt => from.0, BigInt => to.0,
            )
            .get_result(tx.conn())
            .await
            .optional()?;
            tx.changed.extend(user.map(|user| (UserKey(user), Change::Anything)));
        }
    }
    Ok(())
}

type BlockTypes = (BigInt, BigInt, BigInt, Nullable<BigInt>, BigInt, Binary);
type BlockRow = (i64, i64, i64, Option<i64>, i64, Vec<u8>);

async fn blocks(conn: &mut AsyncPgConnection, batch: &RedriveBatch) -> Attempt<Vec<Block>> {
    let most = i64::try_from(batch.max_blocks).unwrap_or(i64::MAX);
    let rows: Vec<BlockRow> = match batch.filter.notification {
        // outcome_block_by_notification
        Some(notification) => {
            constant!(
                BlockTypes;
                "SELECT id, app, notification_id, route, at, entries FROM outcome_block \
                 WHERE notification_id = $1 AND id > $2 ORDER BY id LIMIT $3",
                BigInt => notification.0, BigInt => batch.after, BigInt => most,
            )
            .load(conn)
            .await?
        }
        None => constant!(
            BlockTypes;
            "SELECT id, app, notification_id, route, at, entries FROM outcome_block WHERE id > $1 ORDER BY id LIMIT $2",
            BigInt => batch.after, BigInt => most,
        )
        .load(conn)
        .await?,
    };
    let block = |(id, app, notification, route, at, entries)| Block { id, app, notification, route, at, entries };
    Ok(rows.into_iter().map(block).collect())
}

async fn redrive_step(tx: &mut Tx, batch: &RedriveBatch, now: UnixMs) -> Attempt<Redriven> {
    let mut answer = Redriven { after: batch.after, done: true, ..Redriven::default() };
    let user = match &batch.filter.user {
        None => None,
        Some(user) => match users::user_key(tx.conn(), batch.app, user).await? {
            None => return Ok(answer),
            known => known,
        },
    };
    let blocks = blocks(tx.conn(), batch).await?;
    let found = redrive::find(batch, user, &blocks)?;
    (answer.after, answer.done) = (found.after, found.done);
    let (mut jobs, mut appended) = (JobColumns::of(tx.context.packing.written()), BlockColumns::default());
    for (notification, dead) in found.dead {
        // Two redrives of one notification wait for each other; the second then sees what the first wrote.
        let row: Option<(i64, i16, i64, Option<i64>)> = constant!(
            (BigInt, SmallInt, BigInt, Nullable<BigInt>);
            "SELECT app, lane, expires_at, cancelled_at FROM notification WHERE id = $1 FOR NO KEY UPDATE",
            BigInt => notification.0,
        )
        .get_result(tx.conn())
        .await
        .optional()?;
        let (first, first_user, last_user) = redrive::span(&dead);
        // outcome_block_by_notification
        let later: Vec<(i64, Vec<u8>)> = constant!(
            (BigInt, Binary);
            "SELECT id, entries FROM outcome_block WHERE notification_id = $1 AND id > $2 AND first_user <= $4 \
             AND last_user >= $3",
            BigInt => notification.0, BigInt => first, BigInt => first_user.0, BigInt => last_user.0,
        )
        .load(tx.conn())
        .await?;
        let dead = redrive::still_dead(dead, &later)?;
        let count = dead.len() as u64;
        let Some((owner, stored_lane, expires_at, cancelled_at)) = row else { continue };
        if !redrive::in_time(batch.app, owner, expires_at, cancelled_at, now) {
            answer.too_late += count;
            continue;
        }
        let (new, entries) = redrive::reopen(notification, lane(stored_lane)?, dead, now);
        for job in &new {
            jobs.push(JobId(tx.next_id(now)), batch.app, job, Lease::FREE)?;
            answer.routes.push((job.route, job.lane));
        }
        appended.push(|| tx.next_id(now), batch.app, notification, None, &entries, now);
        answer.redriven += count;
    }
    jobs::insert(tx, jobs).await?;
    jobs::append(tx, appended).await?;
    answer.routes.sort_unstable();
    answer.routes.dedup();
    Ok(answer)
}
