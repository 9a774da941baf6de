//! What the engine's tasks share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::{Notify, RwLock, mpsc};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::broadcasts::Broadcasts;
use super::flight::Flight;
use super::metrics;
use super::permits::Permits;
use super::route_state::RouteState;
use super::settings::Settings;
use crate::domain::deny::DenyFeed;
use crate::domain::ids::{NotificationId, RouteId};
use crate::domain::notification::{HandOff, HandedOver, Permit};
use crate::domain::outcome::Entry;
use crate::domain::platform::{Lane, Route};
use crate::render::Types;
use crate::runtime::Runtime;
use crate::senders::{Outcomes, Registry, Sender};
use crate::storage::{BootId, Store};

pub struct Shared {
    pub runtime: Runtime,
    pub store: Arc<dyn Store>,
    pub owner: BootId,
    pub senders: Registry,
    /// Event types' templates.
    pub types: Arc<Types>,
    pub deny: Arc<DenyFeed>,
    pub settings: Settings,
    pub permits: Permits,
    /// One entry per route that this process can send through.
    pub routes: HashMap<RouteId, RouteLanes>,
    /// Jobs at the senders, by ticket. Bounded by the permits.
    pub flights: Mutex<HashMap<u64, Flight>>,
    pub next_ticket: AtomicU64,
    pub outcomes: mpsc::UnboundedSender<Outcomes>,
    /// A flight changed without an outcome (all its targets were concluded, or the sender refused it).
    pub settled: Notify,
    /// For the line that tells of a broadcast's end.
    pub broadcasts: Broadcasts,
    /// A fan-out was begun.
    pub fanout: Notify,
    /// Shared by ordinary jobs in flight, taken alone by a suspect one.
    pub isolation: Arc<RwLock<()>>,
    /// No new claims, no hand-offs.
    pub stopping: CancellationToken,
}

/// A route and its two queues.
pub struct RouteLanes {
    pub route: Arc<Route>,
    pub sender: Arc<dyn Sender>,
    pub state: RouteState,
    /// Whether payloads carry `nudged_id`.
    pub push_id: bool,
    pub lanes: [LaneInbox; 2],
}

/// How a lane's worker is reached.
pub struct LaneInbox {
    pub wake: Notify,
    /// Unbounded, but every entry holds a permit.
    pub work: mpsc::UnboundedSender<Work>,
}

/// Work that a lane's worker did not claim itself.
pub enum Work {
    /// Of one commit.
    HandedOver(Vec<HandedOver>),
    /// Some of its targets must pass the gate again.
    Regate(Box<Flight>),
}

impl Shared {
    pub fn ticket(&self) -> u64 {
        self.next_ticket.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether the route may be handed anything now.
    pub fn can_send(&self, route: RouteId) -> bool {
        let known = self.routes.get(&route);
        !self.stopping.is_cancelled() && known.is_some_and(|lanes| !lanes.state.is_broken())
    }

    /// As callers know it: what logs say.
    pub fn public_id(&self, notification: NotificationId) -> Uuid {
        self.store.identity().public_notification(notification)
    }

    pub fn lane(&self, route: RouteId, lane: Lane) -> Option<&LaneInbox> {
        self.routes.get(&route).map(|lanes| &lanes.lanes[lane.index()])
    }
}

impl HandOff for Shared {
    fn try_permit(&self, route: RouteId, lane: Lane, targets: usize) -> Option<Permit> {
        if !self.can_send(route) {
            return None;
        }
        self.permits.try_take(lane, targets)
    }

    fn knows_route(&self, route: RouteId) -> bool {
        self.senders.knows(route)
    }

    fn planned(&self, targets: usize, suppressed: &[Entry]) {
        metrics::planned(targets, suppressed);
    }

    fn deliver(&self, handed: HandedOver) {
        self.deliver_all(vec![handed]);
    }

    fn deliver_all(&self, jobs: Vec<HandedOver>) {
        let mut inboxes: Vec<((RouteId, Lane), Vec<HandedOver>)> = Vec::new();
        for handed in jobs {
            let to = (handed.job.route, handed.job.lane);
            match inboxes.iter_mut().find(|(known, _)| *known == to) {
                Some((_, jobs)) => jobs.push(handed),
                None => inboxes.push((to, vec![handed])),
            }
        }
        for ((route, lane), jobs) in inboxes {
            if let Some(inbox) = self.lane(route, lane)
                && let Err(returned) = inbox.work.send(Work::HandedOver(jobs))
                && let Work::HandedOver(jobs) = returned.0
            {
                // The worker has ended: the lease is given back by the shutdown, or freed at the next start.
                tracing::debug!(jobs = jobs.len(), "jobs were handed over during shutdown");
            }
        }
    }

    fn wake_jobs(&self, route: RouteId, lane: Lane) {
        if let Some(inbox) = self.lane(route, lane) {
            inbox.wake.notify_one();
        }
    }

    fn wake_fanout(&self) {
        self.fanout.notify_one();
    }
}
