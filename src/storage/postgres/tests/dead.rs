//! Devices that are retired in place: no index is written, others may have their tokens, and earlier versions never meet them.

use std::time::Duration;

use diesel::sql_types::{BigInt, Nullable, SmallInt, Text};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use super::replicas::{count, eventually, execute, fixture};
use super::*;
use crate::domain::device::{Device, DeviceRef, Registration};
use crate::domain::platform::{DeviceToken, Platform};
use crate::domain::targets;
use crate::storage::StoreError;
use crate::storage::conformance::{World, devices, user};

type Row = (i16, Option<String>, Option<i64>);

async fn rows(database: &Database) -> Vec<Row> {
    constant!(
        (SmallInt, Nullable<Text>, Nullable<BigInt>);
        "SELECT state, retired_reason, retired_at FROM device ORDER BY id"
    )
    .load(&mut database.connect().await)
    .await
    .unwrap()
}

const ALIVE: Row = (1, None, None);

fn dead(state: i16, world: &World<'_>) -> Row {
    (state, Some("410 Unregistered".to_owned()), Some(world.now().0))
}

/// Changes of rows of `device` that wrote its indexes anew. A server process tells of them when it ends, at the latest.
async fn indexed_updates(database: &Database) -> i64 {
    let sql = "SELECT n_tup_upd - n_tup_hot_upd AS count FROM pg_stat_user_tables WHERE relname = 'device'";
    count(database, sql).await
}

#[tokio::test]
async fn a_dead_device_keeps_its_place_in_every_index() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let of_store = fixture(&store, &deny);
    let world = World::new(&of_store).await;
    let device = world.register("mina", "aa").await;
    let others = [world.register("jun", "bb").await, world.register("bo", "cc").await];
    devices::die(&world, &[device.id, others[0].id, others[1].id]).await;
    let still = dead(1, &world);
    assert_eq!(rows(&database).await, [still.clone(), still.clone(), still.clone(), ALIVE]);
    world.pass(1);
    assert_eq!(world.register("mina", "aa").await.id, device.id);
    assert_eq!(rows(&database).await, [ALIVE, still.clone(), still, ALIVE], "it lives there again");
    store.close().await;
    let told = "SELECT n_tup_upd AS count FROM pg_stat_user_tables WHERE relname = 'device'";
    eventually("four changes are told of", async || count(&database, told).await == 4).await;
    assert_eq!(indexed_updates(&database).await, 0);
}

#[tokio::test]
async fn whoever_else_registers_the_token_has_it() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let of_store = fixture(&store, &deny);
    let world = World::new(&of_store).await;
    let device = world.register("mina", "aa").await;
    devices::die(&world, &[device.id]).await;
    let row = dead(2, &world);
    world.pass(1);
    let theirs = world.try_register(world.registration("jun", "aa")).await.unwrap();
    assert!(theirs.created);
    // As of when it died.
    assert_eq!(rows(&database).await, [row, ALIVE, ALIVE]);
    store.close().await;
}

/// Who records that a token is dead waits for who gives it to somebody else, or the other way round.
#[tokio::test]
async fn a_token_that_dies_while_it_changes_hands_is_retired_once() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let of_store = fixture(&store, &deny);
    let world = World::new(&of_store).await;
    for round in 0..30 {
        let token = format!("aa{round:02x}");
        let device = world.register("mina", &token).await;
        let dying = devices::dying(&world, &[device.id]).await;
        world.pass(1);
        let register = async {
            // Now this one first, now the other.
            crate::runtime::Runtime::production().sleep(Duration::from_micros(round * 50)).await;
            world.store().register_device(world.registration("jun", &token), world.now()).await
        };
        let (died, registered) = tokio::join!(world.record(dying), register);
        assert!(died && registered.unwrap().created);
    }
    for (name, active) in [("mina", false), ("jun", true)] {
        let devices = world.store().list_devices(world.app, &user(name), None, 200).await.unwrap().items;
        assert!(devices.iter().all(|device| device.active == active));
    }
    assert_eq!(count(&database, "SELECT count(*) AS count FROM device_retirement").await, 30);
    store.close().await;
}

/// Both have read what is packed of their person before either writes it.
#[tokio::test]
async fn two_devices_that_die_at_once_both_leave_their_person() {
    let database = Database::new().await;
    let ((a, deny), (b, other_deny)) = (database.open().await, database.open().await);
    let (of_a, of_b) = (fixture(&a, &deny), fixture(&b, &other_deny));
    let (world, other) = (World::new(&of_a).await, World::new(&of_b).await);
    let (first, second) = (world.register("mina", "aa").await, world.register("mina", "bb").await);
    world.register("mina", "cc").await;
    let (one, two) = (devices::dying(&world, &[first.id]).await, devices::dying(&other, &[second.id]).await);
    let mut holder = database.connect().await;
    let hold = "BEGIN; SELECT 1 FROM app_user WHERE external_id = 'mina' FOR NO KEY UPDATE";
    holder.batch_execute(hold).await.unwrap();
    let release = async {
        let waiting = "SELECT count(*) AS count FROM pg_stat_activity \
                       WHERE datname = current_database() AND wait_event_type = 'Lock'";
        eventually("both wait for their person", async || count(&database, waiting).await == 2).await;
        holder.batch_execute("COMMIT").await.unwrap();
    };
    let (died, too, ()) = tokio::join!(world.record(one), other.record(two), release);
    assert!(died && too);
    let (wrong, unpacked) = repack::differing(&mut database.connect().await).await.unwrap();
    assert_eq!((wrong.len(), unpacked.len()), (0, 0), "only the third device is left");
    for store in [a, b] {
        store.close().await;
    }
}

