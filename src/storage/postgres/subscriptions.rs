//! Subscriptions, with tombstones: a late retry of Subscribe does not undo a later Unsubscribe.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::query::RunQuery;
use diesel::sql_types::{Array, BigInt, SmallInt, Text};
use diesel_async::AsyncPgConnection;

use super::Inner;
use super::fail::{Attempt, Fail};
use super::gather::{Answers, Work};
use super::rows::flag;
use super::statement::constant;
use super::tx::{Tx, step};
use super::users::{ensure_users, lock_users, topic_key, user_key};
use crate::domain::ids::{AppKey, Topic, UserId, UserKey};
use crate::domain::time::UnixMs;
use crate::storage::{NewSubscription, Page, Result, Subscription};

/// A call that begins or ends a subscription.
pub(super) struct Subscribe {
    pub new: NewSubscription,
    pub now: UnixMs,
}

impl Work for Subscribe {
    type Answer = bool;
    const DOING: &'static str = "recording a subscription";

    fn bytes(&self) -> usize {
        self.new.user.as_str().len() + self.new.topic.as_str().len()
    }

    async fn run(inner: &Inner, group: &[&Self]) -> Result<Answers<bool>> {
        step!(inner, Self::DOING, |tx| set(tx, group))
    }
}

pub(super) async fn import(tx: &mut Tx, new: &NewSubscription, now: UnixMs) -> Attempt<bool> {
    let one = Subscribe { new: new.clone(), now };
    set(tx, &[&one]).await?.pop().flatten().unwrap_or_else(|| Ok(false)).map_err(Fail::from)
}

async fn set(tx: &mut Tx, group: &[&Subscribe]) -> Attempt<Answers<bool>> {
    let mut seen = HashSet::new();
    let members: Vec<usize> = (0..group.len())
        .filter(|place| {
            let NewSubscription { app, user, topic, .. } = &group[*place].new;
            seen.insert((*app, user, topic))
        })
        .collect();
    let names: Vec<_> = members
        .iter()
        .map(|place| {
            let Subscribe { new, now } = group[*place];
            (new.app, new.user.as_str(), *now)
        })
        .collect();
    let context = Arc::clone(&tx.context);
    let users = ensure_users(tx.conn(), &context.ids, &names).await?;
    lock_users(tx, users.iter().copied()).await?;
    let wanted = members.iter().map(|place| (group[*place].new.app, &group[*place].new.topic, group[*place].now));
    let topics = ensure_topics(tx, wanted.collect()).await?;
    let key = |place: usize| topics.get(&(group[place].new.app, &group[place].new.topic)).copied();
    let mut keys = Vec::with_capacity(members.len());
    for (place, user) in members.into_iter().zip(users) {
        keys.push((place, key(place).ok_or_else(|| Fail::corrupt("a topic's row vanished"))?, user));
    }
    // Written in one order on every replica.
    keys.sort_unstable_by_key(|(_, topic, user)| (*topic, *user));
    let stored = stored(tx.conn(), &keys).await?;
    let mut answers: Answers<bool> = group.iter().map(|_| None).collect();
    let (mut topics, mut users, mut active) = (Vec::new(), Vec::new(), Vec::new());
    let (mut observed, mut recorded) = (Vec::new(), Vec::new());
    for ((place, topic, user), stored) in keys.into_iter().zip(stored) {
        let Subscribe { new, now } = group[place];
        if stored.is_some_and(|stored| stored.outlives(new, Some(*now))) {
            answers[place] = Some(Ok(false));
            continue;
        }
        topics.push(topic);
        users.push(user.0);
        active.push(i16::from(new.active));
        observed.push(new.observed_at.0);
        recorded.push(now.0);
        answers[place] = Some(Ok(stored.is_some_and(|stored| stored.active) != new.active));
    }
    if !topics.is_empty() {
        tx.execute(constant!(
            ();
            "INSERT INTO subscription (topic, user_key, active, observed_at, recorded_at) \
             SELECT * FROM unnest($1, $2, $3, $4, $5) \
             ON CONFLICT (topic, user_key) DO UPDATE SET active = excluded.active, \
             observed_at = greatest(subscription.observed_at, excluded.observed_at), \
             recorded_at = excluded.recorded_at",
            Array<BigInt> => topics, Array<BigInt> => users, Array<SmallInt> => active, Array<BigInt> => observed,
            Array<BigInt> => recorded,
        ))
        .await?;
    }
    Ok(answers)
}

