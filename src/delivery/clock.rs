//! Notices that the wall clock jumped: set by hand, by a time server after a long absence, or asleep.
//!
//! What depends on it: TTLs, due times, quiet hours and the age of history are wall-clock times; leases, pauses and the
//! proof of the "no" log are not. A jump forward lets due what waits and ends TTLs early; a jump back makes what waits for
//! a time wait so much longer. Neither loses anything: what expires is recorded, ids never go back. Deleting history
//! is the one thing that cannot be made good, so that waits.

use std::time::Duration;

use metrics::counter;

use crate::domain::time::UnixMs;
use crate::runtime::Instant;
use crate::telemetry::names;

/// A time server that slews is far below this between two looks; a step is not.
const TOLERANCE: Duration = Duration::from_secs(2);
/// After a larger jump forward no history is deleted for a while.
const DOUBTFUL: Duration = Duration::from_secs(3600);
/// The while: long enough for somebody to set the clock right.
const HOLD: Duration = Duration::from_secs(24 * 3600);

/// How the wall clock moved beyond what time has passed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Jump {
    Forward(Duration),
    Back(Duration),
}

pub struct ClockWatch {
    wall: UnixMs,
    at: Instant,
    held_until: Option<Instant>,
}

impl ClockWatch {
    pub fn new(wall: UnixMs, at: Instant) -> Self {
        Self { wall, at, held_until: None }
    }

    /// Since the last look.
    pub fn look(&mut self, wall: UnixMs, at: Instant) -> Option<Jump> {
        let expected = self.wall.plus(at.saturating_duration_since(self.at));
        (self.wall, self.at) = (wall, at);
        let (forward, back) = (wall.since(expected), expected.since(wall));
        if forward > TOLERANCE {
            if forward > DOUBTFUL {
                self.held_until = Some(at + HOLD);
            }
            Some(Jump::Forward(forward))
        } else if back > TOLERANCE {
            // The jump forward before it, if there was one, is taken back by that much.
            if back > DOUBTFUL {
                self.held_until = None;
            }
            Some(Jump::Back(back))
        } else {
            None
        }
    }

    /// [`ClockWatch::look`], told to whoever can set the clock right. Whether history may be deleted by this clock.
    pub fn is_trusted(&mut self, wall: UnixMs, at: Instant) -> bool {
        match self.look(wall, at) {
            Some(Jump::Forward(by)) => {
                counter!(names::CLOCK_JUMPS, "direction" => "forward").increment(1);
                let held = by > DOUBTFUL;
                tracing::warn!(seconds = by.as_secs(), history_is_kept = held, "the clock jumped forward");
            }
            Some(Jump::Back(by)) => {
                counter!(names::CLOCK_JUMPS, "direction" => "back").increment(1);
                tracing::warn!(seconds = by.as_secs(), "the clock was set back: what waits for a time waits longer");
            }
            None => {}
        }
        self.held_until.is_none_or(|until| at >= until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::Runtime;

    const START: UnixMs = UnixMs(1_790_000_000_000);
    const HOUR: Duration = Duration::from_secs(3600);
    const LOOK: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn jumps_are_told_from_time_that_passes() {
        let origin = Runtime::simulated(1, START).instant();
        let mut clock = ClockWatch::new(START, origin);
        let mut at = origin;
        let mut wall = START;
        let mut pass = |by: Duration, jump: i64| {
            at += by;
            wall = UnixMs(wall.plus(by).0 + jump);
            (wall, at)
        };
        let (wall, at) = pass(48 * HOUR, 0);
        assert_eq!(clock.look(wall, at), None, "a long pause is none");
        let (wall, at) = pass(LOOK, 1_900);
        assert_eq!(clock.look(wall, at), None, "slewed");
        let (wall, at) = pass(LOOK, 24 * 3_600_000);
        assert_eq!(clock.look(wall, at), Some(Jump::Forward(24 * HOUR)));
        let (wall, at) = pass(LOOK, 0);
        assert_eq!(clock.look(wall, at), None, "once");
        let (wall, at) = pass(LOOK, -3_600_000);
        assert_eq!(clock.look(wall, at), Some(Jump::Back(HOUR)));
    }

    #[tokio::test(start_paused = true)]
    async fn history_is_kept_for_a_day_after_a_jump_forward_or_until_it_is_taken_back() {
        let origin = Runtime::simulated(1, START).instant();
        let day = 24 * 3_600_000;
        let mut clock = ClockWatch::new(START, origin);
        assert!(clock.is_trusted(START, origin));
        assert!(clock.is_trusted(UnixMs(START.0 + 600_000), origin), "ten minutes are a small thing");
        assert!(!clock.is_trusted(UnixMs(START.0 + day), origin));
        assert!(!clock.is_trusted(UnixMs(START.0 + day + day / 2), origin + 12 * HOUR));
        assert!(clock.is_trusted(UnixMs(START.0 + 2 * day), origin + 24 * HOUR));
        assert!(!clock.is_trusted(UnixMs(START.0 + 9 * day), origin + 24 * HOUR));
        assert!(clock.is_trusted(UnixMs(START.0 + day), origin + 24 * HOUR), "set right");
    }
}
