//! Trouble with the database that is nobody's fault: it is waited out or answered within a caller's deadline, and what was
//! acknowledged is there afterwards.

use std::time::Duration;

use diesel_async::SimpleAsyncConnection;

use super::replicas::{count, eventually, execute, fixture, within};
use super::*;
use crate::domain::outcome::ResultCode;
use crate::storage::conformance::{Engine, World, entries, key, topic, user};

/// A caller's default deadline.
const DEADLINE: Duration = Duration::from_secs(10);

#[tokio::test]
async fn serialization_failures_are_run_again() {
    let database = Database::new().await;
    let name = database.url.rsplit('/').next().unwrap().split('?').next().unwrap();
    execute(&database, &format!("ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")).await;
    let ((a, a_deny), (b, _b_deny)) = (database.open().await, database.open().await);
    let fixture = fixture(&a, &a_deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    let cancelled = a.accept(world.to_users(&["mina"]), Engine::with_room(0), world.now()).await.unwrap().notification;
    let before = failures(&database).await;
    // Every call reads and writes the same few rows; cancels are transactions of their own, beside each other also in one
    // process.
    let mut calls = Vec::new();
    for number in 0..30 {
        for store in [&a, &b] {
            let world = &world;
            calls.push(async move {
                let at = world.now().plus(Duration::from_millis(number));
                store.cancel_notification(world.app, cancelled, at).await.unwrap();
                let mut choice = world.choice("mina", number % 2 == 0);
                choice.observed_at = at;
                store.set_opt_in(choice, at).await.unwrap();
                store.register_device(world.registration("mina", &format!("{number:064x}")), at).await.unwrap();
                let mut event = world.to_users(&["mina"]);
                event.idempotency = Some(key(&format!("key-{number}"), 7));
                store.accept(event, Engine::with_room(0), at).await.unwrap()
            });
        }
    }
    let accepted = futures_util::future::join_all(calls).await;
    assert_eq!(accepted.iter().filter(|one| !one.duplicate).count(), 30);
    assert_eq!(count(&database, "SELECT count(*) FROM notification").await, 31);
    let stands = a.list_opt_ins(world.app, &user("mina")).await.unwrap();
    assert!(!stands[0].opted_in, "the latest stands: {stands:?}");
    // A connection tells what it did when it has been idle for ten seconds, if not before.
    let told = Runtime::production().instant() + Duration::from_secs(20);
    let mut after = before;
    while after <= before && Runtime::production().instant() < told {
        after = failures(&database).await;
    }
    println!("{} transactions were rolled back and run again", after - before);
    assert!(after > before, "there were conflicts");
}

/// Transactions that the server rolled back, counted once its processes have told.
async fn failures(database: &Database) -> i64 {
    Runtime::production().sleep(Duration::from_millis(1_200)).await;
    count(database, "SELECT xact_rollback AS count FROM pg_stat_database WHERE datname = current_database()").await
}

#[tokio::test]
async fn whoever_a_deadlock_chooses_runs_again() {
    let database = Database::new().await;
    // Whoever waits longest looks for one first; it must not look before there is one.
    execute(&database, &format!("ALTER DATABASE {} SET deadlock_timeout = '2s'", database.name)).await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    // A machine that is held up for two seconds misses the moment at which the server looks.
    for tries in 1..=3 {
        world.accept(world.to_users(&["mina"])).await;
        world.accept(world.to_users(&["mina"])).await;
        let mut claimed = world.claim(world.apns, Lane::Interactive).await;
        claimed.sort_by_key(|one| one.job.id);
        let [first, second] = &claimed[..] else { panic!("two jobs") };
        // Somebody locks the second and then wants the first; the store wants them the other way round and waits longest.
        let mut other = database.connect().await;
        let lock = |id: i64| format!("SELECT 1 FROM job WHERE id = {id} FOR UPDATE");
        other
            .batch_execute(&format!(
                "SET statement_timeout = 0; SET lock_timeout = 0; SET deadlock_timeout = '60s'; BEGIN; {}",
                lock(second.job.id.0)
            ))
            .await
            .unwrap();
        let updates = claimed
            .iter()
            .map(|one| world.update(one, entries(&one.job.targets, ResultCode::Sent)))
            .collect::<Vec<_>>();
        let recording = store.record(updates, world.now());
        let crossing = async {
            eventually("the store waits", async || {
                count(
                    &database,
                    "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()",
                )
                .await
                    > 0
            })
            .await;
            other.batch_execute(&lock(first.job.id.0)).await.unwrap();
            other.batch_execute("COMMIT").await.unwrap();
        };
        let (held, ()) = tokio::join!(recording, crossing);
        assert_eq!(held.unwrap(), [true, true], "rolled back, run again, written once");
        assert_eq!(count(&database, "SELECT count(*) FROM outcome_block").await, 2 * tries);
        let deadlocks = "SELECT deadlocks AS count FROM pg_stat_database WHERE datname = current_database()";
        // A session that counted something a second before may tell of it as late as ten seconds after.
        if within(Duration::from_secs(12), async || count(&database, deadlocks).await == 1).await {
            return;
        }
    }
    panic!("there was no deadlock");
}

#[tokio::test]
async fn a_lock_that_is_held_for_long_is_answered_within_the_deadline() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    let mut other = database.connect().await;
    other
        .batch_execute("SET idle_in_transaction_session_timeout = 0; BEGIN; LOCK TABLE opt_in, device, notification")
        .await
        .unwrap();
    let runtime = Runtime::production();
    let begun = runtime.instant();
    let (choice, registration) = (world.choice("mina", false), world.registration("bori", "another"));
    let mina = user("mina");
    let answers = tokio::join!(
        store.set_opt_in(choice.clone(), world.now()),
        store.register_device(registration, world.now()),
        world.try_accept(world.to_users(&["mina"])),
        store.list_opt_ins(world.app, &mina),
    );
    let unavailable = |error: Option<StoreError>| matches!(error, Some(StoreError::Unavailable { .. }));
    assert!(unavailable(answers.0.err()) && unavailable(answers.1.err()), "steps");
    assert!(unavailable(answers.2.err()) && unavailable(answers.3.err()), "events and reads");
    assert!(runtime.instant() - begun < DEADLINE, "{:?}", runtime.instant() - begun);
    other.batch_execute("COMMIT").await.unwrap();
    assert!(store.set_opt_in(choice, world.now()).await.unwrap().1, "it goes on by itself");
}

