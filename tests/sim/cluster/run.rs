//! Runs one history of a cluster and hands back what was seen.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nudged::domain::time::UnixMs;
use nudged::runtime::Runtime;
use nudged::storage::sqlite::shared::Hub;
use tokio::sync::Notify;

use super::callers::{self, Callers, Key, Seen, Told};
use super::replica::{Door, FLOOR, Place, Replica};
use super::story::{Act, Story};
use super::wire::{Quality, StoreLink, StoreWay, Wire};
use crate::checker::{self, Bounds, Violation};
use crate::clock::{Clock, START_MS, millis};
use crate::facts::{Fact, Facts, Ms};
use crate::history::token_text;
use crate::provider::{Mood, Provider};

const WATCHERS: usize = 2;
/// Beyond the longest time to live: what is left by then is stuck.
const REST_MS: Ms = 120_000;
/// How often it is looked whether anything is open.
const LOOK: Duration = Duration::from_secs(1);
/// The longest that a call is worked on after its caller has gone.
const QUIET_MS: Ms = 8_000;
/// A supervisor's.
const START_AGAIN: Duration = Duration::from_secs(1);
/// A watcher looks five times a second, and may have to find another replica first.
const WATCHED: Duration = Duration::from_secs(20);

/// What a history came to.
pub struct Outcome {
    pub facts: Vec<Fact>,
    pub told: Vec<Vec<(Key, String)>>,
    pub violations: Vec<Violation>,
}

impl Outcome {
    /// The same for the same history.
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (&self.facts, &self.told).hash(&mut hasher);
        hasher.finish()
    }
}

pub fn run(story: &Story, lies: bool) -> Outcome {
    let tokio = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without system resources");
    let (facts, told, mut violations) = tokio.block_on(World::new(story, lies).live());
    // Whatever still runs ends here.
    drop(tokio);
    let bounds = Bounds {
        attempts: 80,
        attempts_per_crash: 20,
        floor_ms: millis(FLOOR),
        patience_ms: i64::from(story.setup.request_timeout_ms) - 500,
        // Of the replicas' clocks, and what half a round trip to the store may hide.
        clocks_apart_ms: story.clocks_apart_ms() + 400,
        must_answer: false,
        once: None,
    };
    violations.extend(checker::check(&facts, &bounds));
    Outcome { facts, told, violations }
}

/// A replica's place, through all its lives.
struct Slot {
    number: u64,
    door: Door,
    to_callers: Arc<Wire>,
    to_providers: Arc<Wire>,
    to_store: Arc<StoreWay>,
    /// Of the life that goes on, or begins.
    link: Mutex<Option<Arc<StoreLink>>>,
    life: Mutex<Option<Replica>>,
    lives: Mutex<u64>,
}

struct World {
    story: Story,
    lies: bool,
    outside: Runtime,
    facts: Arc<Facts>,
    clock: Arc<Clock>,
    hub: Arc<Hub>,
    store_is_down: Arc<AtomicBool>,
    provider: Arc<Provider>,
    slots: Vec<Slot>,
}

impl World {
    /// Within the runtime whose clock is the world's.
    fn new(story: &Story, lies: bool) -> Arc<Self> {
        let (facts, clock) = (Arc::<Facts>::default(), Arc::<Clock>::default());
        let outside = Runtime::simulated(story.seed, UnixMs(START_MS));
        clock.begin(&outside, 0);
        let hub = Hub::open(Runtime::simulated(story.seed ^ 1, UnixMs(START_MS))).expect("a database in memory");
        let provider = Provider::new(story.seed, story.setup.mood, Arc::clone(&facts), Arc::clone(&clock));
        let slot = |number: usize| {
            let to_store = Arc::<StoreWay>::default();
            to_store.set_quality(story.setup.quality);
            Slot {
                number: number as u64,
                door: Door::default(),
                to_callers: Arc::default(),
                to_providers: Arc::default(),
                to_store,
                link: Mutex::default(),
                life: Mutex::default(),
                lives: Mutex::new(0),
            }
        };
        Arc::new(Self {
            lies,
            outside,
            facts,
            clock,
            hub,
            store_is_down: Arc::default(),
            provider: Arc::new(provider),
            slots: (0..story.setup.clocks_ms.len()).map(slot).collect(),
            story: story.clone(),
        })
    }

