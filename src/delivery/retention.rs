//! Old history goes, beside traffic: a batch, a pause, and a longer one when there is little to do.

use std::sync::Arc;
use std::time::Duration;

use super::HOUSEKEEPING;
use super::clock::ClockWatch;
use super::shared::Shared;
use crate::domain::time::UnixMs;
use crate::storage::RETAIN_BATCH;

/// Between batches while there is more: 5 000 rows a second of each table at most.
const PAUSE: Duration = Duration::from_millis(100);

pub async fn run(shared: Arc<Shared>) {
    let mut clock = ClockWatch::new(shared.runtime.now(), shared.runtime.instant());
    loop {
        let now = shared.runtime.now();
        let is_trusted = clock.is_trusted(now, shared.runtime.instant());
        let pause = if is_trusted { delete(&shared, now).await } else { HOUSEKEEPING };
        tokio::select! {
            biased;
            () = shared.stopping.cancelled() => return,
            () = shared.runtime.sleep(pause) => {}
        }
    }
}

/// Until the next batch.
async fn delete(shared: &Shared, now: UnixMs) -> Duration {
    match shared.store.retain(now.minus(shared.settings.retention), now).await {
        Ok(rows) if rows >= RETAIN_BATCH => PAUSE,
        Ok(_) => HOUSEKEEPING,
        Err(error) => {
            tracing::debug!(%error, "old rows cannot be deleted");
            HOUSEKEEPING
        }
    }
}
