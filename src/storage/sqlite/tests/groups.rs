//! Group commit's corner cases. A pause of the writer lets a test form a group at will.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::{join, join_all};

use super::*;
use crate::domain::notification::{HandedOver, NewEvent, NoHandOff, Permit};
use crate::storage::StoreError;
use crate::storage::conformance::{Engine, World, key};
use crate::storage::sqlite::fail::Fail;
use crate::storage::sqlite::group::CommitFault;

/// Runs all of `steps` in one group and answers what they answered.
async fn in_one_group<F: Future>(store: &SqliteStore, steps: Vec<F>) -> Vec<F::Output> {
    let pause = store.writer.pause();
    let count = steps.len();
    let go = async {
        while store.writer.waiting() < count {
            tokio::task::yield_now().await;
        }
        drop(pause);
    };
    join(join_all(steps), go).await.0
}

/// A step that inserts a row and then does as it is told.
async fn scripted(store: &SqliteStore, name: &'static str, end: fn() -> Attempt<()>) -> Result<()> {
    store
        .write(Class::Consent, SMALL, "being scripted", move |tx| {
            insert_pause(tx, name)?;
            end()
        })
        .await
}

fn insert_pause(tx: &mut Tx<'_>, name: &str) -> Attempt<()> {
    tx.execute(constant!(
        (); "INSERT INTO pause (name, since, reason) VALUES (?1, 0, '')", diesel::sql_types::Text => name,
    ))?;
    Ok(())
}

async fn rows(store: &SqliteStore) -> Vec<String> {
    let read = |conn: &mut SqliteConnection| {
        Ok(constant!(diesel::sql_types::Text; "SELECT name FROM pause ORDER BY name").load::<String>(conn)?)
    };
    store.read(Asker::Caller, "reading a test's rows", read).await.unwrap()
}

/// The end of a step that does what it should.
const FINE: fn() -> Attempt<()> = || Ok(());

