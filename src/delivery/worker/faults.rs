//! A route with a fault: what a look at its queue put off comes back when the fault is over, or a probe needs something to
//! ask with.

use std::time::Duration;

use crate::domain::time::UnixMs;
use crate::runtime::Instant;
use crate::storage::{ClaimRequest, Claimed, StoreError};

use super::Worker;

/// What a look put off may still be on its way to the queue so long after it.
const ON_ITS_WAY: Duration = Duration::from_secs(2);
/// Between two looks for it.
const PULL_PAUSE: Duration = Duration::from_millis(500);
/// Jobs pulled forward in one write.
const PULLED: usize = 500;

/// Jobs were put off that are to be due again when the fault is over.
pub(super) struct PutOff {
    last: Instant,
    /// When to pull some of them forward.
    pub pull_at: Instant,
}

impl PutOff {
    pub fn now(now: Instant) -> Self {
        Self { last: now, pull_at: now }
    }
}

impl Worker {
    /// One write's worth of what was put off for a fault that is over is due again. What cannot be written waits out its
    /// minute at most.
    pub(super) async fn pull_forward(&mut self) {
        let now = self.shared.runtime.instant();
        let Some(put_off) = self.put_off.as_mut().filter(|put_off| put_off.pull_at <= now) else { return };
        let pulled = self.shared.store.pull_forward(self.route, self.lane, self.shared.runtime.now(), PULLED).await;
        match pulled {
            Ok(0) if put_off.last + ON_ITS_WAY < now => self.put_off = None,
            Ok(0) => put_off.pull_at = now + PULL_PAUSE,
            Ok(_) => self.lanes.lanes[self.lane.index()].wake.notify_one(),
            Err(error) => {
                tracing::warn!(route_id = %self.route, %error, "jobs that waited for a fault's end could not be taken up at once");
                self.put_off = None;
            }
        }
    }

    /// A probe asks with what a look has put off, where there is nothing else.
    pub(super) async fn claim_for(
        &self,
        request: ClaimRequest,
        probing: bool,
        now: UnixMs,
    ) -> Result<Vec<Claimed>, StoreError> {
        let store = &self.shared.store;
        let claimed = store.claim(request, self.shared.owner, now).await?;
        if !claimed.is_empty() || !probing || store.pull_forward(self.route, self.lane, now, 1).await? == 0 {
            return Ok(claimed);
        }
        store.claim(request, self.shared.owner, now).await
    }
}
