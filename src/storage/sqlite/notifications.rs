//! Notifications as callers ask about them.

use std::collections::HashSet;

use diesel::sql_types::{BigInt, Binary, Integer, Nullable, SmallInt, Text};
use diesel::sqlite::SqliteConnection;
use diesel::{OptionalExtension, RunQueryDsl};

use super::fail::{Attempt, Fail};
use super::group::Tx;
use super::handed;
use super::rows::{NotificationRow, NotificationTypes, notification_columns};
use super::statement::constant;
use crate::domain::deny::DenyKey;
use crate::domain::ids::{AppKey, EventType, NotificationId};
use crate::domain::notification::Notification;
use crate::domain::outcome::{self, ResultCode, State};
use crate::domain::targets::{Progress, Target};
use crate::domain::time::UnixMs;
use crate::planted;
use crate::storage::{Counts, NotificationView, Page, StoreError};

pub(super) fn row(conn: &mut SqliteConnection, id: NotificationId) -> Attempt<Option<NotificationRow>> {
    Ok(constant!(
        NotificationTypes; concat!("SELECT ", notification_columns!(), " FROM notification WHERE id = ?1"),
        BigInt => id.0,
    )
    .get_result(conn)
    .optional()?)
}

/// The notification of this app, and how many people it was for.
pub(super) fn read(
    conn: &mut SqliteConnection,
    app: AppKey,
    id: NotificationId,
) -> Attempt<(Notification, Option<i64>)> {
    let missing = || Fail::from(StoreError::NotificationNotFound { notification: id });
    let row = row(conn, id)?.ok_or_else(missing)?;
    let people = row.people;
    let notification = row.into_domain()?;
    if notification.app == app || planted::is("foreign-notification-visible") {
        Ok((notification, people))
    } else {
        Err(missing())
    }
}

pub(super) fn cancel(tx: &mut Tx<'_>, app: AppKey, id: NotificationId, now: UnixMs) -> Attempt<bool> {
    let row: Option<(i64, Option<i64>, i16)> = constant!(
        (BigInt, Nullable<BigInt>, SmallInt);
        "SELECT app, cancelled_at, EXISTS (SELECT 1 FROM job WHERE notification_id = ?1) \
         OR EXISTS (SELECT 1 FROM fanout WHERE notification_id = ?1) FROM notification WHERE id = ?1",
        BigInt => id.0,
    )
    .get_result(tx.conn)
    .optional()?;
    match row {
        Some((owner, cancelled_at, open)) if owner == app.0 => {
            if cancelled_at.is_some() {
                return Ok(false);
            }
            tx.execute(constant!(
                (); "UPDATE notification SET cancelled_at = ?2 WHERE id = ?1", BigInt => id.0, BigInt => now.0,
            ))?;
            if !planted::is("cancel-leaves-the-cache") {
                tx.cache.forget(id);
            }
            tx.deny(DenyKey::Notification(id));
            Ok(open != 0 || handed::is_open(tx, id))
        }
        _ => Err(StoreError::NotificationNotFound { notification: id }.into()),
    }
}

pub(super) fn view(conn: &mut SqliteConnection, app: AppKey, id: NotificationId) -> Attempt<NotificationView> {
    let (notification, people) = read(conn, app, id)?;
    let expanding: i64 = constant!(
        BigInt; "SELECT count(*) FROM fanout WHERE notification_id = ?1", BigInt => id.0,
    )
    .get_result(conn)?;
    Ok(NotificationView {
        counts: counts(conn, id)?,
        notification,
        people: people.and_then(|people| u64::try_from(people).ok()),
        expanding: expanding > 0,
    })
}

/// Finals from the blocks (a delivery has one final result), open ones from the jobs.
fn counts(conn: &mut SqliteConnection, id: NotificationId) -> Attempt<Counts> {
    let (mut counts, mut redriven) = (Counts::default(), 0);
    // job_by_notification
    let jobs = constant!(
        (Integer, Nullable<Binary>); "SELECT target_count, progress FROM job WHERE notification_id = ?1",
        BigInt => id.0,
    )
    .load_iter::<(i32, Option<Vec<u8>>), diesel::connection::DefaultLoadingMode>(conn)?;
    for job in jobs {
        let (targets, progress) = job?;
        let targets = usize::try_from(targets).map_err(|_| Fail::corrupt("a negative number of targets"))?;
        let finished = Progress::from_bytes(progress.as_deref().unwrap_or_default(), targets).count();
        counts.open += targets.saturating_sub(finished) as u64;
    }
    let mut handed: HashSet<Target> = handed::of(conn, id)?.into_iter().flat_map(|job| job.targets).collect();
    // outcome_block_by_notification
    let blocks = constant!(Binary; "SELECT entries FROM outcome_block WHERE notification_id = ?1", BigInt => id.0)
        .load_iter::<Vec<u8>, diesel::connection::DefaultLoadingMode>(conn)?;
    for entries in blocks {
        for entry in outcome::unpack(&entries?)? {
            handed.remove(&Target { user: entry.user, device: entry.device });
            match entry.code.state() {
                // It died before, and is counted where it waits or ends now.
                State::Open if entry.code == ResultCode::Redriven => redriven += 1,
                // Counted where it waits.
                State::Open => {}
                State::Sent => counts.sent += if planted::is("sent-counted-twice") { 2 } else { 1 },
                State::Suppressed => counts.suppressed += 1,
                State::Expired => counts.expired += 1,
                State::Cancelled => counts.cancelled += 1,
                State::Dead => counts.dead += 1,
            }
        }
    }
    counts.open += handed.len() as u64;
    counts.dead = counts.dead.saturating_sub(redriven);
    Ok(counts)
}

pub(super) fn list(
    conn: &mut SqliteConnection,
    app: AppKey,
    event_type: Option<&EventType>,
    before: Option<NotificationId>,
    limit: usize,
) -> Attempt<Page<Notification, NotificationId>> {
    let before = before.map_or(i64::MAX, |id| id.0);
    // notification_by_app
    let rows: Vec<NotificationRow> = match event_type {
        None => constant!(
            NotificationTypes;
            concat!("SELECT ", notification_columns!(), " FROM notification WHERE app = ?1 AND id < ?2 \
             ORDER BY id DESC LIMIT ?3 + 0"),
            BigInt => app.0, BigInt => before, BigInt => super::page_limit(limit),
        )
        .load(conn)?,
        Some(event_type) => constant!(
            NotificationTypes;
            concat!("SELECT ", notification_columns!(), " FROM notification WHERE app = ?1 AND id < ?2 \
             AND event_type = ?4 ORDER BY id DESC LIMIT ?3 + 0"),
            BigInt => app.0, BigInt => before, BigInt => super::page_limit(limit), Text => event_type.as_str(),
        )
        .load(conn)?,
    };
    let items = rows.into_iter().map(NotificationRow::into_domain).collect::<Attempt<Vec<_>>>()?;
    Ok(super::page(items, limit, |notification| notification.id))
}

/// There, and not cancelled.
pub(super) fn is_wanted(conn: &mut SqliteConnection, id: NotificationId) -> Attempt<bool> {
    let cancelled_at: Option<Option<i64>> = constant!(
        Nullable<BigInt>; "SELECT cancelled_at FROM notification WHERE id = ?1", BigInt => id.0,
    )
    .get_result(conn)
    .optional()?;
    Ok(cancelled_at == Some(None))
}
