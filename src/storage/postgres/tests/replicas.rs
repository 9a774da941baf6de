//! Several stores on one database.

use std::time::Duration;

use super::*;
use crate::domain::deny::DenyFeed;
use crate::domain::ids::{DeviceId, UserKey};
use crate::domain::outcome::ResultCode;
use crate::storage::conformance::{Engine, World, entries, topic, user};

pub(super) async fn count(database: &Database, sql: &str) -> i64 {
    #[derive(diesel::QueryableByName)]
    struct Count {
        #[diesel(sql_type = diesel::sql_types::BigInt)]
        count: i64,
    }
    let mut conn = database.connect().await;
    let rows: Vec<Count> = diesel_async::RunQueryDsl::load(diesel::sql_query(sql), &mut conn).await.unwrap();
    rows[0].count
}

pub(super) async fn execute(database: &Database, sql: &str) {
    database.connect().await.batch_execute(sql).await.unwrap();
}

/// Until `done`, or panics after ten seconds.
pub(super) async fn eventually(what: &str, done: impl AsyncFnMut() -> bool) {
    assert!(within(Duration::from_secs(10), done).await, "never: {what}");
}

/// Whether it is `done` by then.
pub(super) async fn within(patience: Duration, mut done: impl AsyncFnMut() -> bool) -> bool {
    let runtime = Runtime::production();
    let deadline = runtime.instant() + patience;
    while !done().await {
        if runtime.instant() >= deadline {
            return false;
        }
        runtime.sleep(Duration::from_millis(10)).await;
    }
    true
}

pub(super) fn fixture(store: &Arc<PostgresStore>, deny: &Arc<DenyFeed>) -> Fixture {
    Fixture {
        store: Arc::<PostgresStore>::clone(store),
        deny: Arc::clone(deny),
        boot: store.boot_id(),
        kept: Box::new(()),
    }
}

#[tokio::test]
async fn ten_replicas_start_at_once_on_an_empty_database() {
    let database = Database::new().await;
    let stores = futures_util::future::join_all((0..10).map(|_| database.open())).await;
    assert_eq!(count(&database, "SELECT count(DISTINCT slot) AS count FROM replica WHERE boot_id <> 0").await, 10);
    let keys: Vec<_> = stores
        .iter()
        .map(|(store, _)| store.identity().nudged_id(NotificationId(1 << 40), DeviceId(1 << 40)))
        .collect();
    assert!(keys.windows(2).all(|pair| pair[0] == pair[1]), "one installation, one key");
    for (store, _) in stores {
        store.close().await;
    }
}

#[tokio::test]
async fn a_no_on_one_replica_reaches_the_others_within_a_second() {
    let database = Database::new().await;
    let ((here, here_deny), (_there, there_deny)) = (database.open().await, database.open().await);
    let fixture = fixture(&here, &here_deny);
    let world = World::new(&fixture).await;
    let device = world.reachable("mina").await;
    let gated = there_deny.position();
    let (_, applied) = here.set_opt_in(world.choice("mina", false), world.now()).await.unwrap();
    assert!(applied);
    let said = world.fixture.deny.position();
    assert!(said > crate::domain::deny::DenyPosition(0), "at once where it was said");
    let runtime = Runtime::production();
    let answered = runtime.instant();
    let user = UserKey(count(&database, "SELECT id AS count FROM app_user").await);
    eventually("the other replica hears of it", async || there_deny.hit(gated, user, device.id, NotificationId(1)))
        .await;
    assert!(runtime.instant() - answered < Duration::from_secs(1));
}

#[tokio::test]
async fn a_replica_cut_off_from_the_database_may_hand_over_nothing_after_600_ms() {
    let database = Database::new().await;
    let (store, deny, proxy) = database.open_behind_a_proxy().await;
    let runtime = Runtime::production();
    let complete = || deny.is_complete(runtime.instant().into_std());
    assert!(complete());
    runtime.sleep(Duration::from_secs(1)).await;
    assert!(complete(), "polls go on");
    let cut_at = runtime.instant();
    proxy.cut();
    eventually("the feed counts as incomplete", async || !complete()).await;
    assert!(runtime.instant() - cut_at < Duration::from_millis(700));
    assert!(store.ping().await.is_err(), "/readyz says so");
    proxy.mend();
    eventually("the feed is complete again", async || complete()).await;
    assert!(store.ping().await.is_ok());
}