/// It would take them for active.
#[tokio::test]
async fn beside_a_replica_that_does_not_know_of_it_rows_say_what_they_are() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let of_store = fixture(&store, &deny);
    let world = World::new(&of_store).await;
    let (first, second) = (world.register("mina", "aa").await, world.register("mina", "bb").await);
    devices::die(&world, &[first.id]).await;
    let in_place = dead(1, &world);
    execute(
        &database,
        "INSERT INTO replica (slot, boot_id, heartbeat, version, pack_format, rowless) \
         VALUES (1000, 77, (extract(epoch FROM clock_timestamp()) * 1000)::BIGINT + 3600000, 'older', 2, 1)",
    )
    .await;
    eventually("it is heard of", async || !store.inner.context.packing.dead_in_place()).await;
    assert!(store.inner.context.packing.rowless(), "of what it knows there may be more");
    devices::die(&world, &[second.id]).await;
    let carrier = ALIVE;
    assert_eq!(rows(&database).await, [in_place, dead(2, &world), carrier]);
    store.close().await;
}

/// As somebody's who goes back to an older version.
#[tokio::test]
async fn without_it_the_rows_say_all() {
    const DOWN: &str = include_str!("../../../../migrations/postgres/2026-11-30-000010_retired_in_place/down.sql");
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let of_store = fixture(&store, &deny);
    let world = World::new(&of_store).await;
    let (mina, jun) = (world.register("mina", "aa").await, world.register("jun", "bb").await);
    world.register("mina", "cc").await;
    devices::die(&world, &[mina.id, jun.id]).await;
    store.close().await;
    execute(&database, DOWN).await;
    assert_eq!(rows(&database).await, [dead(2, &world), dead(2, &world), ALIVE, ALIVE]);
    drop(database);
}

/// What a caller is told of somebody's devices, but for what another database numbers otherwise.
async fn told(world: &World<'_>, name: &str) -> Vec<String> {
    let devices = world.store().list_devices(world.app, &user(name), None, 200).await.unwrap().items;
    let told = |device: Device| {
        let Device { active, retired_reason, retired_at, installation_id, observed_at, confirmed_at, .. } = device;
        format!("{active} {retired_reason:?} {retired_at:?} {installation_id:?} {observed_at} {confirmed_at}")
    };
    devices.into_iter().map(told).collect()
}

/// Whatever happens to devices, callers are told the same as by a replica that writes what each device is into its row.
#[tokio::test]
async fn in_place_or_not_nobody_can_tell() {
    const NAMES: [&str; 3] = ["mina", "jun", "bo"];
    let (here, there) = (Database::new().await, Database::new().await);
    let (in_place, deny) = here.open().await;
    let older = Settings { pack_format: targets::OLDEST, ..there.settings() };
    let (plain, other_deny) = there.open_with(&older).await.unwrap();
    assert!(in_place.inner.context.packing.dead_in_place() && !plain.inner.context.packing.dead_in_place());
    let fixtures = [fixture(&in_place, &deny), fixture(&plain, &other_deny)];
    let worlds = [World::new(&fixtures[0]).await, World::new(&fixtures[1]).await];
    let seed = 20_261_130;
    let mut random = SmallRng::seed_from_u64(seed);
    let (mut kept, mut let_go) = (0, 0);
    for step in 0..400 {
        let (name, token) = (NAMES[random.random_range(0..3)], format!("aa0{}", random.random_range(0..6)));
        let (install, at, what) = (random.random_range(0..4), random.random_range(0..8), random.random_range(0..10));
        let mut told_of = Vec::new();
        for world in &worlds {
            world.pass(if what == 9 { 3 * 3_600_000 } else { 1 });
            let of_them = world.store().list_devices(world.app, &user(name), None, 200).await.unwrap().items;
            let one = of_them.get(at % of_them.len().max(1)).map(|device| device.id);
            let now = world.now();
            let answer = match what {
                0..4 => {
                    let installation_id = (install > 0).then(|| format!("i-{install}"));
                    let device = one.filter(|_| at == 0);
                    let registration = Registration { device, installation_id, ..world.registration(name, &token) };
                    match world.try_register(registration).await {
                        Ok(registered) => format!("{} {}", registered.created, registered.device.active),
                        Err(StoreError::DeviceNotFound { .. }) => "not found".to_owned(),
                        Err(error) => panic!("seed {seed}, step {step}: {error}"),
                    }
                }
                4..8 => {
                    if let Some(one) = one {
                        devices::die(world, &[one]).await;
                    }
                    one.is_some().to_string()
                }
                8 => {
                    let token = DeviceRef::Token(Platform::Apns, DeviceToken::trusted(&token));
                    format!("{:?}", world.store().unregister_device(world.app, None, token, now, now).await.ok())
                }
                _ => String::new(),
            };
            let mut all = vec![answer];
            for name in NAMES {
                all.push(told(world, name).await.join("; "));
            }
            told_of.push(all);
        }
        assert_eq!(told_of[0], told_of[1], "seed {seed}, step {step}");
        let of_state = |rows: &[Row], state| rows.iter().filter(|row| row.0 == state && row.2.is_some()).count();
        let stored = rows(&here).await;
        kept = kept.max(of_state(&stored, 1));
        let_go = let_go.max(of_state(&stored, 2));
        assert_eq!(of_state(&rows(&there).await, 1), 0);
    }
    assert!(kept > 2 && let_go > 2, "{kept} in place, {let_go} that let go");
    for store in [in_place, plain] {
        store.close().await;
    }
}
