//! What the hot statements touch in a database of a million people: the server's own counters, after the store did its
//! work and closed its connections, say that nothing was scanned.

use super::*;
use crate::domain::content::Content;
use crate::domain::device::Retirement;
use crate::domain::ids::UserKey;
use crate::domain::notification::Audience;
use crate::domain::outcome::ResultCode;
use crate::domain::plan::plan;
use crate::storage::conformance::{Engine, START, World, comment, entries, topic, user};

const PEOPLE: i64 = 1_000_000;

/// Everybody has a device and a choice and follows one topic; open work on another route, and history.
///
/// `people` of them, and a fifth as much work and history.
async fn fill(database: &Database, world: &World<'_>, people: i64) {
    let work = people / 5;
    let (app, apns, fcm) = (world.app.0, world.apns.0, world.fcm.0);
    let now = START.0;
    let route = format!("{:016x}", apns.swap_bytes());
    let statements = [
        format!(
            "INSERT INTO app_user (id, app, external_id, created_at, reach) SELECT id, {app}, 'person-' || n, {now}, \
             '\\x0101010001'::BYTEA || set_byte(set_byte(set_byte(set_byte('\\x0000000000000000'::BYTEA, \
             0, id & 255), 1, id >> 8 & 255), 2, id >> 16 & 255), 3, id >> 24 & 255) \
             || '\\x{route}0020'::BYTEA || convert_to(md5(n::TEXT), 'UTF8') || '\\x00'::BYTEA \
             FROM (SELECT n, (1000000000 + n)::INTEGER AS id FROM generate_series(1, {people}) AS n) AS made"
        ),
        format!(
            "INSERT INTO device (id, app, platform, user_key, route, kind, token_hash, token_sealed, observed_at, \
             confirmed_at, state, created_at) SELECT 1000000000 + n, {app}, 1, 1000000000 + n, {apns}, 1, \
             decode(md5(n::TEXT), 'hex'), convert_to(md5(n::TEXT), 'UTF8'), {now}, {now}, 1, {now} \
             FROM generate_series(1, {people}) AS n"
        ),
        format!(
            "INSERT INTO opt_in (user_key, app, opted_in, observed_at, recorded_at) \
             SELECT 1000000000 + n, {app}, 1, {now}, {now} FROM generate_series(1, {people}) AS n"
        ),
        format!("INSERT INTO topic (id, app, name) VALUES (77, {app}, 'everybody')"),
        format!(
            "INSERT INTO subscription (topic, user_key, active, observed_at, recorded_at) \
             SELECT 77, 1000000000 + n, 1, {now}, {now} FROM generate_series(1, {people}) AS n"
        ),
        format!(
            "INSERT INTO notification (id, app, event_type, default_opt_in, lane, priority, content, event_at, \
             accepted_at, expires_at) SELECT 1000000000 + n, {app}, 'comment.created', 1, 0, 0, '{{}}', {now}, {now}, \
             {now} FROM generate_series(1, {work}) AS n"
        ),
        format!(
            "INSERT INTO job (id, app, notification_id, route, lane, format, ready_at, due_at, first_user, last_user, \
             target_count, targets) SELECT 1000000000 + n, {app}, 1000000000 + n, {fcm}, 0, 1, {now}, {now} + n, 1, 2, \
             1, ''::BYTEA FROM generate_series(1, {work}) AS n"
        ),
        format!(
            "INSERT INTO outcome_block (id, app, notification_id, first_user, last_user, at, entries) \
             SELECT 1000000000 + n, {app}, 1000000000 + n, 1, 2, 1, '\\x01'::BYTEA FROM generate_series(1, {work}) AS n"
        ),
        format!(
            "INSERT INTO idempotency (app, key, hash_version, hash, notification_id, expires_at) \
             SELECT {app}, 'key-' || n, 1, ''::BYTEA, 1000000000 + n, {now} FROM generate_series(1, {work}) AS n"
        ),
    ];
    let mut conn = database.connect().await;
    conn.batch_execute("SET statement_timeout = 0; SET synchronous_commit = off; SET enable_hashjoin = on")
        .await
        .unwrap();
    for statement in statements {
        conn.batch_execute(&statement).await.unwrap();
    }
    // What is packed of them is what the store would have.
    let few: Vec<UserKey> = (1..=70_000).step_by(7_000).map(|n| UserKey(1_000_000_000 + n)).collect();
    let rows = reach::by_rows(&mut conn, &comment(), &few).await.unwrap();
    let packed = reach::of_users(&mut conn, &comment(), &few).await.unwrap();
    assert_eq!((packed.people, packed.facts), (rows.people, rows.facts));
}

