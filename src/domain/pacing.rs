//! How fast a provider is used: a token bucket whose rate ramps up after idleness.
//!
//! Pure arithmetic over a small state, so that one process can keep it in memory and many can share it as a row. What
//! it guarantees: in any minute no more permits are granted than the configured rate, burst included, even if every
//! permit is used as late as [`PERMIT_GOOD_FOR`] after it was granted. Fractions of a permit are kept, never granted.

use std::time::Duration;

use super::platform::Lane;
use super::time::UnixMs;
use crate::planted;

/// A granted permit that is not used within this time is lost: hoarded permits would be a burst.
pub const PERMIT_GOOD_FOR: Duration = Duration::from_secs(1);
/// Without a request for so long, the rate begins its ramp again.
pub const IDLE_AFTER: Duration = Duration::from_secs(60);
/// The share of the full rate at which a ramp begins.
pub const RAMP_BEGINS_AT: f64 = 0.1;
/// The share of the bucket that BULK leaves to INTERACTIVE.
pub const KEPT_FOR_INTERACTIVE: f64 = 0.25;

const MINUTE_SECS: f64 = 60.0;

/// A configured rate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rate {
    /// Requests a minute at most, 1 or more.
    pub per_minute: u32,
    /// From a tenth of the rate to all of it after idleness; zero: at once.
    pub ramp_up: Duration,
}

impl Rate {
    /// What the bucket holds when it is full: a second's worth.
    #[must_use]
    pub fn burst(self) -> f64 {
        (f64::from(self.per_minute) / MINUTE_SECS).max(1.0)
    }

    /// Permits a millisecond at full rate. Less than the rate says by the burst and by what may be used late, so that
    /// both fit into every minute.
    #[must_use]
    pub fn refill_per_ms(self) -> f64 {
        let spread_secs = MINUTE_SECS + PERMIT_GOOD_FOR.as_secs_f64();
        if planted::is("burst-on-top-of-the-rate") {
            return f64::from(self.per_minute) / MINUTE_SECS / 1000.0;
        }
        let steady = (f64::from(self.per_minute) - self.burst()) / spread_secs;
        // One a minute, whose burst is all there is.
        steady.max(0.5 / spread_secs) / 1000.0
    }

    /// How many are worth a round trip of their own: a tenth of a second's worth.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "below u32::MAX / 60, and positive")]
    pub fn block(self) -> u32 {
        (self.refill_per_ms() * 100.0).ceil().max(1.0) as u32
    }

    #[expect(clippy::cast_precision_loss, reason = "a day of milliseconds fits 52 bits")]
    pub(crate) fn ramp_ms(self) -> f64 {
        self.ramp_up.as_millis().min(86_400_000) as f64
    }

    /// The share of the full rate so long after the ramp began.
    fn share(self, since_ms: f64) -> f64 {
        let ramp = self.ramp_ms();
        if since_ms >= ramp { 1.0 } else { RAMP_BEGINS_AT + (1.0 - RAMP_BEGINS_AT) * since_ms / ramp }
    }

    /// The share's integral from the ramp's beginning, in milliseconds at full rate.
    fn area(self, since_ms: f64) -> f64 {
        let ramp = self.ramp_ms();
        let rest = 1.0 - RAMP_BEGINS_AT;
        if since_ms >= ramp {
            since_ms - rest * ramp / 2.0
        } else {
            RAMP_BEGINS_AT * since_ms + rest * since_ms * since_ms / (2.0 * ramp)
        }
    }
}

/// Who asks for how many.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PermitRequest {
    pub rate: Rate,
    pub lane: Lane,
    /// 0: only to learn, or to slow down.
    pub wanted: u32,
    /// The provider said that it is too fast: the bucket is emptied and the ramp begins again.
    pub slow_down: bool,
}

impl PermitRequest {
    pub(crate) fn kept(self) -> f64 {
        match self.lane {
            Lane::Interactive => 0.0,
            Lane::Bulk if planted::is("bulk-takes-every-permit") => 0.0,
            Lane::Bulk => KEPT_FOR_INTERACTIVE,
        }
    }
}

/// An answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PermitBlock {
    pub granted: u32,
    /// When asking again is worth it; zero when all were granted.
    pub wait: Duration,
}

/// What is known of one credential's rate.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Bucket {
    pub permits: f64,
    pub ramp_from: UnixMs,
    /// The last request.
    pub at: UnixMs,
}

