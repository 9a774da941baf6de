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
mod expand;
mod flight;
mod metrics;
mod outcomes;
mod permits;
mod retention;
mod route_state;
mod settings;
mod shared;
mod worker;

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, RwLock, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::domain::deny::DenyFeed;
use crate::domain::ids::RouteId;
use crate::domain::notification::HandOff;
use crate::domain::platform::Lane;
use crate::render::Types;
use crate::runtime::Runtime;
use crate::senders::Registry;
use crate::storage::{BootId, Store};

pub use settings::Settings;

use broadcasts::Broadcasts;
use permits::Permits;
use route_state::RouteState;
use shared::{LaneInbox, RouteLanes, Shared};

/// How often backlog metrics are read, and old rows looked for.
const HOUSEKEEPING: Duration = Duration::from_secs(10);

/// What the engine is built from.
pub struct Parts {
    pub runtime: Runtime,
    pub store: Arc<dyn Store>,
    pub owner: BootId,
    pub senders: Registry,
    /// Shared with whoever accepts events.
    pub types: Arc<Types>,
    pub deny: Arc<DenyFeed>,
    /// Routes whose payloads do not carry `nudged_id`.
    pub without_push_id: Vec<RouteId>,
    pub settings: Settings,
}

/// The running engine. Must be shut down by [`Engine::shutdown`]; dropping it leaves leases to the next start.
pub struct Engine {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    expander: JoinHandle<()>,
    housekeeper: JoinHandle<()>,
    retention: JoinHandle<()>,
    writer: JoinHandle<()>,
    finish: CancellationToken,
}

impl Engine {
    /// Frees what an earlier run of this process left leased, then starts all tasks on the current runtime.
    pub async fn start(parts: Parts) -> Result<Self, crate::storage::StoreError> {
        let Parts { runtime, store, owner, senders, types, deny, without_push_id, settings } = parts;
        let freed = store.release_others(owner, runtime.now()).await?;
        if freed > 0 {
            tracing::info!(jobs = freed, "took up the work that the last run left");
        }
        let (outcomes, outcomes_in) = mpsc::unbounded_channel();
        let mut routes = HashMap::new();
        let mut inboxes = Vec::new();
        for route in senders.routes() {
            let (_, sender) = senders.get(route.id).expect("it was just listed");
            let mut lane = |lane| {
                let (work, inbox) = mpsc::unbounded_channel();
                inboxes.push((route.id, lane, inbox));
                LaneInbox { wake: Notify::new(), work }
            };
            let lanes = RouteLanes {
                route: Arc::clone(route),
                sender: Arc::clone(sender),
                state: RouteState::default(),
                push_id: !without_push_id.contains(&route.id),
                lanes: [lane(Lane::Interactive), lane(Lane::Bulk)],
            };
            routes.insert(route.id, lanes);
        }
        let shared = Arc::new(Shared {
            runtime: runtime.clone(),
            store,
            owner,
            senders,
            types,
            deny,
            settings,
            permits: Permits::new(settings.max_in_flight_targets),
            routes,
            flights: Mutex::new(HashMap::new()),
            next_ticket: AtomicU64::new(1),
            outcomes,
            settled: Notify::new(),
            broadcasts: Broadcasts::default(),
            fanout: Notify::new(),
            isolation: Arc::new(RwLock::new(())),
            stopping: CancellationToken::new(),
        });
        let finish = CancellationToken::new();
        let workers = inboxes
            .into_iter()
            .map(|(route, lane, inbox)| {
                runtime.spawn(worker::Worker::new(Arc::clone(&shared), route, lane, inbox).run())
            })
            .collect();
        let writer = runtime.spawn(outcomes::Writer::new(Arc::clone(&shared), outcomes_in, finish.clone()).run());
        let expander = runtime.spawn(expand::Expander::new(Arc::clone(&shared)).run());
        let housekeeper = runtime.spawn(housekeeping(Arc::clone(&shared)));
        let retention = runtime.spawn(retention::run(Arc::clone(&shared)));
        Ok(Self { shared, workers, expander, housekeeper, retention, writer, finish })
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
        self.shared.routes.values().filter_map(|lanes| Some((lanes.route.id, lanes.state.reason()?))).collect()
    }

    /// Ordered: stop claiming, drain the senders to the deadline, write what they answered, give back what is left.
    pub async fn shutdown(self) {
        let shared = self.shared;
        shared.stopping.cancel();
        for worker in self.workers {
            join("a lane's worker", worker).await;
        }
        join("the expander", self.expander).await;
        join("housekeeping", self.housekeeper).await;
        join("retention", self.retention).await;
        let mut drained: Vec<usize> = Vec::new();
        let mut drains = Vec::new();
        for lanes in shared.routes.values() {
            // Several routes share a sender.
            let identity = Arc::as_ptr(&lanes.sender).cast::<()>().addr();
            if !drained.contains(&identity) {
                drained.push(identity);
                drains.push(lanes.sender.drain(shared.settings.drain));
            }
        }
        futures_util::future::join_all(drains).await;
        self.finish.cancel();
        join("the writer of outcomes", self.writer).await;
        tracing::info!("the delivery engine has stopped");
    }
}

/// A look at the routes, apart from the engine's life.
#[derive(Clone)]
pub struct RouteStates(Arc<Shared>);

impl RouteStates {
    /// Its platform refuses the credential; unknown routes are not.
    pub fn is_paused(&self, route: RouteId) -> bool {
        self.0.routes.get(&route).is_some_and(|lanes| lanes.state.is_broken())
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
        match shared.store.backlog(now).await {
            Ok(backlog) => {
                metrics::backlog(&shared, &backlog);
                shared.broadcasts.look(&shared, backlog.jobs == 0 && backlog.fanouts == 0).await;
            }
            Err(error) => tracing::debug!(%error, "the backlog cannot be read"),
        }
        tokio::select! {
            biased;
            () = shared.stopping.cancelled() => break,
            () = shared.runtime.sleep(HOUSEKEEPING) => {}
        }
    }
}