#[tokio::test]
async fn a_living_replica_renews_its_heartbeat() {
    let database = Database::new().await;
    let (store, _) = database.open().await;
    execute(&database, "UPDATE replica SET heartbeat = heartbeat - 9000").await;
    let fresh = "SELECT count(*) AS count FROM replica WHERE boot_id <> 0 \
         AND heartbeat > (extract(epoch FROM clock_timestamp()) * 1000)::BIGINT - 3000";
    eventually("the next beat says that it lives", async || count(&database, fresh).await == 1).await;
    store.close().await;
}

#[tokio::test]
async fn the_work_of_a_dead_replica_is_taken_up_and_it_can_write_no_more() {
    let database = Database::new().await;
    let ((dead, dead_deny), (alive, alive_deny)) = (database.open().await, database.open().await);
    let theirs = fixture(&dead, &dead_deny);
    let world = World::new(&theirs).await;
    world.reachable("mina").await;
    let id = world.accept(world.to_users(&["mina"])).await;
    let claimed = world.claim_one().await;
    assert_eq!(alive.release_others(alive.boot_id(), world.now()).await.unwrap(), 0, "its heart beats");
    // As a killed process: no more heartbeats, nothing given back.
    dead.inner.context.stopping.cancel();
    for task in &*dead.tasks.lock().unwrap() {
        task.abort();
    }
    execute(&database, "UPDATE replica SET heartbeat = heartbeat - 11000").await;
    let ours = fixture(&alive, &alive_deny);
    eventually("it is claimed by the other", async || {
        let request = ClaimRequest { route: world.apns, lane: Lane::Interactive, max_targets: 10, max_jobs: 10 };
        let again = ours.store.claim(request, ours.boot, world.now()).await.unwrap();
        again.iter().any(|again| again.job.id == claimed.job.id && again.job.fence > claimed.job.fence + 1)
    })
    .await;
    let late = world.update(&claimed, entries(&claimed.job.targets, ResultCode::Sent));
    assert_eq!(alive.record(vec![late], world.now()).await.unwrap(), [false], "the fence holds");
    assert_eq!(ours.store.get_notification(world.app, id).await.unwrap().counts.open, 1);
}

#[tokio::test]
async fn a_graceful_stop_gives_everything_back_at_once() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    world.accept(world.to_users(&["mina"])).await;
    world.claim_one().await;
    assert_eq!(count(&database, "SELECT count(*) FROM job WHERE owner <> 0").await, 1);
    store.close().await;
    assert_eq!(count(&database, "SELECT count(*) FROM job WHERE owner <> 0").await, 0);
    assert_eq!(count(&database, "SELECT count(*) FROM replica WHERE boot_id <> 0").await, 0);
    assert!(matches!(store.ping().await, Err(StoreError::Unavailable { .. })));
}

#[tokio::test]
async fn an_event_whose_commit_was_not_answered_is_not_doubled() {
    let database = Database::new().await;
    let (store, deny, proxy) = database.open_behind_a_proxy().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    for (keyed, hand_off) in [(true, 10), (false, 10), (false, 0)] {
        let before = count(&database, "SELECT count(*) FROM notification").await;
        let engine = Engine::with_room(hand_off);
        let mut event = world.to_users(&["mina"]);
        event.idempotency = keyed.then(|| crate::storage::conformance::key("once", 1));
        // Only the statement that writes them has the words.
        proxy.lose_answer_to("초코님".as_bytes());
        let accepted = store.accept(event, engine.clone(), world.now()).await.unwrap();
        assert!(proxy.is_lost());
        assert!(!accepted.duplicate);
        assert_eq!(count(&database, "SELECT count(*) FROM notification").await, before + 1);
        assert!(engine.handed_over.lock().unwrap().is_empty(), "what was leased then goes to whoever claims it");
        let claimed = world.claim_one().await;
        assert_eq!(claimed.notification.id, accepted.notification);
        assert!(world.record(world.update(&claimed, entries(&claimed.job.targets, ResultCode::Sent))).await);
    }
}