/// Rows that were read by scans and through indexes so far, by table.
async fn rows_read(database: &Database) -> HashMap<String, (i64, i64)> {
    let mut conn = database.connect().await;
    let rows: Vec<(String, i64, i64)> = constant!(
        (diesel::sql_types::Text, diesel::sql_types::BigInt, diesel::sql_types::BigInt);
        "SELECT relname::TEXT, seq_tup_read, coalesce(idx_tup_fetch, 0) FROM pg_stat_user_tables"
    )
    .load(&mut conn)
    .await
    .unwrap();
    rows.into_iter().map(|(table, scanned, fetched)| (table, (scanned, fetched))).collect()
}

/// [`rows_read`], once it nearly stands still: a server process tells its counts up to a second late, or when it ends.
/// An open store's heartbeat reads a few rows a second.
async fn settled(database: &Database) -> HashMap<String, (i64, i64)> {
    let mut last = rows_read(database).await;
    loop {
        crate::runtime::Runtime::production().sleep(std::time::Duration::from_millis(1_200)).await;
        let now = rows_read(database).await;
        let total =
            |counts: &HashMap<String, (i64, i64)>| counts.values().map(|(scans, reads)| scans + reads).sum::<i64>();
        if total(&now) - total(&last) < 100 {
            return now;
        }
        last = now;
    }
}

