//! Runs one history, life after life, and hands back what was seen.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use nudged::domain::outcome::State;
use nudged::domain::time::UnixMs;
use nudged::runtime::Runtime;
use nudged::service::Call;
use nudged::service::notifications::ListDeliveries;
use nudged::storage::Queue;

use super::callers::{Callers, Line};
use super::checker::{self, Bounds, Violation};
use super::clock::{Clock, START_MS, millis};
use super::database::{Database, Place, Weather};
use super::facts::{Fact, Facts, Ms};
use super::history::{self, Act, History, Step, token_text};
use super::lies::Lie;
use super::life::{FLOOR, Life};
use super::provider::{Mood, Provider};

/// Beyond the longest time to live: what is left by then is stuck.
const REST_MS: Ms = 180_000;
/// The longest that a call waits for its answer.
const CALL_MS: Ms = 60_000;
/// How often it is looked whether anything is open.
const LOOK: Duration = Duration::from_millis(500);
/// A supervisor's.
const START_AGAIN: Duration = Duration::from_secs(1);
const MAX_STARTS: u32 = 200;

/// What a history came to.
pub struct Outcome {
    pub facts: Vec<Fact>,
    pub violations: Vec<Violation>,
}

impl Outcome {
    /// The same for the same history, on every machine.
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.facts.hash(&mut hasher);
        hasher.finish()
    }

    pub fn is_red(&self) -> bool {
        !self.violations.is_empty()
    }
}

pub fn bounds(history: &History) -> Bounds {
    Bounds {
        attempts: 80,
        attempts_per_crash: 20,
        floor_ms: millis(FLOOR),
        patience_ms: i64::from(history.setup.request_timeout_ms) - 500,
        clocks_apart_ms: 0,
        must_answer: history.has_calm_database(),
        once: history.setup.once.then(|| history::event_type_text(history::ONCE)),
    }
}

pub fn run(history: &History, place: Place) -> Outcome {
    check(history, simulate(history, place, None))
}

/// With a part of the process that lies.
pub fn run_lying(history: &History, place: Place, lie: Lie) -> Outcome {
    check(history, simulate(history, place, Some(lie)))
}

fn check(history: &History, facts: Vec<Fact>) -> Outcome {
    let violations = checker::check(&facts, &bounds(history));
    Outcome { facts, violations }
}

/// What goes on through all lives.
struct World<'a> {
    history: &'a History,
    lie: Option<Lie>,
    facts: Arc<Facts>,
    clock: Arc<Clock>,
    provider: Arc<Provider>,
    weather: Arc<Weather>,
    callers: Arc<Callers>,
    /// True time at the beginning of this life.
    at: Ms,
    /// How far off the process' wall clock is.
    off_by_ms: i64,
    /// The next step.
    next: usize,
    lives: u64,
}

enum End {
    Crash { down_ms: u32 },
    Restart { down_ms: u32 },
    Rested,
}

fn simulate(history: &History, place: Place, lie: Option<Lie>) -> Vec<Fact> {
    let (facts, clock) = (Arc::<Facts>::default(), Arc::<Clock>::default());
    let provider = Provider::new(history.seed, history.setup.mood, Arc::clone(&facts), Arc::clone(&clock));
    let mut world = World {
        history,
        lie,
        provider: Arc::new(provider),
        weather: Arc::new(Weather::new(history.seed, history.setup.database)),
        callers: Arc::new(Callers::new(Arc::clone(&facts), Arc::clone(&clock))),
        facts,
        clock,
        at: 0,
        off_by_ms: 0,
        next: 0,
        lives: 0,
    };
    let mut database = Database::new(place);
    loop {
        let tokio = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime without system resources");
        let (end, at) = tokio.block_on(world.live(&database));
        let down_ms = match end {
            End::Crash { down_ms } => {
                world.facts.add(Fact::Crashed { at });
                database.crash(lie == Some(Lie::ForgetfulStore));
                down_ms
            }
            End::Restart { down_ms } => down_ms,
            End::Rested => 0,
        };
        // All its tasks go with it, wherever they are.
        drop(tokio);
        if matches!(end, End::Rested) {
            database.done();
            return world.facts.take();
        }
        world.callers.hang_up();
        world.at = at + i64::from(down_ms);
    }
}

