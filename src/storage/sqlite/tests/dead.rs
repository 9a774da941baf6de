//! Dead devices that only their person's row names.

use diesel::Connection as _;
use diesel::connection::SimpleConnection as _;
use diesel::sql_types::{BigInt, Nullable, SmallInt, Text};

use super::*;
use crate::storage::conformance::{World, devices};
use crate::storage::sqlite::reach;

type Row = (i16, Option<String>, Option<i64>);

fn rows(conn: &mut SqliteConnection) -> Vec<Row> {
    constant!(
        (SmallInt, Nullable<Text>, Nullable<BigInt>);
        "SELECT state, retired_reason, retired_at FROM device d ORDER BY id"
    )
    .load(conn)
    .unwrap()
}

fn named(conn: &mut SqliteConnection) -> Vec<String> {
    constant!(Text; "SELECT dead FROM app_user WHERE dead IS NOT NULL ORDER BY id").load(conn).unwrap()
}

const ALIVE: Row = (1, None, None);

#[tokio::test]
async fn a_dead_device_leaves_its_row_alone() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let device = world.register("mina", "aa").await;
    devices::die(&world, &[device.id]).await;
    {
        let conn = &mut store.writer.inline_core().conn;
        assert_eq!(rows(conn), [ALIVE, ALIVE]);
        let entry = format!(r#"{{"{}":["410 Unregistered",{}]}}"#, device.id.0, world.now().0);
        assert_eq!(named(conn), [entry]);
    }
    world.pass(1);
    world.register("mina", "aa").await;
    let conn = &mut store.writer.inline_core().conn;
    assert_eq!(rows(conn), [ALIVE, ALIVE]);
    assert!(named(conn).is_empty(), "and nothing is left of it once it lives");
    assert_eq!(reach::differing(conn).unwrap(), [0_i64; 0]);
}

/// So that somebody's row stays within its page, however many phones they wear out.
#[tokio::test]
async fn many_dead_devices_go_into_their_rows() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let mut longest = 0;
    for number in 0..40 {
        let device = world.register("mina", &format!("aa{number:02x}")).await;
        devices::die(&world, &[device.id]).await;
        let conn = &mut store.writer.inline_core().conn;
        longest = longest.max(named(conn).iter().map(String::len).max().unwrap_or(0));
        assert_eq!(reach::differing(conn).unwrap(), [0_i64; 0]);
    }
    assert!((256..=512).contains(&longest), "{longest} bytes");
    let conn = &mut store.writer.inline_core().conn;
    let written = rows(conn).iter().filter(|row| row.0 == 2 && row.2.is_some()).count();
    let listed = named(conn).iter().map(|list| list.matches("410").count()).sum::<usize>();
    assert!(written >= 30 && written + listed == 40, "{written} rows say so themselves, {listed} are listed");
}

/// Another store does not know of the person's list.
#[tokio::test]
async fn before_a_move_the_rows_say_all() {
    let OnFile { store, deny, directory } = on_file();
    let path = directory.path().join("nudged.db");
    let died = {
        let fixture = fixture(&store, &deny);
        let world = World::new(&fixture).await;
        let (mina, jun) = (world.register("mina", "aa").await, world.register("jun", "bb").await);
        world.register("mina", "cc").await;
        devices::die(&world, &[mina.id, jun.id]).await;
        world.now().0
    };
    drop(store);
    let mut conn = SqliteConnection::establish(path.to_str().unwrap()).unwrap();
    assert_eq!(rows(&mut conn), [ALIVE; 4]);
    drop(Source::open(&path).unwrap());
    let dead = (2, Some("410 Unregistered".to_owned()), Some(died));
    assert_eq!(rows(&mut conn), [dead.clone(), dead, ALIVE, ALIVE]);
    assert!(named(&mut conn).is_empty());
    assert_eq!(reach::differing(&mut conn).unwrap(), [0_i64; 0]);
    drop(open_in(directory));
}

/// As somebody's who goes back to an older version.
#[tokio::test]
async fn without_the_list_the_rows_say_all() {
    const DOWN: &str = include_str!("../../../../migrations/sqlite/2026-11-30-000009_dead/down.sql");
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let (mina, jun) = (world.register("mina", "aa").await, world.register("jun", "bb").await);
    world.register("mina", "cc").await;
    devices::die(&world, &[mina.id, jun.id]).await;
    let conn = &mut store.writer.inline_core().conn;
    conn.batch_execute(DOWN).unwrap();
    let dead = (2, Some("410 Unregistered".to_owned()), Some(world.now().0));
    assert_eq!(rows(conn), [dead.clone(), dead, ALIVE, ALIVE]);
}
