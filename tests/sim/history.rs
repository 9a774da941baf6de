//! Histories: what callers, operators, phones and the weather do, drawn from a seed. A history is plain data, so that a red
//! one can be cut down and kept.

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use super::provider::Mood;

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct History {
    /// Of everything that is decided while it runs.
    pub seed: u64,
    pub setup: Setup,
    pub steps: Vec<Step>,
}

/// The process and its surroundings.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Setup {
    /// Streams our side uses of a connection.
    pub max_streams: u32,
    pub max_in_flight_targets: u32,
    pub page_people: u32,
    pub request_timeout_ms: u32,
    /// One poll in so many is put off; 0: none.
    pub reorder_one_in: u32,
    /// APNs by token, else by certificate.
    pub with_token: bool,
    pub mood: Mood,
    pub database: Database,
    /// Providers and database go on as they were after the last step, until every time to live has ended.
    pub stays_bad: bool,
    /// The event type [`ONCE`] is declared as one that drops what is in doubt.
    #[serde(default)]
    pub once: bool,
}

/// Of a hundred calls of the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Database {
    pub busy: u32,
    pub lost: u32,
    pub slow: u32,
    pub slowest_ms: u32,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Step {
    pub after_ms: u32,
    pub act: Act,
}

/// Users, tokens, topics and event types are numbers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Act {
    Register {
        user: u8,
        token: u8,
        is_sandbox: bool,
    },
    Unregister {
        user: u8,
        token: u8,
        by_id: bool,
    },
    OptIn {
        user: u8,
        event_type: Option<u8>,
        token: Option<u8>,
        yes: bool,
    },
    Subscribe {
        user: u8,
        topic: u8,
        active: bool,
    },
    Notify {
        tag: u32,
        event_type: u8,
        to: To,
        actor: Option<u8>,
        ttl_secs: u32,
        collapses: bool,
        is_keyed: bool,
    },
    /// The same again, with its idempotency key.
    Repeat {
        tag: u32,
    },
    Cancel {
        tag: u32,
    },
    /// The app is removed from the phone.
    Uninstall {
        token: u8,
    },
    Pause {
        event_type: Option<u8>,
    },
    Resume {
        event_type: Option<u8>,
    },
    Mood(Mood),
    Database(Database),
    Jump {
        by_ms: i32,
    },
    Crash {
        down_ms: u32,
    },
    Restart {
        down_ms: u32,
    },
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum To {
    Users(Vec<u8>),
    Topic(u8),
    Devices(Vec<u8>),
    Everyone,
}

/// The event type that [`Setup::once`] is about.
pub const ONCE: u8 = 1;

pub fn event_type_text(number: u8) -> String {
    format!("type{number}")
}

/// Even tokens are Apple's, odd ones Google's.
pub fn token_text(token: u8) -> String {
    if token.is_multiple_of(2) { format!("{token:064x}") } else { format!("device{token:03}:APA91bSimulated") }
}

pub fn is_apns(token: u8) -> bool {
    token.is_multiple_of(2)
}

impl History {
    /// The longest time to live in it, in ms.
    pub fn longest_ttl_ms(&self) -> i64 {
        let ttl = |step: &Step| match step.act {
            Act::Notify { ttl_secs, .. } => i64::from(ttl_secs) * 1_000,
            _ => 0,
        };
        self.steps.iter().map(ttl).max().unwrap_or_default()
    }

    /// By how much wall clocks are set back in all, in ms.
    pub fn set_back_ms(&self) -> i64 {
        let back = |step: &Step| match step.act {
            Act::Jump { by_ms } => i64::from(by_ms).min(0),
            _ => 0,
        };
        -self.steps.iter().map(back).sum::<i64>()
    }

    /// Nothing ever disturbs it.
    pub fn has_calm_database(&self) -> bool {
        let is_disturbed =
            |step: &Step| matches!(&step.act, Act::Database(database) if *database != Database::default());
        self.setup.database == Database::default() && !self.steps.iter().any(is_disturbed)
    }

    pub fn drawn(seed: u64) -> Self {
        let mut draw = Draw { seed, rng: SmallRng::seed_from_u64(seed), tags: 0 };
        let (users, tokens) = (draw.rng.random_range(1..=5), draw.rng.random_range(1..=8));
        let setup = draw.setup();
        let mut steps = Vec::new();
        for token in 0..tokens {
            let user = draw.rng.random_range(0..users);
            steps.push(draw.step(200, Act::Register { user, token, is_sandbox: false }));
        }
        for user in 0..users {
            if draw.rng.random_bool(0.9) {
                steps.push(draw.step(200, Act::OptIn { user, event_type: None, token: None, yes: true }));
            }
            if draw.rng.random_bool(0.4) {
                steps.push(draw.step(200, Act::Subscribe { user, topic: 0, active: true }));
            }
        }
        let longest = *[50, 400, 2_000, 10_000].choose(&mut draw.rng).expect("some");
        for _ in 0..draw.rng.random_range(3..24) {
            let act = draw.act(users, tokens);
            steps.push(draw.step(longest, act));
        }
        Self { seed, setup, steps }
    }
}

