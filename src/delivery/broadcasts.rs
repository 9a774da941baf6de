//! One log line per broadcast: a large audience from acceptance to its last result.
//!
//! Counting a broadcast reads its outcome blocks, so it is looked at seldom: at growing intervals, and at once when no
//! job is open any more. `finished_ms` is when that look saw it, so up to one interval late. A restart forgets what it was waiting for; the line is a convenience, the numbers stay in
//! GetNotification.

use std::sync::Mutex;
use std::time::Duration;

use super::shared::Shared;
use crate::domain::ids::{AppKey, NotificationId};
use crate::domain::time::UnixMs;
use crate::runtime::Instant;
use crate::telemetry::traces;

/// More are not waited for: they get no line.
const MAX_WATCHED: usize = 256;
const FIRST_LOOK: Duration = Duration::from_secs(10);
const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// Broadcasts that were worked out and are not finished.
#[derive(Default)]
pub struct Broadcasts(Mutex<Vec<Watched>>);

#[derive(Clone)]
struct Watched {
    app: AppKey,
    notification: NotificationId,
    event_type: String,
    accepted_at: UnixMs,
    expanded_at: UnixMs,
    look_at: Instant,
    wait: Duration,
}

impl Broadcasts {
    /// The last page of its audience was written.
    pub fn expanded(&self, shared: &Shared, notification: &crate::domain::notification::Notification) {
        let watched = Watched {
            app: notification.app,
            notification: notification.id,
            event_type: notification.event_type.to_string(),
            accepted_at: notification.accepted_at,
            expanded_at: shared.runtime.now(),
            look_at: shared.runtime.instant() + FIRST_LOOK,
            wait: FIRST_LOOK,
        };
        let mut open = self.0.lock().expect("no panic while held");
        if open.len() < MAX_WATCHED {
            open.push(watched);
        }
    }

    /// Logs those that have ended. `idle`: no job is open, so all have.
    pub async fn look(&self, shared: &Shared, idle: bool) {
        let instant = shared.runtime.instant();
        let due: Vec<Watched> = {
            let open = self.0.lock().expect("no panic while held");
            open.iter().filter(|one| idle || one.look_at <= instant).cloned().collect()
        };
        for one in due {
            let ended = match shared.store.get_notification(one.app, one.notification).await {
                Ok(view) if view.counts.open == 0 && !view.expanding => {
                    let now = shared.runtime.now();
                    let counts = view.counts;
                    let public_id = shared.public_id(one.notification).to_string();
                    let ends = [
                        ("sent", counts.sent),
                        ("suppressed", counts.suppressed),
                        ("dead", counts.dead),
                        ("expired", counts.expired),
                        ("cancelled", counts.cancelled),
                    ];
                    traces::broadcast(&public_id, &one.event_type, one.accepted_at, now, ends);
                    tracing::info!(
                        notification_id = public_id,
                        event_type = one.event_type,
                        accepted_at = %one.accepted_at,
                        expanded_ms = millis(one.expanded_at.since(one.accepted_at)),
                        finished_ms = millis(now.since(one.accepted_at)),
                        sent = counts.sent,
                        suppressed = counts.suppressed,
                        dead = counts.dead,
                        expired = counts.expired,
                        cancelled = counts.cancelled,
                        "a broadcast is finished"
                    );
                    true
                }
                Ok(_) => false,
                // Deleted meanwhile, or the store is in trouble, which is logged elsewhere.
                Err(error) => {
                    tracing::debug!(%error, "a broadcast cannot be counted");
                    matches!(error, crate::storage::StoreError::NotificationNotFound { .. })
                }
            };
            let mut open = self.0.lock().expect("no panic while held");
            if ended {
                open.retain(|other| other.notification != one.notification);
            } else if let Some(watched) = open.iter_mut().find(|other| other.notification == one.notification) {
                watched.wait = (watched.wait * 2).min(LONGEST_WAIT);
                watched.look_at = instant + watched.wait;
            }
        }
    }
}

/// As a number in the log: wider ones are written as texts.
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
