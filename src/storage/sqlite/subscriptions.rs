//! Subscriptions, with tombstones: a late retry of Subscribe does not undo a later Unsubscribe.

use diesel::sql_types::{BigInt, SmallInt, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{OptionalExtension, RunQueryDsl};

use super::fail::Attempt;
use super::group::Tx;
use super::people::{ensure_user, topic_key, user_key};
use super::rows::flag;
use super::statement::constant;
use crate::domain::ids::{AppKey, Topic, UserId, UserKey};
use crate::domain::time::UnixMs;
use crate::planted;
use crate::storage::{NewSubscription, Page, Subscription};

pub(super) fn set(tx: &mut Tx<'_>, new: &NewSubscription, now: UnixMs) -> Attempt<bool> {
    let user = ensure_user(tx, new.app, &new.user, now)?;
    let topic = if let Some(topic) = topic_key(tx.conn, new.app, &new.topic)? {
        topic
    } else {
        let id = tx.next_id(now);
        tx.execute(constant!(
            (); "INSERT INTO topic (id, app, name) VALUES (?1, ?2, ?3)",
            BigInt => id, BigInt => new.app.0, Text => new.topic.as_str(),
        ))?;
        id
    };
    let stored = stored(tx.conn, topic, user)?;
    if stored.is_some_and(|stored| stored.outlives(new, Some(now))) {
        return Ok(false);
    }
    tx.execute(constant!(
        ();
        "INSERT INTO subscription (topic, user_key, active, observed_at, recorded_at) VALUES (?1, ?2, ?3, ?4, ?5) \
         ON CONFLICT (topic, user_key) DO UPDATE SET active = excluded.active, \
         observed_at = max(subscription.observed_at, excluded.observed_at), \
         recorded_at = excluded.recorded_at",
        BigInt => topic, BigInt => user.0, SmallInt => i16::from(new.active), BigInt => new.observed_at.0,
        BigInt => now.0,
    ))?;
    Ok(stored.is_some_and(|stored| stored.active) != new.active)
}

/// What [`set`] would answer.
pub(super) fn assess(conn: &mut SqliteConnection, new: &NewSubscription) -> Attempt<bool> {
    let (Some(user), Some(topic)) = (user_key(conn, new.app, &new.user)?, topic_key(conn, new.app, &new.topic)?) else {
        return Ok(new.active);
    };
    let stored = stored(conn, topic, user)?;
    Ok(!stored.is_some_and(|stored| stored.outlives(new, None))
        && stored.is_some_and(|stored| stored.active) != new.active)
}

#[derive(Clone, Copy)]
struct Stored {
    active: bool,
    observed_at: i64,
}

impl Stored {
    /// As with opt-ins a tie is a "no", and so is a "no" that is said now; what says nothing new is not written.
    fn outlives(self, new: &NewSubscription, now: Option<UnixMs>) -> bool {
        if !new.active && Some(new.observed_at) == now {
            return !self.active;
        }
        let tie_says_yes = new.active && !self.active;
        if planted::is("late-subscription-wins") {
            return false;
        }
        new.observed_at.0 < self.observed_at
            || (new.observed_at.0 == self.observed_at && (tie_says_yes || new.active == self.active))
    }
}

fn stored(conn: &mut SqliteConnection, topic: i64, user: UserKey) -> Attempt<Option<Stored>> {
    let row: Option<(i16, i64)> = constant!(
        (SmallInt, BigInt); "SELECT active, observed_at FROM subscription WHERE topic = ?1 AND user_key = ?2",
        BigInt => topic, BigInt => user.0,
    )
    .get_result(conn)
    .optional()?;
    Ok(row.map(|(active, observed_at)| Stored { active: flag(active), observed_at }))
}

pub(super) fn list(
    conn: &mut SqliteConnection,
    app: AppKey,
    user: &UserId,
    after: Option<i64>,
    limit: usize,
) -> Attempt<Page<Subscription, i64>> {
    let Some(user) = user_key(conn, app, user)? else { return Ok(Page { items: Vec::new(), next: None }) };
    // subscription_by_user
    let rows: Vec<(i64, String, i64)> = constant!(
        (BigInt, Text, BigInt);
        "SELECT s.topic, t.name, s.observed_at FROM subscription s JOIN topic t ON t.id = s.topic \
         WHERE s.user_key = ?1 AND s.topic > ?2 AND s.active = 1 ORDER BY s.topic LIMIT ?3 + 0",
        BigInt => user.0, BigInt => after.unwrap_or(0), BigInt => super::page_limit(limit),
    )
    .load(conn)?;
    let page = super::page(rows, limit, |(topic, _, _)| *topic);
    let subscription = |(_, name, observed_at): (i64, String, i64)| Subscription {
        topic: Topic::trusted(&name),
        observed_at: UnixMs(observed_at),
    };
    Ok(Page { items: page.items.into_iter().map(subscription).collect(), next: page.next })
}
