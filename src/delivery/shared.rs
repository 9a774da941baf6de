//! What the engine's tasks share.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use tokio::sync::{Notify, RwLock as AsyncRwLock, mpsc};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::broadcasts::Broadcasts;
use super::credential::{Credential, CredentialKey};
use super::flight::Flight;
use super::guard::Guard;
use super::holds::Holds;
use super::metrics;
use super::permits::Permits;
use super::quiet::Quiet;
use super::route_state::{Paused, RouteState};
use super::settings::Settings;
use super::settled::Settled;
use super::share::Share;
use crate::domain::allow::AllowList;
use crate::domain::deny::DenyFeed;
use crate::domain::ids::{AppKey, JobId, NotificationId, RouteId};
use crate::domain::notification::{HandOff, HandedOver, Job, Permit};
use crate::domain::outcome::Entry;
use crate::domain::platform::{Environment, Lane, Route, RouteSpec};
use crate::domain::provider::{RouteCondition, RouteStatus};
use crate::domain::room::Room;
use crate::domain::time::UnixMs;
use crate::render::Types;
use crate::runtime::{Instant, Runtime};
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
    /// How much is open, for whoever accepts events.
    pub room: Room,
    /// Replaced as a whole when the configuration changes.
    pub table: RwLock<Arc<RouteTable>>,
    pub holds: Holds,
    /// What routes share. Bounded by the credentials that were ever configured in this run.
    pub credentials: Mutex<BTreeMap<CredentialKey, Arc<Credential>>>,
    pub guard: Guard,
    pub quiet: Quiet,
    /// A route or credential was paused, or works again.
    pub troubled: Notify,
    /// Jobs at the senders, by ticket. Bounded by the permits.
    /// Boxed: thousands of them inline would be a table of megabytes, met at random.
    pub flights: Mutex<HashMap<u64, Box<Flight>>>,
    /// Leases that are still to be given back: their route was removed, or the store refused to take them. Bounded by the
    /// permits, for a store that takes nothing gives no new ones.
    pub orphans: Mutex<Vec<Orphan>>,
    pub next_ticket: AtomicU64,
    pub outcomes: mpsc::UnboundedSender<Outcomes>,
    /// Flights that changed without an answer.
    pub settled: Settled,
    /// For the line that tells of a broadcast's end.
    pub broadcasts: Broadcasts,
    /// A fan-out was begun.
    pub fanout: Notify,
    /// Shared by ordinary jobs in flight, taken alone by a suspect one.
    pub isolation: Arc<AsyncRwLock<()>>,
    /// No new claims, no hand-offs.
    pub stopping: CancellationToken,
}

/// Jobs whose leases are to be given back, with their fences.
pub struct Orphan {
    jobs: Vec<(JobId, i64)>,
    /// Not due before this.
    put_off: Option<UnixMs>,
}

/// What this process can send through, and to whom.
#[derive(Default)]
pub struct RouteTable {
    /// In order, as all that is gone through: what happens must not depend on chance, or no history could be replayed.
    pub routes: BTreeMap<RouteId, Arc<RouteLanes>>,
    /// Of the apps that have one.
    pub allow_lists: BTreeMap<AppKey, Arc<AllowList>>,
}

/// A route and its two queues. Lives from the configuration that names it to the one that does not.
pub struct RouteLanes {
    pub route: Arc<Route>,
    link: RwLock<Arc<Link>>,
    pub state: RouteState,
    pub credential: Arc<Credential>,
    /// What the credential holds of the room in this environment.
    pub share: Arc<Share>,
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
    pub fn new(route: Arc<Route>, link: Link, credential: Arc<Credential>, lanes: [LaneInbox; 2]) -> Self {
        let (state, removed) = (RouteState::default(), CancellationToken::new());
        let share = Arc::clone(credential.share(route.spec.environment));
        Self { route, link: RwLock::new(Arc::new(link)), state, credential, share, lanes, removed }
    }

    /// Its own fault or its credential's.
    pub fn is_broken(&self) -> bool {
        self.state.is_broken() || self.credential.state.is_broken()
    }

