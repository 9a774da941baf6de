//! The shared suite, over a link without faults and over one that loses requests and answers, and what only several
//! replicas show.

use std::sync::atomic::AtomicU32;

use super::*;
use crate::domain::platform::Lane;
use crate::storage::conformance::{Engine, Fixture, START, World, entries};
use crate::storage::{ClaimRequest, Queue as _};
use crate::store_conformance;

/// Loses requests and answers by turns, and can be cut.
#[derive(Default)]
struct Rough {
    sent: AtomicU32,
    /// Every so many requests one is lost, and every so many answers; 0: none.
    loses: u32,
    is_cut: AtomicBool,
    /// Answers are lost, and requests arrive.
    is_deaf: AtomicBool,
}

impl Rough {
    fn losing(loses: u32) -> Arc<Self> {
        Arc::new(Self { loses, ..Self::default() })
    }

    fn passes(&self) -> bool {
        let sent = self.sent.fetch_add(1, Ordering::Relaxed) + 1;
        !self.is_cut.load(Ordering::Relaxed) && (self.loses == 0 || !sent.is_multiple_of(self.loses))
    }
}

impl Link for Rough {
    fn there(&self) -> Option<Duration> {
        self.passes().then_some(Duration::ZERO)
    }

    fn back(&self) -> Option<Duration> {
        (self.passes() && !self.is_deaf.load(Ordering::Relaxed)).then_some(Duration::ZERO)
    }
}

/// At the hub after 40 ms, answered after 80.
struct Slow;

impl Link for Slow {
    fn there(&self) -> Option<Duration> {
        Some(Duration::from_millis(40))
    }

    fn back(&self) -> Option<Duration> {
        Some(Duration::from_millis(40))
    }
}

fn hub() -> Arc<Hub> {
    Hub::open(Runtime::simulated(1, START)).unwrap()
}

async fn replica(hub: &Arc<Hub>, seed: u64, link: Arc<dyn Link>) -> Fixture {
    let runtime = Runtime::simulated(seed, START);
    let deny = Arc::new(DenyFeed::shared(runtime.instant().into_std()));
    let store = SharedStore::open(hub, runtime, link, Arc::clone(&deny), false).await.unwrap();
    let boot = store.boot_id();
    Fixture { store: Arc::new(store), deny, boot, kept: Box::new(()) }
}

mod direct {
    use super::*;

    store_conformance!(replica(&hub(), 2, Arc::new(Direct)).await);
}

mod rough {
    use super::*;

    // Five and the two calls of a step have nothing in common: requests and answers are lost in turn.
    store_conformance!({
        tokio::time::pause();
        replica(&hub(), 2, Rough::losing(5)).await
    });
}

fn claim(world: &World<'_>) -> ClaimRequest {
    ClaimRequest { route: world.apns, lane: Lane::Interactive, max_targets: 100, max_jobs: 100 }
}

#[tokio::test(start_paused = true)]
async fn leases_of_a_dead_replica_are_free_after_ten_seconds() {
    let hub = hub();
    let link = Rough::losing(0);
    let (a, b) = (replica(&hub, 2, Arc::clone(&link) as _).await, replica(&hub, 3, Arc::new(Direct)).await);
    let world = World::new(&a).await;
    world.reachable("mina").await;
    world.accept(world.to_users(&["mina"])).await;
    let theirs = world.claim_one().await;
    let claim = async || b.store.claim(claim(&world), b.boot, world.now()).await.unwrap();
    Runtime::production().sleep(Duration::from_secs(5)).await;
    assert!(a.store.is_shared() && b.store.is_shared());
    assert!(claim().await.is_empty(), "its heart beats");
    link.is_cut.store(true, Ordering::Relaxed);
    Runtime::production().sleep(Duration::from_secs(9)).await;
    assert!(claim().await.is_empty(), "it may come back");
    Runtime::production().sleep(Duration::from_secs(4)).await;
    let again = claim().await;
    assert_eq!(again[0].job.id, theirs.job.id);
    assert!(!b.store.is_shared());
    link.is_cut.store(false, Ordering::Relaxed);
    assert!(
        !world
            .record(world.update(&theirs, entries(&theirs.job.targets, crate::domain::outcome::ResultCode::Sent)))
            .await
    );
}

#[tokio::test(start_paused = true)]
async fn what_was_leased_to_nobodys_knowledge_is_freed() {
    let hub = hub();
    let link = Rough::losing(0);
    let a = replica(&hub, 2, Arc::clone(&link) as _).await;
    let world = World::new(&a).await;
    world.reachable("mina").await;
    world.accept(world.to_users(&["mina"])).await;
    link.is_deaf.store(true, Ordering::Relaxed);
    let begun = Runtime::production().instant();
    let lost = world.store().claim(claim(&world), a.boot, world.now()).await.unwrap_err();
    assert!(!lost.is_refusal() && begun.elapsed() + AGAIN >= PATIENCE);
    // Accepted with a lease, and nobody was told.
    let engine = Engine::with_room(9);
    world.store().accept(world.to_users(&["mina"]), Arc::clone(&engine) as _, world.now()).await.unwrap_err();
    assert!(engine.handed_over.lock().unwrap().is_empty());
    link.is_deaf.store(false, Ordering::Relaxed);
    Runtime::production().sleep(Duration::from_secs(3)).await;
    assert_eq!(world.claim(world.apns, Lane::Interactive).await.len(), 2);
}

