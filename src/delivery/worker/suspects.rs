//! Jobs that may be what brings the process down: they run alone, and at last are given up.

use std::any::Any;
use std::sync::Arc;

use crate::delivery::flight::Flight;
use crate::domain::outcome::ResultCode;
use crate::storage::SUSPECT_CLAIMS;

use super::Worker;

/// A suspect job runs alone, and is halved when the process went down with it all the same. A single target that was alone
/// in flight at three crashes is given up.
const POISON_CLAIMS: u32 = SUSPECT_CLAIMS + 3;

impl Worker {
    /// To be held while jobs are in flight that are not suspect. One for all that are sent together: to wait for a second
    /// one while holding the first could be for ever, with a suspect job waiting in between.
    pub(super) async fn beside_others(&self) -> Option<Arc<dyn Any + Send + Sync>> {
        self.unless_over(self.shared.isolation.clone().read_owned()).await
    }

    /// To be held while a suspect job is in flight.
    ///
    /// Nobody waits for ever: whoever holds a guard is at a sender, at the writer of outcomes or on the way between its
    /// worker's gate and its sender, and needs neither a guard nor room in the engine to come to its end. A flight that
    /// comes back to its worker for another gate has let its guard go before ([`Flight::let_go`]), for that worker may be
    /// the one that waits here.
    pub(super) async fn alone(&self) -> Option<Arc<dyn Any + Send + Sync>> {
        self.unless_over(self.shared.isolation.clone().write_owned()).await
    }

    /// `None`: the worker is to end.
    async fn unless_over<T: Send + Sync + 'static>(
        &self,
        guard: impl Future<Output = T>,
    ) -> Option<Arc<dyn Any + Send + Sync>> {
        tokio::select! {
            biased;
            () = self.shared.stopping.cancelled() => None,
            () = self.lanes.removed.cancelled() => None,
            guard = guard => Some(Arc::new(guard)),
        }
    }

    /// A job that was alone in flight when the process went down: halve it until the one target is alone, then give it up.
    /// Whether it was dealt with.
    pub(super) fn isolate(&self, flight: &mut Flight) -> bool {
        if flight.job.claims <= SUSPECT_CLAIMS {
            return false;
        }
        let pending = flight.pending();
        let instant = self.shared.runtime.instant();
        if let [only] = pending[..] {
            if flight.job.claims < POISON_CLAIMS {
                return false;
            }
            tracing::error!(job_id = %flight.job.id, notification_id = %self.shared.public_id(flight.notification.id),
                claims = flight.job.claims, fence = flight.job.fence, attempt = flight.job.attempt,
                "one delivery was in flight at every crash; it is given up");
            flight.conclude(only, ResultCode::DeadPoison, instant);
            return true;
        }
        flight.split(&pending, SUSPECT_CLAIMS - 1, self.shared.runtime.now(), instant);
        true
    }
}
