//! Acceptance: an event becomes a notification and its jobs, or a fan-out cursor, in one step.
//!
//! The people of a small audience are resolved, counted, gated and planned inside the transaction, so a "no" that was
//! answered before is seen. A large audience costs no more than a small one: counting stops one past the limit, and
//! the rest is the expander's work.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use super::query::RunQuery;
use diesel::OptionalExtension;
use diesel::sql_types::{Array, BigInt, Binary, Nullable, SmallInt, Text};
use diesel_async::AsyncPgConnection;

use super::batch::{BlockColumns, JobColumns};
use super::fail::{Attempt, Fail};
use super::handed;
use super::ids;
use super::jobs::{self, Lease};
use super::people::device_owners;
use super::reach;
use super::rows::priority_code;
use super::statement::constant;
use super::subscribers;
use super::tx::Tx;
use super::users::{insert_user, topic_key, user_key};
use crate::domain::audience::PackedAudience;
use crate::domain::deny::DenyPosition;
use crate::domain::ids::{AppKey, DeviceId, JobId, NotificationId, RouteId, Topic, UserId, UserKey};
use crate::domain::notification::{
    Accepted, Audience, HandOff, HandedOver, IDEMPOTENCY_KEPT_MS, Job, NewEvent, NewJob, Notification, SMALL_AUDIENCE,
};
use crate::domain::outcome::Entry;
use crate::domain::plan::plan;
use crate::domain::platform::Lane;
use crate::domain::targets::{Progress, Target};
use crate::domain::time::UnixMs;
use crate::storage::people::People;
use crate::storage::{BootId, ResolvedAudience, StoreError};

/// How the stored hash was made; the first byte of a later way would differ.
pub(super) const HASH_VERSION: i16 = 1;

/// An event, made ready outside the writer as far as possible.
pub(super) struct Prepared {
    /// Its lists are taken out of its audience.
    pub event: NewEvent,
    /// Sorted and distinct, as are the topics and devices.
    pub users: Vec<UserId>,
    pub topics: Vec<Topic>,
    devices: Vec<DeviceId>,
    pub body: String,
    /// Counted beforehand: more people than `max_audience`, which is beyond a small audience.
    too_many: bool,
    pub engine: Arc<dyn HandOff>,
}

impl Prepared {
    pub fn new(mut event: NewEvent, engine: Arc<dyn HandOff>) -> Attempt<Self> {
        let Audience { user_ids: mut users, mut topics, device_ids: mut devices, everyone } =
            std::mem::take(&mut event.audience);
        event.audience.everyone = everyone;
        users.sort_unstable();
        users.dedup();
        topics.sort_unstable();
        topics.dedup();
        devices.sort_unstable();
        devices.dedup();
        let body = serde_json::to_string(&*event.body)?;
        Ok(Self { event, users, topics, devices, body, too_many: false, engine })
    }

    /// What it holds, for the queue's bound.
    pub fn bytes(&self) -> usize {
        512 + 2 * self.body.len() + 64 * (self.users.len() + self.topics.len())
    }

    /// As it is stored.
    pub fn notification(&self, id: NotificationId, actor: Option<UserKey>, large: bool, now: UnixMs) -> Notification {
        let event = &self.event;
        Notification {
            id,
            app: event.app,
            event_type: event.event_type.clone(),
            type_version: event.type_version,
            default_opt_in: event.default_opt_in,
            lane: event.lane.unwrap_or(if large { Lane::Bulk } else { Lane::Interactive }),
            priority: event.priority,
            on_maybe: event.on_maybe,
            collapse_key: event.collapse_key.clone(),
            actor,
            body: Arc::clone(&event.body),
            event_at: event.event_at,
            accepted_at: now,
            not_before: event.not_before,
            expires_at: event.expires_at,
            cancelled_at: None,
        }
    }

    /// Named people, few enough to be planned at once, and topics, which may be small: for a group.
    pub fn is_for_group(&self) -> bool {
        let audience = &self.event.audience;
        !audience.everyone
            && self.devices.is_empty()
            && self.users.len() <= SMALL_AUDIENCE
            && self.topics.len() <= subscribers::MOST_TOPICS
    }

    /// A limit beyond a small audience, which is worth counting for on a reader rather than in the writer.
    pub fn wide_limit(&self) -> Option<u32> {
        self.event.max_audience.filter(|limit| *limit as usize > SMALL_AUDIENCE)
    }

