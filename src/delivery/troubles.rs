//! Tells the other processes, and whoever asks the database, which credentials and routes are paused and why; learns
//! what an operator confirmed about dead tokens.
//!
//! One task brings the stored troubles in line with what this process knows, so that no write is lost for good: every
//! two seconds while anything is paused, every ten else, and at once when something changed.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::route_state::{Paused, RouteState};
use super::shared::{RouteLanes, Shared};
use crate::domain::time::UnixMs;
use crate::storage::{StoreError, Trouble, TroubleCause};

const LOOK_IN_TROUBLE: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_secs(10);
/// A trouble that stands is told again so often.
const TELL_AGAIN_MS: i64 = 60_000;

/// Until the engine stops.
pub async fn watch(shared: Arc<Shared>) {
    // What was told, and when.
    let mut told: HashMap<String, UnixMs> = HashMap::new();
    loop {
        let troubles = current(&shared);
        let pause = if troubles.is_empty() { LOOK } else { LOOK_IN_TROUBLE };
        if let Err(error) = reconcile(&shared, troubles, &mut told).await {
            tracing::debug!(%error, "what stops providers cannot be told or read");
        }
        tokio::select! {
            biased;
            () = shared.stopping.cancelled() => break,
            () = shared.troubled.notified() => {}
            () = shared.runtime.sleep(pause) => {}
        }
    }
}

/// The stored name of a route's own trouble.
pub fn route_name(lanes: &RouteLanes) -> String {
    format!("route/{}", lanes.route.id.0)
}

fn current(shared: &Shared) -> Vec<Trouble> {
    let now = shared.runtime.now();
    let trouble = |name: String, state: &RouteState| {
        let Paused { cause, reason, since, .. } = state.paused()?;
        Some(Trouble { name, cause, reason, since, seen_at: now, confirmed_until: None })
    };
    let table = shared.table();
    let credentials = shared.credentials.lock().expect("no panic while held");
    let used = |credential| table.routes.values().any(|lanes| Arc::ptr_eq(&lanes.credential, credential));
    let of_credentials = credentials
        .values()
        .filter(|credential| used(credential))
        .filter_map(|credential| trouble(format!("credential/{}", credential.key.stored()), &credential.state));
    let of_routes = table.routes.values().filter_map(|lanes| trouble(route_name(lanes), &lanes.state));
    of_credentials.chain(of_routes).collect()
}

async fn reconcile(
    shared: &Shared,
    troubles: Vec<Trouble>,
    told: &mut HashMap<String, UnixMs>,
) -> Result<(), StoreError> {
    let now = shared.runtime.now();
    let over: Vec<String> =
        told.keys().filter(|name| troubles.iter().all(|trouble| trouble.name != **name)).cloned().collect();
    for name in over {
        shared.store.end_trouble(&name, now).await?;
        told.remove(&name);
    }
    for trouble in troubles {
        if told.get(&trouble.name).is_some_and(|at| now.0 - at.0 < TELL_AGAIN_MS) {
            continue;
        }
        let name = trouble.name.clone();
        shared.store.report_trouble(trouble).await?;
        told.insert(name, now);
    }
    let known = shared.store.troubles(now).await?;
    let instant = shared.runtime.instant();
    for lanes in shared.table().routes.values() {
        let name = route_name(lanes);
        let confirmed = known.iter().find(|trouble| trouble.name == name).and_then(|trouble| trouble.confirmed_until);
        let Some(until) = confirmed.filter(|until| *until > now) else { continue };
        if shared.guard.is_lifted(lanes.route.id, instant) {
            continue;
        }
        shared.guard.lift(lanes.route.id, instant + until.since(now));
        if lanes.state.paused().is_some_and(|paused| paused.cause == TroubleCause::Tokens) && lanes.state.works() {
            tracing::info!(route_id = %lanes.route.id, "an operator confirmed that tokens are dead; the route goes on");
            lanes.wake();
            shared.troubled.notify_one();
        }
    }
    Ok(())
}