    async fn live(self: Arc<Self>) -> (Vec<Fact>, Vec<Vec<(Key, String)>>, Vec<Violation>) {
        for number in 0..self.slots.len() {
            self.start(number, Duration::ZERO);
        }
        let client = |slot: &Slot| callers::client(&slot.door, &slot.to_callers, &self.outside);
        let clients: Vec<_> = self.slots.iter().map(client).collect();
        let told: Vec<Told> = (0..WATCHERS).map(|_| Told::default()).collect();
        for (first, told) in told.iter().enumerate() {
            let begun = Arc::new(Notify::new());
            let watching =
                callers::watch(self.outside.clone(), clients.clone(), first, Arc::clone(told), Arc::clone(&begun));
            drop(self.outside.spawn(watching));
            begun.notified().await;
        }
        let (facts, clock) = (Arc::clone(&self.facts), Arc::clone(&self.clock));
        let callers = Arc::new(Callers::new(facts, clock, self.outside.clone(), clients));
        for step in &self.story.steps {
            if step.after_ms > 0 {
                self.outside.sleep(Duration::from_millis(step.after_ms.into())).await;
            }
            self.act(&callers, &step.act);
        }
        let seen = self.rest(&callers).await;
        self.outside.sleep(WATCHED).await;
        let told: Vec<_> = told.iter().map(|told| std::mem::take(&mut *told.lock().unwrap())).collect();
        let violations = compare(&seen, &told);
        (self.facts.take(), told, violations)
    }

    fn act(self: &Arc<Self>, callers: &Arc<Callers>, act: &Act) {
        match act {
            Act::Call(replica, call) => {
                if let super::story::Call::Register { token, .. } = call {
                    self.provider.install(&token_text(*token), false);
                }
                callers.act(*replica, call);
            }
            Act::Uninstall { token } => self.provider.uninstall(&token_text(*token)),
            Act::Mood(mood) => self.provider.set_mood(*mood),
            Act::Quality { replica, quality } => self.slots[usize::from(*replica)].to_store.set_quality(*quality),
            Act::CutStore { replica, for_ms } => {
                self.apart(*for_ms);
                let way = Arc::clone(&self.slots[usize::from(*replica)].to_store);
                way.set_cut(true);
                self.later(*for_ms, move || way.set_cut(false));
            }
            Act::DeafToStore { replica, for_ms } => {
                self.apart(*for_ms);
                let way = Arc::clone(&self.slots[usize::from(*replica)].to_store);
                way.set_deaf(true);
                self.later(*for_ms, move || way.set_deaf(false));
            }
            Act::StoreDown { for_ms } => {
                self.apart(*for_ms);
                let down = Arc::clone(&self.store_is_down);
                down.store(true, Ordering::Relaxed);
                self.later(*for_ms, move || down.store(false, Ordering::Relaxed));
            }
            Act::CutProviders { replica, for_ms } => self.cut(&self.slots[usize::from(*replica)].to_providers, *for_ms),
            Act::CutCallers { replica, for_ms } => self.cut(&self.slots[usize::from(*replica)].to_callers, *for_ms),
            Act::Crash { replica, down_ms } => self.crash(usize::from(*replica), *down_ms),
            Act::Restart { replica, down_ms } => self.restart(usize::from(*replica), *down_ms),
        }
    }

    fn cut(&self, wire: &Arc<Wire>, for_ms: u32) {
        let wire = Arc::clone(wire);
        wire.cut();
        self.later(for_ms, move || wire.heal());
    }

    fn later(&self, for_ms: u32, then: impl FnOnce() + Send + 'static) {
        let outside = self.outside.clone();
        drop(self.outside.spawn(async move {
            outside.sleep(Duration::from_millis(for_ms.into())).await;
            then();
        }));
    }

    /// In this time somebody may be told by a provider what it cannot write down.
    fn apart(&self, for_ms: u32) {
        let from = self.clock.now();
        self.facts.add(Fact::Apart { from, to: from + i64::from(for_ms) });
    }

    fn crash(self: &Arc<Self>, number: usize, down_ms: u32) {
        let slot = &self.slots[number];
        // One that is starting, or down, is left alone.
        let Some(replica) = slot.life.lock().unwrap().take() else { return };
        self.facts.add(Fact::Crashed { at: self.clock.now() });
        self.bury(number, replica);
        self.start(number, Duration::from_millis(down_ms.into()));
    }

    fn bury(&self, number: usize, replica: Replica) {
        let slot = &self.slots[number];
        if let Some(link) = slot.link.lock().unwrap().take() {
            link.die();
        }
        replica.crash(&slot.door);
        slot.to_callers.reset();
        slot.to_providers.reset();
    }

    fn restart(self: &Arc<Self>, number: usize, down_ms: u32) {
        let Some(replica) = self.slots[number].life.lock().unwrap().take() else { return };
        self.facts.add(Fact::Restarted { at: self.clock.now() });
        let this = Arc::clone(self);
        drop(self.outside.spawn(async move {
            replica.stop(&this.slots[number].door).await;
            this.start(number, Duration::from_millis(down_ms.into()));
        }));
    }

