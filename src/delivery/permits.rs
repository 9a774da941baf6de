//! Room for targets in the engine, by lane.
//!
//! One permit covers a target from claim or hand-off until its outcome is durable, so a stalled provider or database
//! cannot pile up work in memory. INTERACTIVE has half of the room to itself: a million followers never take it, and a
//! hiccup of the database while single events stream in does not send them through the queue, which costs half as much
//! again and, being slower, lasts.
//! Waiting is first come, first served, in turns of at most one claim: apps take turns by targets.

use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::domain::notification::Permit;
use crate::domain::platform::Lane;
use crate::domain::targets::MAX_TARGETS;
use crate::planted;

#[derive(Clone)]
pub struct Permits {
    lanes: [Arc<Semaphore>; 2],
}

impl Permits {
    /// At least one full job fits each lane.
    pub fn new(max_in_flight_targets: usize) -> Self {
        let interactive = (max_in_flight_targets / 2).max(MAX_TARGETS);
        if planted::is("one-room-for-both-lanes") {
            let room = Arc::new(Semaphore::new(max_in_flight_targets.max(2 * MAX_TARGETS)));
            return Self { lanes: [Arc::clone(&room), room] };
        }
        let bulk = max_in_flight_targets.saturating_sub(interactive).max(MAX_TARGETS);
        Self { lanes: [Arc::new(Semaphore::new(interactive)), Arc::new(Semaphore::new(bulk))] }
    }

    /// Room now, or `None`.
    pub fn try_take(&self, lane: Lane, targets: usize) -> Option<Permit> {
        let wanted = u32::try_from(targets).ok()?;
        let guard = Arc::clone(&self.lanes[lane.index()]).try_acquire_many_owned(wanted).ok()?;
        Some(Permit::new(Box::new(guard)))
    }

    /// Waits for room; `None` for more than there ever is. Cancel safe.
    pub async fn take(&self, lane: Lane, targets: usize) -> Option<Permit> {
        let wanted = u32::try_from(targets).ok().filter(|_| targets <= MAX_TARGETS)?;
        let guard = Arc::clone(&self.lanes[lane.index()]).acquire_many_owned(wanted).await.ok()?;
        Some(Permit::new(Box::new(guard)))
    }

    /// Waits for room for one full job, then takes what else is free up to `most`.
    pub async fn claim(&self, lane: Lane, most: usize) -> Claim {
        let semaphore = &self.lanes[lane.index()];
        let least = u32::try_from(MAX_TARGETS).expect("a small constant");
        let mut guard = Arc::clone(semaphore)
            .acquire_many_owned(least)
            .await
            .expect("the semaphore lives as long as its users and is never closed");
        let more = most.saturating_sub(MAX_TARGETS).min(semaphore.available_permits());
        if let Ok(more) = u32::try_from(more)
            && more > 0
            && let Ok(rest) = Arc::clone(semaphore).try_acquire_many_owned(more)
        {
            guard.merge(rest);
        }
        Claim { guard }
    }

    /// Free room, for the metric.
    pub fn free(&self, lane: Lane) -> usize {
        self.lanes[lane.index()].available_permits()
    }
}

/// Room taken before a claim; each claimed job splits off its part, the rest goes back with this.
pub struct Claim {
    guard: tokio::sync::OwnedSemaphorePermit,
}

impl Claim {
    pub fn targets(&self) -> usize {
        self.guard.num_permits()
    }

    /// The part of one job. A store that claimed more than was asked for is served from what there is.
    pub fn split(&mut self, targets: usize) -> Permit {
        let part = self.guard.split(targets.min(self.guard.num_permits())).expect("not more than there is");
        if planted::is("permit-leaked") {
            part.forget();
            return Permit::new(Box::new(()));
        }
        Permit::new(Box::new(part))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bulk_never_takes_the_interactive_half() {
        let permits = Permits::new(4_000);
        let bulk = permits.claim(Lane::Bulk, 10_000).await;
        assert_eq!(bulk.targets(), 2_000);
        assert!(permits.try_take(Lane::Bulk, 1).is_none());
        assert!(permits.try_take(Lane::Interactive, 2_000).is_some());
    }

    #[tokio::test]
    async fn parts_of_a_claim_come_back_one_by_one() {
        let permits = Permits::new(4_000);
        let mut claim = permits.claim(Lane::Interactive, 2_000).await;
        let part = claim.split(400);
        drop(claim);
        assert_eq!(permits.free(Lane::Interactive), 1_600);
        drop(part);
        assert_eq!(permits.free(Lane::Interactive), 2_000);
    }
}
