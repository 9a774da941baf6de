//! Whether a route or a credential may be used now. A fault pauses it: nothing is burned, deliveries wait until their
//! TTL, one probe at a time asks whether it works again.

use std::sync::Mutex;
use std::time::Duration;

use crate::domain::time::UnixMs;
use crate::planted;
use crate::runtime::Instant;
use crate::storage::TroubleCause;

const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Where tokens are the trouble: each probe costs an answer about a token, and providers count those.
const FIRST_TOKENS_PAUSE: Duration = Duration::from_secs(60);
const LONGEST_TOKENS_PAUSE: Duration = Duration::from_secs(5 * 60);
/// A probe without an answer holds the next one up no longer.
const PROBE_PATIENCE: Duration = Duration::from_secs(60);

#[derive(Default)]
pub struct RouteState {
    pause: Mutex<Option<Pause>>,
}

struct Pause {
    cause: TroubleCause,
    reason: String,
    since: UnixMs,
    until: Instant,
    length: Duration,
    probing_until: Option<Instant>,
}

/// Why it is paused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Paused {
    pub cause: TroubleCause,
    pub reason: String,
    pub since: UnixMs,
    pub until: Instant,
}

impl RouteState {
    /// Pauses it. Whether it was working before: then the caller logs it, once.
    pub fn broke(&self, cause: TroubleCause, reason: &str, now: Instant, wall: UnixMs) -> bool {
        let mut pause = self.pause.lock().expect("no panic while held");
        let (first, longest) = match cause {
            TroubleCause::Configuration => (FIRST_PAUSE, LONGEST_PAUSE),
            TroubleCause::Tokens => (FIRST_TOKENS_PAUSE, LONGEST_TOKENS_PAUSE),
        };
        let (since, length) = match &*pause {
            None => (wall, first),
            // Several batches fail together: one fault, one step.
            Some(running) if running.until > now => (running.since, running.length),
            Some(over) => (over.since, (over.length * 2).clamp(first, longest)),
        };
        let is_first = pause.is_none();
        let reason = reason.to_owned();
        *pause = Some(Pause { cause, reason, since, until: now + length, length, probing_until: None });
        is_first
    }

    /// The platform took something. Whether this ended a pause.
    pub fn works(&self) -> bool {
        if planted::is("probe-never-resumes") {
            return false;
        }
        self.pause.lock().expect("no panic while held").take().is_some()
    }

    /// Paused or on probation: only one probe at a time.
    pub fn is_broken(&self) -> bool {
        self.pause.lock().expect("no panic while held").is_some()
    }

    /// Until when nothing at all may be sent.
    pub fn paused_until(&self, now: Instant) -> Option<Instant> {
        self.pause.lock().expect("no panic while held").as_ref().map(|pause| pause.until).filter(|until| *until > now)
    }

    /// Whether the caller is the one that may ask now.
    pub fn begin_probe(&self, now: Instant) -> bool {
        let mut pause = self.pause.lock().expect("no panic while held");
        let Some(pause) = &mut *pause else { return true };
        if pause.until > now || pause.probing_until.is_some_and(|until| until > now) {
            return false;
        }
        if !planted::is("probes-together") {
            pause.probing_until = Some(now + PROBE_PATIENCE);
        }
        true
    }

    /// There was nothing to ask with, or the answer said nothing: somebody else may.
    pub fn end_probe(&self) {
        if let Some(pause) = &mut *self.pause.lock().expect("no panic while held") {
            pause.probing_until = None;
        }
    }

    pub fn paused(&self) -> Option<Paused> {
        let pause = self.pause.lock().expect("no panic while held");
        let known = |Pause { cause, reason, since, until, .. }: &Pause| Paused {
            cause: *cause,
            reason: reason.clone(),
            since: *since,
            until: *until,
        };
        pause.as_ref().map(known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_with_each_failed_probe_and_end_with_success() {
        let runtime = crate::runtime::Runtime::simulated(1, UnixMs(0));
        let state = RouteState::default();
        let broke = |wall| {
            let cause = TroubleCause::Configuration;
            state.broke(cause, "403 InvalidProviderToken", runtime.instant(), UnixMs(wall))
        };
        assert!(broke(7));
        assert!(!broke(8), "logged once");
        assert_eq!(state.paused_until(runtime.instant()), Some(runtime.instant() + FIRST_PAUSE));
        for _ in 0..8 {
            runtime.sleep(LONGEST_PAUSE).await;
            assert_eq!(state.paused_until(runtime.instant()), None, "a probe may go");
            assert!(state.is_broken());
            broke(9);
        }
        assert_eq!(state.paused_until(runtime.instant()), Some(runtime.instant() + LONGEST_PAUSE));
        assert_eq!(state.paused().map(|paused| paused.since), Some(UnixMs(7)), "since it began");
        assert!(state.works());
        assert!(!state.is_broken() && state.paused().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn one_probe_at_a_time() {
        let runtime = crate::runtime::Runtime::simulated(1, UnixMs(0));
        let state = RouteState::default();
        assert!(state.begin_probe(runtime.instant()), "nothing is wrong");
        state.broke(TroubleCause::Configuration, "403", runtime.instant(), UnixMs(0));
        assert!(!state.begin_probe(runtime.instant()), "not yet");
        runtime.sleep(FIRST_PAUSE).await;
        assert!(state.begin_probe(runtime.instant()));
        assert!(!state.begin_probe(runtime.instant()), "one is under way");
        state.end_probe();
        assert!(state.begin_probe(runtime.instant()));
        runtime.sleep(PROBE_PATIENCE).await;
        assert!(state.begin_probe(runtime.instant()), "its answer was lost");
    }
}
