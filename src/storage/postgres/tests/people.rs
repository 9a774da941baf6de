//! What is packed of people says what their rows say, whoever changes them and however it is read.

use diesel::sql_types::BigInt;

use super::replicas::{count, eventually, execute, fixture};
use super::*;
use crate::domain::device::{DeviceRef, Retirement};
use crate::domain::ids::{Locale, UserKey};
use crate::domain::outcome::ResultCode;
use crate::domain::platform::{DeviceToken, Platform};
use crate::storage::NewOptIn;
use crate::storage::conformance::{Engine, World, comment, entries, people, user};
use crate::storage::seed::{Seed, SeedPerson};

/// Everybody is packed who fits, and rightly.
pub(super) async fn assert_packed(database: &Database, what: &str) {
    let differing = repack::differing(&mut database.connect().await).await.unwrap();
    assert_eq!(differing, (Vec::new(), Vec::new()), "{what}: wrong, and not packed");
}

/// A session that is not ours.
async fn stranger(database: &Database, sql: &str) {
    let mut conn = database.connect().await;
    conn.batch_execute("RESET nudged.packs").await.unwrap();
    conn.batch_execute(sql).await.unwrap();
}

async fn keys(database: &Database) -> Vec<UserKey> {
    let keys: Vec<i64> =
        constant!(BigInt; "SELECT id FROM app_user ORDER BY id").load(&mut database.connect().await).await.unwrap();
    keys.into_iter().map(UserKey).collect()
}

const UNPACKED: &str = "SELECT count(*) FROM app_user WHERE reach IS NULL";

#[tokio::test]
async fn whatever_changes_a_person_packs_them_anew() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let mut before = Vec::new();
    people::every_change(&world, async |what: &str| {
        assert_packed(&database, what).await;
        let mut conn = database.connect().await;
        let now: Vec<(i64, Option<Vec<u8>>)> = constant!(
            (BigInt, diesel::sql_types::Nullable<diesel::sql_types::Binary>);
            "SELECT id, reach FROM app_user ORDER BY id"
        )
        .load(&mut conn)
        .await
        .unwrap();
        // A choice of somebody who is too large would not.
        assert!(now != before || what == "a choice", "{what} changes nothing");
        before = now;
    })
    .await;
}

#[tokio::test]
async fn a_range_and_a_look_up_say_what_the_rows_do() {
    const PEOPLE: usize = 60;
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    people::crowd(&world, PEOPLE).await;
    assert_packed(&database, "a crowd").await;
    // Some are not packed, and one in a way that is not known yet.
    let keys = keys(&database).await;
    execute(&database, "UPDATE app_user SET reach = NULL WHERE id % 7 = 3").await;
    execute(&database, &format!("UPDATE app_user SET reach = '\\x0201' WHERE id = {}", keys[33].0)).await;
    assert_eq!(keys.len(), PEOPLE);
    let conn = &mut database.connect().await;
    let (mut ranges, mut crowded) = (0, 0);
    for step in [1, 3, 7] {
        for from in (0..PEOPLE).step_by(3) {
            for count in [0, 1, 9, PEOPLE] {
                let users: Vec<UserKey> = keys[from..].iter().step_by(step).take(count).copied().collect();
                let rows = reach::by_rows(conn, &comment(), &users).await.unwrap();
                let looked_up = reach::of_users(conn, &comment(), &users).await.unwrap();
                assert_eq!((&looked_up.people, &looked_up.facts), (&rows.people, &rows.facts));
                match reach::of_range(conn, &comment(), &users).await.unwrap() {
                    None => crowded += 1,
                    Some(range) => {
                        ranges += 1;
                        assert_eq!((&range.people, &range.facts), (&rows.people, &rows.facts));
                    }
                }
            }
        }
    }
    assert!(ranges > 100 && crowded > 20, "{ranges} ranges, {crowded} crowded");
    execute(&database, &format!("UPDATE app_user SET reach = NULL WHERE id = {}", keys[33].0)).await;
}

/// The few people and tokens that everybody comes to at once.
struct Crossing<'a> {
    world: &'a World<'a>,
    store: &'a PostgresStore,
    seed: u64,
}