/// The group has more to ask then, for another event's key was used before.
#[tokio::test]
async fn what_a_group_handed_over_before_it_failed_is_not_handed_over_again() {
    let database = Database::new().await;
    let (store, deny, proxy) = database.open_behind_a_proxy().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    // More than go without a row.
    let names: Vec<String> = (0..20).map(|number| format!("u{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    for name in &names {
        world.reachable(name).await;
    }
    let mut keyed = world.to_users(&["u0"]);
    keyed.idempotency = Some(crate::storage::conformance::key("taken", 1));
    let first = store.accept(keyed.clone(), Engine::with_room(0), world.now()).await.unwrap();
    let engine = Engine::with_room(100);
    // What asks for used keys, on its way to the server for the first time.
    proxy.lose_answer_to(b"AS e(place, app, key, now)");
    let (accepted, repeated) = tokio::join!(
        store.accept(world.to_users(&names), engine.clone(), world.now()),
        store.accept(keyed, engine.clone(), world.now()),
    );
    assert!(proxy.is_lost());
    let (accepted, repeated) = (accepted.unwrap(), repeated.unwrap());
    assert_eq!((accepted.duplicate, repeated.duplicate, repeated.notification), (false, true, first.notification));
    let handed = std::mem::take(&mut *engine.handed_over.lock().unwrap());
    let [handed] = &handed[..] else { panic!("{} jobs", handed.len()) };
    assert_eq!((handed.notification.id, handed.job.targets.len()), (accepted.notification, names.len()));
    assert!(store.inner.context.held.lock().unwrap().contains(&handed.job.id.0), "no sweep frees it");
    assert_eq!(world.claim_one().await.notification.id, first.notification, "nobody else gets it");
    let claimed = Claimed { job: handed.job.clone(), notification: Arc::clone(&handed.notification) };
    assert!(world.record(world.update(&claimed, entries(&handed.job.targets, ResultCode::Sent))).await);
}

/// What a group wrote for a few without an answer, the event's own transaction finds when they have become many.
#[tokio::test]
async fn an_event_to_a_topic_that_grows_before_it_is_asked_again_is_not_doubled() {
    let database = Database::new().await;
    let (store, deny, proxy) = database.open_behind_a_proxy().await;
    let (other, _) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    world.subscribe("mina", "post:1").await;
    // So that the group's connection stands.
    world.accept(world.to_users(&["nobody"])).await;
    let engine = Engine::with_room(10);
    proxy.lose_answer_to("초코님".as_bytes());
    proxy.refuse();
    let accepting = store.accept(world.to_topics(&["post:1"]), engine.clone(), world.now());
    let growing = async {
        eventually("it is written", async || count(&database, "SELECT count(*) FROM notification").await == 2).await;
        let subscriptions = (0..subscribers::MOST).map(|number| {
            let name = user(&format!("late-{number}"));
            other.set_subscription(world.app, name, topic("post:1"), true, world.now(), world.now())
        });
        assert!(futures_util::future::join_all(subscriptions).await.iter().all(Result::is_ok));
        proxy.mend();
    };
    let (accepted, ()) = tokio::join!(accepting, growing);
    let accepted = accepted.unwrap();
    assert!(proxy.is_lost());
    assert!(!accepted.duplicate);
    assert_eq!(count(&database, "SELECT count(*) FROM notification").await, 2);
    assert!(engine.handed_over.lock().unwrap().is_empty(), "what was leased then goes to whoever claims it");
    assert_eq!(world.claim_one().await.notification.id, accepted.notification);
    // Now it is for more people than a group takes.
    let id = store.accept(world.to_topics(&["post:1"]), engine, world.now()).await.unwrap().notification;
    assert_eq!(world.view(id).await.people, Some(subscribers::MOST as u64 + 1));
}

#[tokio::test]
async fn a_claim_whose_commit_was_not_answered_is_freed() {
    let database = Database::new().await;
    let (store, deny, proxy) = database.open_behind_a_proxy().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    world.accept(world.to_users(&["mina"])).await;
    let kept = world.claim_one().await;
    let id = world.accept(world.to_users(&["mina"])).await;
    proxy.lose_answer_to(b"COMMIT");
    // The first run leases it for nobody; the second finds nothing free until the heartbeat has looked.
    eventually("it is free again", async || {
        world.claim(world.apns, Lane::Interactive).await.iter().any(|claimed| claimed.notification.id == id)
    })
    .await;
    assert!(proxy.is_lost());
    let update = world.update(&kept, entries(&kept.job.targets, ResultCode::Sent));
    assert!(world.record(update).await, "what the engine held all along stays its own");
}

/// A heart that has something to do besides may have to give up on it.
#[tokio::test]
async fn what_nobody_knows_of_is_freed_also_when_the_first_look_for_it_was_given_up() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    world.accept(world.to_users(&["mina"])).await;
    let lost = world.claim_one().await;
    let context = &store.inner.context;
    // Another step that leases takes its time, and the sweep waits for it longer than a beat may take.
    let busy = context.leasing.read().await;
    context.held.lock().unwrap().remove(&lost.job.id.0);
    context.sweep.ask();
    Runtime::production().sleep(Duration::from_secs(6)).await;
    drop(busy);
    eventually("it is free again", async || !world.claim(world.apns, Lane::Interactive).await.is_empty()).await;
}

