//! A life of the store between two power cuts: every kind of hot transaction, and a note of what was answered when.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nudged::domain::content::Content;
use nudged::domain::deny::DenyFeed;
use nudged::domain::device::{DeviceDetails, Registration, Retirement};
use nudged::domain::event_type::OnMaybe;
use nudged::domain::ids::{AppId, AppKey, EventType, IdempotencyKey, JobId, NotificationId, RouteId, Topic, UserId};
use nudged::domain::notification::{Audience, Body, Job, NewEvent, NewJob};
use nudged::domain::outcome::{Entry, ResultCode};
use nudged::domain::plan::plan;
use nudged::domain::platform::{DeviceKind, DeviceToken, Environment, Lane, Platform, RouteSpec};
use nudged::domain::sending::{Priority, ProviderAnswer};
use nudged::domain::time::UnixMs;
use nudged::runtime::Runtime;
use nudged::storage::sqlite::{Settings, SqliteStore, Synchronous};
use nudged::storage::{
    Attempt, ClaimRequest, Fanout, ImportBatch, ImportItem, JobUpdate, NewOptIn, PageWrite, Queue as _, Registry as _,
};

use super::disk::{Event, Image};
use super::eye::{Dump, Eye};
use super::random::Random;
use super::room::Room;
use super::vfs::Mounted;

const START: i64 = 1_790_000_000_000;
const HOUR: i64 = 3_600_000;
/// Odd, so that two deeds in turn come to everybody.
const PEOPLE: usize = 5;
const TOPICS: [&str; 2] = ["author:choco", "pets"];

/// Something that was answered, and so must be there for good.
#[derive(Clone, Debug)]
pub enum Fact {
    /// `planned`: the deliveries that were planned at once.
    Accepted {
        id: NotificationId,
        key: String,
        hash: u8,
        planned: u64,
    },
    Chose {
        user: String,
        opted_in: bool,
    },
    Registered {
        user: String,
        token: String,
    },
    Sent {
        id: NotificationId,
        sent: u64,
    },
    Fence {
        job: JobId,
        fence: i64,
    },
}

/// From this position of the disk's record on, all of this was answered.
pub struct Mark {
    pub position: usize,
    pub what: &'static str,
    pub dump: Arc<Dump>,
    pub facts: Vec<Fact>,
}

/// A life, and what was done to the disk in it.
pub struct Life {
    pub base: Image,
    pub is_made: bool,
    pub events: Vec<Event>,
    /// Ascending; the first is of the beginning.
    pub marks: Vec<Mark>,
    /// The clock at its end.
    pub now: i64,
    pub synchronous: Synchronous,
}

/// What a life begins with.
pub struct Start {
    pub base: Image,
    /// The schema and what the installation keeps are there; the first start makes them in many transactions.
    pub is_made: bool,
    pub dump: Arc<Dump>,
    pub facts: Vec<Fact>,
    pub now: i64,
}

impl Start {
    /// On an empty disk.
    pub fn empty() -> Self {
        Self { base: Image::new(), is_made: false, dump: Arc::default(), facts: Vec::new(), now: START }
    }
}

pub fn settings(path: &Path, synchronous: Synchronous) -> Settings {
    Settings { synchronous, ..Settings::file(path) }
}

/// Runs `future` on a paused clock.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(future)
}

/// The store on the database in `directory`.
pub fn open_store(directory: &Path, synchronous: Synchronous, seed: u64, now: i64) -> SqliteStore {
    let runtime = Runtime::simulated(seed, UnixMs(now));
    let path = directory.join("nudged.db");
    SqliteStore::open(runtime, &settings(&path, synchronous), Arc::<DenyFeed>::default()).unwrap()
}

pub fn user(name: &str) -> UserId {
    UserId::trusted(name)
}

pub struct World {
    pub store: SqliteStore,
    pub app: AppKey,
    pub apns: RouteId,
    pub fcm: RouteId,
    pub now: i64,
    random: Random,
    /// Otherwise people come in turn, and events are for all of them.
    is_random: bool,
    person: usize,
    room: Arc<Room>,
    held: Vec<Job>,
    fanouts: Vec<Fanout>,
    accepted: Vec<NotificationId>,
    pub facts: Vec<Fact>,
}

