//! The deny table: every replica's "no" reaches every other.
//!
//! A poll every 200 ms reads what was logged since three seconds before the last good one; the transactions that log
//! are cut after two, so a row that becomes visible late is still met. A poll that succeeds proves the feed complete up
//! to the moment it was sent. It has a connection of its own: a busy pool must not stop the sending.

use std::collections::HashMap;
use std::time::Duration;

use super::query::RunQuery;
use diesel::sql_types::{BigInt, SmallInt};
use diesel_async::AsyncPgConnection;

use super::Inner;
use super::statement::constant;
use crate::domain::deny::DenyKey;
use crate::domain::ids::{DeviceId, NotificationId, UserKey};
use crate::planted;

const POLL: Duration = Duration::from_millis(200);
const POLL_LIMIT: Duration = Duration::from_millis(1_500);
/// Longer than a logging transaction can last.
const OVERLAP_MS: i64 = 3_000;
/// Rows older than this are deleted by retention.
pub(super) const KEPT_MS: i64 = 3_600_000;

const USER: i16 = 1;
const DEVICE: i16 = 2;
const NOTIFICATION: i16 = 3;

/// As stored.
pub(super) fn code(key: &DenyKey) -> (i16, i64) {
    match key {
        DenyKey::User(user) => (USER, user.0),
        DenyKey::Device(device) => (DEVICE, device.0),
        DenyKey::Notification(notification) => (NOTIFICATION, notification.0),
    }
}

fn key(kind: i16, subject: i64) -> Option<DenyKey> {
    match kind {
        USER => Some(DenyKey::User(UserKey(subject))),
        DEVICE => Some(DenyKey::Device(DeviceId(subject))),
        NOTIFICATION => Some(DenyKey::Notification(NotificationId(subject))),
        _ => None,
    }
}

/// The reader of the table.
#[derive(Default)]
pub(super) struct Poller {
    conn: Option<AsyncPgConnection>,
    /// The server's time of the last good poll; 0 before the first.
    read_at: i64,
    /// Rows met within the overlap, with their time.
    seen: HashMap<i64, i64>,
}

impl Poller {
    pub async fn run(mut self, inner: std::sync::Arc<Inner>) {
        let runtime = inner.context.runtime.clone();
        loop {
            let begun = runtime.instant();
            match runtime.timeout(POLL_LIMIT, self.poll(&inner)).await {
                Some(Ok(())) => {}
                failed => {
                    self.conn = None;
                    if let Some(Err(error)) = failed {
                        tracing::debug!(error, "the deny table cannot be read; nothing is sent meanwhile");
                    }
                }
            }
            tokio::select! {
                biased;
                () = inner.context.stopping.cancelled() => return,
                () = runtime.sleep_until(begun + POLL) => {}
            }
        }
    }

    pub async fn poll(&mut self, inner: &Inner) -> Result<(), String> {
        let context = &inner.context;
        if self.conn.is_none() {
            self.conn = Some(inner.target.connect().await.map_err(|error| error.to_string())?);
        }
        let conn = self.conn.as_mut().expect("connected above");
        let sent_at = context.runtime.instant();
        // deny_by_time. The first poll reads the last minute: gates may be that old when a database comes back. The
        // statement's time, for clock_timestamp() may differ from row to row, and so every row of the last hour would be
        // asked what time it is.
        let since = if self.read_at == 0 { 0 } else { self.read_at - OVERLAP_MS };
        let rows: Vec<(i64, i16, i64, i64)> = constant!(
            (BigInt, SmallInt, BigInt, BigInt);
            "SELECT d.id, d.kind, d.subject, d.at FROM deny d WHERE d.at >= greatest($1, \
             (extract(epoch FROM statement_timestamp()) * 1000)::BIGINT - 60000)",
            BigInt => since,
        )
        .load(conn)
        .await
        .map_err(|error| error.to_string())?;
        let now: i64 = constant!(BigInt; "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::BIGINT")
            .get_result(conn)
            .await
            .map_err(|error| error.to_string())?;
        let mut keys = Vec::new();
        for (id, kind, subject, at) in rows {
            if self.seen.insert(id, at).is_none() {
                keys.extend(key(kind, subject));
            }
        }
        if planted::is("pg-no-of-others-ignored") {
            keys.clear();
        }
        context.deny.publish(&keys, context.runtime.instant().into_std());
        context.deny.prove(sent_at.into_std());
        // The second statement was sent after the first, so nothing between them is skipped by the overlap.
        self.read_at = now;
        self.seen.retain(|_, at| *at >= now - 2 * OVERLAP_MS - 60_000);
        Ok(())
    }
}
