//! Old history goes, beside traffic: a batch, a pause, and a longer one when there is little to do.

use std::sync::Arc;
use std::time::Duration;

use super::HOUSEKEEPING;
use super::shared::Shared;
use crate::storage::RETAIN_BATCH;

/// Between batches while there is more: 5 000 rows a second of each table at most.
const PAUSE: Duration = Duration::from_millis(100);

pub async fn run(shared: Arc<Shared>) {
    loop {
        let now = shared.runtime.now();
        let pause = match shared.store.retain(now.minus(shared.settings.retention), now).await {
            Ok(rows) if rows >= RETAIN_BATCH => PAUSE,
            Ok(_) => HOUSEKEEPING,
            Err(error) => {
                tracing::debug!(%error, "old rows cannot be deleted");
                HOUSEKEEPING
            }
        };
        tokio::select! {
            biased;
            () = shared.stopping.cancelled() => return,
            () = shared.runtime.sleep(pause) => {}
        }
    }
}
