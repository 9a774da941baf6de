//! What one credential holds of the engine's room, at one of its platform's ends, and whether anything answers there.
//!
//! Counters only: how much that may be is decided in `permits`, where the room is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Mutex, Notify};

use crate::domain::platform::Lane;
use crate::runtime::Instant;

/// Asked for so long without any answer, a provider counts as silent. Slow ones answer something meanwhile.
pub const SILENT_AFTER: Duration = Duration::from_secs(2);

/// Of a credential in one of the platform's environments: what one stalled service holds up.
pub struct Share {
    lanes: [LaneShare; 2],
    epoch: Instant,
    /// When the first push was handed to the sender that no answer has followed: milliseconds since `epoch`, and one; 0
    /// where there is none.
    unanswered_since: AtomicU64,
}

#[derive(Default)]
struct LaneShare {
    held: AtomicUsize,
    /// One claim at a time waits for the share to shrink, in order.
    turn: Mutex<()>,
    is_awaited: AtomicBool,
    shrunk: Notify,
}

impl Share {
    pub fn new(epoch: Instant) -> Arc<Self> {
        Arc::new(Self { lanes: Default::default(), epoch, unanswered_since: AtomicU64::new(0) })
    }

    /// Targets that hold room, and claims that are about to.
    pub fn held(&self, lane: Lane) -> usize {
        self.lanes[lane.index()].held.load(Ordering::Relaxed)
    }

    /// Whether anything is under way.
    pub fn is_held(&self) -> bool {
        Lane::ALL.iter().any(|lane| self.held(*lane) > 0)
    }

    /// Something goes to the sender.
    pub fn asks(&self, now: Instant) {
        if self.unanswered_since.load(Ordering::Relaxed) == 0 {
            self.unanswered_since.store(self.millis(now) + 1, Ordering::Relaxed);
        }
    }

    /// The provider said something, whatever it was.
    pub fn answered(&self, now: Instant) {
        let was_silent = self.is_silent(now);
        self.unanswered_since.store(0, Ordering::Relaxed);
        if was_silent {
            for lane in &self.lanes {
                lane.wake();
            }
        }
    }

    /// Whether nothing was answered for so long that more of the same is of no use.
    pub fn is_silent(&self, now: Instant) -> bool {
        match self.unanswered_since.load(Ordering::Relaxed) {
            0 => false,
            since => self.millis(now) >= since - 1 + millis_of(SILENT_AFTER),
        }
    }

    fn millis(&self, now: Instant) -> u64 {
        millis_of(now.saturating_duration_since(self.epoch))
    }

    /// A claim waits for what comes back: nothing is to overtake it.
    pub(super) fn is_awaited(&self, lane: Lane) -> bool {
        self.lanes[lane.index()].is_awaited.load(Ordering::Relaxed)
    }

    /// Takes a part where `fits` allows it, told what is held without it.
    pub(super) fn take(self: &Arc<Self>, lane: Lane, targets: usize, fits: impl FnOnce(usize) -> bool) -> Option<Part> {
        let held = &self.lanes[lane.index()].held;
        // Counted before it is judged: of two at once at most one is refused too much, and none is let in too much.
        let before = held.fetch_add(targets, Ordering::Relaxed);
        if !fits(before) {
            // Without waking anybody: whoever waits may be who was refused.
            held.fetch_sub(targets, Ordering::Relaxed);
            return None;
        }
        Some(Part { share: Arc::clone(self), lane, targets })
    }

    /// Calls `take` until it gives something: now, when something came back, and every `again`. Cancel safe.
    pub(super) async fn wait<S: Future<Output = ()>>(
        &self,
        lane: Lane,
        take: impl Fn() -> Option<Part>,
        again: impl Fn() -> S,
    ) -> Part {
        let lane = &self.lanes[lane.index()];
        let _turn = lane.turn.lock().await;
        if let Some(part) = take() {
            return part;
        }
        let _awaited = Awaited::new(&lane.is_awaited);
        loop {
            // What comes back between the look and the wait leaves its wake-up behind.
            if let Some(part) = take() {
                return part;
            }
            tokio::select! {
                () = lane.shrunk.notified() => {}
                () = again() => {}
            }
        }
    }
}

impl LaneShare {
    fn wake(&self) {
        if self.is_awaited.load(Ordering::Relaxed) {
            self.shrunk.notify_one();
        }
    }
}

fn millis_of(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

struct Awaited<'a>(&'a AtomicBool);

impl<'a> Awaited<'a> {
    fn new(flag: &'a AtomicBool) -> Self {
        flag.store(true, Ordering::Relaxed);
        Self(flag)
    }
}

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// What some targets count for in their share; counted no more when it is dropped.
pub(super) struct Part {
    share: Arc<Share>,
    lane: Lane,
    targets: usize,
}

impl Part {
    pub(super) fn split(&mut self, targets: usize) -> Self {
        let targets = targets.min(self.targets);
        self.targets -= targets;
        Self { share: Arc::clone(&self.share), lane: self.lane, targets }
    }

    pub(super) fn merge(&mut self, mut other: Self) {
        self.targets += std::mem::take(&mut other.targets);
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let lane = &self.share.lanes[self.lane.index()];
        lane.held.fetch_sub(self.targets, Ordering::Relaxed);
        lane.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::time::UnixMs;
    use crate::runtime::Runtime;

    #[tokio::test(start_paused = true)]
    async fn silence_begins_with_what_was_asked_and_ends_with_an_answer() {
        let runtime = Runtime::simulated(1, UnixMs(0));
        let share = Share::new(runtime.instant());
        runtime.sleep(10 * SILENT_AFTER).await;
        assert!(!share.is_silent(runtime.instant()), "nothing was asked");
        share.asks(runtime.instant());
        runtime.sleep(SILENT_AFTER / 2).await;
        share.asks(runtime.instant());
        assert!(!share.is_silent(runtime.instant()));
        runtime.sleep(SILENT_AFTER / 2).await;
        assert!(share.is_silent(runtime.instant()), "since the first that was asked");
        share.answered(runtime.instant());
        assert!(!share.is_silent(runtime.instant()));
        runtime.sleep(10 * SILENT_AFTER).await;
        assert!(!share.is_silent(runtime.instant()), "nothing was asked since");
    }
}
