//! Histories of a cluster: what callers ask of which replica, and what breaks, drawn from a seed. Plain data.

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::wire::Quality;
use crate::provider::Mood;

#[derive(Clone, Debug)]
pub struct Story {
    /// Of everything that is decided while it runs.
    pub seed: u64,
    pub setup: Setup,
    pub steps: Vec<Step>,
}

/// The cluster and its surroundings.
#[derive(Clone, Debug)]
pub struct Setup {
    /// By how much each replica's wall clock is ahead; as many as there are replicas.
    pub clocks_ms: Vec<i64>,
    pub max_streams: u32,
    pub page_people: u32,
    pub request_timeout_ms: u32,
    pub quality: Quality,
    pub mood: Mood,
}

#[derive(Clone, Debug)]
pub struct Step {
    pub after_ms: u32,
    pub act: Act,
}

/// Users, tokens, topics, event types and replicas are numbers.
#[derive(Clone, Debug)]
pub enum Act {
    /// Asked of this replica first.
    Call(u8, Call),
    /// The app is removed from the phone.
    Uninstall {
        token: u8,
    },
    Mood(Mood),
    Quality {
        replica: u8,
        quality: Quality,
    },
    CutStore {
        replica: u8,
        for_ms: u32,
    },
    /// What it asks of the store arrives, and no answer comes back.
    DeafToStore {
        replica: u8,
        for_ms: u32,
    },
    CutProviders {
        replica: u8,
        for_ms: u32,
    },
    CutCallers {
        replica: u8,
        for_ms: u32,
    },
    /// The store does not answer anybody.
    StoreDown {
        for_ms: u32,
    },
    Crash {
        replica: u8,
        down_ms: u32,
    },
    Restart {
        replica: u8,
        down_ms: u32,
    },
}

#[derive(Clone, Debug)]
pub enum Call {
    Register { user: u8, token: u8 },
    Unregister { token: u8 },
    OptIn { user: u8, event_type: Option<u8>, yes: bool },
    Subscribe { user: u8, topic: u8, active: bool },
    Notify { tag: u32, event_type: u8, to: To, actor: Option<u8>, ttl_secs: u32, is_keyed: bool },
    Cancel { tag: u32 },
}

#[derive(Clone, Debug)]
pub enum To {
    Users(Vec<u8>),
    Topic(u8),
    Everyone,
}

impl Story {
    /// The longest time to live in it, in ms.
    pub fn longest_ttl_ms(&self) -> i64 {
        let ttl = |step: &Step| match step.act {
            Act::Call(_, Call::Notify { ttl_secs, .. }) => i64::from(ttl_secs) * 1_000,
            _ => 0,
        };
        self.steps.iter().map(ttl).max().unwrap_or_default()
    }

    /// How far two replicas' clocks are apart at most, in ms.
    pub fn clocks_apart_ms(&self) -> i64 {
        let clocks = &self.setup.clocks_ms;
        clocks.iter().max().unwrap_or(&0) - clocks.iter().min().unwrap_or(&0)
    }

    /// A replica is cut off from the store with a queue of pushes before a slow provider, and the "no" is said to the other.
    pub fn canary() -> Self {
        let mood = Mood { slowest_ms: 2_500, streams: 1, ..Mood::CALM };
        let setup = Setup {
            clocks_ms: vec![0, 0],
            max_streams: 1,
            page_people: 100,
            request_timeout_ms: 10_000,
            quality: Quality::default(),
            mood,
        };
        let at = |after_ms, act| Step { after_ms, act };
        let yes = |yes| Call::OptIn { user: 0, event_type: None, yes };
        // Even tokens: one platform, one connection, one stream.
        let mut steps: Vec<Step> =
            (0..12).map(|number| at(20, Act::Call(0, Call::Register { user: 0, token: 2 * number }))).collect();
        let to = To::Users(vec![0]);
        let event = Call::Notify { tag: 1, event_type: 0, to, actor: None, ttl_secs: 60, is_keyed: true };
        steps.extend([
            at(100, Act::Call(0, yes(true))),
            at(500, Act::Call(0, event)),
            at(1_000, Act::CutStore { replica: 0, for_ms: 15_000 }),
            at(100, Act::Call(1, yes(false))),
            // Only then does the provider become quick.
            at(12_000, Act::Quality { replica: 1, quality: Quality::default() }),
        ]);
        Self { seed: 1, setup, steps }
    }

    pub fn drawn(seed: u64) -> Self {
        let mut draw = Draw { rng: SmallRng::seed_from_u64(seed), replicas: 0, tags: 0 };
        draw.replicas = draw.rng.random_range(2..=4);
        let (users, tokens) = (draw.rng.random_range(1..=5), draw.rng.random_range(1..=8));
        let setup = draw.setup();
        let mut steps = Vec::new();
        for token in 0..tokens {
            let user = draw.rng.random_range(0..users);
            steps.push(draw.step(100, |draw| draw.call(Call::Register { user, token })));
        }
        for user in 0..users {
            if draw.rng.random_bool(0.9) {
                steps.push(draw.step(100, |draw| draw.call(Call::OptIn { user, event_type: None, yes: true })));
            }
            if draw.rng.random_bool(0.4) {
                steps.push(draw.step(100, |draw| draw.call(Call::Subscribe { user, topic: 0, active: true })));
            }
        }
        let longest = *[50, 400, 2_000, 5_000].choose(&mut draw.rng).expect("some");
        for _ in 0..draw.rng.random_range(4..24) {
            steps.push(draw.step(longest, |draw| draw.act(users, tokens)));
        }
        Self { seed, setup, steps }
    }
}

