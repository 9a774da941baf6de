//! When each token may be sent to, as callers were told: written apart from the gates.

use std::collections::HashMap;

/// What the promise allows between the answer to a "no" and the last hand-over.
const GRACE_MS: i64 = 1_000;

/// Milliseconds since 1970.
type At = i64;

/// A push as the provider saw it.
#[derive(Clone, Debug)]
pub struct Push {
    pub token: String,
    /// The event's key.
    pub key: String,
    /// When it was handed over, at the latest.
    pub at: At,
}

#[derive(Default)]
pub struct Model {
    /// Token to (from, until) of times in which it may be sent to, ascending; open ones end at `At::MAX`.
    allowed: HashMap<String, Vec<(At, At)>>,
    /// Event's key to when its cancellation was answered.
    cancelled: HashMap<String, At>,
}

/// What came of all that was forbidden.
#[derive(Default, Debug)]
pub struct Judgement {
    /// Pushes later than the promise allows, with the milliseconds after the "no"; `None`: nothing ever allowed it.
    pub forbidden: Vec<(Push, Option<i64>)>,
    /// Of each "no" that was followed by a push, the milliseconds from its answer to the last one; ascending.
    pub lateness: Vec<i64>,
    pub nos: usize,
}

impl Model {
    /// From before the call: the server may act on a yes before it answers.
    pub fn allow(&mut self, token: &str, from: At) {
        let times = self.allowed.entry(token.to_owned()).or_default();
        if times.last().is_none_or(|(_, until)| *until != At::MAX) {
            times.push((from, At::MAX));
        }
    }

    /// From after the answer.
    pub fn forbid(&mut self, token: &str, until: At) {
        if let Some((_, open)) = self.allowed.get_mut(token).and_then(|times| times.last_mut()) {
            *open = (*open).min(until);
        }
    }

    pub fn cancel(&mut self, key: &str, at: At) {
        self.cancelled.insert(key.to_owned(), at);
    }

    /// Whether anybody decided about it.
    pub fn knows(&self, token: &str) -> bool {
        self.allowed.contains_key(token)
    }

    pub fn merge(&mut self, other: Self) {
        self.allowed.extend(other.allowed);
        self.cancelled.extend(other.cancelled);
    }

    /// As if every "no" had been answered so much earlier: to see the harness fail.
    pub fn shift(&mut self, ms: i64) {
        for (from, until) in self.allowed.values_mut().flatten().filter(|(_, until)| *until != At::MAX) {
            *until = (*until - ms).max(*from);
        }
    }

    pub fn judge(&self, pushes: &[Push]) -> Judgement {
        let mut judged = Judgement::default();
        // By token and the interval that was over; by cancelled event.
        let mut last: HashMap<(&str, usize), i64> = HashMap::new();
        let mut last_cancelled: HashMap<&str, i64> = HashMap::new();
        for push in pushes {
            if let Some(at) = self.cancelled.get(&push.key) {
                let late = push.at - at;
                if late > 0 {
                    let entry = last_cancelled.entry(&push.key).or_default();
                    *entry = late.max(*entry);
                }
                if late > GRACE_MS {
                    judged.forbidden.push((push.clone(), Some(late)));
                }
            }
            let times = self.allowed.get(&push.token).map_or(&[][..], |times| times);
            // The last interval that began before it.
            let began = times.partition_point(|(from, _)| *from <= push.at);
            let Some(number) = began.checked_sub(1) else {
                judged.forbidden.push((push.clone(), None));
                continue;
            };
            let late = push.at.saturating_sub(times[number].1);
            if late > 0 {
                let entry = last.entry((&push.token, number)).or_default();
                *entry = late.max(*entry);
            }
            if late > GRACE_MS {
                judged.forbidden.push((push.clone(), Some(late)));
            }
        }
        judged.nos =
            self.cancelled.len() + self.allowed.values().flatten().filter(|(_, until)| *until != At::MAX).count();
        judged.lateness = last.into_values().chain(last_cancelled.into_values()).collect();
        judged.lateness.sort_unstable();
        judged
    }
}

impl std::fmt::Display for Judgement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { forbidden, lateness, nos } = self;
        let at = |percent: usize| lateness.get((lateness.len() * percent / 100).min(lateness.len().max(1) - 1));
        let ms = |percent| at(percent).copied().unwrap_or(0);
        write!(
            f,
            "{nos} times \"no\", {} of them followed by a push: the last one after p50 {} ms, p99 {} ms, at most {} ms; \
             {} forbidden",
            lateness.len(),
            ms(50),
            ms(99),
            ms(100),
            forbidden.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(at: At) -> Push {
        Push { token: "token".to_owned(), key: "key".to_owned(), at }
    }

    #[test]
    fn a_second_is_allowed_and_no_more() {
        let mut model = Model::default();
        assert_eq!(model.judge(&[push(5)]).forbidden.len(), 1, "nobody said yes");
        model.allow("token", 10);
        model.forbid("token", 100);
        let judged = model.judge(&[push(50), push(100), push(900), push(1_100)]);
        assert_eq!((judged.forbidden.len(), judged.lateness), (0, vec![1_000]));
        assert_eq!(model.judge(&[push(1_101)]).forbidden.len(), 1);
        model.allow("token", 1_050);
        assert_eq!(model.judge(&[push(1_101)]).forbidden.len(), 0, "another yes");
        model.cancel("key", 0);
        assert_eq!(model.judge(&[push(1_101)]).forbidden.len(), 1, "but the event was cancelled");
    }

    #[test]
    fn earlier_answers_make_it_red() {
        let mut model = Model::default();
        model.allow("token", 0);
        model.forbid("token", 50_000);
        assert!(model.judge(&[push(40_000)]).forbidden.is_empty());
        model.shift(30_000);
        assert!(!model.judge(&[push(40_000)]).forbidden.is_empty());
    }
}