/// Nothing but results is one statement, which is its own transaction; a failed attempt besides needs a COMMIT.
#[tokio::test]
async fn results_whose_commit_was_not_answered_are_written_once() {
    let database = Database::new().await;
    let (store, deny, proxy) = database.open_behind_a_proxy().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    for attempts in [0, 1] {
        let id = world.accept(world.to_users(&["mina"])).await;
        let claimed = world.claim_one().await;
        let results = || world.update(&claimed, entries(&claimed.job.targets, ResultCode::Sent));
        let mut update = results();
        if attempts == 0 {
            // The statement has the job's id in it, where its preparation has not.
            proxy.lose_answer_to(Box::leak(Box::new(claimed.job.id.0.to_be_bytes())));
        } else {
            proxy.lose_answer_to(b"COMMIT");
            update.details.push(crate::storage::conformance::queue::attempt(&claimed, "TOKEN_GONE"));
        }
        let blocks = format!("SELECT count(*) FROM outcome_block WHERE notification_id = {}", id.0);
        assert!(world.record(update).await);
        assert!(proxy.is_lost());
        assert_eq!(count(&database, &blocks).await, 1);
        assert_eq!(count(&database, "SELECT count(*) FROM attempt_detail").await, attempts);
        assert_eq!(world.view(id).await.counts.sent, 1);
        // Nothing is lost any more: the job is gone for whoever comes late.
        assert!(!world.record(results()).await);
        assert_eq!(count(&database, &blocks).await, 1);
    }
}

#[tokio::test]
async fn steps_go_on_after_the_connections_were_cut() {
    let database = Database::new().await;
    let (store, deny, proxy) = database.open_behind_a_proxy().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    proxy.cut();
    proxy.mend();
    world.accept(world.to_users(&["mina"])).await;
    proxy.cut();
    let runtime = Runtime::production();
    let begun = runtime.instant();
    let refused = world.try_accept(world.to_users(&["mina"])).await;
    assert!(matches!(refused, Err(StoreError::Unavailable { .. })), "{refused:?}");
    assert!(runtime.instant() - begun < Duration::from_secs(8), "within the caller's deadline");
    proxy.mend();
    world.accept(world.to_users(&["mina"])).await;
    assert_eq!(world.claim(world.apns, Lane::Interactive).await.len(), 2);
}

#[tokio::test]
async fn crossed_keys_from_two_replicas_end_as_duplicates() {
    let database = Database::new().await;
    let ((a, a_deny), (b, _)) = (database.open().await, database.open().await);
    let fixture = fixture(&a, &a_deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    let (mut firsts, mut calls) = (0, Vec::new());
    for round in 0..2 {
        for number in 0..40 {
            let number = if round == 0 { number } else { 39 - number };
            let store = if round == 0 { &a } else { &b };
            let mut event = world.to_users(&["mina"]);
            event.idempotency = Some(crate::storage::conformance::key(&format!("key-{number}"), 7));
            calls.push(store.accept(event, Engine::with_room(0), world.now()));
        }
    }
    for answer in futures_util::future::join_all(calls).await {
        firsts += usize::from(!answer.unwrap().duplicate);
    }
    assert_eq!(firsts, 40);
    assert_eq!(count(&database, "SELECT count(*) FROM notification").await, 40);
}

/// Between the look for the key and its insert: the insert waits for the other's, and finds it.
#[tokio::test]
async fn a_key_that_is_taken_as_its_event_is_written_is_answered_as_a_duplicate() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    let accept = |key: &str| {
        let mut event = world.to_users(&["mina"]);
        event.idempotency = Some(crate::storage::conformance::key(key, 7));
        store.accept(event, Engine::with_room(0), world.now())
    };
    let first = accept("first").await.unwrap();
    let mut other = database.connect().await;
    let take = "BEGIN; INSERT INTO idempotency (app, key, hash_version, hash, notification_id, expires_at) \
                SELECT app, 'taken', hash_version, hash, notification_id, expires_at FROM idempotency WHERE key = 'first'";
    other.batch_execute(take).await.unwrap();
    let commit = async {
        eventually("the event waits for its key", async || {
            let waiting = "SELECT count(*) FROM pg_stat_activity \
                           WHERE datname = current_database() AND wait_event_type = 'Lock'";
            count(&database, waiting).await > 0
        })
        .await;
        other.batch_execute("COMMIT").await.unwrap();
    };
    let (second, ()) = tokio::join!(accept("taken"), commit);
    let second = second.unwrap();
    assert!(second.duplicate);
    assert_eq!(second.notification, first.notification);
    assert_eq!(count(&database, "SELECT count(*) FROM notification").await, 1);
    assert_eq!(count(&database, "SELECT count(*) FROM job").await, 1);
}