#[tokio::test]
async fn the_hot_statements_scan_nothing_among_a_million_people() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let boot = store.boot_id();
    let filled = Fixture { store: Arc::<PostgresStore>::clone(&store), deny, boot, kept: Box::new(()) };
    let world = World::new(&filled).await;
    fill(&database, &world, PEOPLE).await;
    let mut conn = database.connect().await;
    conn.batch_execute("SET statement_timeout = 0").await.unwrap();
    conn.batch_execute("VACUUM ANALYZE").await.unwrap();
    drop(conn);
    // What it and the filling read must be counted before the measurement begins.
    store.close().await;

    // A store of its own, so that its counters are all written when it is closed.
    let (store, deny) = database.open().await;
    let before = settled(&database).await;
    let boot = store.boot_id();
    let measured = Fixture { store: Arc::<PostgresStore>::clone(&store), deny, boot, kept: Box::new(()) };
    let world = World { fixture: &measured, app: world.app, apns: world.apns, fcm: world.fcm, now: START.0.into() };
    let watched_from = store.watch(world.app, None, &crate::storage::WatchFilter::default(), 1).await.unwrap().position;
    let now = world.now();
    for number in 0..10 {
        let name = format!("person-{}", 1 + number * 99_991);
        let mut event = world.to_users(&[&name]);
        event.idempotency = Some(crate::storage::conformance::key(&format!("new-{number}"), 1));
        store.accept(event, Engine::with_room(0), now).await.unwrap();
        store.register_device(world.registration(&name, &format!("new-token-{number}")), now).await.unwrap();
        store.set_opt_in(world.choice(&name, number % 2 == 0), now).await.unwrap();
        store.set_subscription(world.app, user(&name), topic("few"), true, now, now).await.unwrap();
    }
    store.accept(world.to_topics(&["few"]), Engine::with_room(0), now).await.unwrap();
    let claimed = world.claim(world.apns, Lane::Interactive).await;
    assert_eq!(claimed.len(), 11);
    for claimed in &claimed {
        let targets = &claimed.job.targets;
        let facts = store.gate_facts(claimed.notification.id, &claimed.notification.event_type, targets).await.unwrap();
        assert_eq!(facts.facts.len(), targets.len());
    }
    let updates = claimed.iter().map(|one| world.update(one, entries(&one.job.targets, ResultCode::Sent))).collect();
    assert!(store.record(updates, now).await.unwrap().iter().all(|held| *held));
    assert!(store.next_due(world.fcm, Lane::Interactive).await.unwrap().is_some());

    let mut everybody = world.to_topics(&["everybody"]);
    everybody.body = Arc::new(crate::domain::notification::Body { content: Content::default(), ..Default::default() });
    assert_eq!(everybody.audience.topics.len(), 1, "{:?}", Audience::default());
    store.accept(everybody, Engine::with_room(0), now).await.unwrap();
    let mut fanout = store.claim_fanout(boot, now, &[]).await.unwrap().unwrap();
    for _ in 0..5 {
        let page = store.fanout_page(&fanout, 1_000).await.unwrap();
        assert_eq!(page.people.len(), 1_000);
        let planned = plan(&page.people, &fanout.notification.rules(), now);
        let job = |(route, targets)| crate::domain::notification::NewJob {
            notification: fanout.notification.id,
            route,
            lane: Lane::Bulk,
            targets,
            attempt: 0,
            claims: 0,
            ready_at: now,
            due_at: now,
            first_attempt_at: None,
        };
        let write = PageWrite {
            app: world.app,
            notification: fanout.notification.id,
            fence: fanout.fence,
            cursor: page.cursor,
            done: page.done,
            jobs: planned.jobs.into_iter().map(job).collect(),
            leased: 0,
            suppressed: planned.suppressed,
        };
        assert!(store.write_page(write, now).await.unwrap().is_some());
        fanout.cursor = page.cursor;
    }
    // A page of a watcher far behind, and one of a quiet filter.
    let from = crate::domain::watch::WatchPosition { transaction: 1, ..watched_from };
    let filter = crate::storage::WatchFilter::default();
    // Databases that other tests make and drop are transactions of the same server, and hold the horizon.
    let runtime = crate::runtime::Runtime::production();
    let deadline = runtime.instant() + std::time::Duration::from_secs(120);
    while !store.watch(world.app, Some(from), &filter, 100).await.unwrap().more {
        assert!(runtime.instant() < deadline, "no result is below the horizon");
        runtime.sleep(std::time::Duration::from_millis(500)).await;
    }
    let filter = crate::storage::WatchFilter { user: Some(user("few-1")), ..filter };
    store.watch(world.app, Some(from), &filter, 100).await.unwrap();
    store.close().await;

    let mut fetched = 0;
    for (table, (scans, fetches)) in settled(&database).await {
        // A handful of rows each, which an open store reads several times a second, however long the wait above was.
        if ["deny", "replica"].contains(&table.as_str()) {
            continue;
        }
        let (scans_before, fetches_before) = before.get(&table).copied().unwrap_or_default();
        assert!(scans - scans_before < 500, "{} rows of {table} were read by sequential scans", scans - scans_before);
        fetched += fetches - fetches_before;
    }
    println!("{fetched} rows read through indexes among {PEOPLE} people");
    // Five pages of a thousand people: subscription and person. The rest is small.
    assert!(fetched < 20_000, "{fetched} rows were read through indexes");
}

