//! Acceptance: an event becomes a notification and its jobs, or a fan-out cursor, in one step.
//!
//! The people of a small audience are resolved, counted, gated and planned inside the transaction, so a "no" that was
//! answered before is seen. A large audience costs no more than a small one: counting stops one past the limit, and
//! the rest is the expander's work.

use std::collections::HashSet;
use std::sync::Arc;

use diesel::sql_types::{BigInt, Binary, Nullable, SmallInt, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{OptionalExtension, RunQueryDsl};

use super::fail::{Attempt, Fail};
use super::group::Tx;
use super::handed::{self, Handed};
use super::history;
use super::homes::{self, homeless};
use super::jobs::{self, Lease};
use super::people::{device_owners, insert_user, names_and_labels, new_key, of_devices, topic_key, user_key};
use super::reach::{of_name, of_users};
use super::rows::{json_ids, priority_code};
use super::statement::constant;
use crate::domain::audience::PackedAudience;
use crate::domain::ids::{AppKey, DeviceId, JobId, NotificationId, Topic, UserId, UserKey};
use crate::domain::notification::{
    Accepted, Audience, HandOff, HandedOver, IDEMPOTENCY_KEPT_MS, Job, NewEvent, NewJob, Notification, SMALL_AUDIENCE,
};
use crate::domain::plan::{self, plan};
use crate::domain::platform::Lane;
use crate::domain::targets::{Progress, Target};
use crate::domain::time::UnixMs;
use crate::planted;
use crate::storage::people::People;
use crate::storage::{ResolvedAudience, StoreError};

/// What an event's body takes as JSON, nearly always.
const BODY_BYTES: usize = 512;
/// How the stored hash was made; the first byte of a later way would differ.
const HASH_VERSION: i16 = 1;

/// An event, made ready outside the writer as far as possible.
pub(super) struct Prepared {
    /// Its lists are taken out of its audience.
    event: NewEvent,
    /// Sorted and distinct, as are the topics and devices.
    users: Vec<UserId>,
    topics: Vec<Topic>,
    devices: Vec<DeviceId>,
    body: String,
    /// Counted beforehand: more people than `max_audience`, which is beyond a small audience.
    too_many: bool,
    engine: Arc<dyn HandOff>,
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
        let mut body = Vec::with_capacity(BODY_BYTES);
        serde_json::to_writer(&mut body, &*event.body)?;
        let body = String::from_utf8(body).expect("JSON is UTF-8");
        Ok(Self { event, users, topics, devices, body, too_many: false, engine })
    }

    /// What it holds, for the queue's bound.
    pub fn bytes(&self) -> usize {
        512 + self.body.len()
            + self.users.iter().map(|user| 64 + user.as_str().len()).sum::<usize>()
            + 256 * self.topics.len()
            + 8 * self.devices.len()
    }

    /// A limit beyond a small audience, which is worth counting for on a reader rather than in the writer.
    pub fn wide_limit(&self) -> Option<u32> {
        self.event.max_audience.filter(|limit| *limit as usize > SMALL_AUDIENCE)
    }

    /// Counts on a reader, as far as `limit` needs. The audience may change until the event is accepted; `max_audience`
    /// is a guard against mistakes, not an exact cut.
    pub fn exceeds(&self, conn: &mut SqliteConnection, limit: u32) -> Attempt<bool> {
        let app = self.event.app;
        let most = i64::from(limit) + 1;
        if self.event.audience.everyone {
            let (first, last) = homes::range(app);
            // app_user's primary key; app_user_by_app
            let count: i64 = constant!(
                BigInt;
                concat!(
                    "SELECT count(*) FROM (SELECT 1 FROM app_user WHERE id >= ?2 AND id <= ?3 AND app = ?1 \
                     UNION ALL SELECT 1 FROM app_user WHERE app = ?1 AND ", homeless!(), " LIMIT ?4 + 0)"
                ),
                BigInt => app.0, BigInt => first.0, BigInt => last.0, BigInt => most,
            )
            .get_result(conn)?;
            return Ok(count > i64::from(limit));
        }
        let (known, unknown) = self.known_users(conn)?;
        let mut keys: Vec<i64> = known.iter().map(|key| key.0).collect();
        keys.extend(device_owners(conn, app, &self.devices)?.iter().map(|target| target.user.0));
        let topics = topic_keys(conn, app, &self.topics)?;
        // A temporary tree removes repeats; the limit ends the scan.
        let count: i64 = constant!(
            BigInt;
            "SELECT count(*) FROM (SELECT value AS user_key FROM json_each(?1) UNION \
             SELECT s.user_key FROM json_each(?2) AS t JOIN subscription s ON s.topic = t.value AND s.active = 1 \
             LIMIT ?3 + 0)",
            Text => json_ids(keys.into_iter()), Text => json_ids(topics.into_iter()), BigInt => most,
        )
        .get_result(conn)?;
        Ok(count + i64::try_from(unknown.len()).unwrap_or(i64::MAX) > i64::from(limit))
    }

    pub fn set_too_many(&mut self, too_many: bool) {
        self.too_many = too_many;
    }
    fn known_users(&self, conn: &mut SqliteConnection) -> Attempt<(Vec<UserKey>, Vec<&UserId>)> {
        known_users(conn, self.event.app, &self.users)
    }
}