#[tokio::test]
async fn cut_sessions_are_replaced_and_nothing_acknowledged_is_lost() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    let runtime = Runtime::production();
    let cutting = async {
        for _ in 0..10 {
            runtime.sleep(Duration::from_millis(100)).await;
            execute(
                &database,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() \
                 AND pid <> pg_backend_pid()",
            )
            .await;
        }
    };
    let accepting = async {
        let (mut acknowledged, mut refused) = (0, Vec::new());
        for number in 0..200 {
            let mut event = world.to_users(&["mina"]);
            event.idempotency = Some(key(&format!("key-{number}"), 7));
            match store.accept(event, Engine::with_room(0), world.now()).await {
                Ok(accepted) => {
                    assert!(!accepted.duplicate);
                    acknowledged += 1;
                }
                Err(error) => refused.push(format!("{number}: {error:?}")),
            }
            runtime.sleep(Duration::from_millis(4)).await;
        }
        (acknowledged, refused)
    };
    let ((), (acknowledged, refused)) = tokio::join!(cutting, accepting);
    assert!(acknowledged > 100, "it goes on between the cuts: {acknowledged}, {refused:?}");
    let (stored, jobs) = (
        count(&database, "SELECT count(*) FROM notification").await,
        count(&database, "SELECT count(*) FROM job").await,
    );
    assert!(stored >= acknowledged && stored == jobs, "{acknowledged} acknowledged, {stored} stored, {jobs} jobs");
}

/// A statement's rows come before the COMMIT that it is: what fails there was not accepted, whatever the rows say.
#[tokio::test]
async fn what_fails_at_its_commit_is_not_acknowledged() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    execute(
        &database,
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'at its commit'; END $$; \
         CREATE CONSTRAINT TRIGGER fails_at_commit AFTER INSERT ON idempotency DEFERRABLE INITIALLY DEFERRED \
         FOR EACH ROW EXECUTE FUNCTION fail()",
    )
    .await;
    // Handed over, as a job's row, and with somebody who is left out: a statement each.
    for (room, users) in
        [(1, &["mina"][..]), (0, &["mina"][..]), (1, &["mina", "nobody"][..]), (0, &["mina", "nobody"][..])]
    {
        let mut event = world.to_users(users);
        event.idempotency = Some(key(&format!("{room}-{}", users.len()), 7));
        let accepted = store.accept(event, Engine::with_room(room), world.now()).await;
        assert!(accepted.is_err(), "{accepted:?}, room {room}, {users:?}");
    }
    assert_eq!(count(&database, "SELECT count(*) FROM notification").await, 0);
    assert_eq!(count(&database, "SELECT count(*) FROM open_job").await, 0);
}

/// As when a newer version's first replica migrates: what was prepared before and returns a changed column fails for the life
/// of its session.
#[tokio::test]
async fn a_migration_beside_a_running_replica_costs_it_its_sessions_and_no_call() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    let calls = |round: i64| {
        let (store, world) = (&store, &world);
        async move {
            // First, for a read that fails would replace the session.
            store.set_opt_in(world.choice("mina", round % 2 == 0), world.now()).await.expect("a choice");
            let registered = store.register_device(world.registration("mina", &format!("token-{round}")), world.now());
            registered.await.expect("a registration");
            let topic = topic(&format!("topic-{round}"));
            store
                .set_subscription(world.app, user("mina"), topic, true, world.now(), world.now())
                .await
                .expect("a topic");
            let event = world.to_users(&["mina", &format!("new-{round}")]);
            let accepted = store.accept(event, Engine::with_room(0), world.now()).await.expect("an event");
            let filter = crate::storage::DeliveryFilter::default();
            let page =
                store.list_deliveries(world.app, accepted.notification, filter, None, 10).await.expect("deliveries");
            assert!(page.items.iter().any(|delivery| delivery.user.as_str() == "mina"));
        }
    };
    for round in 0..8 {
        calls(round).await;
    }
    let migration = [
        include_str!("../../../../migrations/postgres/2026-11-30-000006_byte_order/down.sql"),
        include_str!("../../../../migrations/postgres/2026-11-30-000006_byte_order/up.sql"),
    ];
    // Down and up again would leave the columns as they were: each is met.
    for (round, migration) in (8_i64..).zip(migration) {
        execute(&database, migration).await;
        calls(round).await;
    }
}

