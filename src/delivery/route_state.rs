//! Whether a route may be used now. A broken credential pauses it: nothing is burned, deliveries wait until their TTL,
//! one probe at a time asks whether it works again.

use std::sync::Mutex;
use std::time::Duration;

use crate::runtime::Instant;

const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

#[derive(Default)]
pub struct RouteState {
    pause: Mutex<Option<Pause>>,
}

#[derive(Clone)]
struct Pause {
    until: Instant,
    length: Duration,
    reason: String,
}

impl RouteState {
    /// Pauses the route. Whether it was working before: then the caller logs it, once.
    pub fn broke(&self, reason: &str, now: Instant) -> bool {
        let mut pause = self.pause.lock().expect("no panic while held");
        let first = pause.is_none();
        let length = match &*pause {
            None => FIRST_PAUSE,
            // Several batches fail together: one fault, one step.
            Some(running) if running.until > now => running.length,
            Some(over) => (over.length * 2).min(LONGEST_PAUSE),
        };
        *pause = Some(Pause { until: now + length, length, reason: reason.to_owned() });
        first
    }

    /// The platform took something. Whether this ended a pause.
    pub fn works(&self) -> bool {
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

    /// Why it is paused.
    pub fn reason(&self) -> Option<String> {
        self.pause.lock().expect("no panic while held").as_ref().map(|pause| pause.reason.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_with_each_failed_probe_and_end_with_success() {
        let runtime = crate::runtime::Runtime::simulated(1, crate::domain::time::UnixMs(0));
        let state = RouteState::default();
        assert!(state.broke("403 InvalidProviderToken", runtime.instant()));
        assert!(!state.broke("403 InvalidProviderToken", runtime.instant()), "logged once");
        assert_eq!(state.paused_until(runtime.instant()), Some(runtime.instant() + FIRST_PAUSE));
        for _ in 0..8 {
            runtime.sleep(LONGEST_PAUSE).await;
            assert_eq!(state.paused_until(runtime.instant()), None, "a probe may go");
            assert!(state.is_broken());
            state.broke("403 InvalidProviderToken", runtime.instant());
        }
        assert_eq!(state.paused_until(runtime.instant()), Some(runtime.instant() + LONGEST_PAUSE));
        assert!(state.works());
        assert!(!state.is_broken() && state.reason().is_none());
    }
}