impl Bucket {
    /// Of a credential that was not used yet.
    #[must_use]
    pub fn fresh(rate: Rate, now: UnixMs) -> Self {
        Self { permits: (rate.burst() * rate.share(0.0)).max(1.0), ramp_from: now, at: now }
    }

    /// The bucket afterwards, and what was granted. A clock set back gives nothing and takes nothing.
    #[must_use]
    pub fn take(self, request: PermitRequest, now: UnixMs) -> (Self, PermitBlock) {
        let rate = request.rate;
        let now = now.max(self.at);
        let mut bucket = self.filled(rate, now);
        if request.slow_down {
            let ramp_from = if planted::is("complaint-begins-no-ramp") { bucket.ramp_from } else { now };
            bucket = Self { permits: 0.0, ramp_from, at: now };
        }
        let most = (bucket.permits - bucket.reserved(request)).floor().max(0.0);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most `wanted`")]
        let granted = most.min(f64::from(request.wanted)) as u32;
        bucket.permits -= f64::from(granted);
        let wait = if granted >= request.wanted { Duration::ZERO } else { bucket.wait(request) };
        (bucket, PermitBlock { granted, wait })
    }

    fn filled(self, rate: Rate, now: UnixMs) -> Self {
        if now.since(self.at) > IDLE_AFTER {
            return Self::fresh(rate, now);
        }
        let gained =
            rate.refill_per_ms() * (rate.area(ms(self.ramp_from, now)) - rate.area(ms(self.ramp_from, self.at)));
        Self { permits: (self.permits + gained.max(0.0)).min(self.room(rate, now)), at: now, ..self }
    }

    /// What it can hold now: a ramp's burst is smaller.
    fn room(self, rate: Rate, now: UnixMs) -> f64 {
        (rate.burst() * rate.share(ms(self.ramp_from, now))).max(1.0)
    }

    fn reserved(self, request: PermitRequest) -> f64 {
        // A bucket of one or two has nothing to keep.
        let room = self.room(request.rate, self.at);
        if room >= 4.0 { room * request.kept() } else { 0.0 }
    }

    /// Until one permit can be granted, at the rate of this moment.
    #[must_use]
    pub fn wait(self, request: PermitRequest) -> Duration {
        let missing = 1.0 + self.reserved(request) - self.permits;
        let speed = request.rate.refill_per_ms() * request.rate.share(ms(self.ramp_from, self.at));
        Duration::from_secs_f64((missing.max(0.0) / speed / 1000.0).clamp(0.001, 120.0))
    }
}