impl Crossing<'_> {
    fn random(&mut self, below: u64) -> u64 {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.seed >> 33) % below
    }

    async fn go(mut self, steps: u32) {
        for _ in 0..steps {
            self.world.pass(1);
            self.step().await;
        }
    }

    async fn step(&mut self) {
        let (world, store) = (self.world, self.store);
        let (name, now) = (format!("u{}", self.random(4)), world.now());
        let token = format!("{:064x}", self.random(6));
        match self.random(10) {
            0..=3 => {
                let mut registration = world.registration(&name, &token);
                registration.installation_id = (self.random(2) == 0).then(|| format!("install-{}", self.random(3)));
                registration.details.locale = ["ko-KR", "en-GB"]
                    .get(usize::try_from(self.random(3)).unwrap())
                    .map(|locale| Locale::trusted(locale));
                store.register_device(registration, now).await.unwrap();
            }
            4 => {
                let device = DeviceRef::Token(Platform::Apns, DeviceToken::trusted(&token));
                store.unregister_device(world.app, None, device, now, now).await.unwrap();
            }
            5 | 6 => {
                let choice = NewOptIn {
                    event_type: (self.random(2) == 0).then(comment),
                    ..world.choice(&name, self.random(3) > 0)
                };
                store.set_opt_in(choice, now).await.unwrap();
            }
            7 => {
                let devices = store.list_devices(world.app, &user(&name), None, 10).await.unwrap().items;
                let Some(device) = devices.last() else { return };
                let choice = NewOptIn { device: Some(device.id), ..world.choice(&name, self.random(3) > 0) };
                store.set_opt_in(choice, now).await.unwrap();
            }
            _ => self.bury(&name).await,
        }
    }

    /// An event's answer: all tokens are dead, or the devices are on another route.
    async fn bury(&mut self, name: &str) {
        let (world, store, now) = (self.world, self.store, self.world.now());
        let engine = Engine::with_room(0);
        store.accept(world.to_users(&[name]), engine, now).await.unwrap();
        for route in [world.apns, world.fcm] {
            let request = ClaimRequest { route, lane: Lane::Interactive, max_jobs: 2, max_targets: 20 };
            for claimed in store.claim(request, store.boot_id(), now).await.unwrap() {
                let mut update = world.update(&claimed, entries(&claimed.job.targets, ResultCode::DeadToken));
                for target in &claimed.job.targets {
                    if self.random(2) == 0 {
                        let reason = "410 Unregistered".to_owned();
                        update.retirements.push(Retirement { device: target.device, since: Some(now), reason });
                    } else {
                        let to = if route == world.apns { world.fcm } else { world.apns };
                        let device = target.device;
                        update.device_changes.push(crate::storage::DeviceChange::Reroute { device, from: route, to });
                    }
                }
                store.record(vec![update], now).await.unwrap();
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_that_change_the_same_people_at_once_lose_nothing() {
    const STEPS: u32 = 40;
    let database = Database::new().await;
    let ((a, a_deny), (b, _b), (c, _c)) = (database.open().await, database.open().await, database.open().await);
    let fixture = fixture(&a, &a_deny);
    let world = World::new(&fixture).await;
    // The sweep goes over them all the while.
    let stop = CancellationToken::new();
    let sweeping = async {
        while !stop.is_cancelled() {
            execute(&database, "UPDATE app_user SET reach = NULL WHERE id % 2 = 0").await;
            repack::sweep(Arc::clone(&b.inner)).await;
        }
    };
    let going = (0..12_u64).map(|seed| {
        let store = [&a, &b, &c][usize::try_from(seed % 3).unwrap()];
        Crossing { world: &world, store, seed }.go(STEPS)
    });
    let crossing = async {
        futures_util::future::join_all(going).await;
        stop.cancel();
    };
    futures_util::future::join(sweeping, crossing).await;
    repack::sweep(Arc::clone(&b.inner)).await;
    assert_packed(&database, "three replicas").await;
    let sql = "SELECT deadlocks AS count FROM pg_stat_database WHERE datname = current_database()";
    println!("{} deadlocks", count(&database, sql).await);
}

#[tokio::test]
async fn who_is_changed_by_somebody_who_does_not_pack_is_read_by_rows() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    for name in ["mina", "dubu"] {
        world.reachable(name).await;
    }
    let targets = async || {
        let engine = Engine::with_room(10);
        store.accept(world.to_users(&["mina"]), engine.clone(), world.now()).await.unwrap();
        engine.handed_over.lock().unwrap().len()
    };
    assert_eq!(targets().await, 1);
    assert_eq!(count(&database, UNPACKED).await, 0);
    let mina = "(SELECT id FROM app_user WHERE external_id = 'mina')";
    for (sql, reached) in [
        (format!("UPDATE device SET state = 2 WHERE user_key = {mina}"), 0),
        (format!("UPDATE device SET state = 1 WHERE user_key = {mina}"), 1),
        (format!("UPDATE opt_in SET opted_in = 0 WHERE user_key = {mina}"), 0),
        (format!("DELETE FROM opt_in WHERE user_key = {mina}"), 0),
        (
            format!(
                "INSERT INTO opt_in (user_key, app, opted_in, observed_at, recorded_at) SELECT {mina}, id, 1, 1, 1 FROM app"
            ),
            1,
        ),
        (format!("DELETE FROM device WHERE user_key = {mina}"), 0),
    ] {
        repack::sweep(Arc::clone(&store.inner)).await;
        assert_packed(&database, "swept").await;
        stranger(&database, &sql).await;
        assert_eq!(count(&database, UNPACKED).await, 1, "{sql}");
        assert_eq!(targets().await, reached, "{sql}");
    }
    // Who uses a session of ours packs them, whatever they change.
    world.register("mina", "aa07").await;
    assert_packed(&database, "a registration").await;
    // What is not packed may change as it likes.
    stranger(&database, "UPDATE device SET confirmed_at = confirmed_at + 1, has_choice = 1").await;
    assert_packed(&database, "a time").await;
}

/// Somebody who does not pack has changed them, and has not committed yet, when we pack them.
#[tokio::test]
async fn a_change_that_is_not_committed_yet_is_not_packed_over() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world.reachable("mina").await;
    execute(&database, "UPDATE app_user SET reach = NULL").await;
    let mut older = database.connect().await;
    older.batch_execute("RESET nudged.packs; BEGIN; UPDATE device SET locale = 'en-GB'").await.unwrap();
    let second = store.register_device(world.registration("mina", "aa07"), world.now());
    let commit = async {
        let waits =
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
        eventually("our transaction waits", async || count(&database, waits).await == 1).await;
        older.batch_execute("COMMIT").await.unwrap();
    };
    let (registered, ()) = futures_util::future::join(second, commit).await;
    registered.unwrap();
    assert_packed(&database, "one after the other").await;
}

#[tokio::test]
async fn a_start_packs_everybody_who_is_not_and_leaves_who_is_too_large() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    people::crowd(&world, 20).await;
    world.opt_in("haru").await;
    for number in 0..12 {
        world.register("haru", &format!("bb{number:02}{}", "c".repeat(150))).await;
    }
    execute(&database, "UPDATE app_user SET reach = NULL").await;
    let (swept, _deny) = database.open_with(&Settings { pack_people: true, ..database.settings() }).await.unwrap();
    eventually("all but the large one are packed", async || count(&database, UNPACKED).await == 1).await;
    assert_packed(&database, "a start").await;
    let engine = Engine::with_room(50);
    store.accept(world.to_users(&["haru"]), engine.clone(), world.now()).await.unwrap();
    assert_eq!(engine.handed_over.lock().unwrap()[0].job.targets.len(), 12);
    // It comes to its end with one who stays as they are.
    repack::sweep(Arc::clone(&store.inner)).await;
    swept.close().await;
}

#[tokio::test]
async fn who_is_seeded_for_a_measurement_is_packed() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let person = |number: u32| SeedPerson {
        user: user(&format!("seed-{number}")),
        platform: if number.is_multiple_of(2) { Platform::Apns } else { Platform::Fcm },
        token: DeviceToken::trusted(&format!("{number:064x}")),
        opted_in: !number.is_multiple_of(3),
    };
    let seed = Seed { app: world.app, apns: world.apns, fcm: world.fcm, topics: &[], people: 50, person: &person };
    super::super::seed(&Runtime::production(), &database.url, &seed, world.now()).await.unwrap();
    assert_eq!(count(&database, "SELECT count(*) FROM device").await, 50);
    assert_packed(&database, "a seed").await;
}