/// What a life does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Deed {
    Register,
    Move,
    OptIn,
    OptOut,
    Subscribe,
    Accept,
    AcceptHandedOver,
    AcceptRepeat,
    Broadcast,
    Claim,
    Record,
    RecordPart,
    RecordFollower,
    RecordRetired,
    Release,
    PutOff,
    ClaimFanout,
    Page,
    ReleaseFanout,
    Cancel,
    Import,
    Retain,
    Checkpoint,
    Hold,
}

impl Deed {
    const ALL: [Self; 24] = [
        Self::Register,
        Self::Move,
        Self::OptIn,
        Self::OptOut,
        Self::Subscribe,
        Self::Accept,
        Self::AcceptHandedOver,
        Self::AcceptRepeat,
        Self::Broadcast,
        Self::Claim,
        Self::Record,
        Self::RecordPart,
        Self::RecordFollower,
        Self::RecordRetired,
        Self::Release,
        Self::PutOff,
        Self::ClaimFanout,
        Self::Page,
        Self::ReleaseFanout,
        Self::Cancel,
        Self::Import,
        Self::Retain,
        Self::Checkpoint,
        Self::Hold,
    ];

    /// Each of them at least once, with jobs and fan-outs at hand where it needs some.
    const EACH: [Self; 40] = [
        Self::Subscribe,
        Self::Move,
        Self::Accept,
        Self::AcceptHandedOver,
        Self::AcceptRepeat,
        Self::Claim,
        Self::Checkpoint,
        Self::AcceptHandedOver,
        Self::Record,
        Self::RecordPart,
        Self::Record,
        Self::AcceptHandedOver,
        Self::RecordFollower,
        Self::AcceptHandedOver,
        Self::RecordRetired,
        Self::Hold,
        Self::AcceptHandedOver,
        Self::Release,
        Self::Checkpoint,
        Self::AcceptHandedOver,
        Self::PutOff,
        Self::Hold,
        Self::Checkpoint,
        Self::Broadcast,
        Self::ClaimFanout,
        Self::Page,
        Self::ReleaseFanout,
        Self::ClaimFanout,
        Self::Page,
        Self::Page,
        Self::Page,
        Self::Page,
        Self::OptOut,
        Self::Cancel,
        Self::Import,
        Self::Claim,
        Self::Record,
        Self::Retain,
        Self::Checkpoint,
        Self::Register,
    ];
}

/// Which deeds.
#[derive(Clone, Copy)]
pub enum Script {
    /// None: only what opening and closing does.
    Nothing,
    /// People and their phones, then every deed with what it needs.
    Each,
    /// So many, at random.
    Some(usize),
}

/// Lives on the disk `start` to a clean end.
pub fn live(directory: &Path, start: Start, synchronous: Synchronous, seed: u64, script: Script) -> Life {
    let mounted = Mounted::new(directory, &start.base, seed);
    let mut marks = vec![Mark { position: 0, what: "the start", dump: start.dump, facts: start.facts.clone() }];
    let now = block_on(async {
        let store = open_store(directory, synchronous, seed, start.now);
        let path = directory.join("nudged.db");
        let (mut eye, mut holder) = (Eye::open(&path, synchronous), Eye::open(&path, synchronous));
        let mut mark = |what, facts: &[Fact], eye: &mut Eye| {
            let position = mounted.position();
            marks.push(Mark { position, what, dump: Arc::new(eye.dump()), facts: facts.to_vec() });
        };
        mark("opening", &start.facts, &mut eye);
        let at = UnixMs(start.now);
        let app = ensure_app(&store, at).await;
        mark("an app", &start.facts, &mut eye);
        ensure_routes(&store, app, at).await;
        mark("routes", &start.facts, &mut eye);
        let mut world = World::new(store, start.now, seed).await;
        world.facts = start.facts;
        world.store.release_others(world.store.boot_id(), at).await.unwrap();
        mark("freeing leases", &world.facts, &mut eye);
        for deed in world.deeds(script) {
            world.now += 1_000;
            let what = match deed {
                Deed::Checkpoint => {
                    let how = ["PASSIVE", "FULL", "RESTART", "TRUNCATE"][world.random.below(4)];
                    eye.checkpoint(how);
                    "a checkpoint"
                }
                Deed::Hold => {
                    holder.hold();
                    "a snapshot"
                }
                deed => world.deed(deed).await,
            };
            mark(what, &world.facts, &mut eye);
        }
        world.now
    });
    Life { base: start.base, is_made: start.is_made, events: mounted.events(), marks, now: now + HOUR, synchronous }
}

