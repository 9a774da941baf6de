//! Turns large audiences into jobs, a page at a time.
//!
//! A page reads the next distinct people with their devices and choices, gates them, and writes jobs, suppressions and
//! the advanced cursor in one short transaction. Open fan-outs take turns page by page, so a second broadcast does not
//! wait for the first, and the expander waits while enough is open already.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::metrics;
use super::shared::Shared;
use crate::domain::ids::NotificationId;
use crate::domain::notification::NewJob;
use crate::domain::plan;
use crate::storage::{Fanout, PageWrite, StoreError};

/// After the store failed.
const STORE_PAUSE: Duration = Duration::from_millis(500);
/// While too much is open.
const FULL_PAUSE: Duration = Duration::from_millis(200);
/// Pages between two looks at the backlog: bounds how far the limit is overrun.
const PAGES_PER_LOOK: u32 = 16;

pub struct Expander {
    shared: Arc<Shared>,
    open: VecDeque<Fanout>,
    pages: u32,
}

impl Expander {
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared, open: VecDeque::new(), pages: 0 }
    }

    pub async fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        while !shared.stopping.is_cancelled() {
            let worked = self.turn().await;
            let pause = match worked {
                Ok(true) => continue,
                Ok(false) => shared.settings.poll,
                Err(Pause(pause)) => pause,
            };
            tokio::select! {
                biased;
                () = shared.stopping.cancelled() => {}
                () = shared.fanout.notified(), if worked.is_ok() => {}
                () = shared.runtime.sleep(pause) => {}
            }
        }
        for fanout in self.open {
            if let Err(error) = shared.store.release_fanout(fanout.notification.id, fanout.fence).await {
                tracing::warn!(%error, "a fan-out could not be given back; the next start frees it");
            }
        }
    }

    /// Takes on one more fan-out if there is room, then does one page. Whether there was anything to do.
    async fn turn(&mut self) -> Result<bool, Pause> {
        let shared = Arc::clone(&self.shared);
        if self.pages.is_multiple_of(PAGES_PER_LOOK) {
            let backlog = shared.store.backlog(shared.runtime.now()).await.map_err(|e| trouble("counting", &e))?;
            if backlog.targets >= shared.settings.max_open_targets {
                return Err(Pause(FULL_PAUSE));
            }
        }
        if self.open.len() < shared.settings.max_fanouts {
            let known: Vec<NotificationId> = self.open.iter().map(|fanout| fanout.notification.id).collect();
            let claimed = shared.store.claim_fanout(shared.owner, shared.runtime.now(), &known).await;
            self.open.extend(claimed.map_err(|error| trouble("claiming a fan-out", &error))?);
        }
        let Some(mut fanout) = self.open.pop_front() else {
            self.pages = 0;
            return Ok(false);
        };
        match self.page(&mut fanout).await {
            Ok(true) => self.open.push_back(fanout),
            Ok(false) => {}
            Err(error) => {
                self.open.push_back(fanout);
                return Err(trouble("expanding", &error));
            }
        }
        self.pages = self.pages.wrapping_add(1);
        Ok(true)
    }

    /// Whether more pages follow under our lease.
    async fn page(&self, fanout: &mut Fanout) -> Result<bool, StoreError> {
        let shared = &self.shared;
        let mut page = shared.store.fanout_page(fanout, shared.settings.page_people).await?;
        for person in &mut page.people {
            for (_, facts) in &mut person.devices {
                facts.route_known = shared.senders.knows(facts.route);
            }
        }
        let now = shared.runtime.now();
        let notification = &fanout.notification;
        let plan = plan::plan(&page.people, &notification.rules(), now);
        let targets: usize = plan.jobs.iter().map(|(_, targets)| targets.len()).sum();
        let due_at = notification.not_before.map_or(now, |at| at.max(now));
        let jobs = plan
            .jobs
            .into_iter()
            .map(|(route, targets)| NewJob {
                notification: notification.id,
                route,
                lane: notification.lane,
                targets,
                attempt: 0,
                claims: 0,
                ready_at: due_at,
                due_at,
                first_attempt_at: None,
            })
            .collect::<Vec<_>>();
        let routes: Vec<_> = jobs.iter().map(|job| job.route).collect();
        metrics::planned(targets, &plan.suppressed);
        let write = PageWrite {
            app: notification.app,
            notification: notification.id,
            fence: fanout.fence,
            cursor: page.cursor,
            done: page.done,
            jobs,
            suppressed: plan.suppressed,
        };
        if !shared.store.write_page(write, now).await? {
            tracing::warn!(notification_id = %shared.public_id(notification.id), "another owner expands this audience");
            return Ok(false);
        }
        for route in routes {
            if let Some(inbox) = shared.lane(route, notification.lane) {
                inbox.wake.notify_one();
            }
        }
        fanout.cursor = page.cursor;
        if page.done {
            tracing::debug!(notification_id = %shared.public_id(notification.id), "a large audience is worked out");
            shared.broadcasts.expanded(shared, notification);
        }
        Ok(!page.done)
    }
}

struct Pause(Duration);

fn trouble(doing: &str, error: &StoreError) -> Pause {
    tracing::warn!(%error, "the store failed while {doing}; trying again");
    Pause(STORE_PAUSE)
}
