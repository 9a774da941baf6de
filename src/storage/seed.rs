//! A large installation for measurements: who is in it, and in what order the rows lie.
//!
//! Rows are as the API would have made them, spread over a year, and in no relation to each other: neighbours in one
//! table are strangers in the next, which is what a database looks like after a year of installs and rotated tokens.
//! Each store has a writer of its own.

use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;

use crate::domain::ids::{AppKey, EPOCH_MS, RouteId, UserId};
use crate::domain::platform::{DeviceToken, Platform};
use crate::domain::time::UnixMs;

/// Everything was made within so long before `now`.
const YEAR_MS: i64 = 365 * 24 * 3600 * 1000;
/// Below the bits of a sequence and a node: see [`crate::domain::ids`].
const ID_SHIFT: u32 = 22;
const DEVICE_SHIFT: u32 = 18;

/// One person with one device.
pub struct SeedPerson {
    pub user: UserId,
    pub platform: Platform,
    pub token: DeviceToken,
    pub opted_in: bool,
}

/// A topic and who has it, by number.
pub struct SeedTopic<'a> {
    pub name: &'a str,
    pub has: &'a (dyn Fn(u32) -> bool + Sync),
}

/// What is to be there.
pub struct Seed<'a> {
    pub app: AppKey,
    /// By platform.
    pub apns: RouteId,
    pub fcm: RouteId,
    pub topics: &'a [SeedTopic<'a>],
    /// At most 2^32.
    pub people: u32,
    /// Who is who, by number from 0.
    pub person: &'a (dyn Fn(u32) -> SeedPerson + Sync),
}

impl Seed<'_> {
    pub(super) fn route(&self, platform: Platform) -> RouteId {
        match platform {
            Platform::Apns => self.apns,
            Platform::Fcm => self.fcm,
        }
    }
}

/// A row's place in the order of making: whose it is, their key, and when it was made.
#[derive(Clone, Copy)]
pub(super) struct Made {
    pub person: u32,
    pub user_key: i64,
    /// Milliseconds since [`EPOCH_MS`], the time in ids.
    since_epoch: i64,
}

impl Made {
    pub fn at(self) -> i64 {
        self.since_epoch + EPOCH_MS
    }

    pub fn device(self) -> i64 {
        self.since_epoch << DEVICE_SHIFT
    }

    /// The id of a row that was made then.
    pub fn row(self) -> i64 {
        self.since_epoch << ID_SHIFT
    }
}

/// Two orders in no relation: of people, and of devices.
pub(super) struct Scattered {
    people: Vec<u32>,
    devices: Vec<u32>,
    /// By person.
    keys: Vec<i64>,
    began: i64,
    step: i64,
}

impl Scattered {
    pub fn new(count: u32, now: UnixMs) -> Self {
        let mut people: Vec<u32> = (0..count).collect();
        let mut rng = SmallRng::seed_from_u64(1);
        let step = (YEAR_MS / i64::from(count).max(1)).max(1);
        let began = now.0 - EPOCH_MS - YEAR_MS;
        people.shuffle(&mut rng);
        let mut devices = people.clone();
        devices.shuffle(&mut rng);
        let mut keys = vec![0; people.len()];
        for (place, person) in (0_i64..).zip(&people) {
            keys[*person as usize] = (began + place * step) << ID_SHIFT;
        }
        Self { people, devices, keys, began, step }
    }

    /// Gives people the keys that a store makes for them, but for those whom another has the same of.
    pub fn rekey(&mut self, key: impl Fn(u32) -> i64) {
        let mut wanted: Vec<(i64, u32)> = self.people.iter().map(|person| (key(*person), *person)).collect();
        wanted.sort_unstable();
        wanted.dedup_by_key(|(key, _)| *key);
        for (key, person) in wanted {
            self.keys[person as usize] = key;
        }
    }

    /// The id of the `at`-th topic.
    pub fn topic(&self, at: usize) -> i64 {
        (self.began << ID_SHIFT) + 1 + i64::try_from(at).unwrap_or(0)
    }

    pub fn people(&self) -> impl Iterator<Item = Made> + '_ {
        self.made(&self.people)
    }

    pub fn devices(&self) -> impl Iterator<Item = Made> + '_ {
        self.made(&self.devices)
    }

    fn made<'a>(&'a self, order: &'a [u32]) -> impl Iterator<Item = Made> + 'a {
        (0_i64..).zip(order).map(|(place, person)| Made {
            person: *person,
            user_key: self.keys[*person as usize],
            since_epoch: self.began + place * self.step,
        })
    }
}