async fn ensure_app(store: &SqliteStore, at: UnixMs) -> AppKey {
    store.ensure_app(&AppId::trusted("pets"), at).await.unwrap()
}

async fn ensure_routes(store: &SqliteStore, app: AppKey, at: UnixMs) -> (RouteId, RouteId) {
    let spec = |platform, environment, bundle: &str| RouteSpec {
        app,
        platform,
        credential: Arc::from("default"),
        environment,
        bundle: Arc::from(bundle),
    };
    let apns = spec(Platform::Apns, Environment::Production, "com.example.pets");
    let routes = store.ensure_routes(&[apns, spec(Platform::Fcm, Environment::None, "")], at).await.unwrap();
    (routes[0].id, routes[1].id)
}

impl World {
    pub async fn new(store: SqliteStore, now: i64, seed: u64) -> Self {
        let app = ensure_app(&store, UnixMs(now)).await;
        let (apns, fcm) = ensure_routes(&store, app, UnixMs(now)).await;
        Self {
            store,
            app,
            apns,
            fcm,
            now,
            random: Random::new(seed),
            is_random: false,
            person: 0,
            room: Arc::default(),
            held: Vec::new(),
            fanouts: Vec::new(),
            accepted: Vec::new(),
            facts: Vec::new(),
        }
    }

    fn deeds(&mut self, script: Script) -> Vec<Deed> {
        match script {
            Script::Nothing => Vec::new(),
            Script::Each => {
                let people = [Deed::Register, Deed::OptIn].into_iter().cycle().take(2 * PEOPLE);
                people.chain(Deed::EACH).collect()
            }
            Script::Some(count) => {
                self.is_random = true;
                let more = [Deed::Accept, Deed::AcceptHandedOver, Deed::Claim, Deed::Record, Deed::Page, Deed::OptOut];
                let all: Vec<Deed> = Deed::ALL.into_iter().chain(more).collect();
                (0..count).map(|_| all[self.random.below(all.len())]).collect()
            }
        }
    }

    fn at(&self) -> UnixMs {
        UnixMs(self.now)
    }

    fn anybody(&mut self) -> String {
        self.person += if self.is_random { self.random.below(PEOPLE) } else { 1 };
        format!("user-{}", self.person % PEOPLE)
    }

    fn registration(&mut self, name: &str, token: &str) -> Registration {
        let fcm = token.starts_with(['1', '2', '3', '4']);
        Registration {
            app: self.app,
            user: user(name),
            platform: if fcm { Platform::Fcm } else { Platform::Apns },
            kind: DeviceKind::Alert,
            token: DeviceToken::trusted(token),
            route: if fcm { self.fcm } else { self.apns },
            device: None,
            installation_id: None,
            details: DeviceDetails::default(),
            observed_at: self.at(),
        }
    }

    fn choice(&self, name: &str, opted_in: bool) -> NewOptIn {
        NewOptIn {
            app: self.app,
            user: user(name),
            event_type: None,
            device: None,
            opted_in,
            observed_at: self.at(),
            caller: Some("backend".to_owned()),
            source: None,
            policy_version: None,
            evidence: None,
        }
    }

