//! Fan-outs: leasing one, paging over its merged audience, writing a page.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::query::RunQuery;
use diesel::OptionalExtension;
use diesel::sql_types::{Array, BigInt, Binary};
use diesel_async::AsyncPgConnection;

use super::batch::{BlockColumns, JobColumns};
use super::fail::Attempt;
use super::ids;
use super::jobs::{self, Lease};
use super::notifications;
use super::reach;
use super::statement::constant;
use super::tx::Tx;
use crate::domain::audience::PackedAudience;
use crate::domain::ids::{AppKey, EventType, JobId, NotificationId, UserKey};
use crate::domain::targets::Target;
use crate::domain::time::UnixMs;
use crate::storage::people::People;
use crate::storage::{BootId, Fanout, FanoutPage, Gate, PageWrite};

/// A fan-out that cannot be read is put off by this, as an unreadable job is.
const UNREADABLE_FOR_MS: i64 = 3_600_000;

/// Apps take turns: the next app after the one served last, and of that the one due first. Open fan-outs are few
/// enough to look at all.
pub(super) async fn claim(tx: &mut Tx, owner: BootId, now: UnixMs, skip: &[NotificationId]) -> Attempt<Option<Fanout>> {
    loop {
        let last_app = tx.context.last_fanout_app.load(Ordering::Relaxed);
        let row: Option<(i64, i64, i64, i64, Vec<u8>)> = constant!(
            (BigInt, BigInt, BigInt, BigInt, Binary);
            "UPDATE fanout SET owner = $1, fence = fence + 1 WHERE notification_id = ( \
             SELECT notification_id FROM fanout WHERE owner = 0 AND due_at <= $2 \
             AND notification_id <> ALL ($3) \
             ORDER BY app <= $4, app, due_at, notification_id LIMIT 1 FOR UPDATE SKIP LOCKED) \
             RETURNING notification_id, app, cursor, fence, audience",
            BigInt => owner.0, BigInt => now.0, Array<BigInt> => ids(skip.iter().map(|id| id.0)),
            BigInt => last_app,
        )
        .get_result(tx.conn())
        .await
        .optional()?;
        let Some((id, app, cursor, fence, audience)) = row else { return Ok(None) };
        tx.context.last_fanout_app.store(app, Ordering::Relaxed);
        let notification = jobs::notification(tx, NotificationId(id)).await;
        if let (Ok(Some(notification)), Ok(_)) = (&notification, PackedAudience::unpack(&audience)) {
            let notification = Arc::clone(notification);
            return Ok(Some(Fanout { notification, cursor: UserKey(cursor), fence, audience: audience.into() }));
        }
        tracing::error!(notification_id = id, "a fan-out cannot be read and is put off");
        tx.execute(constant!(
            (); "UPDATE fanout SET owner = 0, fence = fence + 1, due_at = $2 WHERE notification_id = $1",
            BigInt => id, BigInt => now.0 + UNREADABLE_FOR_MS,
        ))
        .await?;
    }
}

/// One sorted stream of users of the audience.
enum Source {
    Everyone(AppKey),
    Topic(i64),
    Listed(Vec<UserKey>),
}

struct Stream {
    source: Source,
    buffer: VecDeque<UserKey>,
    /// Read so far.
    after: UserKey,
    /// Nothing comes after the buffer.
    ended: bool,
}

impl Stream {
    fn new(source: Source, after: UserKey) -> Self {
        Self { source, buffer: VecDeque::new(), after, ended: false }
    }

    async fn peek(&mut self, conn: &mut AsyncPgConnection, chunk: usize) -> Attempt<Option<UserKey>> {
        if self.buffer.is_empty() && !self.ended {
            let limit = i64::try_from(chunk).unwrap_or(i64::MAX);
            let read: Vec<i64> = match &self.source {
                // app_user_by_app. Nothing but the key: with what is packed, the server might rather walk the primary key,
                // past everybody of other apps.
                Source::Everyone(app) => {
                    constant!(
                        BigInt; "SELECT id FROM app_user WHERE app = $1 AND id > $2 ORDER BY id LIMIT $3 + 0",
                        BigInt => app.0, BigInt => self.after.0, BigInt => limit,
                    )
                    .load(conn)
                    .await?
                }
                // subscription's primary key
                Source::Topic(topic) => {
                    constant!(
                        BigInt;
                        "SELECT user_key FROM subscription WHERE topic = $1 AND user_key > $2 AND active = 1 \
                         ORDER BY user_key LIMIT $3 + 0",
                        BigInt => *topic, BigInt => self.after.0, BigInt => limit,
                    )
                    .load(conn)
                    .await?
                }
                Source::Listed(users) => {
                    let from = users.partition_point(|user| *user <= self.after);
                    users[from..].iter().take(chunk).map(|user| user.0).collect()
                }
            };
            self.ended = read.len() < chunk;
            if let Some(last) = read.last() {
                self.after = UserKey(*last);
            }
            self.buffer.extend(read.into_iter().map(UserKey));
        }
        Ok(self.buffer.front().copied())
    }
}