/// Rows of the named users that have one, and the names of those that do not.
fn known_users<'a>(
    conn: &mut SqliteConnection,
    app: AppKey,
    users: &'a [UserId],
) -> Attempt<(Vec<UserKey>, Vec<&'a UserId>)> {
    let (mut known, mut unknown) = (Vec::with_capacity(users.len()), Vec::new());
    for user in users {
        match user_key(conn, app, user)? {
            Some(key) => known.push(key),
            None => unknown.push(user),
        }
    }
    Ok((known, unknown))
}

/// Who an event would be for, for those who only want to know.
pub(super) fn rehearse(
    conn: &mut SqliteConnection,
    app: AppKey,
    audience: &Audience,
    actor: Option<&UserId>,
) -> Attempt<ResolvedAudience> {
    let mut named = audience.user_ids.clone();
    named.sort_unstable();
    named.dedup();
    let (mut users, unknown) = known_users(conn, app, &named)?;
    users.sort_unstable();
    let mut devices = device_owners(conn, app, &audience.device_ids)?;
    devices.retain(|target| users.binary_search(&target.user).is_err());
    let mut topics = topic_keys(conn, app, &audience.topics)?;
    topics.dedup();
    let packed = PackedAudience { everyone: audience.everyone, topics, users, devices };
    let actor = match actor {
        None => None,
        Some(actor) => user_key(conn, app, actor)?,
    };
    Ok(ResolvedAudience { audience: packed.pack().into(), unknown: unknown.into_iter().cloned().collect(), actor })
}