    pub fn event(&mut self, audience: Audience, key: &str, hash: u8) -> NewEvent {
        let text = "가나다라마바사 ".repeat(1 + self.random.below(60));
        let content = Content { title: Some("새 댓글".to_owned()), body: Some(text), ..Content::default() };
        NewEvent {
            app: self.app,
            event_type: EventType::trusted("comment.created"),
            type_version: None,
            default_opt_in: true,
            lane: None,
            on_maybe: OnMaybe::Retry,
            idempotency: Some((IdempotencyKey::trusted(key), [hash; 32])),
            audience,
            actor: None,
            body: Arc::new(Body { content, ..Body::default() }),
            priority: Priority::High,
            collapse_key: None,
            event_at: self.at(),
            not_before: None,
            expires_at: UnixMs(self.now + 24 * HOUR),
            max_audience: None,
            may_broadcast: true,
        }
    }

    /// The id, and how it was keyed.
    pub async fn accept(&mut self, audience: Audience, room: usize) -> NotificationId {
        let (key, hash) = (format!("event-{}", self.now), self.random.byte());
        self.room.free.store(room, Ordering::SeqCst);
        let event = self.event(audience, &key, hash);
        let hand_off = Arc::<Room>::clone(&self.room);
        let accepted = self.store.accept(event, hand_off, self.at()).await.unwrap();
        assert!(!accepted.duplicate);
        let planned = self.room.planned.swap(0, Ordering::SeqCst) as u64;
        self.facts.push(Fact::Accepted { id: accepted.notification, key, hash, planned });
        self.accepted.push(accepted.notification);
        for handed in self.room.handed_over.lock().unwrap().drain(..) {
            self.facts.push(Fact::Fence { job: handed.job.id, fence: handed.job.fence });
            self.held.push(handed.job);
        }
        accepted.notification
    }

    /// Whether an event with this key counts as a repeat of that one.
    pub async fn is_repeat(&mut self, id: NotificationId, key: &str, hash: u8) -> bool {
        let event = self.event(Audience { everyone: true, ..Audience::default() }, key, hash);
        let hand_off = Arc::<Room>::clone(&self.room);
        let accepted = self.store.accept(event, hand_off, self.at()).await.unwrap();
        accepted.duplicate && accepted.notification == id
    }

    fn some_people(&mut self) -> Audience {
        let count = if self.is_random { 1 + self.random.below(3) } else { PEOPLE };
        let mut user_ids: Vec<UserId> = (0..count).map(|_| user(&self.anybody())).collect();
        if self.random.one_in(4) {
            user_ids.push(user(&format!("newcomer-{}", self.now)));
        }
        let topics = if self.random.one_in(3) { vec![Topic::trusted(TOPICS[0])] } else { Vec::new() };
        Audience { user_ids, topics, ..Audience::default() }
    }

    async fn register(&mut self, token: String) {
        let name = self.anybody();
        let registration = self.registration(&name, &token);
        self.store.register_device(registration, self.at()).await.unwrap();
        self.facts.retain(|fact| !matches!(fact, Fact::Registered { token: theirs, .. } if *theirs == token));
        self.facts.push(Fact::Registered { user: name, token });
    }

    async fn choose(&mut self, opted_in: bool) {
        let name = self.anybody();
        let choice = self.choice(&name, opted_in);
        let (_, applied) = self.store.set_opt_in(choice, self.at()).await.unwrap();
        assert!(applied, "the latest choice stands");
        self.facts.retain(|fact| !matches!(fact, Fact::Chose { user, .. } if *user == name));
        self.facts.push(Fact::Chose { user: name, opted_in });
    }

    async fn claim(&mut self, route: RouteId, lane: Lane) {
        let request = ClaimRequest { route, lane, max_targets: 100, max_jobs: 3 };
        let owner = self.store.boot_id();
        for claimed in self.store.claim(request, owner, self.at()).await.unwrap() {
            self.facts.push(Fact::Fence { job: claimed.job.id, fence: claimed.job.fence });
            self.held.push(claimed.job);
        }
    }

    /// Some job that this life holds.
    fn take_held(&mut self) -> Option<Job> {
        let at = self.random.below(self.held.len());
        (at < self.held.len()).then(|| self.held.remove(at))
    }

