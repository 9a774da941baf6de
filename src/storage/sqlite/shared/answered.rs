//! What a step wants of the engine, kept until its answer has arrived.

use std::sync::{Arc, Mutex};

use crate::domain::allow::AllowList;
use crate::domain::deny::DenyPosition;
use crate::domain::ids::{AppKey, RouteId};
use crate::domain::notification::{HandOff, HandedOver, Permit};
use crate::domain::outcome::Entry;
use crate::domain::platform::Lane;

/// Stands between the hub and a replica's engine for one step. Dropped without [`Answered::pass_on`], as when the answer is
/// lost, it gives the permits back and tells the engine nothing.
pub(super) struct Answered {
    engine: Arc<dyn HandOff>,
    /// The replica's own feed when the request was sent: the hub's is another.
    gated: DenyPosition,
    gated_at: std::time::Instant,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    jobs: Vec<HandedOver>,
    wake_jobs: Vec<(RouteId, Lane)>,
    planned: Vec<(usize, Vec<Entry>)>,
    wake_fanout: bool,
}

impl Answered {
    pub fn new(engine: Arc<dyn HandOff>, gated: DenyPosition, gated_at: std::time::Instant) -> Arc<Self> {
        Arc::new(Self { engine, gated, gated_at, kept: Mutex::default() })
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().expect("no panic while held")
    }

    /// The jobs that the step leased to this replica.
    pub fn leased(&self) -> Vec<i64> {
        self.kept().jobs.iter().map(|handed| handed.job.id.0).collect()
    }

    /// In the order in which a store does it.
    pub fn pass_on(&self) {
        let Kept { jobs, wake_jobs, planned, wake_fanout } = std::mem::take(&mut *self.kept());
        if !jobs.is_empty() {
            let gated = |job| HandedOver { gated: self.gated, gated_at: self.gated_at, ..job };
            self.engine.deliver_all(jobs.into_iter().map(gated).collect());
        }
        for (route, lane) in wake_jobs {
            self.engine.wake_jobs(route, lane);
        }
        for (targets, suppressed) in planned {
            self.engine.planned(targets, &suppressed);
        }
        if wake_fanout {
            self.engine.wake_fanout();
        }
    }
}

impl HandOff for Answered {
    fn try_permit(&self, route: RouteId, lane: Lane, targets: usize) -> Option<Permit> {
        self.engine.try_permit(route, lane, targets)
    }

    fn knows_route(&self, route: RouteId) -> bool {
        self.engine.knows_route(route)
    }

    fn allow_list(&self, app: AppKey) -> Option<Arc<AllowList>> {
        self.engine.allow_list(app)
    }

    fn planned(&self, targets: usize, suppressed: &[Entry]) {
        self.kept().planned.push((targets, suppressed.to_vec()));
    }

    fn deliver(&self, job: HandedOver) {
        self.kept().jobs.push(job);
    }

    fn wake_jobs(&self, route: RouteId, lane: Lane) {
        self.kept().wake_jobs.push((route, lane));
    }

    fn wake_fanout(&self) {
        self.kept().wake_fanout = true;
    }
}
