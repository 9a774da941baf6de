//! The deny feed: the one-second "no".
//!
//! A delivery is gated by query when its job is claimed; between then and the moment it is handed to a provider
//! connection a person may say no. Every "no" is published here *before* its call is answered, and every hand-over asks
//! here whether one arrived since its gate. A hit is not a verdict: the delivery goes back to the gate, which asks the
//! database. So an entry may be too broad (a whole user) but must never be missing.
//!
//! Order matters: a reader takes [`DenyFeed::position`] *before* it queries; the writer publishes *after* its COMMIT
//! and before it answers. Whatever the query missed then has a higher position.
//!
//! With one process that is all. Where several share a database, the others' "no"s arrive by polling, so the feed is only
//! as good as the last poll that succeeded: a feed made by [`DenyFeed::shared`] counts as complete for
//! [`DenyFeed::PROOF_GOOD_FOR`] after the start of that poll, and nothing is handed over while it is not.
//!
//! Memory: one entry per user, device or notification that said no within [`DenyFeed::KEPT`].

use std::collections::{HashMap, VecDeque};
use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::ids::{DeviceId, NotificationId, UserKey};
use crate::planted;

/// Who or what must not be sent to any more.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DenyKey {
    User(UserKey),
    Device(DeviceId),
    Notification(NotificationId),
}

/// How much of the feed a gate's query has surely seen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct DenyPosition(pub u64);

#[derive(Default)]
struct Entries {
    latest: HashMap<DenyKey, u64>,
    order: VecDeque<(Instant, u64, DenyKey)>,
}

#[derive(Default)]
pub struct DenyFeed {
    position: AtomicU64,
    /// The position of the last [`DenyFeed::recall`].
    recalled: AtomicU64,
    entries: RwLock<Entries>,
    /// `None`: every "no" passes through this process, so nothing can be missing.
    proof: Option<Proof>,
}

/// Until when a shared feed was complete: nanoseconds after `origin`.
struct Proof {
    origin: Instant,
    proven: AtomicU64,
}

impl DenyFeed {
    /// How long an entry is kept.
    pub const KEPT: Duration = Duration::from_secs(60);
    /// A gate older than this is asked again at hand-over; shorter than [`DenyFeed::KEPT`] by a safe margin.
    pub const GATE_GOOD_FOR: Duration = Duration::from_secs(50);

    /// How long after it began a successful poll proves a shared feed complete.
    pub const PROOF_GOOD_FOR: Duration = Duration::from_millis(600);

    /// A feed that others write to as well: incomplete until [`DenyFeed::prove`].
    #[must_use]
    pub fn shared(now: Instant) -> Self {
        let origin = now.checked_sub(2 * Self::PROOF_GOOD_FOR).unwrap_or(now);
        Self { proof: Some(Proof { origin, proven: AtomicU64::new(0) }), ..Self::default() }
    }

    /// Every "no" that was answered before `at` (the monotonic clock) is in the feed.
    pub fn prove(&self, at: Instant) {
        if let Some(proof) = &self.proof {
            let nanos = at.saturating_duration_since(proof.origin).as_nanos();
            proof.proven.fetch_max(u64::try_from(nanos).unwrap_or(u64::MAX), Ordering::AcqRel);
        }
    }

    /// Whether a hand-over may rely on the feed.
    #[must_use]
    pub fn is_complete(&self, now: Instant) -> bool {
        self.proof.as_ref().is_none_or(|proof| {
            let proven = Duration::from_nanos(proof.proven.load(Ordering::Acquire));
            now.saturating_duration_since(proof.origin) <= proven + Self::PROOF_GOOD_FOR
                || planted::is("cut-off-feed-trusted")
        })
    }

    /// Takes effect before it returns. `now` is the monotonic clock.
    pub fn publish(&self, keys: &[DenyKey], now: Instant) {
        if keys.is_empty() {
            return;
        }
        let mut entries = self.entries.write().expect("no panic while held");
        while let Some((at, position, key)) = entries.order.front().copied() {
            if now.saturating_duration_since(at) < Self::KEPT && !planted::is("no-forgotten-at-once") {
                break;
            }
            entries.order.pop_front();
            if entries.latest.get(&key) == Some(&position) {
                entries.latest.remove(&key);
            }
        }
        // The position becomes visible only with the lock still held, after its entries.
        let position = self.position.load(Ordering::Relaxed) + 1;
        for key in keys {
            entries.latest.insert(*key, position);
            entries.order.push_back((now, position, *key));
        }
        self.position.store(position, Ordering::Release);
    }

