//! Pauses as the engine obeys them.
//!
//! The store is asked when somebody changed a pause here, and twice a second for what was changed elsewhere: a pause
//! takes effect within a second on every process. A new one recalls everything that was gated before ([`DenyFeed`]), so
//! that what waits at a sender comes back to its gate, which holds it. A route that is held as a whole is not claimed
//! from. A held event type's jobs lie among others, so they are claimed and put off: for as long as the pause has
//! stood, a second at least and a minute at most, without spending a claim; its end pulls them forward, twice, for some
//! may have been on their way back to the queue.
//!
//! [`DenyFeed`]: crate::domain::deny::DenyFeed

use std::sync::Arc;
use std::time::Duration;

use metrics::gauge;
use tokio::sync::{Notify, watch};

use super::shared::Shared;
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
    current: watch::Sender<Arc<Pauses>>,
    /// Somebody changed one here.
    pub changed: Notify,
}

impl Holds {
    pub fn new(pauses: Vec<Pause>) -> Self {
        Self { current: watch::Sender::new(Arc::new(Pauses(pauses))), changed: Notify::new() }
    }

    pub fn now(&self) -> Arc<Pauses> {
        Arc::clone(&self.current.borrow())
    }

    pub fn subscribe(&self) -> watch::Receiver<Arc<Pauses>> {
        self.current.subscribe()
    }
}

/// When a held job may be looked at again.
pub fn until(pause: &Pause, now: UnixMs) -> UnixMs {
    now.plus(now.since(pause.since).clamp(SHORTEST, LONGEST))
}

/// Keeps [`Holds`] true until the engine stops, and gives back what was handed over to nobody.
pub async fn watch(shared: Arc<Shared>) {
    for pause in &shared.holds.now().0 {
        tell(pause);
    }
    show(&shared.holds.now());
    let mut ended: Vec<Pause> = Vec::new();
    loop {
        for pause in std::mem::take(&mut ended) {
            pull_forward(&shared, &pause).await;
        }
        let orphans = std::mem::take(&mut *shared.orphans.lock().expect("no panic while held"));
        if !orphans.is_empty()
            && let Err(error) = shared.store.release(orphans, shared.runtime.now()).await
        {
            tracing::debug!(%error, "leases could not be given back; the next start frees them");
        }
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
    shared.holds.current.send_replace(Arc::new(read));
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
        for lane in Lane::ALL {
            loop {
                match shared.store.pull_forward(lanes.route.id, lane, shared.runtime.now(), PULLED).await {
                    Ok(0) => break,
                    Ok(_) => lanes.lanes[lane.index()].wake.notify_one(),
                    Err(error) => {
                        tracing::warn!(%error, "held jobs could not be taken up at once");
                        break;
                    }
                }
            }
        }
    }
}
