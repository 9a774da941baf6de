//! Pauses as the engine obeys them.
//!
//! The store is asked when somebody changed a pause here, and twice a second for what was changed elsewhere: a pause
//! takes effect within a second on every process. A new one recalls everything that was gated before ([`DenyFeed`]), so
//! that what waits at a sender comes back to its gate, which holds it. A held event type's jobs lie among others, so they
//! are claimed and put off: for as long as the pause has stood, a second at least and a minute at most, without spending a
//! claim; its end pulls them forward, twice, for some may have been on their way back to the queue. From a route that is
//! held as a whole, by an operator or by a provider's fault, a little is claimed at a time, so that what is past its TTL ends
//! there, too; a fan-out past its TTL is held no more.
//!
//! [`DenyFeed`]: crate::domain::deny::DenyFeed

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard};
use std::time::Duration;

use metrics::gauge;
use tokio::sync::Notify;

use super::shared::{RouteLanes, Shared};
use crate::domain::ids::RouteId;
use crate::domain::pause::{Pause, Pauses};
use crate::domain::platform::Lane;
use crate::domain::time::UnixMs;
use crate::telemetry::names;

/// How often the store is asked for what other processes changed.
const LOOK: Duration = Duration::from_millis(500);
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);
/// Jobs pulled forward in one write.
const PULLED: usize = 500;

/// The pauses that this process obeys.
pub struct Holds {
    current: RwLock<Current>,
    /// Told when they changed. Wakes in the order in which it is waited for, so that a history can be replayed: tokio's
    /// `watch` wakes in an order of chance.
    told: Notify,
    /// Somebody changed one here, or a fault is over.
    pub changed: Notify,
    /// Routes whose faults are over, with jobs that were put off meanwhile.
    over: Mutex<BTreeSet<RouteId>>,
}

struct Current {
    version: u64,
    pauses: Arc<Pauses>,
}

impl Holds {
    pub fn new(pauses: Vec<Pause>) -> Self {
        let current = Current { version: 0, pauses: Arc::new(Pauses(pauses)) };
        Self { current: RwLock::new(current), told: Notify::new(), changed: Notify::new(), over: Mutex::default() }
    }

    pub fn now(&self) -> Arc<Pauses> {
        Arc::clone(&self.read().pauses)
    }

    fn read(&self) -> RwLockReadGuard<'_, Current> {
        self.current.read().expect("no panic while held")
    }

    fn replace(&self, pauses: Pauses) {
        {
            let mut current = self.current.write().expect("no panic while held");
            *current = Current { version: current.version + 1, pauses: Arc::new(pauses) };
        }
        self.told.notify_waiters();
    }

    /// What was put off for a fault of this route is to be due again.
    pub fn fault_is_over(&self, route: RouteId) {
        self.over.lock().expect("no panic while held").insert(route);
        self.changed.notify_one();
    }

    pub fn watched(&self) -> Watched<'_> {
        Watched { seen: self.read().version, holds: self }
    }
}

/// Sees every change once, or several as one.
pub struct Watched<'a> {
    holds: &'a Holds,
    seen: u64,
}

impl Watched<'_> {
    pub fn now(&mut self) -> Arc<Pauses> {
        let current = self.holds.read();
        self.seen = current.version;
        Arc::clone(&current.pauses)
    }

    /// Until they are others than those seen. Cancel safe.
    pub async fn changed(&self) {
        loop {
            // Whatever is told from here on reaches it, polled or not.
            let told = self.holds.told.notified();
            if self.holds.read().version != self.seen {
                return;
            }
            told.await;
        }
    }
}

/// When a job that is held since then may be looked at again.
pub fn until(since: UnixMs, now: UnixMs) -> UnixMs {
    now.plus(now.since(since).clamp(SHORTEST, LONGEST))
}

/// Keeps [`Holds`] true until the engine stops, and gives back the leases that could not be given back at once.
pub async fn watch(shared: Arc<Shared>) {
    for pause in &shared.holds.now().0 {
        tell(pause);
    }
    show(&shared.holds.now());
    let mut ended: Vec<Pause> = Vec::new();
    let mut over = BTreeSet::new();
    loop {
        for pause in std::mem::take(&mut ended) {
            pull_forward(&shared, &pause).await;
        }
        let before =
            std::mem::replace(&mut over, std::mem::take(&mut *shared.holds.over.lock().expect("no panic while held")));
        for lanes in before.union(&over).filter_map(|route| shared.route(*route)) {
            pull_forward_on(&shared, &lanes).await;
        }
        shared.give_back().await;
        match shared.store.pauses().await {
            Ok(read) => ended = apply(&shared, Pauses(read)).await,
            Err(error) => tracing::debug!(%error, "the pauses cannot be read"),
        }
        tokio::select! {
            biased;
            () = shared.stopping.cancelled() => break,
            () = shared.holds.changed.notified() => {}
            () = shared.runtime.sleep(LOOK) => {}
        }
    }
}

/// The pauses that ended.
async fn apply(shared: &Shared, read: Pauses) -> Vec<Pause> {
    let before = shared.holds.now();
    if *before == read {
        return Vec::new();
    }
    show(&read);
    for pause in read.0.iter().filter(|pause| !before.has(&pause.scope)) {
        tell(pause);
    }
    let ended: Vec<Pause> = before.0.iter().filter(|pause| !read.has(&pause.scope)).cloned().collect();
    for pause in &ended {
        tracing::info!(scope = %pause.scope, "delivery is resumed");
    }
    let begun = read.0.iter().any(|pause| !before.has(&pause.scope));
    shared.holds.replace(read);
    if begun {
        // After the gates can see it: whatever passed before comes back and does.
        shared.deny.recall();
    }
    if !ended.is_empty() {
        shared.fanout.notify_one();
    }
    for pause in &ended {
        pull_forward(shared, pause).await;
    }
    ended
}

#[expect(clippy::cast_precision_loss, reason = "gauges are floating point")]
fn show(pauses: &Pauses) {
    gauge!(names::PAUSES).set(pauses.0.len() as f64);
}

fn tell(pause: &Pause) {
    tracing::warn!(scope = %pause.scope, reason = pause.reason, "delivery is paused");
}

/// Makes put-off jobs due again on every route the pause covered. What cannot be written waits out its minute.
async fn pull_forward(shared: &Shared, ended: &Pause) {
    for lanes in shared.table().routes.values() {
        let spec = &lanes.route.spec;
        if ended.scope.app.is_some_and(|app| app != spec.app)
            || ended.scope.platform.is_some_and(|platform| platform != spec.platform)
        {
            continue;
        }
        pull_forward_on(shared, lanes).await;
    }
}

async fn pull_forward_on(shared: &Shared, lanes: &RouteLanes) {
    for lane in Lane::ALL {
        loop {
            match shared.store.pull_forward(lanes.route.id, lane, shared.runtime.now(), PULLED).await {
                Ok(pulled) => {
                    if pulled > 0 {
                        lanes.lanes[lane.index()].wake.notify_one();
                    }
                    // What another pause holds is put off again meanwhile, and must not be pulled for ever.
                    if pulled < PULLED as u64 {
                        break;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "held jobs could not be taken up at once");
                    break;
                }
            }
        }
    }
}