/// What callers and the engine do all day, for ten people of their own, one of whom is not packed.
async fn a_day(database: &Database, world: &World<'_>, round: usize) {
    let (store, now, app) = (world.store(), world.now(), world.app);
    let mut first = None;
    for number in 0..10 {
        let name = format!("busy-{round}-{number}");
        store.register_device(world.registration(&name, &format!("token-{round}-{number}")), now).await.unwrap();
        store.set_opt_in(world.choice(&name, true), now).await.unwrap();
        store.set_subscription(app, user(&name), topic("few"), true, now, now).await.unwrap();
        let mut event = world.to_users(&[&name]);
        event.idempotency = Some(crate::storage::conformance::key(&format!("key-{round}-{number}"), 1));
        if number == 9 {
            let unpacked = format!("UPDATE app_user SET reach = NULL WHERE external_id = '{name}'");
            database.connect().await.batch_execute(&unpacked).await.unwrap();
        }
        let accepted = store.accept(event.clone(), Engine::with_room(0), now).await.unwrap();
        assert!(store.accept(event, Engine::with_room(0), now).await.unwrap().duplicate);
        first.get_or_insert((name, accepted.notification));
    }
    let (name, notification) = first.expect("ten");
    let claimed = world.claim(world.apns, Lane::Interactive).await;
    assert_eq!(claimed.len(), 10);
    let fences = |claimed: &[Claimed]| claimed.iter().map(|one| (one.job.id, one.job.fence)).collect::<Vec<_>>();
    store.release(fences(&claimed), now).await.unwrap();
    let claimed = world.claim(world.apns, Lane::Interactive).await;
    store.put_off(fences(&claimed), now).await.unwrap();
    let claimed = world.claim(world.apns, Lane::Interactive).await;
    assert_eq!(claimed.len(), 10);
    let dead = claimed[0].job.targets[0];
    let mut updates = Vec::new();
    for one in &claimed {
        let targets = &one.job.targets;
        store.gate_facts(one.notification.id, &one.notification.event_type, targets).await.unwrap();
        store.names_and_labels(targets).await.unwrap();
        let mut update = world.update(one, entries(targets, ResultCode::Sent));
        if targets[0] == dead {
            let since = Some(now);
            update.retirements.push(Retirement { device: dead.device, since, reason: "410 Unregistered".into() });
        }
        updates.push(update);
    }
    assert!(store.record(updates, now).await.unwrap().iter().all(|held| *held));
    store.next_due(world.apns, Lane::Interactive).await.unwrap();
    store.list_devices(app, &user(&name), None, 10).await.unwrap();
    store.list_opt_ins(app, &user(&name)).await.unwrap();
    store.list_subscriptions(app, &user(&name), None, 10).await.unwrap();
    store.get_notification(app, notification).await.unwrap();
    store.person_history(app, notification, &user(&name)).await.unwrap();
    store.device_owner(app, dead.device).await.unwrap();
    store.cancel_notification(app, notification, now).await.unwrap();
}

#[tokio::test]
async fn plans_made_while_everything_was_empty_serve_a_full_database() {
    const MANY: i64 = 20_000;
    let database = Database::new().await;
    let settings = Settings { pool: 2, ..database.settings() };
    let (store, deny) = database.open_with(&settings).await.unwrap();
    let boot = store.boot_id();
    let fixture = Fixture { store: Arc::<PostgresStore>::clone(&store), deny, boot, kept: Box::new(()) };
    let world = World::new(&fixture).await;
    // Nothing makes the server plan anew, which it would in a minute or two: too late for whoever begins with a rush. Queues
    // are empty again and again, and known to be; of other tables nothing is known as long as they are.
    let tables: Vec<String> = constant!(
        diesel::sql_types::Text;
        "SELECT format('ALTER TABLE %I SET (autovacuum_enabled = off)', c.relname) FROM pg_class c \
         WHERE c.relnamespace = 'public'::REGNAMESPACE AND c.relkind = 'r'"
    )
    .load(&mut database.connect().await)
    .await
    .unwrap();
    database.connect().await.batch_execute(&tables.join("; ")).await.unwrap();
    database.connect().await.batch_execute("VACUUM ANALYZE job, fanout, idempotency").await.unwrap();
    for round in 0..3 {
        a_day(&database, &world, round).await;
    }
    fill(&database, &world, MANY * 5).await;
    let before = settled(&database).await;
    a_day(&database, &world, 3).await;
    a_day(&database, &world, 4).await;
    store.close().await;
    let after = settled(&database).await;
    let rows = |counts: &HashMap<String, (i64, i64)>, table: &str| {
        counts.get(table).map_or(0, |(scans, fetches)| scans + fetches)
    };
    let read = |table: &&String| rows(&after, table) - rows(&before, table);
    let much: Vec<(&String, i64)> = after
        .keys()
        .filter(|table| !["deny", "replica"].contains(&table.as_str()))
        .map(|table| (table, read(&table)))
        .filter(|(_, read)| *read >= MANY / 10)
        .collect();
    assert!(much.is_empty(), "read for twenty people: {much:?}");
}

