//! The delivery engine: from open work to outcomes.
//!
//! For every route and lane one worker claims jobs under a permit (or takes those the accepting transaction handed
//! over), gates their targets by query, renders each variant once and hands a batch to the route's sender. Answers come
//! back to one writer, which makes them durable in batches. The expander turns large audiences into jobs. Nothing here
//! knows a vendor or a database.
//!
//! What it guarantees: a target is handed to a sender only after a gate that saw every "no" answered before it, and
//! never again once its outcome is durable. What it does not: that a push whose answer was lost was not shown; it is
//! repeated with the same identity.

mod broadcasts;
mod clock;
mod credential;
mod expand;
mod flight;
mod guard;
mod holds;
mod learn;
mod metrics;
mod outcomes;
mod pacer;
mod permits;
mod quiet;
mod retention;
mod route_state;
mod settings;
mod settled;
mod share;
mod shared;
mod troubles;
mod worker;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, RwLock, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::domain::allow::AllowList;
use crate::domain::deny::DenyFeed;
use crate::domain::ids::{AppKey, RouteId};
use crate::domain::notification::HandOff;
use crate::domain::pacing::Rate;
use crate::domain::platform::Lane;
use crate::domain::room::Room;
use crate::render::Types;
use crate::runtime::Runtime;
use crate::senders::{Registry, Sender};
use crate::storage::{BootId, Store};

pub use settings::{RetirementGuard, Settings};

use broadcasts::Broadcasts;
use credential::CredentialKey;
use holds::Holds;
use permits::Permits;
use settled::Settled;
use shared::{LaneInbox, Link, RouteLanes, RouteTable, Shared};

/// How often backlog metrics are read, and old rows looked for.
const HOUSEKEEPING: Duration = Duration::from_secs(10);
/// Reading it looks at every open job: at most this part of the time is spent on it.
const COUNTING_SHARE: u32 = 10;

/// Between a shutdown's tries to give leases back.
const GIVE_BACK_AGAIN: Duration = Duration::from_millis(250);

/// What the engine is built from.
pub struct Parts {
    pub runtime: Runtime,
    pub store: Arc<dyn Store>,
    pub owner: BootId,
    pub routing: Routing,
    /// Shared with whoever accepts events.
    pub types: Arc<Types>,
    pub deny: Arc<DenyFeed>,
    pub settings: Settings,
}

/// What the configuration says about routes. Can be replaced while the engine runs.
#[derive(Default)]
pub struct Routing {
    pub senders: Registry,
    /// Routes whose payloads do not carry `nudged_id`.
    pub without_push_id: Vec<RouteId>,
    /// Of the apps that have one.
    pub allow_lists: BTreeMap<AppKey, Arc<AllowList>>,
    /// How fast each route's credential is used; a route that is not here as fast as its provider takes it.
    pub pacing: HashMap<RouteId, Pacing>,
}

/// Of a credential; the same for all its routes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pacing {
    pub rate: Option<Rate>,
    /// How many bad tokens may be tried in the platform's other environment; 0: none.
    pub environment_probes_per_minute: u32,
}

/// The running engine. Must be shut down by [`Engine::shutdown`]; dropping it leaves leases to the next start.
pub struct Engine {
    shared: Arc<Shared>,
    /// Bounded by the routes there are and were.
    workers: Mutex<Vec<JoinHandle<()>>>,
    holds: JoinHandle<()>,
    troubles: JoinHandle<()>,
    expander: JoinHandle<()>,
    housekeeper: JoinHandle<()>,
    retention: JoinHandle<()>,
    writer: JoinHandle<()>,
    finish: CancellationToken,
}

