//! Room for targets in the engine, by lane, and how much of it one credential may hold.
//!
//! One permit covers a target from claim or hand-off until its outcome is durable, so a stalled provider or database
//! cannot pile up work in memory. INTERACTIVE has half of the room to itself: a million followers never take it, and a
//! hiccup of the database while single events stream in does not send them through the queue, which costs half as much
//! again and, being slower, lasts.
//! Waiting is first come, first served, in turns of at most one claim: apps take turns by targets.
//!
//! What a provider does not answer holds its room until it times out. So that one that stalls holds up nobody else, a
//! credential (in one of its platform's environments: one service) is let have a multiple of what is free, not of what
//! there is: [`MOST`], which is three quarters of a lane for one that is alone, and leaves a quarter of a quarter
//! when two stall at the same moment. A fixed quota would be either small enough for many to stall at once, and then slow
//! one that is healthy and alone, whose throughput is its room divided by its provider's latency; or large, and then
//! two fill the lane. One whose provider is silent (`share::SILENT_AFTER`) gets a ninth of what is free, [`SILENT`], so that
//! several, and their retries after each time-out, leave most of the room, and any number leave room for one full job to
//! those who answer. Silence alone would not do: with a full queue the whole room is taken within its two seconds.
//!
//! What it does not promise: a lane too small for two full jobs is given to one of them as a whole. Who holds nothing is
//! let in wherever there is room, so four that stall within the same two seconds can fill the default room between them
//! until their time-outs.
//!
//! Cost: a count up and down for a permit. What does not fit waits in the queue: a hand-off gets no permit, a claim waits
//! for its credential's own room to come back and looks again every [`LOOK_AGAIN`], for others' room may.

use std::sync::Arc;

use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::share::{Part, Share};
use crate::domain::notification::Permit;
use crate::domain::platform::Lane;
use crate::domain::targets::MAX_TARGETS;
use crate::planted;
use crate::runtime::{Instant, Runtime};

/// What a credential may hold, for what is free beside it.
const MOST: Ratio = Ratio { held: 3, free: 1 };
/// … and one that answers nothing: a ninth of a lane where it is alone.
const SILENT: Ratio = Ratio { held: 1, free: 8 };
/// How often a claim that waits for its credential's share looks whether others made room.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

#[derive(Clone, Copy)]
struct Ratio {
    held: usize,
    free: usize,
}

impl Ratio {
    /// How many more may be held: as many as keep the ratio once they are taken.
    fn more(self, held: usize, free: usize) -> usize {
        (self.held * free).saturating_sub(self.free * held) / (self.held + self.free)
    }
}

#[derive(Clone)]
pub struct Permits {
    lanes: [Room; 2],
}

#[derive(Clone)]
struct Room {
    permits: Arc<Semaphore>,
    /// What silent credentials leave to the others.
    kept: usize,
}

impl Room {
    fn new(targets: usize) -> Self {
        let kept = MAX_TARGETS.min(targets.saturating_sub(MAX_TARGETS));
        Self { permits: Arc::new(Semaphore::new(targets)), kept }
    }

    /// How many more targets a share may hold.
    fn more(&self, share: &Share, held: usize, now: Instant) -> usize {
        let free = self.permits.available_permits();
        if share.is_silent(now) {
            SILENT.more(held, free).min(free.saturating_sub(self.kept))
        } else {
            MOST.more(held, free)
        }
    }

    fn fits(&self, share: &Share, held: usize, targets: usize, now: Instant) -> bool {
        if targets <= self.more(share, held, now) || planted::is("stalled-provider-takes-all-room") {
            return true;
        }
        // Somebody who holds nothing gets a job through, or a small room would be nobody's.
        held == 0 && (!share.is_silent(now) || self.permits.available_permits() >= targets + self.kept)
    }
}

/// What a permit holds. Dropped in this order: whoever is woken by the share finds the room.
struct Held {
    _room: OwnedSemaphorePermit,
    _part: Part,
}

