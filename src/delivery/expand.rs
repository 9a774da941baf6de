//! Turns large audiences into jobs, a page at a time.
//!
//! A page reads the next distinct people with their devices and choices, gates them, and writes jobs, suppressions and
//! the advanced cursor in one short transaction. Jobs that there is room for go to their workers directly, the others
//! into the queue. Open fan-outs take turns page by page, so a second broadcast does not
//! wait for the first, and the expander waits while enough is open already.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::metrics;
use super::shared::Shared;
use crate::domain::ids::{NotificationId, RouteId};
use crate::domain::notification::{HandOff as _, HandedOver, Job, NewJob, Permit};
use crate::domain::plan;
use crate::domain::platform::Lane;
use crate::domain::targets::{Progress, Target};
use crate::planted;
use crate::storage::{Fanout, PageWrite, StoreError};

/// After the store failed.
const STORE_PAUSE: Duration = Duration::from_millis(500);
/// While too much is open.
const FULL_PAUSE: Duration = Duration::from_millis(200);
/// Paused fan-outs kept; with so many no other is begun until one of them is resumed.
const MAX_HELD: usize = 1_000;
/// How long a page waits for room to hand a job over: longer than a database that writes its log back holds results up.
const ROOM_PATIENCE: Duration = Duration::from_secs(1);
/// Pages between two looks at the backlog: bounds how far the limit is overrun.
const PAGES_PER_LOOK: u32 = 16;

pub struct Expander {
    shared: Arc<Shared>,
    open: VecDeque<Fanout>,
    /// Claimed, but paused: expanding them would fill the room of those that are not.
    held: Vec<Fanout>,
    pages: u32,
    /// Routes that there was no room for at the last look, nor a little later. Bounded by the routes.
    full: BTreeSet<RouteId>,
}