    /// As a supervisor does: again and again.
    fn start(self: &Arc<Self>, number: usize, after: Duration) {
        let this = Arc::clone(self);
        drop(self.outside.spawn(async move {
            this.outside.sleep(after).await;
            let slot = &this.slots[number];
            loop {
                let life = {
                    let mut lives = slot.lives.lock().unwrap();
                    *lives += 1;
                    *lives
                };
                let seed = this.story.seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ (slot.number << 32) ^ (life << 40);
                let link = Arc::new(StoreLink::new(seed, &slot.to_store, &this.store_is_down));
                *slot.link.lock().unwrap() = Some(Arc::clone(&link));
                let place = Place {
                    hub: Arc::clone(&this.hub),
                    outside: this.outside.clone(),
                    provider: Arc::clone(&this.provider),
                    link,
                    to_providers: Arc::clone(&slot.to_providers),
                    lies: this.lies,
                };
                let clock = UnixMs(this.clock.true_wall() + this.story.setup.clocks_ms[number]);
                match Replica::start(seed, clock, &this.story.setup, &place, &slot.door).await {
                    Ok(replica) => {
                        *slot.life.lock().unwrap() = Some(replica);
                        return;
                    }
                    Err(error) => tracing::info!(error, "it does not start"),
                }
                this.outside.sleep(START_AGAIN).await;
            }
        }));
    }

    /// Waits until everything works again and nothing is open, and takes the last look.
    async fn rest(&self, callers: &Callers) -> Vec<Seen> {
        self.provider.set_mood(Mood::CALM);
        for slot in &self.slots {
            slot.to_store.set_quality(Quality::default());
        }
        let deadline = self.clock.now() + self.story.longest_ttl_ms() + self.story.clocks_apart_ms() + REST_MS;
        let mut last_call = self.clock.now();
        let (open, seen) = loop {
            self.outside.sleep(LOOK).await;
            if callers.waiting() > 0 {
                last_call = self.clock.now();
            }
            // A call that nobody waits for any more may still be worked on.
            let is_quiet = self.clock.now() - last_call > QUIET_MS;
            let (open, seen) = match callers.look().await {
                Some(seen) if is_quiet => (seen.iter().map(open).sum::<u64>(), seen),
                Some(seen) => (1, seen),
                None => (1, Vec::new()),
            };
            if open == 0 || self.clock.now() >= deadline {
                break (open, seen);
            }
        };
        self.facts.add(Fact::Rested { at: self.clock.now(), open });
        for Seen { notification, deliveries } in &seen {
            let name = &notification.notification_id;
            let counts = notification.counts.unwrap_or_default();
            let (open, expanding) = (counts.open(), notification.expanding());
            let ended = [
                ("Sent", counts.sent()),
                ("Suppressed", counts.suppressed()),
                ("Expired", counts.expired()),
                ("Cancelled", counts.cancelled()),
                ("Dead", counts.dead()),
            ];
            self.facts.add(Fact::Counted { notification: name.clone(), open, expanding, ended });
            for delivery in deliveries {
                self.facts.add(Fact::Ended {
                    notification: name.clone(),
                    user: delivery.user_id.clone(),
                    device: (!delivery.device_id.is_empty()).then(|| delivery.device_id.clone()),
                    state: callers::state(delivery),
                    reason: delivery.reason.clone(),
                });
            }
        }
        seen
    }
}

fn open(seen: &Seen) -> u64 {
    let counts = seen.notification.counts.unwrap_or_default();
    counts.open() + u64::from(seen.notification.expanding())
}

/// Each outcome is told once to every watcher, wherever it was when.
fn compare(seen: &[Seen], told: &[Vec<(Key, String)>]) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut ended: BTreeMap<Key, String> = BTreeMap::new();
    for Seen { deliveries, .. } in seen {
        ended.extend(deliveries.iter().map(|delivery| (callers::key(delivery), callers::state(delivery))));
    }
    for (watcher, told) in told.iter().enumerate() {
        let mut finally: BTreeMap<&Key, Vec<&str>> = BTreeMap::new();
        for (key, state) in told.iter().filter(|(_, state)| state != "Open") {
            finally.entry(key).or_default().push(state);
        }
        for (key, state) in &ended {
            let heard = finally.remove(key).unwrap_or_default();
            if state != "Open" && heard != [state.as_str()] {
                let what = format!("watcher {watcher} heard {heard:?} of {key:?}, which is {state}");
                found.push(Violation { rule: "watched", what });
            }
        }
        for (key, heard) in finally {
            let what = format!("watcher {watcher} heard {heard:?} of {key:?}, which nobody knows");
            found.push(Violation { rule: "watched", what });
        }
    }
    found
}