impl World<'_> {
    /// From a start to the next crash or restart, or to the end. Also when that is.
    async fn live(&mut self, database: &Database) -> (End, Ms) {
        self.lives += 1;
        let seed = self.history.seed.wrapping_mul(0x2545_f491_4f6c_dd1d).wrapping_add(self.lives);
        let runtime = Runtime::simulated(seed, UnixMs(START_MS + self.at + self.off_by_ms));
        self.clock.begin(&runtime, self.at);
        runtime.reorder(self.history.setup.reorder_one_in);
        let Some(life) = self.start(&runtime, database).await else {
            return (End::Rested, self.clock.now());
        };
        self.facts.add(Fact::Opened { at: self.clock.now() });
        let line = Line { runtime: runtime.clone(), service: Arc::clone(&life.service), app: Arc::clone(&life.app) };
        while let Some(Step { after_ms, act }) = self.history.steps.get(self.next) {
            self.next += 1;
            if *after_ms > 0 {
                runtime.sleep(Duration::from_millis((*after_ms).into())).await;
            }
            match act {
                Act::Crash { down_ms } => return (End::Crash { down_ms: *down_ms }, self.clock.now()),
                Act::Restart { down_ms } => {
                    self.facts.add(Fact::Restarted { at: self.clock.now() });
                    life.end().await;
                    return (End::Restart { down_ms: *down_ms }, self.clock.now());
                }
                Act::Jump { by_ms } => {
                    self.facts.add(Fact::Jumped { at: self.clock.now(), by_ms: (*by_ms).into() });
                    self.off_by_ms += i64::from(*by_ms);
                    runtime.jump((*by_ms).into());
                }
                Act::Mood(mood) => self.provider.set_mood(*mood),
                Act::Database(database) => self.weather.set(*database),
                Act::Uninstall { token } => self.provider.uninstall(&token_text(*token)),
                Act::Pause { event_type } => self.callers.pause(&line, *event_type, true),
                Act::Resume { event_type } => self.callers.pause(&line, *event_type, false),
                act => {
                    if let Act::Register { token, is_sandbox, .. } = act {
                        self.provider.install(&token_text(*token), *is_sandbox && history::is_apns(*token));
                    }
                    self.callers.act(&line, act);
                }
            }
        }
        self.rest(&runtime, &life, &line).await;
        (End::Rested, self.clock.now())
    }

    /// As a supervisor does: again and again.
    async fn start(&self, runtime: &Runtime, database: &Database) -> Option<Life> {
        for _ in 0..MAX_STARTS {
            let surroundings = (database, &self.weather, &self.provider);
            match Life::begin(runtime, &self.history.setup, surroundings, self.lie).await {
                Ok(life) => return Some(life),
                Err(error) => tracing::info!(error, "it does not start"),
            }
            runtime.sleep(START_AGAIN).await;
        }
        None
    }

    /// Waits until nothing is open, and takes the last look.
    async fn rest(&self, runtime: &Runtime, life: &Life, line: &Line) {
        if !self.history.setup.stays_bad {
            self.provider.set_mood(Mood::CALM);
            self.weather.set(history::Database::default());
        }
        let all_asked = self.clock.now() + CALL_MS;
        while self.callers.waiting() > 0 && self.clock.now() < all_asked {
            runtime.sleep(LOOK).await;
        }
        for event_type in [None, Some(0), Some(1)] {
            self.callers.resume(line, event_type).await;
        }
        let longest = self.history.longest_ttl_ms() + self.history.set_back_ms() + REST_MS;
        let deadline = self.clock.now() + longest;
        let open = loop {
            runtime.sleep(LOOK).await;
            let open = match life.store.backlog(runtime.now()).await {
                Ok(backlog) => backlog.jobs + backlog.fanouts + u64::from(self.callers.waiting()),
                Err(_) => 1,
            };
            if open == 0 || self.clock.now() >= deadline {
                break open;
            }
        };
        self.facts.add(Fact::Rested { at: self.clock.now(), open });
        self.weather.set(history::Database::default());
        for notification in self.callers.notifications() {
            self.look(line, &notification).await;
        }
    }

    async fn look(&self, line: &Line, notification: &str) {
        let call = || Call::new(&line.app).may_read(true);
        let Ok(view) = line.service.get_notification(call(), notification).await else { return };
        let (counts, expanding) = (view.counts, view.expanding);
        let ended = [
            ("Sent", counts.sent),
            ("Suppressed", counts.suppressed),
            ("Expired", counts.expired),
            ("Cancelled", counts.cancelled),
            ("Dead", counts.dead),
        ];
        self.facts.add(Fact::Counted { notification: notification.to_owned(), open: counts.open, expanding, ended });
        let input = ListDeliveries {
            notification_id: notification.to_owned(),
            user_id: String::new(),
            states: Vec::<State>::new(),
            page_size: 1_000,
            page_token: String::new(),
        };
        let Ok((deliveries, _)) = line.service.list_deliveries(call(), input).await else { return };
        for delivery in deliveries {
            self.facts.add(Fact::Ended {
                notification: notification.to_owned(),
                user: delivery.user.as_str().to_owned(),
                device: delivery.device.map(nudged::domain::ids::DeviceId::public),
                state: format!("{:?}", delivery.state),
                reason: delivery.reason.to_owned(),
            });
        }
    }
}
