//! Every statement of normal work is prepared once.

use std::collections::BTreeSet;
use std::sync::Mutex;

use diesel::Connection;
use diesel::connection::{Instrumentation, InstrumentationEvent};

use super::super::dead::is_active;
use super::super::homes::{by_name, homeless};
use super::*;
use crate::domain::notification::{Audience, NewEvent};
use crate::domain::outcome::ResultCode;
use crate::storage::conformance::{World, comment, entries, key};

#[derive(Default)]
struct Seen {
    cached: BTreeSet<String>,
    run: BTreeSet<String>,
}

struct Watch(Arc<Mutex<Seen>>);

impl Instrumentation for Watch {
    fn on_connection_event(&mut self, event: InstrumentationEvent<'_>) {
        let mut seen = self.0.lock().unwrap();
        match event {
            InstrumentationEvent::CacheQuery { sql, .. } => {
                seen.cached.insert(sql.to_owned());
            }
            InstrumentationEvent::StartQuery { query, .. } => {
                let text = query.to_string();
                let sql = text.split(" -- binds:").next().unwrap_or_default();
                seen.run.insert(sql.to_owned());
            }
            _ => {}
        }
    }
}

/// The life of a notification, large and small.
async fn work(world: &World<'_>, round: u8) {
    let name = format!("u{round}");
    world.reachable(&name).await;
    world.subscribe(&name, "post:1").await;
    let mut event = NewEvent { idempotency: Some(key(&name, 1)), ..world.to_topics(&["post:1"]) };
    event.audience.user_ids = vec![crate::storage::conformance::user(&name)];
    let id = world.accept(event).await;
    let claimed = world.claim_one().await;
    world.store().gate_facts(id, &comment(), &claimed.job.targets).await.unwrap();
    assert!(world.record(world.update(&claimed, entries(&claimed.job.targets, ResultCode::Sent))).await);
    world.view(id).await;
    let everyone = Audience { everyone: true, ..Audience::default() };
    world.accept(NewEvent { may_broadcast: true, ..world.event(everyone) }).await;
    let fanout = world.store().claim_fanout(world.fixture.boot, world.now(), &[]).await.unwrap().unwrap();
    world.store().fanout_page(&fanout, 100).await.unwrap();
    world.store().release_fanout(fanout.notification.id, fanout.fence).await.unwrap();
}

#[tokio::test]
async fn normal_work_prepares_nothing_twice() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let seen = Arc::new(Mutex::new(Seen::default()));
    store.writer.inline_core().conn.set_instrumentation(Watch(Arc::clone(&seen)));
    let world = World::new(&fixture).await;
    work(&world, 1).await;
    let first = std::mem::take(&mut *seen.lock().unwrap());
    work(&world, 2).await;
    let second = std::mem::take(&mut *seen.lock().unwrap());
    assert_eq!(second.cached, BTreeSet::new(), "prepared again");
    assert!(second.run.len() > 25, "{} statements", second.run.len());
    let unprepared: Vec<_> = second.run.difference(&first.cached).collect();
    assert!(unprepared.is_empty(), "prepared at every use: {unprepared:#?}");
}

#[test]
fn no_limit_makes_sqlite_parse_again() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/storage/sqlite");
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "rs") || path.ends_with("statement.rs") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for (at, line) in text.lines().enumerate() {
            for word in ["LIMIT ?", "OFFSET ?"] {
                for (_, behind) in line.match_indices(word).map(|(at, word)| (at, &line[at + word.len()..])) {
                    let behind = behind.trim_start_matches(|c: char| c.is_ascii_digit());
                    assert!(behind.starts_with(" + 0"), "{}:{}: see statement.rs", path.display(), at + 1);
                }
            }
        }
    }
}