    /// Counts on a reader, as far as `limit` needs. The audience may change until the event is accepted; `max_audience`
    /// is a guard against mistakes, not an exact cut.
    pub async fn exceeds(&self, conn: &mut AsyncPgConnection, limit: u32) -> Attempt<bool> {
        let app = self.event.app;
        let most = i64::from(limit) + 1;
        if self.event.audience.everyone {
            // app_user_by_app
            let count: i64 = constant!(
                BigInt; "SELECT count(*) FROM (SELECT 1 FROM app_user WHERE app = $1 LIMIT $2 + 0) AS audience",
                BigInt => app.0, BigInt => most,
            )
            .get_result(conn)
            .await?;
            return Ok(count > i64::from(limit));
        }
        let (known, unknown) = self.known_users(conn).await?;
        let mut keys: Vec<i64> = known.iter().map(|key| key.0).collect();
        keys.extend(device_owners(conn, app, &self.devices).await?.iter().map(|target| target.user.0));
        let topics = topic_keys(conn, app, &self.topics).await?;
        // A temporary tree removes repeats; the limit ends the scan.
        let count: i64 = constant!(
            BigInt;
            "SELECT count(*) FROM (SELECT unnest($1) AS user_key UNION \
             SELECT s.user_key FROM unnest($2) AS t(value) JOIN subscription s ON s.topic = t.value AND s.active = 1 \
             LIMIT $3 + 0) AS audience",
            Array<BigInt> => ids(keys.into_iter()), Array<BigInt> => ids(topics.into_iter()), BigInt => most,
        )
        .get_result(conn)
        .await?;
        Ok(count + i64::try_from(unknown.len()).unwrap_or(i64::MAX) > i64::from(limit))
    }

    pub fn set_too_many(&mut self, too_many: bool) {
        self.too_many = too_many;
    }

    async fn known_users(&self, conn: &mut AsyncPgConnection) -> Attempt<(Vec<UserKey>, Vec<&UserId>)> {
        known_users(conn, self.event.app, &self.users).await
    }
}

/// Rows of the named users that have one, and the names of those that do not.
async fn known_users<'a>(
    conn: &mut AsyncPgConnection,
    app: AppKey,
    users: &'a [UserId],
) -> Attempt<(Vec<UserKey>, Vec<&'a UserId>)> {
    if let [user] = users {
        return Ok(match user_key(conn, app, user).await? {
            Some(key) => (vec![key], Vec::new()),
            None => (Vec::new(), vec![user]),
        });
    }
    if users.is_empty() {
        return Ok((Vec::new(), Vec::new()));
    }
    let names: Vec<&str> = users.iter().map(UserId::as_str).collect();
    // app_user_by_name
    let rows: Vec<(i64, Option<i64>)> = constant!(
        (BigInt, Nullable<BigInt>);
        "SELECT e.n - 1, u.id FROM unnest($1) WITH ORDINALITY AS e(value, n) LEFT JOIN app_user u \
         ON u.app = $2 AND u.external_id = e.value",
        Array<Text> => names, BigInt => app.0,
    )
    .load(conn)
    .await?;
    let (mut known, mut unknown) = (Vec::with_capacity(rows.len()), Vec::new());
    for (position, key) in rows {
        match key {
            Some(key) => known.push(UserKey(key)),
            None => unknown.extend(usize::try_from(position).ok().and_then(|at| users.get(at))),
        }
    }
    Ok((known, unknown))
}

/// Who an event would be for, for those who only want to know.
pub(super) async fn rehearse(
    conn: &mut AsyncPgConnection,
    app: AppKey,
    audience: &Audience,
    actor: Option<&UserId>,
) -> Attempt<ResolvedAudience> {
    let mut named = audience.user_ids.clone();
    named.sort_unstable();
    named.dedup();
    let (mut users, unknown) = known_users(conn, app, &named).await?;
    users.sort_unstable();
    let mut devices = device_owners(conn, app, &audience.device_ids).await?;
    devices.retain(|target| users.binary_search(&target.user).is_err());
    let mut topics = topic_keys(conn, app, &audience.topics).await?;
    topics.dedup();
    let unknown = unknown.into_iter().cloned().collect();
    let packed = PackedAudience { everyone: audience.everyone, topics, users, devices };
    let actor = match actor {
        None => None,
        Some(actor) => user_key(conn, app, actor).await?,
    };
    Ok(ResolvedAudience { audience: packed.pack().into(), unknown, actor })
}

async fn topic_keys(conn: &mut AsyncPgConnection, app: AppKey, topics: &[Topic]) -> Attempt<Vec<i64>> {
    let mut keys = Vec::with_capacity(topics.len());
    for topic in topics {
        keys.extend(topic_key(conn, app, topic).await?);
    }
    keys.sort_unstable();
    Ok(keys)
}

