//! Counts instead of a record, for measurements: a million pushes in some 40 MB.
//!
//! What it proves: `distinct` identities were accepted, `repeated` of them came again, and `token_sum` (order does not
//! matter) is that of the tokens that should have been reached. A push whose payload (APNs) or data (FCM) holds
//! [`SENT_AT_KEY`], microseconds since 1970 by this machine's clock, also counts in a histogram of its age.

use std::collections::HashSet;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Mutex, MutexGuard};

use serde::Serialize;
use uuid::Uuid;

use super::record::Received;

/// The custom key that says when a push was asked for.
pub(super) const SENT_AT_KEY: &str = "sandbox_sent_us";

/// Identities remembered; beyond, `distinct` stands still and `overflowed` says so.
const MAX_IDENTITIES: usize = 20_000_000;

/// Buckets per doubling: a percentile is at most 3 % off.
const STEPS: usize = 32;

#[derive(Default)]
pub(super) struct Tally(Mutex<Counts>);

#[derive(Default)]
struct Counts {
    seen: HashSet<u128, BuildHasherDefault<Folded>>,
    repeated: u64,
    overflowed: bool,
    apns: u64,
    fcm: u64,
    refused: u64,
    token_sum: u64,
    first_us: Option<i64>,
    last_us: Option<i64>,
    ages: Histogram,
}

/// What `/stats` shows.
#[derive(Serialize)]
pub(super) struct Summary {
    distinct: u64,
    repeated: u64,
    overflowed: bool,
    apns: u64,
    fcm: u64,
    refused: u64,
    /// Decimal, for JSON's numbers are not exact beyond 2^53.
    token_sum: String,
    first_us: Option<i64>,
    last_us: Option<i64>,
    ages: Percentiles,
}

#[derive(Serialize)]
struct Percentiles {
    count: u64,
    p50_us: u64,
    p99_us: u64,
    p999_us: u64,
    max_us: u64,
}

impl Tally {
    pub(super) fn count(&self, received: &Received) {
        let identity = received.nudged_id.as_deref().and_then(|id| Uuid::try_parse(id).ok());
        let hash = token_hash(&received.token);
        let mut counts = self.counts();
        let counts = &mut *counts;
        if !received.accepted {
            counts.refused += 1;
            return;
        }
        match received.platform {
            super::Platform::Apns => counts.apns += 1,
            super::Platform::Fcm => counts.fcm += 1,
        }
        counts.first_us.get_or_insert(received.at_us);
        counts.last_us = Some(received.at_us);
        if let Some(sent) = received.sent_us {
            counts.ages.add(u64::try_from(received.at_us - sent).unwrap_or(0));
        }
        match identity {
            Some(_) if counts.seen.len() >= MAX_IDENTITIES => counts.overflowed = true,
            Some(identity) if !counts.seen.insert(identity.as_u128()) => counts.repeated += 1,
            Some(_) | None => counts.token_sum = counts.token_sum.wrapping_add(hash),
        }
    }

    pub(super) fn clear(&self) {
        let old = std::mem::take(&mut *self.counts());
        drop(old);
    }

    pub(super) fn summary(&self) -> Summary {
        let counts = self.counts();
        Summary {
            distinct: counts.seen.len() as u64,
            repeated: counts.repeated,
            overflowed: counts.overflowed,
            apns: counts.apns,
            fcm: counts.fcm,
            refused: counts.refused,
            token_sum: counts.token_sum.to_string(),
            first_us: counts.first_us,
            last_us: counts.last_us,
            ages: counts.ages.percentiles(),
        }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().expect("no panic while held")
    }
}

/// FNV-1a: sums of it tell sets of tokens apart, and anybody can compute it.
#[must_use]
pub fn token_hash(token: &str) -> u64 {
    token.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Identities are random already: folding them is hash enough.
#[derive(Default)]
struct Folded(u64);

impl Hasher for Folded {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "the two halves are what is wanted")]
    fn write_u128(&mut self, value: u128) {
        let [high, low] = [(value >> 64) as u64, value as u64];
        self.0 = (high ^ low.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// Exact below [`STEPS`], then [`STEPS`] buckets for each doubling.
#[derive(Default)]
struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    max: u64,
}

impl Histogram {
    fn add(&mut self, value: u64) {
        let bucket = Self::bucket(value);
        if self.buckets.len() <= bucket {
            self.buckets.resize(bucket + 1, 0);
        }
        self.buckets[bucket] += 1;
        self.count += 1;
        self.max = self.max.max(value);
    }

    fn bucket(value: u64) -> usize {
        let doublings = (value / STEPS as u64).checked_ilog2().map_or(0, |log| log as usize + 1);
        let shift = doublings.saturating_sub(1);
        doublings * STEPS + usize::try_from(value >> shift).unwrap_or(usize::MAX) % STEPS
    }

    /// The largest value of a bucket.
    fn top(bucket: usize) -> u64 {
        let (doublings, step) = (bucket / STEPS, bucket % STEPS);
        match doublings.checked_sub(1) {
            None => step as u64,
            Some(shift) => (((STEPS + step + 1) as u64) << shift) - 1,
        }
    }

    fn percentiles(&self) -> Percentiles {
        let at = |per_mille: u64| {
            let rank = (self.count * per_mille).div_ceil(1000).max(1);
            let mut below = 0;
            for (bucket, count) in self.buckets.iter().enumerate() {
                below += count;
                if below >= rank {
                    return Self::top(bucket).min(self.max);
                }
            }
            self.max
        };
        Percentiles { count: self.count, p50_us: at(500), p99_us: at(990), p999_us: at(999), max_us: self.max }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::time::UnixMs;
    use crate::sandbox::Platform;

    #[test]
    fn percentiles_are_close() {
        let mut histogram = Histogram::default();
        for value in 0..100_000_u64 {
            histogram.add(value);
            let top = Histogram::top(Histogram::bucket(value));
            assert!(top >= value && top <= value + value / 32 + 1, "{value} is in a bucket up to {top}");
        }
        let found = histogram.percentiles();
        assert!((49_999..=51_600).contains(&found.p50_us), "{}", found.p50_us);
        assert!((98_990..=99_999).contains(&found.p99_us), "{}", found.p99_us);
        assert_eq!((found.count, found.max_us), (100_000, 99_999));
    }

    #[test]
    fn a_repeat_is_told_from_a_push_of_its_own() {
        let tally = Tally::default();
        let push = |token: &str, id: u128| {
            let mut received = Received::new(Platform::Apns, UnixMs(1), 1, 1);
            received.token = token.to_owned();
            received.nudged_id = Some(Uuid::from_u128(id).to_string());
            tally.count(&received);
        };
        push("aa", 1);
        push("bb", 2);
        push("aa", 1);
        let summary = tally.summary();
        assert_eq!((summary.distinct, summary.repeated), (2, 1));
        assert_eq!(summary.token_sum, token_hash("bb").wrapping_add(token_hash("aa")).to_string());
        tally.clear();
        assert_eq!(tally.summary().distinct, 0);
    }
}