impl Engine {
    /// Frees what an earlier run of this process left leased, then starts all tasks on the current runtime.
    pub async fn start(parts: Parts) -> Result<Self, crate::storage::StoreError> {
        let Parts { runtime, store, owner, routing, types, deny, settings } = parts;
        let freed = store.release_others(owner, runtime.now()).await?;
        if freed > 0 {
            tracing::info!(jobs = freed, "took up the work that the last run left");
        }
        let holds = Holds::new(store.pauses().await?);
        let (outcomes, outcomes_in) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            runtime: runtime.clone(),
            store,
            owner,
            types,
            deny,
            settings,
            permits: Permits::new(settings.max_in_flight_targets),
            room: Room::new(settings.room),
            table: std::sync::RwLock::default(),
            holds,
            credentials: Mutex::default(),
            guard: guard::Guard::default(),
            quiet: quiet::Quiet::default(),
            troubled: Notify::new(),
            flights: Mutex::new(HashMap::new()),
            orphans: Mutex::default(),
            next_ticket: AtomicU64::new(1),
            outcomes,
            settled: Settled::default(),
            broadcasts: Broadcasts::default(),
            fanout: Notify::new(),
            isolation: Arc::new(RwLock::new(())),
            stopping: CancellationToken::new(),
        });
        let finish = CancellationToken::new();
        let writer = runtime.spawn(outcomes::Writer::new(Arc::clone(&shared), outcomes_in, finish.clone()).run());
        let expander = runtime.spawn(expand::Expander::new(Arc::clone(&shared)).run());
        let housekeeper = runtime.spawn(housekeeping(Arc::clone(&shared)));
        let retention = runtime.spawn(retention::run(Arc::clone(&shared)));
        let holds = runtime.spawn(holds::watch(Arc::clone(&shared)));
        let troubles = runtime.spawn(troubles::watch(Arc::clone(&shared)));
        let workers = Mutex::default();
        let engine = Self { shared, workers, holds, troubles, expander, housekeeper, retention, writer, finish };
        engine.reroute(routing);
        Ok(engine)
    }

    /// Sends by this from now on. New routes get workers; removed ones stop claiming and give back what they hold;
    /// replaced senders get no more batches and are returned, to be drained by whoever made them. What waits at a
    /// sender passes its gate again.
    pub fn reroute(&self, routing: Routing) -> Vec<Arc<dyn Sender>> {
        let shared = &self.shared;
        let Routing { senders, without_push_id, allow_lists, pacing } = routing;
        let before = shared.table();
        let before_senders = distinct(before.routes.values().map(|lanes| Arc::clone(&lanes.link().sender)));
        let mut routes = BTreeMap::new();
        let mut inboxes = Vec::new();
        for route in senders.routes() {
            let (_, sender) = senders.get(route.id).expect("it was just listed");
            let link = Link { sender: Arc::clone(sender), push_id: !without_push_id.contains(&route.id) };
            let pacing = pacing.get(&route.id).copied().unwrap_or_default();
            let credential = shared.credential(&CredentialKey::of(&route.spec));
            credential.pacer.set_rate(pacing.rate);
            credential.set_probes(pacing.environment_probes_per_minute);
            let lanes = if let Some(known) = before.routes.get(&route.id) {
                if known.relink(link) {
                    shared.guard.forget(route.id);
                }
                Arc::clone(known)
            } else {
                let [interactive, bulk] = Lane::ALL.map(|_| mpsc::unbounded_channel());
                let inbox = |work| LaneInbox { wake: Notify::new(), work };
                let lanes = RouteLanes::new(Arc::clone(route), link, credential, [inbox(interactive.0), inbox(bulk.0)]);
                let lanes = Arc::new(lanes);
                inboxes.push((Arc::clone(&lanes), Lane::Interactive, interactive.1));
                inboxes.push((Arc::clone(&lanes), Lane::Bulk, bulk.1));
                lanes
            };
            routes.insert(route.id, lanes);
        }
        let table = Arc::new(RouteTable { routes, allow_lists });
        *shared.table.write().expect("no panic while held") = Arc::clone(&table);
        for (id, lanes) in &before.routes {
            if !table.routes.contains_key(id) {
                lanes.removed.cancel();
            }
        }
        shared.deny.recall();
        let mut workers = self.workers.lock().expect("no panic while held");
        workers.retain(|worker| !worker.is_finished());
        workers.extend(inboxes.into_iter().map(|(lanes, lane, inbox)| {
            shared.runtime.spawn(worker::Worker::new(Arc::clone(shared), lanes, lane, inbox).run())
        }));
        let used = distinct(table.routes.values().map(|lanes| Arc::clone(&lanes.link().sender)));
        let retired = before_senders.into_iter().filter(|old| !used.iter().any(|new| Arc::ptr_eq(old, new)));
        retired.collect()
    }

    /// How the store reaches this engine.
    pub fn hand_off(&self) -> Arc<dyn HandOff> {
        Arc::clone(&self.shared) as Arc<dyn HandOff>
    }

    /// Which routes are paused, for as long as anybody asks.
    pub fn route_states(&self) -> RouteStates {
        RouteStates(Arc::clone(&self.shared))
    }

    /// Routes that are paused, with the platform's words.
    pub fn paused_routes(&self) -> Vec<(RouteId, String)> {
        let table = self.shared.table();
        let reason = |lanes: &Arc<RouteLanes>| lanes.credential.state.paused().or_else(|| lanes.state.paused());
        table.routes.values().filter_map(|lanes| Some((lanes.route.id, reason(lanes)?.reason))).collect()
    }

    /// Ordered: stop claiming, drain the senders to the deadline, write what they answered, give back what is left.
    pub async fn shutdown(self) {
        let shared = self.shared;
        shared.stopping.cancel();
        for worker in self.workers.into_inner().expect("no panic while held") {
            join("a lane's worker", worker).await;
        }
        join("the expander", self.expander).await;
        join("the watch over pauses", self.holds).await;
        join("the watch over providers", self.troubles).await;
        join("housekeeping", self.housekeeper).await;
        join("retention", self.retention).await;
        let senders = distinct(shared.table().routes.values().map(|lanes| Arc::clone(&lanes.link().sender)));
        futures_util::future::join_all(senders.iter().map(|sender| sender.drain(shared.settings.drain))).await;
        self.finish.cancel();
        join("the writer of outcomes", self.writer).await;
        for _ in 0..outcomes::LAST_TRIES {
            if shared.give_back().await {
                break;
            }
            shared.runtime.sleep(GIVE_BACK_AGAIN).await;
        }
        tracing::info!("the delivery engine has stopped");
    }
}