/// Every replica polls five times a second, and an hour of "no"s is kept.
#[tokio::test]
async fn a_poll_for_new_noes_passes_over_those_of_the_last_hour() {
    const NOES: i64 = 200_000;
    let database = Database::new().await;
    let (store, _deny) = database.open().await;
    let mut conn = database.connect().await;
    conn.batch_execute(&format!(
        "INSERT INTO deny (id, app, kind, subject, at) SELECT n, 0, 1, n, \
         (extract(epoch FROM clock_timestamp()) * 1000)::BIGINT - 120000 - n FROM generate_series(1, {NOES}) AS n"
    ))
    .await
    .unwrap();
    conn.batch_execute("VACUUM ANALYZE deny").await.unwrap();
    drop(conn);
    let read = |counts: &HashMap<String, (i64, i64)>| counts["deny"].0 + counts["deny"].1;
    let before = read(&rows_read(&database).await);
    crate::runtime::Runtime::production().sleep(std::time::Duration::from_secs(3)).await;
    // None of them is old enough to be deleted.
    store.retain(START, START).await.unwrap();
    store.close().await;
    let rows = read(&settled(&database).await) - before;
    assert!(rows < NOES / 10, "{rows} rows were read to find that there is no new one");
}

#[tokio::test]
async fn a_plan_made_for_an_empty_queue_serves_a_full_one() {
    const JOBS: i64 = 20_000;
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let boot = store.boot_id();
    let fixture = Fixture { store: Arc::<PostgresStore>::clone(&store), deny, boot, kept: Box::new(()) };
    let world = World::new(&fixture).await;
    let update = |job: i64| JobUpdate {
        job: JobId(job),
        fence: 0,
        app: world.app,
        notification: NotificationId(1),
        route: world.apns,
        progress: None,
        entries: Vec::new(),
        details: Vec::new(),
        followers: Vec::new(),
        retirements: Vec::new(),
        device_changes: Vec::new(),
    };
    let mut conn = database.connect().await;
    conn.batch_execute("VACUUM ANALYZE job").await.unwrap();
    // Planned now; nothing is there.
    assert_eq!(store.record(vec![update(1)], world.now()).await.unwrap(), [false]);
    store.release(vec![(JobId(1), 0)], world.now()).await.unwrap();
    let (app, apns, now) = (world.app.0, world.apns.0, START.0);
    conn.batch_execute(&format!(
        "INSERT INTO job (id, app, notification_id, route, lane, format, ready_at, due_at, first_user, last_user, \
         target_count, targets) SELECT n, {app}, 1, {apns}, 0, 1, {now}, {now}, 1, 2, 1, ''::BYTEA \
         FROM generate_series(1, {JOBS}) AS n"
    ))
    .await
    .unwrap();
    drop(conn);
    let before = settled(&database).await;
    let updates: Vec<JobUpdate> = (1..=200).map(update).collect();
    assert!(store.record(updates, world.now()).await.unwrap().iter().all(|held| *held));
    store.release((201..=400).map(|job| (JobId(job), 0)).collect(), world.now()).await.unwrap();
    store.close().await;
    let read = |counts: &HashMap<String, (i64, i64)>| counts["job"].0 + counts["job"].1;
    let rows = read(&settled(&database).await) - read(&before);
    assert!(rows < JOBS / 2, "{rows} rows of a queue of {JOBS} were read to find 400 by their ids");
}