    async fn record(&mut self, job: &Job, change: impl FnOnce(&mut JobUpdate)) -> bool {
        let mut update = JobUpdate {
            job: job.id,
            fence: job.fence,
            app: self.app,
            notification: job.notification,
            route: job.route,
            progress: None,
            entries: Vec::new(),
            details: Vec::new(),
            followers: Vec::new(),
            retirements: Vec::new(),
            device_changes: Vec::new(),
        };
        change(&mut update);
        let sent = update.entries.iter().any(|entry| entry.code == ResultCode::Sent);
        let held = self.store.record(vec![update], self.at()).await.unwrap()[0];
        if held && sent {
            let counts = self.store.get_notification(self.app, job.notification).await.unwrap().counts;
            self.facts.push(Fact::Sent { id: job.notification, sent: counts.sent });
        }
        held
    }

    /// Claims everything that is due within an hour, on both routes.
    pub async fn claim_all(&mut self) -> Vec<Job> {
        self.now += HOUR;
        let mut all = Vec::new();
        for (route, lane) in [self.apns, self.fcm].into_iter().flat_map(|route| Lane::ALL.map(|lane| (route, lane))) {
            loop {
                self.claim(route, lane).await;
                if self.held.is_empty() {
                    break;
                }
                all.append(&mut self.held);
            }
        }
        all
    }

    /// Every target of a job that is not finished is sent.
    pub async fn finish(&mut self, job: &Job) {
        let entries = entries(job, ResultCode::Sent);
        assert!(self.record(job, |update| update.entries = entries).await, "nobody else has the job");
    }

    /// A person with a phone of their own who wants everything.
    pub async fn enrol(&mut self, name: &str, token: &str) {
        let registration = self.registration(name, token);
        self.store.register_device(registration, self.at()).await.unwrap();
        self.store.set_opt_in(self.choice(name, true), self.at()).await.unwrap();
    }