struct Draw {
    rng: SmallRng,
    replicas: u8,
    tags: u32,
}

impl Draw {
    fn step(&mut self, longest_ms: u32, act: impl FnOnce(&mut Self) -> Act) -> Step {
        // Often at once: that is where things meet.
        let after_ms = if self.rng.random_bool(0.3) { 0 } else { self.rng.random_range(0..=longest_ms) };
        Step { after_ms, act: act(self) }
    }

    fn replica(&mut self) -> u8 {
        self.rng.random_range(0..self.replicas)
    }

    fn call(&mut self, call: Call) -> Act {
        Act::Call(self.replica(), call)
    }

    fn setup(&mut self) -> Setup {
        let (mood, quality) = (self.mood(), self.quality());
        let rng = &mut self.rng;
        let apart = *[0, 0, 300, 4_000].choose(rng).expect("some");
        Setup {
            clocks_ms: (0..self.replicas).map(|_| rng.random_range(-apart..=apart)).collect(),
            max_streams: *[1, 2, 100].choose(rng).expect("some"),
            page_people: *[1, 2, 100].choose(rng).expect("some"),
            request_timeout_ms: *[3_000, 10_000].choose(rng).expect("some"),
            quality,
            mood,
        }
    }

    fn mood(&mut self) -> Mood {
        let rng = &mut self.rng;
        Mood {
            faults: *[0, 0, 0, 10, 40].choose(rng).expect("some"),
            broken_connections: *[0, 0, 0, 30].choose(rng).expect("some"),
            slowest_ms: *[5, 100, 1_000, 2_500].choose(rng).expect("some"),
            streams: *[1, 4, 100].choose(rng).expect("some"),
            refused_tokens: *[0, 0, 0, 30].choose(rng).expect("some"),
        }
    }

    fn quality(&mut self) -> Quality {
        let rng = &mut self.rng;
        Quality {
            lost: *[0, 0, 0, 3, 20].choose(rng).expect("some"),
            slowest_ms: *[0, 2, 20, 150].choose(rng).expect("some"),
        }
    }

    fn for_ms(&mut self) -> u32 {
        *[300, 1_000, 2_500, 6_000, 15_000].choose(&mut self.rng).expect("some")
    }

    fn act(&mut self, users: u8, tokens: u8) -> Act {
        let (replica, for_ms) = (self.replica(), self.for_ms());
        let rng = &mut self.rng;
        let user = rng.random_range(0..users);
        let token = rng.random_range(0..tokens);
        match rng.random_range(0..100u32) {
            0..40 => {
                let call = self.notify(users);
                self.call(call)
            }
            40..53 => {
                let event_type = rng.random_bool(0.3).then_some(rng.random_range(0..2u8));
                let yes = rng.random_bool(0.4);
                self.call(Call::OptIn { user, event_type, yes })
            }
            53..59 => self.call(Call::Register { user, token }),
            59..63 => self.call(Call::Unregister { token }),
            63..66 => {
                let (topic, active) = (rng.random_range(0..2), rng.random_bool(0.6));
                self.call(Call::Subscribe { user, topic, active })
            }
            66..71 => {
                let tag = rng.random_range(0..=self.tags);
                self.call(Call::Cancel { tag })
            }
            71..73 => Act::Uninstall { token },
            73..76 => Act::Mood(self.mood()),
            76..79 => Act::Quality { replica, quality: self.quality() },
            79..82 => Act::CutStore { replica, for_ms },
            82..85 => Act::DeafToStore { replica, for_ms },
            85..88 => Act::CutProviders { replica, for_ms },
            88..91 => Act::CutCallers { replica, for_ms },
            91..94 => Act::StoreDown { for_ms: for_ms.min(6_000) },
            94..98 => Act::Crash { replica, down_ms: rng.random_range(0..12_000) },
            _ => Act::Restart { replica, down_ms: rng.random_range(0..1_000) },
        }
    }

    fn notify(&mut self, users: u8) -> Call {
        self.tags += 1;
        let tag = self.tags;
        let rng = &mut self.rng;
        let to = match rng.random_range(0..10u32) {
            0..6 => To::Users((0..users).filter(|_| rng.random_bool(0.6)).chain([0]).collect()),
            6 | 7 => To::Topic(rng.random_range(0..2)),
            _ => To::Everyone,
        };
        Call::Notify {
            tag,
            event_type: rng.random_range(0..2),
            to,
            actor: rng.random_bool(0.2).then(|| rng.random_range(0..users)),
            ttl_secs: *[10, 30, 60].choose(rng).expect("some"),
            is_keyed: rng.random_bool(0.7),
        }
    }
}