fn topic_keys(conn: &mut SqliteConnection, app: AppKey, topics: &[Topic]) -> Attempt<Vec<i64>> {
    let mut keys = Vec::with_capacity(topics.len());
    for topic in topics {
        keys.extend(topic_key(conn, app, topic)?);
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
    /// Already read: one named person and nothing else.
    found: Option<People>,
}

pub(super) fn accept(tx: &mut Tx<'_>, prepared: &Prepared, now: UnixMs) -> Attempt<Accepted> {
    let event = &prepared.event;
    let id = NotificationId(tx.next_id(now));
    let resolved = match admit(tx, prepared, now) {
        Ok(resolved) => resolved,
        // A repeat gets its first answer, whatever would be said of the event now.
        Err(refusal @ Fail::Refused(_)) => return known(tx, event, now)?.ok_or(refusal),
        Err(fail) => return Err(fail),
    };
    if !take_key(tx, event, id, now)? {
        let gone = || Fail::corrupt("an idempotency key that is taken and is not there");
        return known(tx, event, now)?.ok_or_else(gone);
    }

    // Only writes from here on.
    for (key, user) in &resolved.new_users {
        insert_user(tx, event.app, *key, user, now)?;
    }
    let actor = match &event.actor {
        None => None,
        Some(actor) => match user_key(tx.conn, event.app, actor)? {
            // Whoever has no row is in no small audience. A large one is read later, when they may be.
            None if resolved.large => Some(super::people::ensure_user(tx, event.app, actor, now)?),
            known => known,
        },
    };
    let notification = Notification {
        id,
        app: event.app,
        event_type: event.event_type.clone(),
        type_version: event.type_version,
        default_opt_in: event.default_opt_in,
        lane: event.lane.unwrap_or(if resolved.large { Lane::Bulk } else { Lane::Interactive }),
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
    };
    let people = (!resolved.large).then(|| i64::try_from(resolved.people).unwrap_or(i64::MAX));
    if resolved.large {
        insert_notification(tx, &notification, &prepared.body, people, None)?;
        if planted::is("event-ahead-of-its-jobs") {
            tx.commit_early()?;
        }
        begin_fanout(tx, prepared, &notification, resolved, now)?;
    } else {
        plan_now(tx, prepared, notification, resolved, people, now)?;
    }
    Ok(Accepted { notification: id, duplicate: false })
}

/// Who it is for, or why it is refused. Reads only.
fn admit<'a>(tx: &mut Tx<'_>, prepared: &'a Prepared, now: UnixMs) -> Attempt<Resolved<'a>> {
    let event = &prepared.event;
    if event.expires_at <= now {
        return Err(StoreError::AlreadyExpired.into());
    }
    let resolved = resolve(tx, prepared, now)?;
    if resolved.large && !event.may_broadcast {
        return Err(StoreError::BroadcastNotAllowed.into());
    }
    if let Some(limit) = event.max_audience
        && (prepared.too_many || (limit as usize <= SMALL_AUDIENCE && resolved.people > limit as usize))
    {
        return Err(StoreError::AudienceTooLarge { limit: u64::from(limit) }.into());
    }
    Ok(resolved)
}

/// What was answered to the event's idempotency key before.
fn known(tx: &mut Tx<'_>, event: &NewEvent, now: UnixMs) -> Attempt<Option<Accepted>> {
    let Some((key, hash)) = &event.idempotency else { return Ok(None) };
    let known: Option<(Vec<u8>, i64)> = constant!(
        (Binary, BigInt);
        "SELECT hash, notification_id FROM idempotency WHERE app = ?1 AND key = ?2 AND expires_at > ?3",
        BigInt => event.app.0, Text => key.as_str(), BigInt => now.0,
    )
    .get_result(tx.conn)
    .optional()?;
    let Some((known, notification)) = known else { return Ok(None) };
    let notification = NotificationId(notification);
    if known == hash || planted::is("idempotency-without-hash") {
        Ok(Some(Accepted { notification, duplicate: true }))
    } else {
        Err(StoreError::IdempotencyKeyReused { notification }.into())
    }
}

/// The first write of an accepted event, if it has a key. `false`: the key is taken, and nothing was written. To look
/// first would cost every event a second way down the tree for the sake of the few repeats.
fn take_key(tx: &mut Tx<'_>, event: &NewEvent, id: NotificationId, now: UnixMs) -> Attempt<bool> {
    let Some((key, hash)) = &event.idempotency else { return Ok(true) };
    if planted::is("idempotency-not-stored") {
        return Ok(true);
    }
    let rows = constant!(
        ();
        "INSERT INTO idempotency (app, key, hash_version, hash, notification_id, expires_at) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT (app, key) DO UPDATE SET hash_version = excluded.hash_version, \
         hash = excluded.hash, notification_id = excluded.notification_id, expires_at = excluded.expires_at \
         WHERE expires_at <= ?7",
        BigInt => event.app.0, Text => key.as_str(), SmallInt => HASH_VERSION, Binary => &hash[..],
        BigInt => id.0, BigInt => now.0 + IDEMPOTENCY_KEPT_MS, BigInt => now.0,
    )
    .execute(tx.conn)?;
    let taken = rows > 0;
    if taken {
        tx.writes();
    }
    Ok(taken)
}

fn resolve<'a>(tx: &mut Tx<'_>, prepared: &'a Prepared, now: UnixMs) -> Attempt<Resolved<'a>> {
    let event = &prepared.event;
    if let ([user], [], [], false) =
        (&prepared.users[..], &prepared.topics[..], &prepared.devices[..], event.audience.everyone)
    {
        return resolve_one(tx, event, user, now);
    }
    let (mut users, unknown) = prepared.known_users(tx.conn)?;
    let mut promised = HashSet::new();
    let new_users = unknown
        .into_iter()
        .map(|user| Ok((new_key(tx, event.app, user, &mut promised, now)?, user)))
        .collect::<Attempt<Vec<_>>>()?;
    users.extend(new_users.iter().map(|(key, _)| *key));
    users.sort_unstable();
    let mut devices = device_owners(tx.conn, event.app, &prepared.devices)?;
    let topics = topic_keys(tx.conn, event.app, &prepared.topics)?;
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
                BigInt; "SELECT user_key FROM subscription WHERE topic = ?1 AND active = 1 ORDER BY user_key LIMIT ?2 + 0",
                BigInt => *topic, BigInt => most,
            )
            .load(tx.conn)?;
            distinct.extend(subscribers.iter().copied().map(UserKey));
            reached.extend(subscribers.into_iter().map(UserKey));
        }
        large = distinct.len() > SMALL_AUDIENCE;
        if !large {
            reached.sort_unstable();
            reached.dedup();
            devices.retain(|target| reached.binary_search(&target.user).is_err());
            let people = distinct.len();
            return Ok(Resolved { users: reached, devices, topics, new_users, large, people, found: None });
        }
    }
    devices.retain(|target| users.binary_search(&target.user).is_err());
    Ok(Resolved { users, devices, topics, new_users, large, people: SMALL_AUDIENCE + 1, found: None })
}