/// What [`meet`] came to.
pub(super) struct Met {
    pub found: People,
    /// The last of them.
    pub cursor: UserKey,
    pub done: bool,
}

/// The next `limit` distinct people after the cursor: a merge of everyone, topics and the named, all in the order of
/// their keys. Who is in several is met once. `is_thin`: many others lie between them, as an earlier page showed or this
/// one shows.
pub(super) async fn meet(
    conn: &mut AsyncPgConnection,
    app: AppKey,
    event_type: &EventType,
    packed: &[u8],
    after: UserKey,
    limit: usize,
    is_thin: &mut bool,
) -> Attempt<Met> {
    let audience = PackedAudience::unpack(packed)?;
    if let Some(met) = meet_one_source(conn, app, event_type, &audience, after, limit, is_thin).await? {
        return Ok(met);
    }
    let mut whole: Vec<Stream> = Vec::with_capacity(audience.topics.len() + 2);
    if audience.everyone {
        whole.push(Stream::new(Source::Everyone(app), after));
    } else {
        // Everyone includes them: topics and names add nobody.
        whole.extend(audience.topics.iter().map(|topic| Stream::new(Source::Topic(*topic), after)));
        whole.push(Stream::new(Source::Listed(audience.users), after));
    }
    let mut owners: Vec<UserKey> = audience.devices.iter().map(|target| target.user).collect();
    owners.dedup();
    let mut by_device = Stream::new(Source::Listed(owners), after);

    // With many streams each gives only a share of the page.
    let chunk = (2 * limit / whole.len().max(1)).max(16).min(limit + 1);
    let (mut users, mut devices) = (Vec::with_capacity(limit), Vec::<Target>::new());
    let mut cursor = after;
    let mut done = false;
    for _ in 0..limit.max(1) {
        let mut next: Option<UserKey> = None;
        for stream in &mut whole {
            if let Some(user) = stream.peek(conn, chunk).await? {
                next = Some(next.map_or(user, |next| next.min(user)));
            }
        }
        let named = by_device.peek(conn, chunk).await?;
        let on_all_devices = next.is_some() && named.is_none_or(|named| next.is_some_and(|next| next <= named));
        let Some(user) = (if on_all_devices { next } else { named }) else {
            done = true;
            break;
        };
        for stream in whole.iter_mut().chain(std::iter::once(&mut by_device)) {
            if stream.buffer.front() == Some(&user) {
                stream.buffer.pop_front();
            }
        }
        if on_all_devices {
            users.push(user);
        } else {
            let from = audience.devices.partition_point(|target| target.user < user);
            devices.extend(audience.devices[from..].iter().take_while(|target| target.user == user));
        }
        cursor = user;
    }
    if !done {
        done = by_device.peek(conn, 1).await?.is_none();
        for stream in &mut whole {
            done = done && stream.peek(conn, 1).await?.is_none();
        }
    }
    let mut found = reach::of_users(conn, event_type, &users).await?;
    found.add_devices(conn, event_type, &devices).await?;
    Ok(Met { found, cursor, done })
}

/// An audience of one source, which nearly all are: read in one go.
async fn meet_one_source(
    conn: &mut AsyncPgConnection,
    app: AppKey,
    event_type: &EventType,
    audience: &PackedAudience,
    after: UserKey,
    limit: usize,
    is_thin: &mut bool,
) -> Attempt<Option<Met>> {
    let mut stream = match (audience.everyone, &audience.topics[..]) {
        // Everyone includes whoever is named.
        (true, _) => Stream::new(Source::Everyone(app), after),
        (false, [topic]) if audience.users.is_empty() && audience.devices.is_empty() => {
            Stream::new(Source::Topic(*topic), after)
        }
        (false, _) => return Ok(None),
    };
    let limit = limit.max(1);
    stream.peek(conn, limit + 1).await?;
    let done = stream.buffer.len() <= limit;
    let mut users = Vec::from(stream.buffer);
    users.truncate(limit);
    let cursor = users.last().copied().unwrap_or(after);
    let range = if *is_thin { None } else { reach::of_range(conn, event_type, &users).await? };
    let found = if let Some(found) = range {
        found
    } else {
        *is_thin = true;
        reach::of_users(conn, event_type, &users).await?
    };
    Ok(Some(Met { found, cursor, done }))
}