/// A heart that has something to do besides may have to give up on it.
#[tokio::test(start_paused = true)]
async fn what_nobody_knows_of_is_freed_also_when_the_first_look_for_it_was_given_up() {
    let hub = hub();
    let link = Rough::losing(0);
    let runtime = Runtime::simulated(2, START);
    let deny = Arc::new(DenyFeed::shared(runtime.instant().into_std()));
    let store = SharedStore::open(&hub, runtime, Arc::clone(&link) as _, Arc::clone(&deny), false).await.unwrap();
    let replica = Arc::clone(&store.replica);
    let a = Fixture { boot: store.boot_id(), store: Arc::new(store), deny, kept: Box::new(()) };
    let world = World::new(&a).await;
    world.reachable("mina").await;
    world.accept(world.to_users(&["mina"])).await;
    link.is_deaf.store(true, Ordering::Relaxed);
    world.store().claim(claim(&world), a.boot, world.now()).await.unwrap_err();
    // Another step that leases takes its time, and the sweep waits for it longer than a beat may take.
    let busy = replica.leasing.read().await;
    link.is_deaf.store(false, Ordering::Relaxed);
    Runtime::production().sleep(Duration::from_secs(6)).await;
    drop(busy);
    Runtime::production().sleep(Duration::from_secs(6)).await;
    assert_eq!(world.claim(world.apns, Lane::Interactive).await.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_goes_away_leaves_no_lease() {
    let hub = hub();
    let a = replica(&hub, 2, Arc::new(Direct)).await;
    let world = World::new(&a).await;
    world.reachable("mina").await;
    let b = replica(&hub, 3, Arc::new(Slow)).await;
    let engine = Engine::with_room(9);
    let accepting = b.store.accept(world.to_users(&["mina"]), Arc::clone(&engine) as _, world.now());
    assert!(Runtime::production().timeout(Duration::from_millis(60), accepting).await.is_none());
    assert!(world.claim(world.apns, Lane::Interactive).await.is_empty(), "leased");
    Runtime::production().sleep(Duration::from_secs(3)).await;
    assert_eq!(world.claim(world.apns, Lane::Interactive).await.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_no_reaches_the_other_replicas_and_a_cut_off_one_knows_that_it_may_miss_some() {
    let hub = hub();
    let link = Rough::losing(0);
    let (a, b) = (replica(&hub, 2, Arc::new(Direct)).await, replica(&hub, 3, Arc::clone(&link) as _).await);
    let world = World::new(&a).await;
    let device = world.reachable("mina").await;
    let now = || Runtime::production().instant().into_std();
    Runtime::production().sleep(Duration::from_millis(300)).await;
    assert!(a.deny.is_complete(now()) && b.deny.is_complete(now()));
    let gated = b.deny.position();
    world.store().set_opt_in(world.choice("mina", false), world.now()).await.unwrap();
    let user = crate::domain::ids::UserKey(0);
    let hit = |feed: &DenyFeed, at| {
        let users = feed.since(at).0;
        !users.is_empty() || feed.hit(at, user, device.id, crate::domain::ids::NotificationId(1))
    };
    assert!(hit(&a.deny, gated), "where it was said it is known at once");
    Runtime::production().sleep(Duration::from_millis(201)).await;
    assert!(hit(&b.deny, gated));
    link.is_cut.store(true, Ordering::Relaxed);
    Runtime::production().sleep(Duration::from_millis(801)).await;
    assert!(!b.deny.is_complete(now()), "nothing is handed over any more");
    link.is_cut.store(false, Ordering::Relaxed);
    Runtime::production().sleep(Duration::from_millis(201)).await;
    assert!(b.deny.is_complete(now()));
}

#[tokio::test(start_paused = true)]
async fn due_times_are_told_by_the_callers_clock() {
    let hub = hub();
    let ahead = Runtime::simulated(2, START.plus(Duration::from_secs(4)));
    let deny = Arc::new(DenyFeed::shared(ahead.instant().into_std()));
    let store = SharedStore::open(&hub, ahead, Arc::new(Direct), Arc::clone(&deny), true).await.unwrap();
    let boot = store.boot_id();
    let fixture = Fixture { store: Arc::new(store), deny, boot, kept: Box::new(()) };
    let world = World::new(&fixture).await;
    world.pass(4_000);
    world.reachable("mina").await;
    world.accept(world.to_users(&["mina"])).await;
    let job = world.claim_one().await.job;
    let until = world.now().plus(Duration::from_secs(60));
    world.store().put_off(vec![(job.id, job.fence)], until).await.unwrap();
    assert_eq!(world.store().next_due(world.apns, Lane::Interactive).await.unwrap(), Some(until));
    assert_eq!(hub.store.next_due(world.apns, Lane::Interactive).await.unwrap(), Some(UnixMs(until.0 - 4_000)));
}
