//! When to try again.

use std::time::Duration;

use super::sending::RetryCause;
use crate::planted;

/// The delays of one platform. A provider's own hint is a floor, even above `cap`; past the TTL nothing is tried.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RetryPolicy {
    /// The least wait after a failed connection or a refused stream.
    pub transport_floor: Duration,
    /// The least wait after a 429 without a hint.
    pub throttled_floor: Duration,
    /// The least wait after a 5xx without a hint.
    pub server_error_floor: Duration,
    /// The spread of the first retry; doubled for each later one.
    pub base: Duration,
    /// The widest spread.
    pub cap: Duration,
    /// From the first attempt on, retries end after this even if the TTL is longer.
    pub give_up_after: Duration,
}

impl RetryPolicy {
    /// The wait before attempt `attempt + 1` (`attempt` ≥ 1 were made). `random` is even in 0..1.
    ///
    /// The floor is added to full jitter over the doubled, capped spread, so that retries stay spread at the cap and
    /// behind a hint that thousands of deliveries received at once.
    #[must_use]
    pub fn delay(&self, cause: RetryCause, hint: Option<Duration>, attempt: u32, random: f64) -> Duration {
        let hint = hint.filter(|_| !planted::is("retry-after-ignored"));
        let floor = match (hint, cause) {
            (None, _) if planted::is("floors-ignored") => Duration::ZERO,
            (Some(hint), _) => hint.max(self.transport_floor),
            (None, RetryCause::Transport) => self.transport_floor,
            (None, RetryCause::Throttled | RetryCause::DeviceThrottled | RetryCause::ProviderThrottled) => {
                self.throttled_floor
            }
            (None, RetryCause::ServerError) => self.server_error_floor,
        };
        let doublings = attempt.saturating_sub(1).min(20);
        let spread = self.base.saturating_mul(1 << doublings).min(if planted::is("jitter-above-the-cap") {
            4 * self.cap
        } else {
            self.cap
        });
        floor.saturating_add(spread.mul_f64(random.clamp(0.0, 1.0)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICY: RetryPolicy = RetryPolicy {
        transport_floor: Duration::from_secs(1),
        throttled_floor: Duration::from_secs(60),
        server_error_floor: Duration::from_secs(10),
        base: Duration::from_secs(5),
        cap: Duration::from_secs(600),
        give_up_after: Duration::from_secs(3600),
    };

    proptest! {
        #[test]
        fn delay_stays_between_floor_and_floor_plus_cap(
            attempt in 1u32..1000, random in 0.0f64..1.0, hint in proptest::option::of(0u64..100_000)
        ) {
            let hint = hint.map(Duration::from_secs);
            let delay = POLICY.delay(RetryCause::ServerError, hint, attempt, random);
            let floor = hint.map_or(POLICY.server_error_floor, |h| h.max(POLICY.transport_floor));
            prop_assert!(delay >= floor);
            prop_assert!(delay <= floor + POLICY.cap);
        }
    }

    #[test]
    fn jitter_survives_the_cap() {
        let low = POLICY.delay(RetryCause::Transport, None, 50, 0.0);
        let high = POLICY.delay(RetryCause::Transport, None, 50, 0.999);
        assert!(high > low + POLICY.cap / 2);
    }
}