    /// Why and since when it is.
    pub fn paused(&self) -> Option<Paused> {
        self.credential.state.paused().or_else(|| self.state.paused())
    }

    /// Until when nothing at all may be sent in a lane: a fault's pause, a provider's complaint, a rate that is used up.
    pub fn paused_until(&self, lane: Lane, now: Instant) -> Option<Instant> {
        let (route, credential) = (self.state.paused_until(now), self.credential.state.paused_until(now));
        let slowed = self.credential.slowed_until(now);
        route.max(credential).max(slowed).max(self.credential.pacer.dry_until(lane, now))
    }

    /// Whether the caller is the one that may ask whether it works again.
    pub fn begin_probe(&self, now: Instant) -> bool {
        if self.credential.state.is_broken() {
            self.credential.state.begin_probe(now)
        } else {
            self.state.begin_probe(now)
        }
    }

    pub fn end_probe(&self) {
        self.credential.state.end_probe();
        self.state.end_probe();
    }

    pub fn link(&self) -> Arc<Link> {
        Arc::clone(&self.link.read().expect("no panic while held"))
    }

    /// Takes effect for every batch that is made from now on. A credential that is new deserves a new try. Whether it is.
    pub fn relink(&self, link: Link) -> bool {
        let same = Arc::ptr_eq(&self.link().sender, &link.sender);
        *self.link.write().expect("no panic while held") = Arc::new(link);
        if !same {
            self.credential.renewed();
            self.state.works();
            self.wake();
        }
        !same
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
    /// Of one commit.
    HandedOver(Vec<HandedOver>),
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
        self.give_back_later(vec![(job.id, job.fence)], None);
    }

    /// [`Shared::give_back`] does it.
    pub fn give_back_later(&self, jobs: Vec<(JobId, i64)>, put_off: Option<UnixMs>) {
        if !jobs.is_empty() {
            self.orphans.lock().expect("no panic while held").push(Orphan { jobs, put_off });
        }
    }

    /// Gives back the leases that wait for it. Whether none is left: what the store refuses stays for the next time, or
    /// it would be held for as long as this process lives.
    pub async fn give_back(&self) -> bool {
        let orphans = std::mem::take(&mut *self.orphans.lock().expect("no panic while held"));
        let mut all = true;
        for Orphan { jobs, put_off } in orphans {
            let given = match put_off {
                Some(until) => self.store.put_off(jobs.clone(), until).await,
                None => self.store.release(jobs.clone(), self.runtime.now()).await,
            };
            if let Err(error) = given {
                tracing::debug!(%error, "leases cannot be given back; trying again");
                self.give_back_later(jobs, put_off);
                all = false;
            }
        }
        all
    }

    pub fn table(&self) -> Arc<RouteTable> {
        Arc::clone(&self.table.read().expect("no panic while held"))
    }

    pub fn route(&self, route: RouteId) -> Option<Arc<RouteLanes>> {
        self.table.read().expect("no panic while held").routes.get(&route).cloned()
    }

    /// Whether the route may be handed anything now: it is configured, its credential works, and no operator holds it.
    pub fn can_send(&self, route: RouteId) -> bool {
        self.route(route).is_some_and(|lanes| self.may_send(&lanes))
    }

    fn may_send(&self, lanes: &RouteLanes) -> bool {
        let spec = &lanes.route.spec;
        let is_held = self.holds.now().of_route(spec.app, spec.platform).is_some();
        !self.stopping.is_cancelled() && !lanes.is_broken() && !is_held
    }

    /// What goes through a credential, as it was configured first or is now.
    pub fn credential(&self, key: &CredentialKey) -> Arc<Credential> {
        let mut credentials = self.credentials.lock().expect("no panic while held");
        let make = || Arc::new(Credential::new(key.clone(), None, self.runtime.instant()));
        Arc::clone(credentials.entry(key.clone()).or_insert_with(make))
    }