struct Draw {
    seed: u64,
    rng: SmallRng,
    tags: u32,
}

impl Draw {
    fn step(&mut self, longest_ms: u32, act: Act) -> Step {
        // Often at once: that is where things meet.
        let after_ms = if self.rng.random_bool(0.3) { 0 } else { self.rng.random_range(0..=longest_ms) };
        Step { after_ms, act }
    }

    fn setup(&mut self) -> Setup {
        let (mood, database) = (self.mood(), self.database());
        let rng = &mut self.rng;
        Setup {
            max_streams: *[1, 2, 100].choose(rng).expect("some"),
            max_in_flight_targets: *[4, 16, 1_000].choose(rng).expect("some"),
            page_people: *[1, 2, 100].choose(rng).expect("some"),
            request_timeout_ms: *[3_000, 15_000].choose(rng).expect("some"),
            reorder_one_in: *[0, 2, 8].choose(rng).expect("some"),
            with_token: rng.random_bool(0.5),
            mood,
            database,
            stays_bad: rng.random_bool(0.1),
            // Of another source, so that the seeds of before play what they played.
            once: SmallRng::seed_from_u64(self.seed ^ 0x94d0_49bb_1331_11eb).random_bool(0.4),
        }
    }

    fn mood(&mut self) -> Mood {
        let rng = &mut self.rng;
        Mood {
            faults: *[0, 0, 10, 30, 60].choose(rng).expect("some"),
            broken_connections: *[0, 0, 20, 50].choose(rng).expect("some"),
            slowest_ms: *[5, 100, 1_000, 4_000].choose(rng).expect("some"),
            streams: *[1, 4, 100].choose(rng).expect("some"),
            refused_tokens: *[0, 0, 30].choose(rng).expect("some"),
        }
    }

    fn database(&mut self) -> Database {
        let rng = &mut self.rng;
        if rng.random_bool(0.4) {
            return Database::default();
        }
        Database {
            busy: *[0, 0, 3, 20].choose(rng).expect("some"),
            lost: *[0, 0, 5, 20].choose(rng).expect("some"),
            slow: *[0, 20, 100].choose(rng).expect("some"),
            slowest_ms: *[2, 30, 300].choose(rng).expect("some"),
        }
    }

    fn act(&mut self, users: u8, tokens: u8) -> Act {
        let rng = &mut self.rng;
        let user = rng.random_range(0..users);
        let token = rng.random_range(0..tokens);
        let event_type = rng.random_range(0..2u8);
        match rng.random_range(0..100u32) {
            0..36 => self.notify(users, tokens),
            36..48 => {
                let event_type = rng.random_bool(0.4).then_some(event_type);
                let token = rng.random_bool(0.25).then_some(token);
                Act::OptIn { user, event_type, token, yes: rng.random_bool(0.4) }
            }
            48..56 => Act::Register { user, token, is_sandbox: rng.random_bool(0.15) },
            56..61 => Act::Unregister { user, token, by_id: rng.random_bool(0.5) },
            61..65 => Act::Subscribe { user, topic: rng.random_range(0..2), active: rng.random_bool(0.6) },
            65..70 => Act::Uninstall { token },
            70..76 => Act::Cancel { tag: rng.random_range(0..=self.tags) },
            76..79 => Act::Repeat { tag: rng.random_range(0..=self.tags) },
            79..83 => Act::Mood(self.mood()),
            83..87 => Act::Database(self.database()),
            87..89 => Act::Pause { event_type: rng.random_bool(0.5).then_some(event_type) },
            89..91 => Act::Resume { event_type: rng.random_bool(0.5).then_some(event_type) },
            91..93 => Act::Jump { by_ms: rng.random_range(-60_000..120_000) },
            93..98 => Act::Crash { down_ms: rng.random_range(0..5_000) },
            _ => Act::Restart { down_ms: rng.random_range(0..2_000) },
        }
    }

    fn notify(&mut self, users: u8, tokens: u8) -> Act {
        self.tags += 1;
        let tag = self.tags;
        let rng = &mut self.rng;
        let to = match rng.random_range(0..10u32) {
            0..6 => To::Users((0..users).filter(|_| rng.random_bool(0.6)).chain([0]).collect()),
            6 | 7 => To::Topic(rng.random_range(0..2)),
            8 => To::Everyone,
            _ => To::Devices((0..tokens).filter(|_| rng.random_bool(0.4)).collect()),
        };
        Act::Notify {
            tag,
            event_type: rng.random_range(0..2),
            to,
            actor: rng.random_bool(0.2).then(|| rng.random_range(0..users)),
            ttl_secs: *[5, 30, 60, 120].choose(rng).expect("some"),
            collapses: rng.random_bool(0.2),
            is_keyed: rng.random_bool(0.5),
        }
    }
}