/// Rows of topics, made where there are none.
async fn ensure_topics<'a>(
    tx: &mut Tx,
    mut wanted: Vec<(AppKey, &'a Topic, UnixMs)>,
) -> Attempt<HashMap<(AppKey, &'a Topic), i64>> {
    // In one order on every replica, and each once.
    wanted.sort_unstable();
    wanted.dedup_by_key(|(app, topic, _)| (*app, *topic));
    let mut found = topics_by_name(tx.conn(), &wanted).await?;
    let missing: Vec<_> = wanted.into_iter().filter(|(app, topic, _)| !found.contains_key(&(*app, *topic))).collect();
    if !missing.is_empty() {
        let (mut ids, mut apps, mut names) = (Vec::new(), Vec::new(), Vec::new());
        for (app, topic, now) in &missing {
            ids.push(tx.context.ids.next(*now));
            apps.push(app.0);
            names.push(topic.as_str());
        }
        tx.execute(constant!(
            ();
            "INSERT INTO topic (id, app, name) SELECT * FROM unnest($1, $2, $3) ON CONFLICT (app, name) DO NOTHING",
            Array<BigInt> => ids, Array<BigInt> => apps, Array<Text> => names,
        ))
        .await?;
        // Another replica may have been faster.
        found.extend(topics_by_name(tx.conn(), &missing).await?);
    }
    Ok(found)
}

async fn topics_by_name<'a>(
    conn: &mut AsyncPgConnection,
    wanted: &[(AppKey, &'a Topic, UnixMs)],
) -> Attempt<HashMap<(AppKey, &'a Topic), i64>> {
    let (apps, names): (Vec<i64>, Vec<&str>) = wanted.iter().map(|(app, topic, _)| (app.0, topic.as_str())).unzip();
    // topic_by_name
    let rows: Vec<(i64, i64)> = constant!(
        (BigInt, BigInt);
        "SELECT e.place - 1, t.id FROM unnest($1, $2) WITH ORDINALITY AS e(app, name, place) CROSS JOIN LATERAL \
         (SELECT id FROM topic WHERE app = e.app AND name = e.name OFFSET 0) AS t",
        Array<BigInt> => apps, Array<Text> => names,
    )
    .load(conn)
    .await?;
    let key = |place: i64| wanted.get(usize::try_from(place).ok()?).map(|(app, topic, _)| (*app, *topic));
    Ok(rows.into_iter().filter_map(|(place, topic)| Some((key(place)?, topic))).collect())
}

/// What [`set`] would answer.
pub(super) async fn assess(conn: &mut AsyncPgConnection, new: &NewSubscription) -> Attempt<bool> {
    let (Some(user), Some(topic)) =
        (user_key(conn, new.app, &new.user).await?, topic_key(conn, new.app, &new.topic).await?)
    else {
        return Ok(new.active);
    };
    let stored = stored(conn, &[(0, topic, user)]).await?.pop().flatten();
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
        new.observed_at.0 < self.observed_at
            || (new.observed_at.0 == self.observed_at && (tie_says_yes || new.active == self.active))
    }
}

/// What stands for each of these topics and users.
async fn stored(conn: &mut AsyncPgConnection, keys: &[(usize, i64, UserKey)]) -> Attempt<Vec<Option<Stored>>> {
    let (topics, users): (Vec<i64>, Vec<i64>) = keys.iter().map(|(_, topic, user)| (*topic, user.0)).unzip();
    // subscription's primary key
    let rows: Vec<(i64, i16, i64)> = constant!(
        (BigInt, SmallInt, BigInt);
        "SELECT e.place - 1, s.active, s.observed_at FROM unnest($1, $2) WITH ORDINALITY AS e(topic, user_key, place) \
         CROSS JOIN LATERAL (SELECT active, observed_at FROM subscription WHERE topic = e.topic \
         AND user_key = e.user_key OFFSET 0) AS s",
        Array<BigInt> => topics, Array<BigInt> => users,
    )
    .load(conn)
    .await?;
    let mut stored = vec![None; keys.len()];
    for (place, active, observed_at) in rows {
        let slot = usize::try_from(place).ok().and_then(|place| stored.get_mut(place));
        *slot.ok_or_else(|| Fail::corrupt("a position out of range"))? =
            Some(Stored { active: flag(active), observed_at });
    }
    Ok(stored)
}

pub(super) async fn list(
    conn: &mut AsyncPgConnection,
    app: AppKey,
    user: &UserId,
    after: Option<i64>,
    limit: usize,
) -> Attempt<Page<Subscription, i64>> {
    let Some(user) = user_key(conn, app, user).await? else { return Ok(Page { items: Vec::new(), next: None }) };
    // subscription_by_user
    let rows: Vec<(i64, String, i64)> = constant!(
        (BigInt, Text, BigInt);
        "SELECT s.topic, t.name, s.observed_at FROM subscription s JOIN topic t ON t.id = s.topic \
         WHERE s.user_key = $1 AND s.topic > $2 AND s.active = 1 ORDER BY s.topic LIMIT $3 + 0",
        BigInt => user.0, BigInt => after.unwrap_or(0), BigInt => super::page_limit(limit),
    )
    .load(conn)
    .await?;
    let page = super::page(rows, limit, |(topic, _, _)| *topic);
    let subscription = |(_, name, observed_at): (i64, String, i64)| Subscription {
        topic: Topic::trusted(&name),
        observed_at: UnixMs(observed_at),
    };
    Ok(Page { items: page.items.into_iter().map(subscription).collect(), next: page.next })
}
