//! Subscriptions, with tombstones: a late retry of Subscribe does not undo a later Unsubscribe.

use super::query::RunQuery;
use diesel::OptionalExtension;
use diesel::sql_types::{BigInt, SmallInt, Text};
use diesel_async::AsyncPgConnection;

use super::fail::Attempt;
use super::people::{ensure_user, lock_user, topic_key, user_key};
use super::rows::flag;
use super::statement::constant;
use super::tx::Tx;
use crate::domain::ids::{AppKey, Topic, UserId};
use crate::domain::time::UnixMs;
use crate::storage::{Page, Subscription};

/// A change on its way in.
pub(super) struct NewSubscription {
    pub app: AppKey,
    pub user: UserId,
    pub topic: Topic,
    pub active: bool,
    pub observed_at: UnixMs,
}

pub(super) async fn set(tx: &mut Tx, new: &NewSubscription, now: UnixMs) -> Attempt<bool> {
    let user = ensure_user(tx, new.app, &new.user, now).await?;
    lock_user(tx, user).await?;
    let topic = if let Some(topic) = topic_key(tx.conn(), new.app, &new.topic).await? {
        topic
    } else {
        let id = tx.next_id(now);
        tx.execute(constant!(
            (); "INSERT INTO topic (id, app, name) VALUES ($1, $2, $3)",
            BigInt => id, BigInt => new.app.0, Text => new.topic.as_str(),
        ))
        .await?;
        id
    };
    let stored: Option<(i16, i64)> = constant!(
        (SmallInt, BigInt); "SELECT active, observed_at FROM subscription WHERE topic = $1 AND user_key = $2",
        BigInt => topic, BigInt => user.0,
    )
    .get_result(tx.conn())
    .await
    .optional()?;
    let was_active = stored.is_some_and(|(active, _)| flag(active));
    if let Some((_, observed_at)) = stored {
        // As with opt-ins a tie is a "no", and what says nothing new is not written.
        let tie_says_yes = new.active && !was_active;
        if new.observed_at.0 < observed_at
            || (new.observed_at.0 == observed_at && (tie_says_yes || new.active == was_active))
        {
            return Ok(false);
        }
    }
    tx.execute(constant!(
        ();
        "INSERT INTO subscription (topic, user_key, active, observed_at, recorded_at) VALUES ($1, $2, $3, $4, $5) \
         ON CONFLICT (topic, user_key) DO UPDATE SET active = excluded.active, observed_at = excluded.observed_at, \
         recorded_at = excluded.recorded_at",
        BigInt => topic, BigInt => user.0, SmallInt => i16::from(new.active), BigInt => new.observed_at.0,
        BigInt => now.0,
    ))
    .await?;
    Ok(was_active != new.active)
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