fn resolve_one<'a>(tx: &mut Tx<'_>, event: &NewEvent, user: &'a UserId, now: UnixMs) -> Attempt<Resolved<'a>> {
    let mut new_users = Vec::new();
    let mut found = of_name(tx.conn, event.app, &event.event_type, user)?;
    if found.people.is_empty() {
        let key = new_key(tx, event.app, user, &mut HashSet::new(), now)?;
        new_users.push((key, user));
        found = People::stranger(key);
    }
    let users = found.people.iter().map(|person| person.user).collect();
    let (devices, topics) = (Vec::new(), Vec::new());
    Ok(Resolved { users, devices, topics, new_users, large: false, people: 1, found: Some(found) })
}

fn insert_notification(
    tx: &mut Tx<'_>,
    new: &Notification,
    body: &str,
    people: Option<i64>,
    handed: Option<Vec<u8>>,
) -> Attempt<()> {
    tx.execute(constant!(
        ();
        "INSERT INTO notification (id, app, event_type, default_opt_in, lane, priority, collapse_key, actor, subject, \
         content, event_at, accepted_at, not_before, expires_at, people, type_version, on_maybe, handed) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18)",
        BigInt => new.id.0, BigInt => new.app.0, Text => new.event_type.as_str(),
        SmallInt => i16::from(new.default_opt_in), SmallInt => new.lane.code(),
        SmallInt => priority_code(new.priority),
        Nullable<Text> => new.collapse_key.as_ref().map(crate::domain::ids::CollapseKey::as_str),
        Nullable<BigInt> => new.actor.map(|actor| actor.0), Nullable<Text> => new.body.subject.as_deref(),
        Text => body, BigInt => new.event_at.0, BigInt => new.accepted_at.0,
        Nullable<BigInt> => new.not_before.map(|at| at.0), BigInt => new.expires_at.0, Nullable<BigInt> => people,
        Nullable<BigInt> => new.type_version.map(|version| version.0), SmallInt => new.on_maybe.code(),
        Nullable<Binary> => handed,
    ))?;
    Ok(())
}

fn begin_fanout(
    tx: &mut Tx<'_>,
    prepared: &Prepared,
    notification: &Notification,
    resolved: Resolved<'_>,
    now: UnixMs,
) -> Attempt<()> {
    let everyone = prepared.event.audience.everyone;
    let audience =
        PackedAudience { everyone, topics: resolved.topics, users: resolved.users, devices: resolved.devices };
    tx.execute(constant!(
        (); "INSERT INTO fanout (notification_id, app, audience, due_at) VALUES (?1, ?2, ?3, ?4)",
        BigInt => notification.id.0, BigInt => notification.app.0, Binary => audience.pack(),
        BigInt => due_at(notification, now).0,
    ))?;
    tx.wake_fanout(&prepared.engine);
    Ok(())
}