/// The next page of a fan-out, and what a hand-over of its jobs needs. `gate` was taken before.
pub(super) async fn page(
    conn: &mut AsyncPgConnection,
    fanout: &Fanout,
    limit: usize,
    gate: Gate,
    is_thin: &mut bool,
) -> Attempt<FanoutPage> {
    let notification = &fanout.notification;
    let (app, event_type) = (notification.app, &notification.event_type);
    let Met { found, cursor, done } =
        meet(conn, app, event_type, &fanout.audience, fanout.cursor, limit, is_thin).await?;
    let cancelled = !notifications::is_wanted(conn, notification.id).await?;
    let facts = found.facts.into_iter().map(|facts| (facts.target, Some(facts))).collect();
    Ok(FanoutPage { people: found.people, gate, facts, cancelled, cursor, done })
}

pub(super) async fn write_page(tx: &mut Tx, page: &PageWrite, now: UnixMs) -> Attempt<Option<Vec<JobId>>> {
    // Before anything else: a run after a lost answer takes the same ones.
    let ids: Vec<JobId> = page.jobs.iter().map(|_| JobId(tx.next_id(now))).collect();
    let held = if page.done {
        tx.execute(constant!(
            (); "DELETE FROM fanout WHERE notification_id = $1 AND fence = $2",
            BigInt => page.notification.0, BigInt => page.fence,
        ))
        .await?
    } else {
        tx.execute(constant!(
            (); "UPDATE fanout SET cursor = $3 WHERE notification_id = $1 AND fence = $2 AND cursor < $3",
            BigInt => page.notification.0, BigInt => page.fence, BigInt => page.cursor.0,
        ))
        .await?
    };
    if held == 0 {
        let ours = tx.is_repeated() && was_written(tx, page).await?;
        if ours {
            // The run before this one leased them to us.
            ids.iter().take(page.leased).for_each(|id| tx.leases(*id));
        }
        return Ok(ours.then_some(ids));
    }
    let (mut jobs, mut blocks) = (JobColumns::of(tx.context.packing.written()), BlockColumns::default());
    for (at, (id, job)) in ids.iter().zip(&page.jobs).enumerate() {
        let is_leased = at < page.leased;
        let lease = if is_leased { Lease::first(tx.context.boot) } else { Lease::FREE };
        jobs.push(*id, page.app, job, lease)?;
        if is_leased {
            tx.leases(*id);
        }
    }
    blocks.push(|| tx.next_id(now), page.app, page.notification, None, &page.suppressed, now);
    jobs::insert(tx, jobs).await?;
    jobs::append(tx, blocks).await?;
    Ok(Some(ids))
}

/// Whether the run before this one wrote the page, though its answer was lost.
async fn was_written(tx: &mut Tx, page: &PageWrite) -> Attempt<bool> {
    let row: Option<(i64, i64)> = constant!(
        (BigInt, BigInt); "SELECT cursor, fence FROM fanout WHERE notification_id = $1", BigInt => page.notification.0,
    )
    .get_result(tx.conn())
    .await
    .optional()?;
    Ok(match row {
        None => page.done,
        Some((cursor, fence)) => !page.done && fence == page.fence && cursor == page.cursor.0,
    })
}

pub(super) async fn release(tx: &mut Tx, notification: NotificationId, fence: i64) -> Attempt<()> {
    tx.execute(constant!(
        (); "UPDATE fanout SET owner = 0, fence = fence + 1 WHERE notification_id = $1 AND fence = $2 AND owner <> 0",
        BigInt => notification.0, BigInt => fence,
    ))
    .await?;
    Ok(())
}

/// Whether an open expansion will still come to this person.
pub(super) async fn is_pending(
    conn: &mut AsyncPgConnection,
    app: AppKey,
    notification: NotificationId,
    user: UserKey,
) -> Attempt<bool> {
    let row: Option<(i64, Vec<u8>)> = constant!(
        (BigInt, Binary); "SELECT cursor, audience FROM fanout WHERE notification_id = $1 AND app = $2",
        BigInt => notification.0, BigInt => app.0,
    )
    .get_result(conn)
    .await
    .optional()?;
    let Some((cursor, audience)) = row else { return Ok(false) };
    if user.0 <= cursor {
        return Ok(false);
    }
    let audience = PackedAudience::unpack(&audience)?;
    if audience.everyone
        || audience.users.binary_search(&user).is_ok()
        || audience.devices.iter().any(|target| target.user == user)
    {
        return Ok(true);
    }
    let subscribed: i64 = constant!(
        BigInt;
        "SELECT count(*) FROM unnest($1) AS t(value) JOIN subscription s ON s.topic = t.value AND s.user_key = $2 \
         AND s.active = 1",
        Array<BigInt> => ids(audience.topics.into_iter()), BigInt => user.0,
    )
    .get_result(conn)
    .await?;
    Ok(subscribed > 0)
}