#[tokio::test]
async fn two_replicas_that_race_for_a_person_or_a_token_agree() {
    let database = Database::new().await;
    let ((a, a_deny), (b, _)) = (database.open().await, database.open().await);
    let fixture = fixture(&a, &a_deny);
    let world = World::new(&fixture).await;
    for number in 0..20 {
        let (mina, bori) = (format!("mina-{number}"), format!("bori-{number}"));
        let token = format!("{number:064x}");
        let (one, other) = tokio::join!(
            a.register_device(world.registration(&mina, &token), world.now()),
            b.register_device(world.registration(&bori, &token), world.now()),
        );
        one.unwrap();
        other.unwrap();
        let (yes, no) = tokio::join!(
            a.set_opt_in(world.choice(&mina, true), world.now()),
            b.set_opt_in(world.choice(&mina, false), world.now()),
        );
        yes.unwrap();
        no.unwrap();
        let choices = a.list_opt_ins(world.app, &crate::storage::conformance::user(&mina)).await.unwrap();
        assert!(!choices[0].opted_in, "a tie is a no, whoever came first");
    }
    let active = "SELECT count(*) FROM device WHERE state = 1";
    assert_eq!(count(&database, active).await, 20, "a token is one person's");
}

#[tokio::test]
async fn a_busy_pool_refuses_rather_than_piling_up() {
    let database = Database::new().await;
    let (store, _deny) = database.open().await;
    let mut held = Vec::new();
    for _ in 0..database.settings().pool {
        held.push(store.inner.connection("holding one").await.unwrap());
    }
    let runtime = Runtime::production();
    let begun = runtime.instant();
    assert!(store.ping().await.is_err());
    assert!(runtime.instant() - begun < Duration::from_secs(6));
    drop(held);
    assert!(store.ping().await.is_ok());
}

/// A replica whose clock was ahead of the server's asked without a pause until what it took for due was due.
#[tokio::test]
async fn due_times_are_told_by_the_callers_clock() {
    let database = Database::new().await;
    let ahead = Runtime::simulated(7, Runtime::production().now().plus(Duration::from_secs(4)));
    let deny = Arc::new(DenyFeed::shared(ahead.instant().into_std()));
    let settings = Settings { server_clock: true, ..database.settings() };
    let store = Arc::new(PostgresStore::open(ahead.clone(), &settings, Arc::clone(&deny)).await.unwrap());
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.now.store(ahead.now().0, Ordering::Relaxed);
    world.reachable("mina").await;
    world.accept(world.to_users(&["mina"])).await;
    let mut job = Vec::new();
    eventually("the heartbeat tells the clocks apart", async || {
        job = world.claim(world.apns, Lane::Interactive).await;
        !job.is_empty()
    })
    .await;
    let until = world.now().plus(Duration::from_secs(60));
    store.put_off(vec![(job[0].job.id, job[0].job.fence)], until).await.unwrap();
    let due = store.next_due(world.apns, Lane::Interactive).await.unwrap().unwrap();
    assert!((due.0 - until.0).abs() < 1_000, "{} ms off", due.0 - until.0);
    store.close().await;
}

/// The API drops a call whose client is gone; COMMIT may be on its way by then, with a lease that nobody is told of.
#[tokio::test]
async fn a_caller_that_goes_away_leaves_no_lease() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    world.subscribe("mina", "author:choco").await;
    let engine = Engine::with_room(1_000);
    for try_no in 0..200 {
        let accepting = store.accept(world.to_topics(&["author:choco"]), engine.clone(), world.now());
        let _ = Runtime::production().timeout(Duration::from_micros(40 * try_no), accepting).await;
    }
    let leased = "SELECT count(*) FROM job WHERE owner <> 0";
    eventually("only what was handed over is leased", async || {
        let handed_over = engine.handed_over.lock().unwrap().len();
        count(&database, leased).await == i64::try_from(handed_over).unwrap()
    })
    .await;
    store.close().await;
}