    /// Everything that was gated before must pass its gate again before it is handed over: for a pause, or rules that
    /// changed.
    pub fn recall(&self) {
        let _entries = self.entries.write().expect("no panic while held");
        let position = self.position.load(Ordering::Relaxed) + 1;
        self.recalled.store(position, Ordering::Relaxed);
        self.position.store(position, Ordering::Release);
    }

    /// To be read before the gate's query.
    pub fn position(&self) -> DenyPosition {
        DenyPosition(self.position.load(Ordering::Acquire))
    }

    /// What was published after `seen`, as far as it is kept, and how far that leads: for whoever passes it on.
    pub fn since(&self, seen: DenyPosition) -> (Vec<DenyKey>, DenyPosition) {
        let entries = self.entries.read().expect("no panic while held");
        let later = entries.order.iter().rev().take_while(|(_, position, _)| *position > seen.0);
        let mut keys: Vec<DenyKey> = later.map(|(_, _, key)| *key).collect();
        keys.reverse();
        (keys, DenyPosition(self.position.load(Ordering::Relaxed)))
    }

    /// Whether a "no" that touches this delivery arrived after `gated`.
    pub fn hit(&self, gated: DenyPosition, user: UserKey, device: DeviceId, notification: NotificationId) -> bool {
        if self.position.load(Ordering::Acquire) == gated.0 {
            return false;
        }
        if self.recalled.load(Ordering::Relaxed) > gated.0 && !planted::is("recall-ignored") {
            return true;
        }
        let entries = self.entries.read().expect("no panic while held");
        [DenyKey::User(user), DenyKey::Device(device), DenyKey::Notification(notification)]
            .iter()
            .any(|key| entries.latest.get(key).is_some_and(|at| *at > gated.0))
    }

    /// Entries held, for the metric.
    pub fn len(&self) -> usize {
        self.entries.read().expect("no panic while held").latest.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "any instant will do as the origin")]
    fn only_a_later_no_hits_and_old_ones_are_forgotten() {
        let feed = DenyFeed::default();
        let start = Instant::now();
        let before = feed.position();
        feed.publish(&[DenyKey::User(UserKey(1))], start);
        assert!(feed.hit(before, UserKey(1), DeviceId(9), NotificationId(5)));
        assert!(!feed.hit(before, UserKey(2), DeviceId(9), NotificationId(5)));
        let after = feed.position();
        assert!(!feed.hit(after, UserKey(1), DeviceId(9), NotificationId(5)));
        feed.publish(&[DenyKey::Device(DeviceId(9))], start + DenyFeed::KEPT);
        assert_eq!(feed.len(), 1, "the first entry's minute is over");
        feed.publish(&[DenyKey::Notification(NotificationId(5))], start + DenyFeed::KEPT);
        assert!(feed.hit(after, UserKey(3), DeviceId(9), NotificationId(6)), "the second's is not");
        assert!(feed.hit(after, UserKey(3), DeviceId(3), NotificationId(5)));
    }

    #[test]
    fn a_recall_hits_everything_that_was_gated_before() {
        let feed = DenyFeed::default();
        let before = feed.position();
        feed.recall();
        let hit = |gated| feed.hit(gated, UserKey(1), DeviceId(2), NotificationId(3));
        assert!(hit(before));
        assert!(!hit(feed.position()));
        assert!(feed.is_empty());
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "any instant will do as the origin")]
    fn a_shared_feed_is_complete_only_as_long_as_it_was_proven() {
        let start = Instant::now() + Duration::from_secs(60);
        assert!(DenyFeed::default().is_complete(start), "one process needs no proof");
        let feed = DenyFeed::shared(start);
        assert!(!feed.is_complete(start));
        feed.prove(start);
        assert!(feed.is_complete(start + DenyFeed::PROOF_GOOD_FOR));
        assert!(!feed.is_complete(start + DenyFeed::PROOF_GOOD_FOR + Duration::from_millis(1)));
        feed.prove(start.checked_sub(Duration::from_secs(1)).expect("the clock began earlier"));
        assert!(feed.is_complete(start + DenyFeed::PROOF_GOOD_FOR), "a late answer takes nothing back");
    }
}