/// Who an event is for, in rows.
struct Resolved<'a> {
    /// Reached on every device: named or subscribed, ascending. Of a large audience only those that were named.
    users: Vec<UserKey>,
    /// Named by device only; sorted.
    devices: Vec<Target>,
    topics: Vec<i64>,
    /// To be given rows.
    new_users: Vec<(UserKey, &'a UserId)>,
    /// Everyone, or more people than [`SMALL_AUDIENCE`].
    large: bool,
    /// Distinct people of a small audience.
    people: usize,
}

pub(super) async fn accept(tx: &mut Tx, prepared: &Prepared, now: UnixMs) -> Attempt<Accepted> {
    let event = &prepared.event;
    // The first id of every run, so that a run after a lost COMMIT finds what that one wrote.
    let id = NotificationId(tx.next_id(now));
    if tx.is_repeated() && was_accepted(tx, id).await? {
        return Ok(Accepted { notification: id, duplicate: false });
    }
    if let Some((key, hash)) = &event.idempotency {
        let known: Option<(Vec<u8>, i64)> = constant!(
            (Binary, BigInt);
            "SELECT hash, notification_id FROM idempotency WHERE app = $1 AND key = $2 AND expires_at + 0 > $3",
            BigInt => event.app.0, Text => key.as_str(), BigInt => now.0,
        )
        .get_result(tx.conn())
        .await
        .optional()?;
        if let Some((known, notification)) = known {
            let notification = NotificationId(notification);
            if known == hash {
                return Ok(Accepted { notification, duplicate: true });
            }
            return Err(StoreError::IdempotencyKeyReused { notification }.into());
        }
    }
    if event.expires_at <= now {
        return Err(StoreError::AlreadyExpired.into());
    }
    let resolved = resolve(tx, prepared, now).await?;
    if resolved.large && !event.may_broadcast {
        return Err(StoreError::BroadcastNotAllowed.into());
    }
    if let Some(limit) = event.max_audience
        && (prepared.too_many || (limit as usize <= SMALL_AUDIENCE && resolved.people > limit as usize))
    {
        return Err(StoreError::AudienceTooLarge { limit: u64::from(limit) }.into());
    }

    // Only writes from here on.
    for (key, user) in &resolved.new_users {
        insert_user(tx, event.app, *key, user, now).await?;
    }
    let actor = match &event.actor {
        None => None,
        Some(actor) => match user_key(tx.conn(), event.app, actor).await? {
            // Whoever has no row is in no small audience. A large one is read later, when they may be.
            None if resolved.large => Some(super::users::ensure_user(tx, event.app, actor, now).await?),
            known => known,
        },
    };
    let notification = prepared.notification(id, actor, resolved.large, now);
    let people = (!resolved.large).then(|| i64::try_from(resolved.people).unwrap_or(i64::MAX));
    insert_notification(tx, &notification, &prepared.body, people).await?;
    if let Some((key, hash)) = &event.idempotency {
        let taken = tx.execute(constant!(
            ();
            "INSERT INTO idempotency AS i (app, key, hash_version, hash, notification_id, expires_at) \
             VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (app, key) DO UPDATE SET hash_version = excluded.hash_version, \
             hash = excluded.hash, notification_id = excluded.notification_id, expires_at = excluded.expires_at \
             WHERE i.expires_at <= $7",
            BigInt => event.app.0, Text => key.as_str(), SmallInt => HASH_VERSION, Binary => &hash[..],
            BigInt => id.0, BigInt => now.0 + IDEMPOTENCY_KEPT_MS, BigInt => now.0,
        ))
        .await?;
        if taken == 0 {
            // Another replica took the key since we looked.
            return Err(Fail::Database(super::tx::again()));
        }
    }
    if resolved.large {
        begin_fanout(tx, prepared, &notification, resolved, now).await?;
    } else {
        plan_now(tx, prepared, notification, &resolved, now).await?;
    }
    Ok(Accepted { notification: id, duplicate: false })
}

/// Its jobs, where they were leased, were handed to nobody: they go to whoever claims them.
async fn was_accepted(tx: &mut Tx, id: NotificationId) -> Attempt<bool> {
    let there: Option<i64> = constant!(BigInt; "SELECT id FROM notification WHERE id = $1", BigInt => id.0)
        .get_result(tx.conn())
        .await
        .optional()?;
    if there.is_none() {
        return Ok(false);
    }
    let context = Arc::clone(&tx.context);
    handed::free_unknown(tx.conn(), &context, Some(id)).await?;
    tx.execute(constant!(
        (); "UPDATE job SET owner = 0, fence = fence + 1, claims = 0 WHERE notification_id = $1 AND owner = $2",
        BigInt => id.0, BigInt => context.boot.0,
    ))
    .await?;
    Ok(true)
}