impl Permits {
    /// At least one full job fits each lane.
    pub fn new(max_in_flight_targets: usize) -> Self {
        let interactive = (max_in_flight_targets / 2).max(MAX_TARGETS);
        if planted::is("one-room-for-both-lanes") {
            let room = Room::new(max_in_flight_targets.max(2 * MAX_TARGETS));
            return Self { lanes: [room.clone(), room] };
        }
        let bulk = max_in_flight_targets.saturating_sub(interactive).max(MAX_TARGETS);
        Self { lanes: [Room::new(interactive), Room::new(bulk)] }
    }

    /// Room now, or `None`.
    pub fn try_take(&self, share: &Arc<Share>, lane: Lane, targets: usize, now: Instant) -> Option<Permit> {
        if share.is_awaited(lane) {
            return None;
        }
        let part = self.part(share, lane, targets, now)?;
        let wanted = u32::try_from(targets).ok()?;
        let room = Arc::clone(&self.lanes[lane.index()].permits).try_acquire_many_owned(wanted).ok()?;
        Some(permit(room, part))
    }

    /// Waits for room; `None` for more than there ever is. Cancel safe.
    pub async fn take(&self, runtime: &Runtime, share: &Arc<Share>, lane: Lane, targets: usize) -> Option<Permit> {
        let wanted = u32::try_from(targets).ok().filter(|_| targets <= MAX_TARGETS)?;
        let part = self.wait(runtime, share, lane, targets).await;
        let room = Arc::clone(&self.lanes[lane.index()].permits).acquire_many_owned(wanted).await.ok()?;
        Some(permit(room, part))
    }

    /// Waits for room for one full job, then takes what else is free up to `most`. Cancel safe.
    pub async fn claim(&self, runtime: &Runtime, share: &Arc<Share>, lane: Lane, most: usize) -> Claim {
        let room = &self.lanes[lane.index()];
        let least = u32::try_from(MAX_TARGETS).expect("a small constant");
        let mut part = self.wait(runtime, share, lane, MAX_TARGETS).await;
        let mut permits = Arc::clone(&room.permits)
            .acquire_many_owned(least)
            .await
            .expect("the semaphore lives as long as its users and is never closed");
        let now = runtime.instant();
        let more = most.saturating_sub(MAX_TARGETS).min(room.more(share, share.held(lane), now));
        if let Ok(wanted) = u32::try_from(more)
            && wanted > 0
            && let Some(rest) = self.part(share, lane, more, now)
            && let Ok(also) = Arc::clone(&room.permits).try_acquire_many_owned(wanted)
        {
            permits.merge(also);
            part.merge(rest);
        }
        Claim { permits, part }
    }

    fn part(&self, share: &Arc<Share>, lane: Lane, targets: usize, now: Instant) -> Option<Part> {
        let room = &self.lanes[lane.index()];
        share.take(lane, targets, |held| room.fits(share, held, targets, now))
    }

    async fn wait(&self, runtime: &Runtime, share: &Arc<Share>, lane: Lane, targets: usize) -> Part {
        let take = || self.part(share, lane, targets, runtime.instant());
        share.wait(lane, take, || runtime.sleep(LOOK_AGAIN)).await
    }

    /// Free room, for the metric.
    pub fn free(&self, lane: Lane) -> usize {
        self.lanes[lane.index()].permits.available_permits()
    }
}

fn permit(room: OwnedSemaphorePermit, part: Part) -> Permit {
    Permit::new(Box::new(Held { _room: room, _part: part }))
}

/// Room taken before a claim; each claimed job splits off its part, the rest goes back with this.
pub struct Claim {
    permits: OwnedSemaphorePermit,
    part: Part,
}

impl Claim {
    pub fn targets(&self) -> usize {
        self.permits.num_permits()
    }

    /// The part of one job. A store that claimed more than was asked for is served from what there is.
    pub fn split(&mut self, targets: usize) -> Permit {
        let room = self.permits.split(targets.min(self.permits.num_permits())).expect("not more than there is");
        let part = self.part.split(targets);
        if planted::is("permit-leaked") {
            room.forget();
            return Permit::new(Box::new(()));
        }
        permit(room, part)
    }
}

#[cfg(test)]
mod tests;
