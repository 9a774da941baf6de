//! What the engine's tasks share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use tokio::sync::{Notify, RwLock as AsyncRwLock, mpsc};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::broadcasts::Broadcasts;
use super::flight::Flight;
use super::holds::Holds;
use super::metrics;
use super::permits::Permits;
use super::route_state::RouteState;
use super::settings::Settings;
use crate::domain::allow::AllowList;
use crate::domain::deny::DenyFeed;
use crate::domain::ids::{AppKey, JobId, NotificationId, RouteId};
use crate::domain::notification::{HandOff, HandedOver, Job, Permit};
use crate::domain::outcome::Entry;
use crate::domain::platform::{Lane, Route};
use crate::render::Types;
use crate::runtime::Runtime;
use crate::senders::{Outcomes, Sender};
use crate::storage::{BootId, Store};

pub struct Shared {
    pub runtime: Runtime,
    pub store: Arc<dyn Store>,
    pub owner: BootId,
    /// Event types' templates.
    pub types: Arc<Types>,
    pub deny: Arc<DenyFeed>,
    pub settings: Settings,
    pub permits: Permits,
    /// Replaced as a whole when the configuration changes.
    pub table: RwLock<Arc<RouteTable>>,
    pub holds: Holds,
    /// Jobs at the senders, by ticket. Bounded by the permits.
    pub flights: Mutex<HashMap<u64, Flight>>,
    /// Leases to be given back. Bounded by the permits of a moment in which a route was removed.
    pub orphans: Mutex<Vec<(JobId, i64)>>,
    pub next_ticket: AtomicU64,
    pub outcomes: mpsc::UnboundedSender<Outcomes>,
    /// A flight changed without an outcome (all its targets were concluded, or the sender refused it).
    pub settled: Notify,
    /// For the line that tells of a broadcast's end.
    pub broadcasts: Broadcasts,
    /// A fan-out was begun.
    pub fanout: Notify,
    /// Shared by ordinary jobs in flight, taken alone by a suspect one.
    pub isolation: Arc<AsyncRwLock<()>>,
    /// No new claims, no hand-offs.
    pub stopping: CancellationToken,
}

/// What this process can send through, and to whom.
#[derive(Default)]
pub struct RouteTable {
    pub routes: HashMap<RouteId, Arc<RouteLanes>>,
    /// Of the apps that have one.
    pub allow_lists: HashMap<AppKey, Arc<AllowList>>,
}

/// A route and its two queues. Lives from the configuration that names it to the one that does not.
pub struct RouteLanes {
    pub route: Arc<Route>,
    link: RwLock<Arc<Link>>,
    pub state: RouteState,
    pub lanes: [LaneInbox; 2],
    /// The route is configured no more: its workers stop claiming and give back what they hold.
    pub removed: CancellationToken,
}

/// What a route's pushes go out through; another one after its credential was replaced.
pub struct Link {
    pub sender: Arc<dyn Sender>,
    /// Whether payloads carry `nudged_id`.
    pub push_id: bool,
}

impl RouteLanes {
    pub fn new(route: Arc<Route>, link: Link, lanes: [LaneInbox; 2]) -> Self {
        let (state, removed) = (RouteState::default(), CancellationToken::new());
        Self { route, link: RwLock::new(Arc::new(link)), state, lanes, removed }
    }

    pub fn link(&self) -> Arc<Link> {
        Arc::clone(&self.link.read().expect("no panic while held"))
    }

    /// Takes effect for every batch that is made from now on. A credential that is new deserves a new try.
    pub fn relink(&self, link: Link) {
        let same = Arc::ptr_eq(&self.link().sender, &link.sender);
        *self.link.write().expect("no panic while held") = Arc::new(link);
        if !same && self.state.is_broken() {
            self.state.works();
            self.wake();
        }
    }

    pub fn wake(&self) {
        for inbox in &self.lanes {
            inbox.wake.notify_one();
        }
    }
}

/// How a lane's worker is reached.
pub struct LaneInbox {
    pub wake: Notify,
    /// Unbounded, but every entry holds a permit.
    pub work: mpsc::UnboundedSender<Work>,
}

/// Work that a lane's worker did not claim itself.
pub enum Work {
    HandedOver(HandedOver),
    /// Some of its targets must pass the gate again.
    Regate(Box<Flight>),
}

impl Shared {
    pub fn ticket(&self) -> u64 {
        self.next_ticket.fetch_add(1, Ordering::Relaxed)
    }

    /// Its worker has ended since the permit was given: shutdown, or the route was removed. The store is calling us, so the
    /// lease is given back later.
    fn orphan(&self, job: &Job) {
        self.orphans.lock().expect("no panic while held").push((job.id, job.fence));
    }

    pub fn table(&self) -> Arc<RouteTable> {
        Arc::clone(&self.table.read().expect("no panic while held"))
    }

    pub fn route(&self, route: RouteId) -> Option<Arc<RouteLanes>> {
        self.table.read().expect("no panic while held").routes.get(&route).cloned()
    }

    /// Whether the route may be handed anything now: it is configured, its credential works, and no operator holds it.
    pub fn can_send(&self, route: RouteId) -> bool {
        let Some(lanes) = self.route(route) else { return false };
        let spec = &lanes.route.spec;
        let is_held = self.holds.now().of_route(spec.app, spec.platform).is_some();
        !self.stopping.is_cancelled() && !lanes.state.is_broken() && !is_held
    }

    /// As callers know it: what logs say.
    pub fn public_id(&self, notification: NotificationId) -> Uuid {
        self.store.identity().public_notification(notification)
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
        self.route(route).is_some()
    }

    fn allow_list(&self, app: AppKey) -> Option<Arc<AllowList>> {
        self.table().allow_lists.get(&app).cloned()
    }

    fn pauses_changed(&self) {
        self.holds.changed.notify_one();
    }

    fn planned(&self, targets: usize, suppressed: &[Entry]) {
        metrics::planned(targets, suppressed);
    }

    fn deliver(&self, handed: HandedOver) {
        let (route, lane) = (handed.job.route, handed.job.lane);
        let Some(lanes) = self.route(route) else { return self.orphan(&handed.job) };
        if let Err(returned) = lanes.lanes[lane.index()].work.send(Work::HandedOver(handed))
            && let Work::HandedOver(handed) = returned.0
        {
            self.orphan(&handed.job);
        }
    }

    fn wake_jobs(&self, route: RouteId, lane: Lane) {
        if let Some(lanes) = self.route(route) {
            lanes.lanes[lane.index()].wake.notify_one();
        }
    }

    fn wake_fanout(&self) {
        self.fanout.notify_one();
    }
}