#[expect(clippy::cast_precision_loss, reason = "differences of times fit 52 bits")]
fn ms(from: UnixMs, to: UnixMs) -> f64 {
    (to.0 - from.0).max(0) as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rate(per_minute: u32, ramp_secs: u64) -> Rate {
        Rate { per_minute, ramp_up: Duration::from_secs(ramp_secs) }
    }

    fn request(rate: Rate, lane: Lane, wanted: u32) -> PermitRequest {
        PermitRequest { rate, lane, wanted, slow_down: false }
    }

    const START: UnixMs = UnixMs(1_790_000_000_000);

    proptest! {
        /// Whoever asks, whenever they ask: in any minute of use no more than the rate, permits used as late as may be.
        #[test]
        fn no_minute_sees_more_than_the_rate(
            per_minute in 1u32..1_000_000, ramp_secs in 0u64..120,
            asks in proptest::collection::vec((0i64..5_000, 0u32..20_000, any::<bool>()), 1..200)
        ) {
            let rate = rate(per_minute, ramp_secs);
            let mut bucket = Bucket::fresh(rate, START);
            let (mut now, mut grants): (UnixMs, Vec<(i64, u64)>) = (START, Vec::new());
            for (pause, wanted, bulk) in asks {
                now = UnixMs(now.0 + pause);
                let lane = if bulk { Lane::Bulk } else { Lane::Interactive };
                let (after, block) = bucket.take(request(rate, lane, wanted), now);
                bucket = after;
                prop_assert!(block.granted <= wanted);
                prop_assert!(block.granted == wanted || block.wait > Duration::ZERO);
                grants.push((now.0, u64::from(block.granted)));
            }
            let window = 60_000 + i64::try_from(PERMIT_GOOD_FOR.as_millis()).unwrap();
            for (from, _) in &grants {
                let sum: u64 = grants.iter().filter(|(at, _)| (*from..*from + window).contains(at)).map(|(_, n)| n).sum();
                prop_assert!(sum <= u64::from(per_minute).max(2), "{sum} in a minute of {per_minute}");
            }
        }
    }

    /// A full bucket, and somebody who takes all there is twenty times a second.
    #[test]
    fn the_greediest_minute_keeps_the_rate() {
        for per_minute in [60, 6_000, 600_000] {
            let rate = rate(per_minute, 0);
            let mut bucket = Bucket::fresh(rate, START);
            let mut grants = Vec::new();
            for step in 0..2 * 61 * 20 {
                let now = UnixMs(START.0 + step * 50);
                let (after, block) = bucket.take(request(rate, Lane::Interactive, u32::MAX), now);
                bucket = after;
                grants.push(u64::from(block.granted));
            }
            let most = grants.windows(61 * 20).map(|minute| minute.iter().sum::<u64>()).max().unwrap();
            assert!(most <= u64::from(per_minute), "{most} in a minute of {per_minute}");
        }
    }

    #[test]
    fn a_busy_credential_gets_nearly_all_of_its_rate() {
        let rate = rate(600_000, 60);
        let mut bucket = Bucket::fresh(rate, START);
        let mut per_minute = [0u64; 3];
        for step in 0..3 * 60 * 20 {
            let (after, block) = bucket.take(request(rate, Lane::Interactive, 5_000), UnixMs(START.0 + step * 50));
            bucket = after;
            per_minute[usize::try_from(step / (60 * 20)).unwrap()] += u64::from(block.granted);
        }
        assert!((300_000..360_000).contains(&per_minute[0]), "ramping up: {per_minute:?}");
        assert!((575_000..=600_000).contains(&per_minute[1]), "{per_minute:?}");
        assert!((575_000..=600_000).contains(&per_minute[2]), "{per_minute:?}");
    }

    #[test]
    fn idleness_and_a_complaint_begin_the_ramp_again() {
        let rate = rate(60_000, 60);
        let mut bucket = Bucket::fresh(rate, START);
        let mut now = START;
        let ask = |bucket: &mut Bucket, now: UnixMs, slow_down| {
            let (after, block) =
                bucket.take(PermitRequest { slow_down, ..request(rate, Lane::Interactive, 9_999) }, now);
            *bucket = after;
            block.granted
        };
        for _ in 0..120 {
            now = now.plus(Duration::from_secs(1));
            ask(&mut bucket, now, false);
        }
        now = now.plus(Duration::from_secs(1));
        assert!(ask(&mut bucket, now, false) > 950, "at full rate");
        assert_eq!(ask(&mut bucket, now, true), 0);
        now = now.plus(Duration::from_secs(1));
        assert!((90..130).contains(&ask(&mut bucket, now, false)), "a tenth again");
        for _ in 0..120 {
            now = now.plus(Duration::from_secs(1));
            ask(&mut bucket, now, false);
        }
        now = now.plus(IDLE_AFTER + Duration::from_secs(1));
        assert_eq!(ask(&mut bucket, now, false), 100, "a tenth of the burst after idleness");
    }

    #[test]
    fn bulk_leaves_some_to_interactive_and_even_one_a_minute_flows() {
        let rate = rate(60_000, 0);
        let bucket = Bucket { permits: 1_000.0, ramp_from: START, at: START };
        let (bucket, bulk) = bucket.take(request(rate, Lane::Bulk, 5_000), START);
        assert_eq!(bulk.granted, 750);
        let (_, interactive) = bucket.take(request(rate, Lane::Interactive, 5_000), START);
        assert_eq!(interactive.granted, 250);
        let slow = self::rate(1, 60);
        let (mut bucket, mut granted, mut now) = (Bucket::fresh(slow, START), 0, START);
        for _ in 0..600 {
            let (after, block) = bucket.take(request(slow, Lane::Bulk, 10), now);
            (bucket, granted) = (after, granted + block.granted);
            now = now.plus(Duration::from_secs(1));
        }
        assert!((3..=10).contains(&granted), "{granted} in ten minutes");
    }

    #[test]
    fn a_clock_set_back_gives_nothing() {
        let rate = rate(6_000, 0);
        let (bucket, all) = Bucket::fresh(rate, START).take(request(rate, Lane::Interactive, 500), START);
        assert_eq!(all.granted, 100);
        let (after, none) = bucket.take(request(rate, Lane::Interactive, 500), UnixMs(START.0 - 3_600_000));
        assert_eq!((none.granted, after.at), (0, START));
    }
}
