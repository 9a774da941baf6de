//! The guard against mass retirement: when a large share of a route's answers call tokens dead for the same reason,
//! the configuration is the likelier fault (the wrong environment, another project's key), and people must not lose
//! their registrations over it.
//!
//! Counted over ten minutes, by route. At most `min` devices are retired before it steps in.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use std::time::Duration;

use super::settings::RetirementGuard;
use crate::domain::ids::RouteId;
use crate::planted;
use crate::runtime::Instant;

const WINDOW: Duration = Duration::from_secs(10 * 60);
const SLICE: Duration = Duration::from_secs(60);
/// Reasons counted apart in one slice; platforms have fewer.
const MAX_REASONS: usize = 16;

#[derive(Default)]
pub struct Guard {
    routes: Mutex<HashMap<RouteId, Counts>>,
}

#[derive(Default)]
struct Counts {
    slices: VecDeque<Slice>,
    /// An operator confirmed that the tokens are dead.
    lifted_until: Option<Instant>,
}

struct Slice {
    began: Instant,
    answers: u64,
    dead: HashMap<Box<str>, u64>,
}

/// What the guard says of a dead token.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Judgement {
    Retire,
    /// Too many. In words.
    Hold(String),
}

impl Guard {
    /// So many answers that are not about dead tokens.
    pub fn answered(&self, route: RouteId, answers: usize, now: Instant) {
        if answers > 0 {
            let mut routes = self.routes.lock().expect("no panic while held");
            routes.entry(route).or_default().slice(now).answers += answers as u64;
        }
    }

    /// A platform called a token dead.
    pub fn judge(&self, settings: RetirementGuard, route: RouteId, reason: &str, now: Instant) -> Judgement {
        let mut routes = self.routes.lock().expect("no panic while held");
        let counts = routes.entry(route).or_default();
        let slice = counts.slice(now);
        slice.answers += 1;
        if slice.dead.len() < MAX_REASONS || slice.dead.contains_key(reason) {
            *slice.dead.entry(reason.into()).or_default() += 1;
        }
        if planted::is("mass-retirement-unguarded")
            || settings.percent == 0
            || counts.lifted_until.is_some_and(|until| until > now)
        {
            return Judgement::Retire;
        }
        let answers: u64 = counts.slices.iter().map(|slice| slice.answers).sum();
        let dead: u64 = counts.slices.iter().filter_map(|slice| slice.dead.get(reason)).sum();
        let percent = dead * 100 / answers.max(1);
        if dead <= u64::from(settings.min) || percent < u64::from(settings.percent) {
            return Judgement::Retire;
        }
        Judgement::Hold(format!("{percent} % of {answers} answers within ten minutes say {reason}"))
    }

    /// Lets everything through until then, and begins to count anew.
    pub fn lift(&self, route: RouteId, until: Instant) {
        let counts = Counts { lifted_until: Some(until), ..Counts::default() };
        self.routes.lock().expect("no panic while held").insert(route, counts);
    }

    pub fn is_lifted(&self, route: RouteId, now: Instant) -> bool {
        let routes = self.routes.lock().expect("no panic while held");
        routes.get(&route).and_then(|counts| counts.lifted_until).is_some_and(|until| until > now)
    }

    /// It works again: what was counted before says nothing any more.
    pub fn forget(&self, route: RouteId) {
        let mut routes = self.routes.lock().expect("no panic while held");
        if let Some(counts) = routes.get_mut(&route) {
            counts.slices.clear();
        }
    }
}

impl Counts {
    fn slice(&mut self, now: Instant) -> &mut Slice {
        while self.slices.front().is_some_and(|slice| now > slice.began + WINDOW) {
            self.slices.pop_front();
        }
        if self.slices.back().is_none_or(|slice| now > slice.began + SLICE) {
            self.slices.push_back(Slice { began: now, answers: 0, dead: HashMap::new() });
        }
        self.slices.back_mut().expect("pushed above when it was not there")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::time::UnixMs;
    use crate::runtime::Runtime;

    const SETTINGS: RetirementGuard = RetirementGuard { min: 100, percent: 50 };
    const ROUTE: RouteId = RouteId(1);

    fn held(guard: &Guard, route: RouteId, reason: &str, times: usize, now: Instant) -> usize {
        (0..times).filter(|_| guard.judge(SETTINGS, route, reason, now) != Judgement::Retire).count()
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_share_dying_alike_is_held_after_the_first_hundred() {
        let runtime = Runtime::simulated(1, UnixMs(0));
        let (guard, now) = (Guard::default(), runtime.instant());
        assert_eq!(held(&guard, ROUTE, "400 BadDeviceToken", 100, now), 0, "too few to tell");
        assert_eq!(held(&guard, ROUTE, "400 BadDeviceToken", 50, now), 50);
        assert_eq!(held(&guard, RouteId(2), "400 BadDeviceToken", 100, now), 0, "another route");
        guard.lift(ROUTE, now + Duration::from_secs(60));
        assert_eq!(held(&guard, ROUTE, "400 BadDeviceToken", 500, now), 0, "confirmed");
        runtime.sleep(Duration::from_secs(61)).await;
        assert_eq!(held(&guard, ROUTE, "400 BadDeviceToken", 1, runtime.instant()), 1, "the confirmation is over");
        guard.forget(ROUTE);
        assert_eq!(held(&guard, ROUTE, "400 BadDeviceToken", 100, runtime.instant()), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn ordinary_losses_of_a_large_audience_are_no_fault() {
        let runtime = Runtime::simulated(1, UnixMs(0));
        let (guard, now) = (Guard::default(), runtime.instant());
        for _ in 0..1_000 {
            guard.answered(ROUTE, 3, now);
            assert_eq!(held(&guard, ROUTE, "410 Unregistered", 1, now), 0, "a quarter");
        }
        // Different reasons are not one fault.
        let guard = Guard::default();
        for _ in 0..200 {
            assert_eq!(held(&guard, ROUTE, "410 Unregistered", 1, now), 0);
            assert_eq!(held(&guard, ROUTE, "410 ExpiredToken", 1, now), 0);
            assert_eq!(held(&guard, ROUTE, "400 BadDeviceToken", 1, now), 0);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_share_is_that_of_ten_minutes() {
        let runtime = Runtime::simulated(1, UnixMs(0));
        let guard = Guard::default();
        guard.answered(ROUTE, 1_000_000, runtime.instant());
        assert_eq!(held(&guard, ROUTE, "410 Unregistered", 200, runtime.instant()), 0);
        runtime.sleep(Duration::from_secs(11 * 60)).await;
        assert_eq!(held(&guard, ROUTE, "410 Unregistered", 200, runtime.instant()), 100);
    }
}