async fn resolve<'a>(tx: &mut Tx, prepared: &'a Prepared, now: UnixMs) -> Attempt<Resolved<'a>> {
    let event = &prepared.event;
    let (mut users, unknown) = prepared.known_users(tx.conn()).await?;
    let new_users: Vec<_> = unknown.into_iter().map(|user| (UserKey(tx.next_id(now)), user)).collect();
    users.extend(new_users.iter().map(|(key, _)| *key));
    users.sort_unstable();
    let mut devices = device_owners(tx.conn(), event.app, &prepared.devices).await?;
    let topics = topic_keys(tx.conn(), event.app, &prepared.topics).await?;
    let owners = |devices: &[Target]| {
        let mut owners: Vec<UserKey> = devices.iter().map(|target| target.user).collect();
        owners.dedup();
        owners
    };
    let mut large = event.audience.everyone;
    let mut reached = users.clone();
    if !large {
        let mut distinct: HashSet<UserKey> = users.iter().copied().chain(owners(&devices)).collect();
        let most = i64::try_from(SMALL_AUDIENCE).unwrap_or(i64::MAX) + 1;
        for topic in &topics {
            if distinct.len() > SMALL_AUDIENCE {
                break;
            }
            // subscription's primary key; one topic alone can only prove a large audience by one person more.
            let subscribers: Vec<i64> = constant!(
                BigInt; "SELECT user_key FROM subscription WHERE topic = $1 AND active = 1 ORDER BY user_key LIMIT $2 + 0",
                BigInt => *topic, BigInt => most,
            )
            .load(tx.conn()).await?;
            distinct.extend(subscribers.iter().copied().map(UserKey));
            reached.extend(subscribers.into_iter().map(UserKey));
        }
        large = distinct.len() > SMALL_AUDIENCE;
        if !large {
            reached.sort_unstable();
            reached.dedup();
            devices.retain(|target| reached.binary_search(&target.user).is_err());
            let people = distinct.len();
            return Ok(Resolved { users: reached, devices, topics, new_users, large, people });
        }
    }
    devices.retain(|target| users.binary_search(&target.user).is_err());
    Ok(Resolved { users, devices, topics, new_users, large, people: SMALL_AUDIENCE + 1 })
}

async fn insert_notification(tx: &mut Tx, new: &Notification, body: &str, people: Option<i64>) -> Attempt<()> {
    tx.execute(constant!(
        ();
        "INSERT INTO notification (id, app, event_type, default_opt_in, lane, priority, collapse_key, actor, subject, \
         content, event_at, accepted_at, not_before, expires_at, people, type_version, on_maybe) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)",
        BigInt => new.id.0, BigInt => new.app.0, Text => new.event_type.as_str(),
        SmallInt => i16::from(new.default_opt_in), SmallInt => new.lane.code(),
        SmallInt => priority_code(new.priority),
        Nullable<Text> => new.collapse_key.as_ref().map(crate::domain::ids::CollapseKey::as_str),
        Nullable<BigInt> => new.actor.map(|actor| actor.0), Nullable<Text> => new.body.subject.as_deref(),
        Text => body, BigInt => new.event_at.0, BigInt => new.accepted_at.0,
        Nullable<BigInt> => new.not_before.map(|at| at.0), BigInt => new.expires_at.0, Nullable<BigInt> => people,
        Nullable<BigInt> => new.type_version.map(|version| version.0), SmallInt => new.on_maybe.code(),
    ))
    .await?;
    Ok(())
}

async fn begin_fanout(
    tx: &mut Tx,
    prepared: &Prepared,
    notification: &Notification,
    resolved: Resolved<'_>,
    now: UnixMs,
) -> Attempt<()> {
    let everyone = prepared.event.audience.everyone;
    let audience =
        PackedAudience { everyone, topics: resolved.topics, users: resolved.users, devices: resolved.devices };
    tx.execute(constant!(
        (); "INSERT INTO fanout (notification_id, app, audience, due_at) VALUES ($1, $2, $3, $4)",
        BigInt => notification.id.0, BigInt => notification.app.0, Binary => audience.pack(),
        BigInt => due_at(notification, now).0,
    ))
    .await?;
    tx.wake_fanout(&prepared.engine);
    Ok(())
}

