//! Notifications as callers ask about them.

use super::query::RunQuery;
use diesel::OptionalExtension;
use diesel::sql_types::{BigInt, Binary, Integer, Nullable, SmallInt, Text};
use diesel_async::AsyncPgConnection;

use super::fail::{Attempt, Fail};
use super::rows::{NotificationRow, NotificationTypes, notification_columns};
use super::statement::constant;
use super::tx::Tx;
use crate::domain::deny::DenyKey;
use crate::domain::ids::{AppKey, EventType, NotificationId, first_id_at, made_at};
use crate::domain::notification::Notification;
use crate::domain::outcome::{self, ResultCode, State};
use crate::domain::targets::Progress;
use crate::domain::time::UnixMs;
use crate::storage::{Counts, NotificationView, Page, StoreError};

pub(super) async fn row(conn: &mut AsyncPgConnection, id: NotificationId) -> Attempt<Option<NotificationRow>> {
    Ok(constant!(
        NotificationTypes; concat!("SELECT ", notification_columns!(), " FROM notification WHERE id = $1"),
        BigInt => id.0,
    )
    .get_result(conn)
    .await
    .optional()?)
}

/// The notification of this app, and how many people it was for.
pub(super) async fn read(
    conn: &mut AsyncPgConnection,
    app: AppKey,
    id: NotificationId,
) -> Attempt<(Notification, Option<i64>)> {
    let missing = || Fail::from(StoreError::NotificationNotFound { notification: id });
    let row = row(conn, id).await?.ok_or_else(missing)?;
    let people = row.people;
    let notification = row.into_domain()?;
    if notification.app == app { Ok((notification, people)) } else { Err(missing()) }
}

pub(super) async fn cancel(tx: &mut Tx, app: AppKey, id: NotificationId, now: UnixMs) -> Attempt<bool> {
    let row: Option<(i64, Option<i64>, i16)> = constant!(
        (BigInt, Nullable<BigInt>, SmallInt);
        "SELECT app, cancelled_at, (EXISTS (SELECT 1 FROM open_job WHERE notification_id = $1) \
         OR EXISTS (SELECT 1 FROM fanout WHERE notification_id = $1))::INTEGER::SMALLINT FROM notification WHERE id = $1",
        BigInt => id.0,
    )
    .get_result(tx.conn()).await
    .optional()?;
    match row {
        Some((owner, cancelled_at, open)) if owner == app.0 => {
            if cancelled_at.is_some() {
                return Ok(false);
            }
            tx.execute(constant!(
                (); "UPDATE notification SET cancelled_at = $2 WHERE id = $1", BigInt => id.0, BigInt => now.0,
            ))
            .await?;
            tx.cache().forget(id);
            tx.deny(DenyKey::Notification(id));
            Ok(open != 0)
        }
        _ => Err(StoreError::NotificationNotFound { notification: id }.into()),
    }
}

pub(super) async fn view(conn: &mut AsyncPgConnection, app: AppKey, id: NotificationId) -> Attempt<NotificationView> {
    let (notification, people) = read(conn, app, id).await?;
    let expanding: i64 = constant!(
        BigInt; "SELECT count(*) FROM fanout WHERE notification_id = $1", BigInt => id.0,
    )
    .get_result(conn)
    .await?;
    Ok(NotificationView {
        counts: counts(conn, id).await?,
        notification,
        people: people.and_then(|people| u64::try_from(people).ok()),
        expanding: expanding > 0,
    })
}

/// Finals from the blocks (a delivery has one final result), open ones from the jobs.
async fn counts(conn: &mut AsyncPgConnection, id: NotificationId) -> Attempt<Counts> {
    let (mut counts, mut redriven) = (Counts::default(), 0);
    // job_by_notification
    let jobs = constant!(
        (Integer, Nullable<Binary>); "SELECT target_count, progress FROM open_job WHERE notification_id = $1",
        BigInt => id.0,
    )
    .load::<(i32, Option<Vec<u8>>)>(conn)
    .await?;
    for job in jobs {
        let (targets, progress) = job;
        let targets = usize::try_from(targets).map_err(|_| Fail::corrupt("a negative number of targets"))?;
        let finished = Progress::from_bytes(progress.as_deref().unwrap_or_default(), targets).count();
        counts.open += targets.saturating_sub(finished) as u64;
    }
    // outcome_block_by_notification
    let blocks = constant!(
        Binary; "SELECT entries FROM outcome_block WHERE notification_id = $1 AND id >= $2",
        BigInt => id.0, BigInt => history_from(id),
    )
    .load::<Vec<u8>>(conn)
    .await?;
    for entries in blocks {
        for entry in outcome::unpack(&entries)? {
            match entry.code.state() {
                // It died before, and is counted where it waits or ends now.
                State::Open if entry.code == ResultCode::Redriven => redriven += 1,
                // Counted where it waits.
                State::Open => {}
                State::Sent => counts.sent += 1,
                State::Suppressed => counts.suppressed += 1,
                State::Expired => counts.expired += 1,
                State::Cancelled => counts.cancelled += 1,
                State::Dead => counts.dead += 1,
            }
        }
    }
    counts.dead = counts.dead.saturating_sub(redriven);
    Ok(counts)
}

pub(super) async fn list(
    conn: &mut AsyncPgConnection,
    app: AppKey,
    event_type: Option<&EventType>,
    before: Option<NotificationId>,
    limit: usize,
) -> Attempt<Page<Notification, NotificationId>> {
    let before = before.map_or(i64::MAX, |id| id.0);
    // notification_by_app
    let rows: Vec<NotificationRow> = match event_type {
        None => {
            constant!(
                NotificationTypes;
                concat!("SELECT ", notification_columns!(), " FROM notification WHERE app = $1 AND id < $2 \
                 ORDER BY id DESC LIMIT $3 + 0"),
                BigInt => app.0, BigInt => before, BigInt => super::page_limit(limit),
            )
            .load(conn)
            .await?
        }
        Some(event_type) => {
            constant!(
                NotificationTypes;
                concat!("SELECT ", notification_columns!(), " FROM notification WHERE app = $1 AND id < $2 \
                 AND event_type = $4 ORDER BY id DESC LIMIT $3 + 0"),
                BigInt => app.0, BigInt => before, BigInt => super::page_limit(limit), Text => event_type.as_str(),
            )
            .load(conn)
            .await?
        }
    };
    let items = rows.into_iter().map(NotificationRow::into_domain).collect::<Attempt<Vec<_>>>()?;
    Ok(super::page(items, limit, |notification| notification.id))
}

/// A notification's blocks and attempts have ids from here on, so the partitions before need not be looked at.
pub(super) fn history_from(id: NotificationId) -> i64 {
    first_id_at(UnixMs(made_at(id.0).0 - super::watching::ID_LAG_MS))
}

/// There, and not cancelled.
pub(super) async fn is_wanted(conn: &mut AsyncPgConnection, id: NotificationId) -> Attempt<bool> {
    let cancelled_at: Option<Option<i64>> = constant!(
        Nullable<BigInt>; "SELECT cancelled_at FROM notification WHERE id = $1", BigInt => id.0,
    )
    .get_result(conn)
    .await
    .optional()?;
    Ok(cancelled_at == Some(None))
}