fn due_at(notification: &Notification, now: UnixMs) -> UnixMs {
    notification.not_before.map_or(now, |not_before| not_before.max(now))
}

fn plan_now(
    tx: &mut Tx<'_>,
    prepared: &Prepared,
    notification: Notification,
    resolved: Resolved<'_>,
    people: Option<i64>,
    now: UnixMs,
) -> Attempt<()> {
    let (app, id, lane) = (notification.app, notification.id, notification.lane);
    let engine = &prepared.engine;
    let mut found = match resolved.found {
        Some(found) => found,
        None => of_users(tx.conn, &notification.event_type, &resolved.users)?,
    };
    found.append(of_devices(tx.conn, &notification.event_type, &resolved.devices)?);
    for (_, device) in found.people.iter_mut().flat_map(|person| &mut person.devices) {
        device.route_known = engine.knows_route(device.route);
    }
    if let Some(list) = engine.allow_list(app) {
        let targets = plan::targets(&found.people);
        let known = names_and_labels(tx.conn, &targets)?;
        plan::restrict(&mut found.people, &list, &targets, &known);
    }
    let due_at = due_at(&notification, now);
    let plan = plan(&found.people, &notification.rules(), now);
    let planned: usize = plan.jobs.iter().map(|(_, targets)| targets.len()).sum();
    let is_small = planned <= handed::MAX_TARGETS && !planted::is("event-ahead-of-its-jobs");
    let (mut free, mut leased, mut rowless) = (Vec::new(), Vec::new(), Vec::new());
    for (route, targets) in plan.jobs {
        let Some(permit) = (due_at <= now).then(|| engine.try_permit(route, lane, targets.len())).flatten() else {
            free.push((route, targets));
            continue;
        };
        let job = JobId(tx.next_id(now));
        if is_small {
            rowless.push(Handed { job, route, targets: targets.clone() });
        }
        leased.push((job, route, targets, permit));
    }
    let packed = (!rowless.is_empty()).then(|| handed::pack(&rowless));
    insert_notification(tx, &notification, &prepared.body, people, packed)?;
    if planted::is("event-ahead-of-its-jobs") {
        tx.commit_early()?;
    }
    handed::born(tx, &notification, due_at, rowless);
    let new_job = |route, claims, targets| NewJob {
        notification: id,
        route,
        lane,
        attempt: 0,
        claims,
        ready_at: due_at,
        due_at,
        first_attempt_at: None,
        targets,
    };
    for (route, targets) in free {
        jobs::insert(tx, app, &new_job(route, 0, targets), Lease::FREE, now)?;
        tx.wake_jobs(engine, route, lane);
    }
    let notification = Arc::new(notification);
    for (job_id, route, targets, permit) in leased {
        let mut job = new_job(route, 1, targets);
        if !is_small {
            let lease = Lease::first(tx.context.boot());
            jobs::insert_row(tx.writes(), job_id, app, &job, lease)?;
        }
        let facts = job.targets.iter().filter_map(|target| found.facts_of(*target).cloned()).collect();
        let job = Job {
            id: job_id,
            notification: id,
            route,
            lane,
            progress: Progress::none(job.targets.len()),
            targets: std::mem::take(&mut job.targets),
            attempt: 0,
            claims: 1,
            fence: handed::FENCE,
            ready_at: due_at,
            first_attempt_at: None,
        };
        let (gated, gated_at) = (tx.gated, tx.gated_at);
        let notification = Arc::clone(&notification);
        tx.hand_over(engine, HandedOver { job, notification, facts, gated, gated_at, permit });
    }
    if !planted::is("suppressed-not-recorded") {
        history::insert_results(tx, app, id, None, &plan.suppressed, now)?;
    }
    tx.planned(engine, planned, plan.suppressed);
    Ok(())
}
