//! Fan-outs: leasing one, paging over its merged audience, writing a page.

use std::collections::VecDeque;
use std::sync::Arc;

use diesel::sql_types::{BigInt, Binary, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{OptionalExtension, RunQueryDsl};

use super::fail::Attempt;
use super::group::Tx;
use super::history;
use super::homes::{self, homeless};
use super::jobs::{self, Lease};
use super::notifications;
use super::people::of_devices;
use super::reach::of_page;
use super::rows::json_ids;
use super::statement::constant;
use crate::domain::audience::PackedAudience;
use crate::domain::ids::{AppKey, EventType, JobId, NotificationId, UserKey};
use crate::domain::notification::TargetFacts;
use crate::domain::targets::Target;
use crate::domain::time::UnixMs;
use crate::planted;
use crate::storage::people::People;
use crate::storage::{BootId, Fanout, FanoutPage, Gate, PageWrite};

/// A fan-out that cannot be read is put off by this, as an unreadable job is.
const UNREADABLE_FOR_MS: i64 = 3_600_000;

/// Apps take turns: the next app after the one served last, and of that the one due first. Open fan-outs are few
/// enough to look at all.
pub(super) fn claim(tx: &mut Tx<'_>, owner: BootId, now: UnixMs, skip: &[NotificationId]) -> Attempt<Option<Fanout>> {
    loop {
        let row: Option<(i64, i64, i64, i64, Vec<u8>)> = constant!(
            (BigInt, BigInt, BigInt, BigInt, Binary);
            "UPDATE fanout SET owner = ?1, fence = fence + 1 WHERE notification_id = ( \
             SELECT notification_id FROM fanout WHERE owner = 0 AND due_at <= ?2 \
             AND notification_id NOT IN (SELECT value FROM json_each(?3)) \
             ORDER BY app <= ?4, app, due_at, notification_id LIMIT 1) \
             RETURNING notification_id, app, cursor, fence, audience",
            BigInt => owner.0, BigInt => now.0, Text => json_ids(skip.iter().map(|id| id.0)),
            BigInt => tx.last_fanout_app.0,
        )
        .get_result(tx.writes())
        .optional()?;
        let Some((id, app, cursor, fence, audience)) = row else { return Ok(None) };
        *tx.last_fanout_app = AppKey(app);
        let notification = jobs::notification(tx, NotificationId(id));
        if let (Ok(Some(notification)), Ok(_)) = (&notification, PackedAudience::unpack(&audience)) {
            let notification = Arc::clone(notification);
            return Ok(Some(Fanout { notification, cursor: UserKey(cursor), fence, audience: audience.into() }));
        }
        tracing::error!(notification_id = id, "a fan-out cannot be read and is put off");
        tx.execute(constant!(
            (); "UPDATE fanout SET owner = 0, fence = fence + 1, due_at = ?2 WHERE notification_id = ?1",
            BigInt => id, BigInt => now.0 + UNREADABLE_FOR_MS,
        ))?;
    }
}

/// One sorted stream of users of the audience.
enum Source {
    Everyone(AppKey),
    Topic(i64),
    Listed(Vec<UserKey>),
}

impl Source {
    /// The next `limit` after a user.
    fn after(&self, conn: &mut SqliteConnection, after: UserKey, limit: usize) -> Attempt<Vec<UserKey>> {
        let most = i64::try_from(limit).unwrap_or(i64::MAX);
        let read: Vec<i64> = match self {
            Self::Everyone(app) => {
                let (first, last) = homes::range(*app);
                // app_user's primary key
                let mut read: Vec<i64> = constant!(
                    BigInt;
                    "SELECT id FROM app_user WHERE id > ?1 AND id <= ?2 AND app = ?3 ORDER BY id LIMIT ?4 + 0",
                    BigInt => after.0.max(first.0 - 1), BigInt => last.0, BigInt => app.0, BigInt => most,
                )
                .load(conn)?;
                // app_user_by_app
                let homeless: Vec<i64> = constant!(
                    BigInt;
                    concat!(
                        "SELECT id FROM app_user WHERE app = ?1 AND id > ?2 AND ", homeless!(), " ORDER BY id LIMIT ?3 + 0"
                    ),
                    BigInt => app.0, BigInt => after.0, BigInt => most,
                )
                .load(conn)?;
                if !homeless.is_empty() {
                    read.extend(homeless);
                    read.sort_unstable();
                    read.dedup();
                    read.truncate(limit);
                }
                read
            }
            // subscription's primary key
            Self::Topic(topic) => constant!(
                BigInt;
                "SELECT user_key FROM subscription WHERE topic = ?1 AND user_key > ?2 AND active = 1 \
                 ORDER BY user_key LIMIT ?3 + 0",
                BigInt => *topic, BigInt => after.0, BigInt => most,
            )
            .load(conn)?,
            Self::Listed(users) => {
                let from = users.partition_point(|user| *user <= after);
                return Ok(users[from..].iter().take(limit).copied().collect());
            }
        };
        Ok(read.into_iter().map(UserKey).collect())
    }
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

    fn peek(&mut self, conn: &mut SqliteConnection, chunk: usize) -> Attempt<Option<UserKey>> {
        if self.buffer.is_empty() && !self.ended {
            let read = self.source.after(conn, self.after, chunk)?;
            self.ended = read.len() < chunk;
            if let Some(last) = read.last() {
                self.after = *last;
            }
            self.buffer.extend(read);
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
/// their keys. Who is in several is met once.
pub(super) fn meet(
    conn: &mut SqliteConnection,
    app: AppKey,
    event_type: &EventType,
    packed: &[u8],
    after: UserKey,
    limit: usize,
) -> Attempt<Met> {
    let audience = PackedAudience::unpack(packed)?;
    if let Some(met) = meet_one_source(conn, app, event_type, &audience, after, limit)? {
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
            if let Some(user) = stream.peek(conn, chunk)? {
                next = Some(next.map_or(user, |next| next.min(user)));
            }
        }
        let named = by_device.peek(conn, chunk)?;
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
        done = by_device.peek(conn, 1)?.is_none();
        for stream in &mut whole {
            done = done && stream.peek(conn, 1)?.is_none();
        }
    }
    let mut found = of_page(conn, event_type, &users)?;
    found.append(of_devices(conn, event_type, &devices)?);
    Ok(Met { found, cursor, done })
}

/// An audience of one source, which nearly all are: nothing to merge.
fn meet_one_source(
    conn: &mut SqliteConnection,
    app: AppKey,
    event_type: &EventType,
    audience: &PackedAudience,
    after: UserKey,
    limit: usize,
) -> Attempt<Option<Met>> {
    let source = match (audience.everyone, &audience.topics[..]) {
        // Everyone includes whoever is named.
        (true, _) => Source::Everyone(app),
        (false, [topic]) if audience.users.is_empty() && audience.devices.is_empty() => Source::Topic(*topic),
        (false, _) => return Ok(None),
    };
    let limit = limit.max(1);
    let mut users = source.after(conn, after, limit.saturating_add(1))?;
    let done = users.len() <= limit;
    users.truncate(limit);
    let cursor = users.last().copied().unwrap_or(after);
    Ok(Some(Met { found: of_page(conn, event_type, &users)?, cursor, done }))
}

/// The next page of a fan-out, and what a hand-over of its jobs needs.
pub(super) fn page(conn: &mut SqliteConnection, fanout: &Fanout, limit: usize, gate: Gate) -> Attempt<FanoutPage> {
    let notification = &fanout.notification;
    let (app, event_type) = (notification.app, &notification.event_type);
    let Met { found, cursor, done } = meet(conn, app, event_type, &fanout.audience, fanout.cursor, limit)?;
    let cancelled = !notifications::is_wanted(conn, notification.id)?;
    let facts = found.facts.into_iter().map(|facts: TargetFacts| (facts.target, Some(facts))).collect();
    Ok(FanoutPage { people: found.people, gate, facts, cancelled, cursor, done })
}

pub(super) fn write_page(tx: &mut Tx<'_>, page: &PageWrite, now: UnixMs) -> Attempt<Option<Vec<JobId>>> {
    let held = if page.done && !planted::is("fanout-never-ends") {
        tx.execute(constant!(
            (); "DELETE FROM fanout WHERE notification_id = ?1 AND fence = ?2",
            BigInt => page.notification.0, BigInt => page.fence,
        ))?
    } else {
        tx.execute(constant!(
            (); "UPDATE fanout SET cursor = ?3 WHERE notification_id = ?1 AND fence = ?2",
            BigInt => page.notification.0, BigInt => page.fence,
            BigInt => page.cursor.0 - i64::from(planted::is("page-cursor-off-by-one")),
        ))?
    };
    if held == 0 {
        return Ok(None);
    }
    if planted::is("cursor-ahead-of-its-jobs") {
        tx.commit_early()?;
    }
    let mut ids = Vec::with_capacity(page.jobs.len());
    for (at, job) in page.jobs.iter().enumerate() {
        let lease = if at < page.leased { Lease::first(tx.context.boot()) } else { Lease::FREE };
        ids.push(jobs::insert(tx, page.app, job, lease, now)?);
    }
    history::insert_results(tx, page.app, page.notification, None, &page.suppressed, now)?;
    Ok(Some(ids))
}

pub(super) fn release(tx: &mut Tx<'_>, notification: NotificationId, fence: i64) -> Attempt<()> {
    tx.execute(constant!(
        (); "UPDATE fanout SET owner = 0, fence = fence + 1 WHERE notification_id = ?1 AND fence = ?2 AND owner <> 0",
        BigInt => notification.0, BigInt => fence,
    ))?;
    Ok(())
}

/// Whether an open expansion will still come to this person.
pub(super) fn is_pending(
    conn: &mut SqliteConnection,
    app: AppKey,
    notification: NotificationId,
    user: UserKey,
) -> Attempt<bool> {
    let row: Option<(i64, Vec<u8>)> = constant!(
        (BigInt, Binary); "SELECT cursor, audience FROM fanout WHERE notification_id = ?1 AND app = ?2",
        BigInt => notification.0, BigInt => app.0,
    )
    .get_result(conn)
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
        "SELECT count(*) FROM json_each(?1) AS t JOIN subscription s ON s.topic = t.value AND s.user_key = ?2 \
         AND s.active = 1",
        Text => json_ids(audience.topics.into_iter()), BigInt => user.0,
    )
    .get_result(conn)?;
    Ok(subscribed > 0)
}