    /// The same bundle in the platform's other environment.
    pub fn other_environment(&self, spec: &RouteSpec) -> Option<Arc<Route>> {
        let other = match spec.environment {
            Environment::None => return None,
            Environment::Production => Environment::Sandbox,
            Environment::Sandbox => Environment::Production,
        };
        let wanted = RouteSpec { environment: other, ..spec.clone() };
        let table = self.table();
        table.routes.values().find(|lanes| lanes.route.spec == wanted).map(|lanes| Arc::clone(&lanes.route))
    }

    /// After a credential's pause or hold has ended.
    pub fn wake_credential(&self, credential: &Arc<Credential>) {
        for lanes in self.table().routes.values().filter(|lanes| Arc::ptr_eq(&lanes.credential, credential)) {
            lanes.wake();
        }
    }

    /// As callers know it: what logs say.
    pub fn public_id(&self, notification: NotificationId) -> Uuid {
        self.store.identity().public_notification(notification)
    }
}

impl HandOff for Shared {
    fn try_permit(&self, route: RouteId, lane: Lane, targets: usize) -> Option<Permit> {
        let lanes = self.route(route)?;
        let now = self.runtime.instant();
        if !self.may_send(&lanes) || lanes.paused_until(lane, now).is_some() {
            return None;
        }
        self.permits.try_take(&lanes.share, lane, targets, now)
    }

    fn knows_route(&self, route: RouteId) -> bool {
        self.table.read().expect("no panic while held").routes.contains_key(&route)
    }

    fn allow_list(&self, app: AppKey) -> Option<Arc<AllowList>> {
        self.table.read().expect("no panic while held").allow_lists.get(&app).cloned()
    }

    fn pauses_changed(&self) {
        self.holds.changed.notify_one();
    }

    fn provider_status(&self, app: AppKey) -> Vec<RouteStatus> {
        let (now, wall) = (self.runtime.instant(), self.runtime.now());
        let at = |instant: Instant| wall.plus(instant.saturating_duration_since(now));
        let table = self.table();
        let of_app = table.routes.values().filter(|lanes| lanes.route.spec.app == app);
        let mut routes: Vec<RouteStatus> = of_app
            .map(|lanes| {
                let credential = &lanes.credential;
                let condition = match (lanes.paused(), credential.slowed_until(now)) {
                    (Some(paused), _) => RouteCondition::Paused {
                        cause: paused.cause.name(),
                        reason: paused.reason,
                        since: paused.since,
                        next_probe: at(paused.until),
                    },
                    (None, Some(until)) => RouteCondition::Slowed { until: at(until) },
                    (None, None) => RouteCondition::Working,
                };
                let status = lanes.link().sender.status();
                RouteStatus {
                    route: lanes.route.id,
                    spec: lanes.route.spec.clone(),
                    condition,
                    rate_per_minute: credential.pacer.rate().map(|rate| rate.per_minute),
                    connections: status.connections,
                    in_flight: status.in_flight,
                    queued: status.queued,
                }
            })
            .collect();
        routes.sort_unstable_by(|a, b| a.spec.cmp(&b.spec));
        routes
    }

    fn troubles_changed(&self) {
        self.troubled.notify_one();
    }

    fn planned(&self, targets: usize, suppressed: &[Entry]) {
        metrics::planned(targets, suppressed);
        // Rarely more than a job for each platform; the next count says what it was.
        self.room.opened(targets as u64, targets.min(2) as u64);
    }

    fn room(&self) -> Option<&Room> {
        Some(&self.room)
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
            let Some(lanes) = self.route(route) else {
                for handed in &jobs {
                    self.orphan(&handed.job);
                }
                continue;
            };
            if let Err(returned) = lanes.lanes[lane.index()].work.send(Work::HandedOver(jobs))
                && let Work::HandedOver(jobs) = returned.0
            {
                for handed in &jobs {
                    self.orphan(&handed.job);
                }
            }
        }
    }

    fn wake_jobs(&self, route: RouteId, lane: Lane) {
        if let Some(lanes) = self.route(route) {
            lanes.lanes[lane.index()].wake.notify_one();
        }
    }

    fn wake_fanout(&self) {
        self.room.opened(0, 1);
        self.fanout.notify_one();
    }
}