    async fn page(&mut self) -> &'static str {
        let Some(mut fanout) = self.fanouts.pop() else { return "no page" };
        let limit = 1 + self.random.below(4);
        let page = self.store.fanout_page(&fanout, limit).await.unwrap();
        let planned = plan(&page.people, &fanout.notification.rules(), self.at());
        let now = self.at();
        let jobs = planned.jobs.into_iter().map(|(route, targets)| NewJob {
            notification: fanout.notification.id,
            route,
            lane: Lane::Bulk,
            targets,
            attempt: 0,
            claims: 0,
            ready_at: now,
            due_at: now,
            first_attempt_at: None,
        });
        let jobs: Vec<NewJob> = jobs.collect();
        let leased = self.random.below(jobs.len() + 1);
        let write = PageWrite {
            app: self.app,
            notification: fanout.notification.id,
            fence: fanout.fence,
            cursor: page.cursor,
            done: page.done,
            jobs: jobs.clone(),
            leased,
            suppressed: planned.suppressed,
        };
        let ids = self.store.write_page(write, now).await.unwrap().expect("its fence holds");
        for (id, job) in ids.into_iter().zip(jobs).take(leased) {
            self.facts.push(Fact::Fence { job: id, fence: 1 });
            self.held.push(Job {
                id,
                notification: job.notification,
                route: job.route,
                lane: job.lane,
                progress: nudged::domain::targets::Progress::none(job.targets.len()),
                targets: job.targets,
                attempt: 0,
                claims: 1,
                fence: 1,
                ready_at: now,
                first_attempt_at: None,
            });
        }
        fanout.cursor = page.cursor;
        if !page.done {
            self.fanouts.push(fanout);
        }
        "a fan-out page"
    }

    async fn deed(&mut self, deed: Deed) -> &'static str {
        let at = self.at();
        match deed {
            Deed::Register => {
                let token = format!("{:x}", self.random.next());
                self.register(token).await;
                "a registration"
            }
            Deed::Move => {
                let token_of = |fact: &Fact| match fact {
                    Fact::Registered { token, .. } => Some(token.clone()),
                    Fact::Accepted { .. } | Fact::Chose { .. } | Fact::Sent { .. } | Fact::Fence { .. } => None,
                };
                let known: Vec<String> = self.facts.iter().filter_map(token_of).collect();
                let Some(token) = known.get(self.random.below(known.len())) else { return "no move" };
                self.register(token.clone()).await;
                "a token on the move"
            }
            Deed::OptIn => {
                self.choose(true).await;
                "a yes"
            }
            Deed::OptOut => {
                self.choose(false).await;
                "a no"
            }
            Deed::Subscribe => {
                let (name, topic) = (self.anybody(), TOPICS[self.random.below(TOPICS.len())]);
                let active = !self.random.one_in(3);
                let (user, topic) = (user(&name), Topic::trusted(topic));
                self.store.set_subscription(self.app, user, topic, active, at, at).await.unwrap();
                "a subscription"
            }
            Deed::Accept => {
                let audience = self.some_people();
                self.accept(audience, 0).await;
                "an event"
            }
            Deed::AcceptHandedOver => {
                let audience = self.some_people();
                self.accept(audience, 100).await;
                "an event that is handed over"
            }
            Deed::AcceptRepeat => {
                let known: Vec<Fact> =
                    self.facts.iter().filter(|fact| matches!(fact, Fact::Accepted { .. })).cloned().collect();
                let Some(Fact::Accepted { id, key, hash, .. }) = known.last().cloned() else { return "no repeat" };
                assert!(self.is_repeat(id, &key, hash).await, "the key is remembered");
                "a repeat"
            }
            Deed::Broadcast => {
                self.accept(Audience { everyone: true, ..Audience::default() }, 0).await;
                "a broadcast"
            }
            Deed::Claim => {
                let route = if self.is_random && self.random.one_in(2) { self.fcm } else { self.apns };
                let lane = if self.is_random && self.random.one_in(3) { Lane::Bulk } else { Lane::Interactive };
                self.claim(route, lane).await;
                "a claim"
            }
            Deed::Record => {
                let Some(job) = self.take_held() else { return "nothing to record" };
                let entries = entries(&job, ResultCode::Sent);
                self.record(&job, |update| update.entries = entries).await;
                "outcomes"
            }
            Deed::RecordPart => {
                let Some(mut job) = self.take_held() else { return "nothing to record" };
                let Some(next) = (0..job.targets.len()).find(|at| !job.progress.is_finished(*at)) else {
                    return "nothing to record";
                };
                job.progress.finish(next);
                let (target, progress) = (job.targets[next], job.progress.clone());
                let entry = Entry { user: target.user, device: target.device, code: ResultCode::Sent };
                let change = |update: &mut JobUpdate| (update.entries, update.progress) = (vec![entry], Some(progress));
                if self.record(&job, change).await {
                    self.held.push(job);
                }
                "a checkpoint of a job"
            }
            Deed::RecordFollower => {
                let Some(job) = self.take_held() else { return "nothing to record" };
                let entries = entries(&job, ResultCode::MovedToRetry);
                let targets: Vec<_> = pending(&job).collect();
                if targets.is_empty() {
                    return "nothing to record";
                }
                let details = targets.iter().map(|target| Attempt {
                    user: target.user,
                    device: target.device,
                    attempt: job.attempt + 1,
                    at,
                    result: ResultCode::MovedToRetry.name(),
                    answer: ProviderAnswer::new(503, "ServiceUnavailable"),
                    next_at: Some(UnixMs(at.0 + 1_000)),
                });
                let details = details.collect();
                let follower = NewJob {
                    notification: job.notification,
                    route: job.route,
                    lane: job.lane,
                    targets,
                    attempt: job.attempt + 1,
                    claims: 0,
                    ready_at: at,
                    due_at: UnixMs(at.0 + 1_000),
                    first_attempt_at: Some(at),
                };
                let change = |update: &mut JobUpdate| {
                    (update.entries, update.details, update.followers) = (entries, details, vec![follower]);
                };
                self.record(&job, change).await;
                "a failed attempt and its follower"
            }
            Deed::RecordRetired => {
                let Some(job) = self.take_held() else { return "nothing to record" };
                let entries = entries(&job, ResultCode::DeadToken);
                let dead = job.targets.first().map(|target| Retirement {
                    device: target.device,
                    since: None,
                    reason: "410 Unregistered".to_owned(),
                });
                let change = |update: &mut JobUpdate| {
                    (update.entries, update.retirements) = (entries, dead.into_iter().collect());
                };
                self.record(&job, change).await;
                // Whose it was is not followed up.
                self.facts.retain(|fact| !matches!(fact, Fact::Registered { .. }));
                "a dead token"
            }
            Deed::Release => {
                let Some(job) = self.take_held() else { return "nothing to give back" };
                self.store.release(vec![(job.id, job.fence)], at).await.unwrap();
                self.facts.push(Fact::Fence { job: job.id, fence: job.fence + 1 });
                "a release"
            }
            Deed::PutOff => {
                let Some(job) = self.take_held() else { return "nothing to give back" };
                self.store.put_off(vec![(job.id, job.fence)], UnixMs(at.0 + 5_000)).await.unwrap();
                self.facts.push(Fact::Fence { job: job.id, fence: job.fence + 1 });
                "a delay"
            }
            Deed::ClaimFanout => {
                let owner = self.store.boot_id();
                self.fanouts.extend(self.store.claim_fanout(owner, at, &[]).await.unwrap());
                "a claimed fan-out"
            }
            Deed::Page => self.page().await,
            Deed::ReleaseFanout => {
                let Some(fanout) = self.fanouts.pop() else { return "no fan-out" };
                self.store.release_fanout(fanout.notification.id, fanout.fence).await.unwrap();
                "a fan-out given back"
            }
            Deed::Cancel => {
                let Some(id) = self.accepted.get(self.random.below(self.accepted.len())).copied() else {
                    return "nothing to cancel";
                };
                self.store.cancel_notification(self.app, id, at).await.unwrap();
                "a cancellation"
            }
            Deed::Import => {
                let (name, token) = (self.anybody(), format!("{:x}", self.random.next()));
                let registration = self.registration(&name, &token);
                let items = vec![
                    ImportItem::Device { registration, created_at: at },
                    ImportItem::OptIn(self.choice(&format!("imported-{}", self.now), true)),
                ];
                let name = "import/people".to_owned();
                let batch = ImportBatch { app: self.app, name, position: self.now, items };
                self.store.import(batch, at).await.unwrap();
                "an import"
            }
            Deed::Retain => {
                // What ended is old enough at once; facts about it end with it.
                self.store.retain(at, at).await.unwrap();
                let mut there = Vec::new();
                for fact in std::mem::take(&mut self.facts) {
                    let gone = match &fact {
                        Fact::Accepted { id, .. } | Fact::Sent { id, .. } => {
                            self.store.get_notification(self.app, *id).await.is_err()
                        }
                        Fact::Chose { .. } | Fact::Registered { .. } | Fact::Fence { .. } => false,
                    };
                    // The blocks may go before their notification.
                    if !gone && !matches!(fact, Fact::Sent { .. }) {
                        there.push(fact);
                    }
                }
                self.facts = there;
                let mut accepted = Vec::new();
                for id in std::mem::take(&mut self.accepted) {
                    if self.store.get_notification(self.app, id).await.is_ok() {
                        accepted.push(id);
                    }
                }
                self.accepted = accepted;
                "retention"
            }
            Deed::Checkpoint | Deed::Hold => unreachable!("done by whoever stands beside"),
        }
    }
}

/// Of what is not finished.
fn pending(job: &Job) -> impl Iterator<Item = nudged::domain::targets::Target> {
    job.targets.iter().enumerate().filter(|(at, _)| !job.progress.is_finished(*at)).map(|(_, target)| *target)
}

fn entries(job: &Job, code: ResultCode) -> Vec<Entry> {
    pending(job).map(|target| Entry { user: target.user, device: target.device, code }).collect()
}