#[tokio::test]
async fn the_same_key_twice_in_one_group_is_one_event() {
    let on_file = on_file();
    let fixture = fixture(&on_file.store, &on_file.deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    let event = |hash| NewEvent { idempotency: Some(key("k", hash)), ..world.to_users(&["mina"]) };
    let steps = [1, 1, 2, 1].map(|hash| world.try_accept(event(hash))).into_iter().collect();
    let answers = in_one_group(&on_file.store, steps).await;
    let first = answers[0].as_ref().unwrap();
    assert!(!first.duplicate);
    for again in [&answers[1], &answers[3]] {
        let again = again.as_ref().unwrap();
        assert!(again.duplicate && again.notification == first.notification);
    }
    assert!(matches!(answers[2], Err(StoreError::IdempotencyKeyReused { .. })));
    assert_eq!(world.store().backlog(world.now()).await.unwrap().jobs, 1);
}

#[tokio::test]
async fn one_bad_request_fails_alone() {
    let on_file = on_file();
    for store in [Arc::clone(&on_file.store), in_memory().0] {
        let steps = vec![
            scripted(&store, "a", FINE),
            scripted(&store, "bad", || Err(Fail::Database(diesel::result::Error::RollbackTransaction))),
            scripted(&store, "b", FINE),
            scripted(&store, "corrupt", || Err(Fail::corrupt("unreadable"))),
            scripted(&store, "a", FINE),
            scripted(&store, "late refusal", || Err(StoreError::BroadcastNotAllowed.into())),
            scripted(&store, "c", FINE),
        ];
        let answers = in_one_group(&store, steps).await;
        assert!(answers[0].is_ok() && answers[2].is_ok() && answers[6].is_ok());
        assert!(matches!(answers[1], Err(StoreError::Unavailable { .. })));
        assert!(matches!(answers[3], Err(StoreError::Corrupt { .. })));
        assert!(matches!(answers[4], Err(StoreError::Unavailable { .. })), "a row twice");
        assert!(matches!(answers[5], Err(StoreError::BroadcastNotAllowed)), "and yet nothing of it is left");
        assert_eq!(rows(&store).await, ["a", "b", "c"]);
    }
}

#[tokio::test]
async fn a_panic_in_one_request_leaves_the_others() {
    let on_file = on_file();
    for store in [Arc::clone(&on_file.store), in_memory().0] {
        let steps = vec![
            scripted(&store, "a", FINE),
            scripted(&store, "bad", || panic!("as the test wants")),
            scripted(&store, "b", FINE),
        ];
        let answers = in_one_group(&store, steps).await;
        assert!(answers[0].is_ok() && answers[2].is_ok());
        assert!(matches!(answers[1], Err(StoreError::Unavailable { .. })));
        assert_eq!(rows(&store).await, ["a", "b"]);
        store.ping().await.unwrap();
    }
}

#[tokio::test]
async fn a_panic_in_a_read_leaves_the_reader() {
    let on_file = on_file();
    for _ in 0..8 {
        let panics = |conn: &mut SqliteConnection| snapshot(conn, |_| -> Attempt<()> { panic!("as the test wants") });
        let answer = on_file.store.read(Asker::Caller, "panicking", panics).await;
        assert!(matches!(answer, Err(StoreError::Unavailable { .. })));
    }
    on_file.store.ping().await.unwrap();
}

#[tokio::test]
async fn a_dropped_caller_changes_nothing() {
    let on_file = on_file();
    let pause = on_file.store.writer.pause();
    {
        let mut step = std::pin::pin!(scripted(&on_file.store, "a", FINE));
        assert!(futures_util::poll!(step.as_mut()).is_pending());
    }
    assert_eq!(on_file.store.writer.waiting(), 1);
    drop(pause);
    scripted(&on_file.store, "b", FINE).await.unwrap();
    assert_eq!(rows(&on_file.store).await, ["a", "b"]);
}

#[tokio::test]
async fn a_re_run_takes_the_same_ids_and_its_effects_happen_once() {
    type Step<'a> = std::pin::Pin<Box<dyn Future<Output = Result<Option<Accepted>>> + 'a>>;
    /// Counts the permits that are held.
    struct Counting {
        engine: Arc<Engine>,
        held: Arc<AtomicUsize>,
        given: AtomicUsize,
    }
    struct Guard(Arc<AtomicUsize>);
    impl Drop for Guard {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }
    impl HandOff for Counting {
        fn try_permit(&self, _: RouteId, _: Lane, _: usize) -> Option<Permit> {
            self.held.fetch_add(1, Ordering::SeqCst);
            self.given.fetch_add(1, Ordering::SeqCst);
            Some(Permit::new(Box::new(Guard(Arc::clone(&self.held)))))
        }
        fn deliver(&self, job: HandedOver) {
            self.engine.deliver(job);
        }
        fn wake_jobs(&self, _: RouteId, _: Lane) {}
        fn wake_fanout(&self) {}
    }

    let on_file = on_file();
    let fixture = fixture(&on_file.store, &on_file.deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    let engine = Arc::new(Counting { engine: Engine::with_room(0), held: Arc::default(), given: AtomicUsize::new(0) });
    let taken = Arc::new(Mutex::new(Vec::new()));
    let theirs = Arc::clone(&taken);
    let now = world.now();
    let probe = async {
        on_file
            .store
            .write(Class::Accept, SMALL, "taking ids", move |tx| {
                theirs.lock().unwrap().push((tx.next_id(now), tx.next_device(now)));
                tx.deny(crate::domain::deny::DenyKey::Device(DeviceId(4711)));
                Ok(())
            })
            .await
            .map(|()| None)
    };
    let event = world.to_users(&["mina"]);
    let accept = async {
        let engine: Arc<dyn HandOff> = Arc::<Counting>::clone(&engine);
        on_file.store.accept(event, engine, now).await.map(Some)
    };
    let bad = async {
        scripted(&on_file.store, "bad", || Err(Fail::Database(diesel::result::Error::RollbackTransaction)))
            .await
            .map(|()| None)
    };
    let steps: Vec<Step<'_>> = vec![Box::pin(probe), Box::pin(accept), Box::pin(bad)];
    let before = on_file.deny.position();
    let answers = in_one_group(&on_file.store, steps).await;
    assert!(answers[0].is_ok() && answers[2].is_err());
    let id = answers[1].as_ref().unwrap().unwrap().notification;
    let taken = taken.lock().unwrap();
    assert_eq!(taken.len(), 2, "the group ran twice");
    assert_eq!(taken[0], taken[1]);
    assert_eq!(on_file.deny.position().0, before.0 + 1, "published once");
    assert_eq!(engine.given.load(Ordering::SeqCst), 2);
    assert_eq!(engine.held.load(Ordering::SeqCst), 1, "the first run's permit was given back");
    let mut handed_over = engine.engine.handed_over.lock().unwrap();
    assert_eq!(handed_over.len(), 1);
    assert_eq!(handed_over[0].notification.id, id);
    handed_over.clear();
    drop(handed_over);
    assert_eq!(engine.held.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn an_unknown_outcome_stops_the_store_and_the_next_start_knows() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nudged.db");
    let open = || {
        let runtime = Runtime::simulated(1, START);
        Arc::new(SqliteStore::open(runtime, &settings(&path), Arc::default()).unwrap())
    };
    let store = open();
    let fixture_one = fixture(&store, &Arc::default());
    let world = World::new(&fixture_one).await;
    world.reachable("mina").await;
    let event = NewEvent { idempotency: Some(key("k", 1)), ..world.to_users(&["mina"]) };
    store.writer.inline_core().commit_fault = Some(CommitFault::LostAnswer);
    assert!(futures_util::poll!(std::pin::pin!(store.fatal())).is_pending());
    assert!(matches!(world.try_accept(event.clone()).await, Err(StoreError::Unavailable { .. })));
    assert!(store.fatal().await.contains("I/O"));
    assert!(matches!(world.try_accept(event.clone()).await, Err(StoreError::Unavailable { .. })));
    assert!(matches!(store.ping().await, Err(StoreError::Unavailable { .. })));
    assert!(matches!(world.store().backlog(world.now()).await, Err(StoreError::Unavailable { .. })));
    drop(fixture_one);
    drop(store);
    let store = open();
    let fixture_two = fixture(&store, &Arc::default());
    let world = World::new(&fixture_two).await;
    assert!(world.try_accept(event).await.unwrap().duplicate, "it had happened");
}

#[tokio::test]
async fn a_full_disk_refuses_and_the_store_lives() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let event = NewEvent { idempotency: Some(key("k", 1)), ..world.to_users(&["mina"]) };
    store.writer.inline_core().commit_fault = Some(CommitFault::DiskFull);
    assert!(matches!(world.try_accept(event.clone()).await, Err(StoreError::DiskFull)));
    assert!(!world.try_accept(event).await.unwrap().duplicate, "nothing was written");
}

#[tokio::test]
async fn importance_decides_and_nothing_starves() {
    let directory = tempfile::tempdir().unwrap();
    let settings = Settings { group_max: 8, ..settings(&directory.path().join("nudged.db")) };
    let store = SqliteStore::open(Runtime::production(), &settings, Arc::default()).unwrap();
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut steps = Vec::new();
    for (class, count) in [(Class::Retention, 3), (Class::Page, 3), (Class::Outcome, 30), (Class::Accept, 30)] {
        for _ in 0..count {
            let order = Arc::clone(&order);
            steps.push(store.write(class, SMALL, "being counted", move |_| {
                order.lock().unwrap().push(class);
                Ok(())
            }));
        }
    }
    let total = steps.len();
    in_one_group(&store, steps).await;
    let order = order.lock().unwrap();
    assert_eq!(order.len(), total);
    let count = |part: &[Class], class| part.iter().filter(|other| **other == class).count();
    for group in 0..3 {
        let group = &order[8 * group..8 * group + 8];
        assert_eq!(count(group, Class::Accept), 5);
        assert_eq!(count(group, Class::Outcome), 1);
        assert_eq!(count(group, Class::Page), 1);
        assert_eq!(count(group, Class::Retention), 1);
        assert_eq!(group[0], Class::Accept, "importance first within a group too");
    }
}

#[tokio::test]
async fn a_full_queue_refuses_events_before_consent_and_lets_our_own_work_wait() {
    let directory = tempfile::tempdir().unwrap();
    let queue = QueueLimits { max_requests: 8, max_bytes: 1 << 20 };
    let settings = Settings { queue, ..settings(&directory.path().join("nudged.db")) };
    let store = SqliteStore::open(Runtime::production(), &settings, Arc::default()).unwrap();
    let pause = store.writer.pause();
    let step = |class, bytes| Box::pin(store.write(class, bytes, "waiting", |_| Ok(())));
    let overloaded = |answer| matches!(answer, std::task::Poll::Ready(Err(StoreError::Overloaded { .. })));
    let mut waiting: Vec<_> = (0..7).map(|_| step(Class::Accept, 1)).collect();
    for step in &mut waiting {
        assert!(futures_util::poll!(step.as_mut()).is_pending());
    }
    assert!(overloaded(futures_util::poll!(step(Class::Accept, 1).as_mut())));
    let mut consent = step(Class::Consent, 1);
    assert!(futures_util::poll!(consent.as_mut()).is_pending());
    assert!(overloaded(futures_util::poll!(step(Class::Consent, 1).as_mut())));
    waiting.push(consent);
    // By bytes, too.
    let mut large = step(Class::Page, 2 << 20);
    assert!(futures_util::poll!(large.as_mut()).is_pending());
    waiting.push(large);
    assert_eq!(store.writer.waiting(), 9, "one alone may be larger than the bound");
    let mut later = step(Class::Page, 1);
    assert!(futures_util::poll!(later.as_mut()).is_pending());
    assert_eq!(store.writer.waiting(), 9, "it waits for room outside");
    waiting.push(later);
    drop(pause);
    assert!(join_all(waiting).await.into_iter().all(|answer| answer.is_ok()));
}

#[tokio::test]
async fn closing_writes_what_is_queued() {
    let on_file = on_file();
    let pause = on_file.store.writer.pause();
    let mut step = Box::pin(scripted(&on_file.store, "a", FINE));
    assert!(futures_util::poll!(step.as_mut()).is_pending());
    std::mem::forget(pause);
    on_file.store.close();
    step.await.unwrap();
    let late = on_file.store.accept(blank(), Arc::new(NoHandOff), START);
    assert!(matches!(late.await, Err(StoreError::Unavailable { .. })));
    let OnFile { store, directory, .. } = on_file;
    drop(store);
    assert_eq!(rows(&open_in(directory).store).await, ["a"]);
}

/// An event for nobody.
fn blank() -> NewEvent {
    NewEvent {
        app: AppKey(1),
        event_type: EventType::trusted("a"),
        type_version: None,
        default_opt_in: true,
        lane: None,
        on_maybe: crate::domain::event_type::OnMaybe::Retry,
        idempotency: None,
        audience: crate::domain::notification::Audience::default(),
        actor: None,
        body: Arc::default(),
        priority: crate::domain::sending::Priority::High,
        collapse_key: None,
        event_at: START,
        not_before: None,
        expires_at: START,
        max_audience: None,
        may_broadcast: false,
    }
}

#[tokio::test]
async fn imports_wait_for_live_traffic_but_not_for_ever() {
    let on_file = on_file();
    let store = &*on_file.store;
    let order = Arc::new(Mutex::new(Vec::new()));
    let step = |class: Class, name: &'static str| {
        let order = Arc::clone(&order);
        store.write(class, SMALL, name, move |_| {
            order.lock().unwrap().push(name);
            Ok(())
        })
    };
    // Ten groups' worth of live steps, and imports that were there first.
    let live = 10 * open::Settings::file("unused").group_max;
    let mut steps: Vec<_> = (0..5).map(|_| step(Class::Import, "import")).collect();
    steps.extend((0..live).map(|_| step(Class::Consent, "live")));
    for answer in in_one_group(store, steps).await {
        answer.unwrap();
    }
    let order = order.lock().unwrap();
    let first = order.iter().position(|name| *name == "import").unwrap();
    assert!(first > live / 2, "live traffic goes first: {first} of {live}");
    assert!(order[first..].contains(&"live"), "an import does not starve");
}
