//! The engine's limits, each with its default.

use std::time::Duration;

use crate::domain::platform::Platform;
use crate::domain::retry::RetryPolicy;
use crate::domain::room::RoomLimits;

#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Settings {
    /// Targets between claim and durable outcome, of both lanes; half is kept for INTERACTIVE. Bounds the engine's
    /// memory: about 1 KiB each.
    pub max_in_flight_targets: usize,
    /// Jobs of one claim.
    pub max_claim_jobs: usize,
    /// Targets of one claim.
    pub max_claim_targets: usize,
    /// How often a route looks for due jobs although nothing woke it.
    pub poll: Duration,
    /// The oldest an answered delivery may be before it is written, while its job goes on.
    pub checkpoint: Duration,
    /// How long a shutdown waits for answers.
    pub drain: Duration,
    /// People of one fan-out page.
    pub page_people: usize,
    /// Fan-outs expanded in turns at the same time.
    pub max_fanouts: usize,
    /// The expander waits while more targets than this are open, so that a broadcast does not fill the disk. At most half
    /// of [`RoomLimits::max_open_targets`]: a broadcast must not be what single events are refused for.
    pub max_expanded_targets: u64,
    /// Beyond which no event is taken.
    pub room: RoomLimits,
    /// History older than this is deleted.
    pub retention: Duration,
    pub apns: RetryPolicy,
    pub fcm: RetryPolicy,
    pub retirement_guard: RetirementGuard,
}

/// When so many tokens die alike that the configuration is the likelier fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RetirementGuard {
    /// Retired at most before the guard steps in.
    pub min: u32,
    /// Of a route's answers within ten minutes; 0: never.
    pub percent: u32,
}

impl Settings {
    #[must_use]
    pub const fn retry(&self, platform: Platform) -> &RetryPolicy {
        match platform {
            Platform::Apns => &self.apns,
            Platform::Fcm => &self.fcm,
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        let shared = RetryPolicy {
            transport_floor: Duration::from_secs(1),
            throttled_floor: Duration::from_secs(60),
            // Apple: 5xx may be retried after 15 minutes.
            server_error_floor: Duration::from_secs(15 * 60),
            base: Duration::from_secs(5),
            cap: Duration::from_secs(10 * 60),
            give_up_after: Duration::from_secs(28 * 24 * 3600),
        };
        Self {
            max_in_flight_targets: 20_000,
            max_claim_jobs: 64,
            max_claim_targets: 2_000,
            poll: Duration::from_secs(5),
            checkpoint: Duration::from_millis(150),
            drain: Duration::from_secs(20),
            page_people: 1_000,
            max_fanouts: 8,
            max_expanded_targets: 1_000_000,
            room: RoomLimits::default(),
            retention: Duration::from_secs(30 * 24 * 3600),
            retirement_guard: RetirementGuard { min: 100, percent: 50 },
            apns: shared,
            // Google: at least 10 s before any retry, and an end after 60 minutes.
            fcm: RetryPolicy {
                transport_floor: Duration::from_secs(10),
                server_error_floor: Duration::from_secs(10),
                give_up_after: Duration::from_secs(60 * 60),
                ..shared
            },
        }
    }
}