fn due_at(notification: &Notification, now: UnixMs) -> UnixMs {
    notification.not_before.map_or(now, |not_before| not_before.max(now))
}

async fn plan_now(
    tx: &mut Tx,
    prepared: &Prepared,
    notification: Notification,
    resolved: &Resolved<'_>,
    now: UnixMs,
) -> Attempt<()> {
    let mut found = reach::of_users(tx.conn(), &notification.event_type, &resolved.users).await?;
    found.add_devices(tx.conn(), &notification.event_type, &resolved.devices).await?;
    let (app, id, lane, engine) = (notification.app, notification.id, notification.lane, &prepared.engine);
    if let Some(list) = engine.allow_list(app) {
        found.restrict(tx.conn(), &list).await?;
    }
    let gate = Gate { boot: tx.context.boot, gated: tx.gated, gated_at: tx.gated_at };
    let planned = Planned::new(found, Arc::new(notification), engine, &gate, || tx.next_id(now), now);
    let (mut jobs, mut blocks) = (JobColumns::of(tx.context.packing.written()), BlockColumns::default());
    for (id, job, lease) in &planned.jobs {
        jobs.push(*id, app, job, *lease)?;
    }
    blocks.push(|| tx.next_id(now), app, id, None, &planned.suppressed, now);
    jobs::insert(tx, jobs).await?;
    jobs::append(tx, blocks).await?;
    for route in planned.unowned() {
        tx.wake_jobs(engine, route, lane);
    }
    for handed in planned.hand_overs {
        tx.hand_over(engine, handed);
    }
    tx.planned(engine, planned.targets, planned.suppressed);
    Ok(())
}

/// What a hand-over says of its gate, and whose its lease is.
pub(super) struct Gate {
    pub boot: BootId,
    pub gated: DenyPosition,
    pub gated_at: Instant,
}

/// What becomes of a small audience.
pub(super) struct Planned {
    pub jobs: Vec<(JobId, NewJob, Lease)>,
    /// Of the jobs that got a permit.
    pub hand_overs: Vec<HandedOver>,
    pub targets: usize,
    pub suppressed: Vec<Entry>,
}

impl Planned {
    #[expect(clippy::needless_pass_by_value, reason = "hand-overs share it")]
    pub fn new(
        mut found: People,
        notification: Arc<Notification>,
        engine: &Arc<dyn HandOff>,
        gate: &Gate,
        mut next_id: impl FnMut() -> i64,
        now: UnixMs,
    ) -> Self {
        let (id, lane) = (notification.id, notification.lane);
        for (_, device) in found.people.iter_mut().flat_map(|person| &mut person.devices) {
            device.route_known = engine.knows_route(device.route);
        }
        let due_at = due_at(&notification, now);
        let plan = plan(&found.people, &notification.rules(), now);
        let targets = plan.jobs.iter().map(|(_, targets)| targets.len()).sum();
        let mut planned = Self { jobs: Vec::new(), hand_overs: Vec::new(), targets, suppressed: plan.suppressed };
        for (route, targets) in plan.jobs {
            let permit = if due_at <= now { engine.try_permit(route, lane, targets.len()) } else { None };
            let job_id = JobId(next_id());
            let job = NewJob {
                notification: id,
                route,
                lane,
                attempt: 0,
                claims: u32::from(permit.is_some()),
                ready_at: due_at,
                due_at,
                first_attempt_at: None,
                targets,
            };
            let Some(permit) = permit else {
                planned.jobs.push((job_id, job, Lease::FREE));
                continue;
            };
            let facts = job.targets.iter().filter_map(|target| found.facts_of(*target).cloned()).collect();
            let leased = Job {
                id: job_id,
                notification: id,
                route,
                lane,
                progress: Progress::none(job.targets.len()),
                targets: job.targets.clone(),
                attempt: 0,
                claims: 1,
                fence: 1,
                ready_at: due_at,
                first_attempt_at: None,
            };
            planned.jobs.push((job_id, job, Lease::first(gate.boot)));
            planned.hand_overs.push(HandedOver {
                job: leased,
                notification: Arc::clone(&notification),
                facts,
                gated: gate.gated,
                gated_at: gate.gated_at,
                permit,
            });
        }
        planned
    }

    /// Routes with jobs for whoever claims them.
    pub fn unowned(&self) -> Vec<RouteId> {
        let free = |(_, job, lease): &(JobId, NewJob, Lease)| (lease.owner == 0).then_some(job.route);
        self.jobs.iter().filter_map(free).collect()
    }
}