#[tokio::test]
async fn hot_statements_use_their_indexes() {
    let (store, _deny) = in_memory();
    let plan = |sql: &str| -> String {
        use diesel::sql_types::Text;
        #[derive(diesel::QueryableByName)]
        struct Line {
            #[diesel(sql_type = Text)]
            detail: String,
        }
        let lines: Vec<Line> =
            diesel::sql_query(format!("EXPLAIN QUERY PLAN {sql}")).load(&mut store.writer.inline_core().conn).unwrap();
        lines.into_iter().map(|line| line.detail + "\n").collect()
    };
    let claim = plan(
        "SELECT id, due_at, target_count FROM job WHERE owner = 0 AND route = 1 AND lane = 0 AND due_at <= 5 \
         AND format = 1 ORDER BY due_at, id LIMIT 9",
    );
    assert!(claim.contains("job_by_due") && !claim.contains("TEMP B-TREE"), "{claim}");
    let facts = plan("SELECT d.id FROM json_each('[1]') AS e CROSS JOIN device d ON d.id = e.value");
    assert!(facts.contains("SEARCH d USING INTEGER PRIMARY KEY"), "{facts}");
    let looked_up = plan("SELECT e.value, u.reach FROM json_each('[1]') AS e LEFT JOIN app_user u ON u.id = e.value");
    assert!(looked_up.contains("SEARCH u USING INTEGER PRIMARY KEY"), "{looked_up}");
    let range = plan("SELECT id, reach FROM app_user WHERE id >= 1 AND id <= 3 ORDER BY id LIMIT 9");
    assert!(range.contains("USING INTEGER PRIMARY KEY") && !range.contains("TEMP B-TREE"), "{range}");
    let named = plan(by_name!("id, reach"));
    assert!(named.contains("app_user_by_name") && named.contains("INTEGER PRIMARY KEY"), "{named}");
    let devices = plan(concat!(
        "SELECT d.id, d.token_sealed FROM device d CROSS JOIN app_user u ON u.id = d.user_key \
         WHERE d.user_key >= 1 AND d.user_key <= 3 AND +",
        is_active!(),
        " ORDER BY d.user_key, d.id"
    ));
    assert!(devices.contains("device_by_user") && !devices.contains("TEMP B-TREE"), "{devices}");
    let choices =
        plan("SELECT opted_in FROM opt_in WHERE user_key >= 1 AND user_key <= 3 ORDER BY user_key, device, event_type");
    assert!(choices.contains("USING PRIMARY KEY") && !choices.contains("TEMP B-TREE"), "{choices}");
    let page = plan(
        "SELECT user_key FROM subscription WHERE topic = 1 AND user_key > 2 AND active = 1 ORDER BY user_key LIMIT 3",
    );
    assert!(page.contains("USING PRIMARY KEY") && !page.contains("TEMP B-TREE"), "{page}");
    let expired = plan(
        "SELECT app, key FROM (SELECT app, key, expires_at FROM idempotency WHERE (app, key) > (1, 'k') \
         ORDER BY app, key LIMIT 9) WHERE expires_at <= 5 LIMIT 3",
    );
    assert!(expired.contains("USING PRIMARY KEY ((app,key)>(?,?))") && !expired.contains("TEMP B-TREE"), "{expired}");
    let homeless =
        plan(concat!("SELECT id FROM app_user WHERE app = 1 AND id > 2 AND ", homeless!(), " ORDER BY id LIMIT 3"));
    assert!(homeless.contains("app_user_by_app") && !homeless.contains("TEMP B-TREE"), "{homeless}");
    let everyone = plan("SELECT id FROM app_user WHERE id > 2 AND id <= 9 AND app = 1 ORDER BY id LIMIT 3");
    assert!(everyone.contains("INTEGER PRIMARY KEY") && !everyone.contains("TEMP B-TREE"), "{everyone}");
    let tokens = plan(
        "SELECT id FROM device WHERE app = 1 AND platform = 1 AND plugin = '' AND token_hash = x'00' ORDER BY id DESC LIMIT 64",
    );
    assert!(tokens.contains("device_by_token") && !tokens.contains("TEMP B-TREE"), "{tokens}");
    let installs = plan(concat!(
        "SELECT d.id FROM device d JOIN app_user u ON u.id = d.user_key WHERE d.app = 1 AND d.installation_id = 'i' AND ",
        is_active!(),
        " ORDER BY d.id DESC LIMIT 64"
    ));
    assert!(installs.contains("device_by_installation") && !installs.contains("TEMP B-TREE"), "{installs}");
    let dead = plan(
        "UPDATE device SET state = 2 WHERE id IN (SELECT CAST(e.key AS INTEGER) FROM app_user u, json_each(u.dead) e WHERE u.id = 1)",
    );
    assert!(dead.contains("SEARCH device USING INTEGER PRIMARY KEY"), "{dead}");
    assert!(dead.contains("SEARCH u USING INTEGER PRIMARY KEY"), "{dead}");
    let held = plan(concat!(
        "SELECT d.id FROM device d CROSS JOIN app_user u ON u.id = d.user_key WHERE d.hold_until > 1 AND ",
        is_active!(),
        " ORDER BY d.hold_until DESC LIMIT 9"
    ));
    assert!(held.contains("device_by_hold") && !held.contains("TEMP B-TREE"), "{held}");
    let owners = plan("UPDATE job SET owner = 0 WHERE owner <> 0 AND owner <> 5");
    assert!(owners.contains("job_by_owner"), "{owners}");
    let blocks = plan(
        "SELECT id FROM outcome_block WHERE notification_id = 1 AND first_user <= 3 AND last_user >= 2 \
         ORDER BY first_user",
    );
    assert!(blocks.contains("outcome_block_by_notification") && !blocks.contains("TEMP B-TREE"), "{blocks}");
}