impl Expander {
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared, open: VecDeque::new(), held: Vec::new(), pages: 0, full: BTreeSet::new() }
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
        for fanout in self.open.iter().chain(&self.held) {
            self.give_back(fanout).await;
        }
    }

    /// Again and again where the store refuses: its lease would be held for as long as this process lives.
    async fn give_back(&self, fanout: &Fanout) {
        let shared = &self.shared;
        let mut last_tries = super::outcomes::LAST_TRIES;
        while let Err(error) = shared.store.release_fanout(fanout.notification.id, fanout.fence).await {
            if shared.stopping.is_cancelled() {
                last_tries -= 1;
                if last_tries == 0 {
                    tracing::warn!(%error, "a fan-out could not be given back; whoever finds it without an owner frees it");
                    return;
                }
            }
            if planted::is("fanout-given-back-once") {
                return;
            }
            shared.runtime.sleep(STORE_PAUSE / 2).await;
        }
    }

    /// Takes on one more fan-out if there is room, then does one page. Whether there was anything to do.
    async fn turn(&mut self) -> Result<bool, Pause> {
        let shared = Arc::clone(&self.shared);
        if self.pages.is_multiple_of(PAGES_PER_LOOK) {
            let backlog = shared.store.backlog(shared.runtime.now()).await.map_err(|e| trouble("counting", &e))?;
            if backlog.targets >= shared.settings.max_expanded_targets {
                return Err(Pause(FULL_PAUSE));
            }
        }
        if self.open.len() < shared.settings.max_fanouts && self.held.len() < MAX_HELD {
            let ours = self.open.iter().chain(&self.held);
            let known: Vec<NotificationId> = ours.map(|fanout| fanout.notification.id).collect();
            let claimed = shared.store.claim_fanout(shared.owner, shared.runtime.now(), &known).await;
            self.open.extend(claimed.map_err(|error| trouble("claiming a fan-out", &error))?);
        }
        self.set_aside();
        let Some(mut fanout) = self.open.pop_front() else {
            self.pages = 0;
            return Ok(false);
        };
        match self.page(&mut fanout).await {
            Ok(true) => self.open.push_back(fanout),
            Ok(false) => {}
            Err(error) => {
                // The page may have been written all the same: only the store knows how far it came, and writing the page
                // again would send it twice. So it is given back, and claimed from where it is.
                let pause = trouble("expanding", &error);
                self.give_back(&fanout).await;
                return Err(pause);
            }
        }
        self.pages = self.pages.wrapping_add(1);
        Ok(true)
    }

    /// Keeps what is paused on every platform apart from what can go on. Past its TTL it does: every person's share of it
    /// has expired, and is to be found so.
    fn set_aside(&mut self) {
        let pauses = self.shared.holds.now();
        let now = self.shared.runtime.now();
        let all = std::mem::take(&mut self.open).into_iter().chain(std::mem::take(&mut self.held));
        for fanout in all {
            let notification = &fanout.notification;
            let waits = notification.expires_at > now || planted::is("paused-audience-never-expires");
            if waits && pauses.of_notification(notification.app, &notification.event_type).is_some() {
                self.held.push(fanout);
            } else {
                self.open.push_back(fanout);
            }
        }
    }

    /// Whether more pages follow under our lease.
    async fn page(&mut self, fanout: &mut Fanout) -> Result<bool, StoreError> {
        let shared = Arc::clone(&self.shared);
        let mut page = shared.store.fanout_page(fanout, shared.settings.page_people).await?;
        let table = shared.table();
        for person in &mut page.people {
            for (_, facts) in &mut person.devices {
                facts.route_known = table.routes.contains_key(&facts.route);
            }
        }
        if let Some(list) = table.allow_lists.get(&fanout.notification.app) {
            let targets = plan::targets(&page.people);
            let known = shared.store.names_and_labels(&targets).await?;
            plan::restrict(&mut page.people, list, &targets, &known);
        }
        let now = shared.runtime.now();
        let notification = Arc::clone(&fanout.notification);
        let mut rules = notification.rules();
        rules.cancelled |= page.cancelled && !planted::is("cancelled-audience-expanded");
        let plan = plan::plan(&page.people, &rules, now);
        let targets: usize = plan.jobs.iter().map(|(_, targets)| targets.len()).sum();
        let due_at = notification.not_before.map_or(now, |at| at.max(now));
        metrics::planned(targets, &plan.suppressed);

        // What there is room for is leased in the same transaction and sent at once, with the tokens already read;
        // that spares a claim and a second look at every device.
        let (mut leased, mut free) = (Vec::new(), Vec::new());
        for (route, targets) in plan.jobs {
            match self.permit(route, notification.lane, targets.len()).await {
                Some(permit) => leased.push((route, targets, permit)),
                None => free.push((route, targets)),
            }
        }
        let job = |route: RouteId, targets: &[Target], claims| NewJob {
            notification: notification.id,
            route,
            lane: notification.lane,
            targets: targets.to_vec(),
            attempt: 0,
            claims,
            ready_at: due_at,
            due_at,
            first_attempt_at: None,
        };
        let mut jobs: Vec<NewJob> = leased.iter().map(|(route, targets, _)| job(*route, targets, 1)).collect();
        jobs.extend(free.iter().map(|(route, targets)| job(*route, targets, 0)));
        let write = PageWrite {
            app: notification.app,
            notification: notification.id,
            fence: fanout.fence,
            cursor: page.cursor,
            done: page.done,
            jobs,
            leased: leased.len(),
            suppressed: plan.suppressed,
        };
        let opened = write.jobs.len() as u64;
        let Some(ids) = shared.store.write_page(write, now).await? else {
            tracing::warn!(notification_id = %shared.public_id(notification.id), "another owner expands this audience");
            return Ok(false);
        };
        shared.room.opened(targets as u64, opened);
        for ((route, targets, permit), id) in leased.into_iter().zip(ids) {
            let facts = targets.iter().filter_map(|target| page.take_facts(*target)).collect();
            let job = Job {
                id,
                notification: notification.id,
                route,
                lane: notification.lane,
                progress: Progress::none(targets.len()),
                targets,
                attempt: 0,
                claims: 1,
                fence: 1,
                ready_at: due_at,
                first_attempt_at: None,
            };
            let (gated, gated_at) = (page.gate.position, page.gate.at);
            shared.deliver(HandedOver { job, notification: Arc::clone(&notification), facts, gated, gated_at, permit });
        }
        for (route, _) in free {
            shared.wake_jobs(route, notification.lane);
        }
        shared.room.ended(0, u64::from(page.done));
        fanout.cursor = page.cursor;
        if page.done {
            tracing::debug!(notification_id = %shared.public_id(notification.id), "a large audience is worked out");
            shared.broadcasts.expanded(&shared, &notification);
        }
        Ok(!page.done)
    }

    /// Room for a job, waited for a little where there is none: as long as the route keeps up, expanding at its pace is
    /// cheaper than a detour through the queue. Once that was in vain, not again until there is room for this route, and
    /// not for one whose provider is silent: the other routes' people wait for the page meanwhile. Not at all where
    /// other processes may have room: the queue is how they get their share.
    async fn permit(&mut self, route: RouteId, lane: Lane, targets: usize) -> Option<Permit> {
        let shared = &self.shared;
        let mut permit = shared.try_permit(route, lane, targets);
        if permit.is_none()
            && !self.full.contains(&route)
            && !shared.store.is_shared()
            && shared.can_send(route)
            && let Some(lanes) = shared.route(route)
            && !lanes.share.is_silent(shared.runtime.instant())
        {
            let room = shared.permits.take(&shared.runtime, &lanes.share, lane, targets);
            permit = shared.runtime.timeout(ROOM_PATIENCE, room).await.flatten();
        }
        if permit.is_none() {
            self.full.insert(route);
        } else {
            self.full.remove(&route);
        }
        permit
    }
}

struct Pause(Duration);

fn trouble(doing: &str, error: &StoreError) -> Pause {
    tracing::warn!(%error, "the store failed while {doing}; trying again");
    Pause(STORE_PAUSE)
}