#[tokio::test]
async fn the_password_is_read_anew_for_each_connection() {
    let database = Database::new().await;
    let runtime = Runtime::production();
    let role = format!("nudged_role_{:016x}", runtime.random_u64());
    let name = database.url.rsplit('/').next().unwrap().split('?').next().unwrap().to_owned();
    execute(&database, &format!("CREATE ROLE {role} LOGIN PASSWORD 'one'; GRANT ALL ON DATABASE {name} TO {role}; GRANT ALL ON SCHEMA public TO {role}")).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "one\n").unwrap();
    let (_, rest) = database.url.split_once('@').unwrap();
    let settings = Settings {
        url: format!("postgres://{role}@{rest}"),
        password_file: Some(file.path().to_owned()),
        ..database.settings()
    };
    let (store, _deny) = database.open_with(&settings).await.unwrap();
    assert!(store.ping().await.is_ok());
    // The password is rotated, and all sessions end.
    execute(&database, &format!("ALTER ROLE {role} PASSWORD 'two'")).await;
    std::fs::write(file.path(), "two").unwrap();
    execute(&database, &format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}'"))
        .await;
    eventually("it connects with the new one", async || store.ping().await.is_ok()).await;
    store.close().await;
    execute(&database, &format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}

#[tokio::test]
async fn a_role_that_may_create_nothing_can_serve_what_another_migrated() {
    let database = Database::new().await;
    let runtime = Runtime::production();
    let (owner, server) = ("CURRENT_USER", format!("nudged_role_{:016x}", runtime.random_u64()));
    let name = database.url.rsplit('/').next().unwrap().split('?').next().unwrap().to_owned();
    execute(&database, &format!("CREATE ROLE {server} LOGIN PASSWORD 'serve'")).await;
    let (_, rest) = database.url.split_once('@').unwrap();
    let settings = Settings { url: format!("postgres://{server}:serve@{rest}"), ..database.settings() };
    // Exactly what docs/scaling.md says.
    let document = include_str!("../../../../docs/scaling.md");
    let (_, rest) = document.split_once("```sql\n").expect("the SQL of the roles");
    let (grants, _) = rest.split_once("```").expect("its end");
    let grants: String = grants.lines().filter(|line| !line.starts_with("CREATE ROLE")).collect::<Vec<_>>().join("\n");
    let grants = grants.replace("nudged_migrate", owner).replace("nudged_serve", &server);
    let grants = grants.replace("DATABASE nudged", &format!("DATABASE {name}"));
    execute(&database, &grants).await;
    let refused = database.open_with(&settings).await.err();
    assert!(matches!(refused, Some(OpenError::Migrate { .. } | OpenError::Read { .. })), "{refused:?}");

    // The owner migrates.
    database.open().await.0.close().await;
    let (store, deny) = database.open_with(&settings).await.unwrap();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    store
        .set_subscription(
            world.app,
            user("mina"),
            crate::storage::conformance::topic("news"),
            true,
            world.now(),
            world.now(),
        )
        .await
        .unwrap();
    let id = world.accept(world.to_users(&["mina"])).await;
    let claimed = world.claim_one().await;
    assert!(world.record(world.update(&claimed, entries(&claimed.job.targets, ResultCode::Sent))).await);
    assert_eq!(world.view(id).await.counts.sent, 1);
    store.retain(world.now(), world.now()).await.unwrap();
    store.begin_restoration("monday", world.now()).await.unwrap();
    assert!(store.confirm_restorations(world.now()).await.unwrap());
    assert!(store.migrations_fit().await.unwrap());
    let mut conn = connect::Target::parse(&settings.url, None).unwrap().connect().await.unwrap();
    let as_an_earlier_version = "RESET nudged.packs; UPDATE device SET locale = 'ko-KR'";
    conn.batch_execute(as_an_earlier_version).await.expect("the triggers need no more than the role may");
    assert!(conn.batch_execute("CREATE TABLE mine (id BIGINT)").await.is_err(), "it may create nothing");
    assert!(conn.batch_execute("DROP TABLE device").await.is_err(), "nor drop");
    drop(conn);
    store.close().await;
    execute(&database, &format!("DROP OWNED BY {server}; DROP ROLE {server}")).await;
}