/// Several routes share a sender.
fn distinct(senders: impl Iterator<Item = Arc<dyn Sender>>) -> Vec<Arc<dyn Sender>> {
    let mut distinct: Vec<Arc<dyn Sender>> = Vec::new();
    for sender in senders {
        if !distinct.iter().any(|known| Arc::ptr_eq(known, &sender)) {
            distinct.push(sender);
        }
    }
    distinct
}

/// A look at the routes, apart from the engine's life.
#[derive(Clone)]
pub struct RouteStates(Arc<Shared>);

impl RouteStates {
    /// Its platform refuses the credential; unknown routes are not.
    pub fn is_paused(&self, route: RouteId) -> bool {
        self.0.route(route).is_some_and(|lanes| lanes.is_broken())
    }
}

async fn join(what: &str, task: JoinHandle<()>) {
    if let Err(error) = task.await {
        tracing::error!(%error, "{what} ended badly");
    }
}

async fn housekeeping(shared: Arc<Shared>) {
    loop {
        let now = shared.runtime.now();
        match shared.store.held_devices(now, quiet::MAX_QUIET).await {
            Ok(held) => shared.quiet.replace(held),
            Err(error) => tracing::debug!(%error, "the devices that are left alone cannot be read"),
        }
        let (begun, mark) = (shared.runtime.instant(), shared.room.mark());
        match shared.store.backlog(now).await {
            Ok(backlog) => {
                shared.room.counted(mark, backlog.targets, backlog.rows());
                metrics::backlog(&shared, &backlog);
                shared.broadcasts.look(&shared, backlog.jobs == 0 && backlog.fanouts == 0).await;
            }
            Err(error) => tracing::debug!(%error, "the backlog cannot be read"),
        }
        let took = shared.runtime.instant() - begun;
        tokio::select! {
            biased;
            () = shared.stopping.cancelled() => break,
            () = shared.runtime.sleep(HOUSEKEEPING.max(took * COUNTING_SHARE)) => {}
        }
    }
}
