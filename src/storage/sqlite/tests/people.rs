//! What is packed of people says what their rows say, however it is read.

use diesel::Connection as _;
use diesel::sql_types::BigInt;

use super::*;
use crate::domain::device::{DeviceRef, Retirement};
use crate::domain::ids::UserKey;
use crate::domain::outcome::ResultCode;
use crate::storage::conformance::{World, comment, entries, user};
use crate::storage::sqlite::people::user_key;
use crate::storage::sqlite::reach;
use crate::storage::{DeviceChange, JobUpdate, NewOptIn};

fn name(number: usize) -> String {
    format!("u{number:02}")
}

/// Of every kind: without devices, with several, some of them retired; without choices, with the user's and a device's own,
/// for this event type and for others.
async fn world_of(world: &World<'_>, people: usize) {
    let other = EventType::parse("event_type", "other").unwrap();
    for number in 0..people {
        let name = name(number);
        world.pass(1);
        // The first mention makes the row: keys ascend.
        world.subscribe(&name, "all").await;
        if number % 3 == 0 {
            world.subscribe(&name, "third").await;
        }
        for place in 0..number % 4 {
            let device = world.register(&name, &format!("{:04x}", number * 16 + place)).await;
            for event_type in [None, Some(comment())].into_iter().take(number % 5 % 3) {
                let choice = world.choice(&name, (number + place) % 2 == 0);
                let choice = NewOptIn { device: Some(device.id), event_type, ..choice };
                world.store().set_opt_in(choice, world.now()).await.unwrap();
            }
            if (number + place) % 5 == 0 {
                let (named, now) = (Some(user(&name)), world.now());
                world.store().unregister_device(world.app, named, DeviceRef::Id(device.id), now, now).await.unwrap();
            }
        }
        for (place, event_type) in [None, Some(comment()), Some(other.clone())].into_iter().enumerate() {
            if (number >> place) % 2 == 0 {
                let choice = NewOptIn { event_type, ..world.choice(&name, (number + place) % 3 != 0) };
                world.store().set_opt_in(choice, world.now()).await.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn a_page_and_a_look_up_say_what_the_rows_do() {
    const PEOPLE: usize = 60;
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    world_of(&world, PEOPLE).await;
    let app = world.app;
    let mut core = store.writer.inline_core();
    let conn = &mut core.conn;
    let keys: Vec<UserKey> =
        (0..PEOPLE).map(|number| user_key(conn, app, &user(&name(number))).ok().flatten().unwrap()).collect();
    assert!(keys.is_sorted());
    assert_eq!(reach::differing(conn).unwrap(), [0_i64; 0]);
    let (mut ranges, mut crowded) = (0, 0);
    for step in [1, 2, 3, 7, 20] {
        for from in 0..PEOPLE {
            for count in [0, 1, 2, 9, PEOPLE] {
                let users: Vec<UserKey> = keys[from..].iter().step_by(step).take(count).copied().collect();
                let rows = reach::of_rows(conn, &comment(), &users).unwrap();
                let looked_up = reach::of_users(conn, &comment(), &users).unwrap();
                assert_eq!((&looked_up.people, &looked_up.facts), (&rows.people, &rows.facts));
                let page = reach::of_page(conn, &comment(), &users).unwrap();
                assert_eq!((&page.people, &page.facts), (&rows.people, &rows.facts));
                match reach::of_range(conn, &comment(), &users).unwrap() {
                    None => crowded += 1,
                    Some(range) => {
                        ranges += 1;
                        assert_eq!((&range.people, &range.facts), (&rows.people, &rows.facts));
                    }
                }
            }
        }
    }
    // Both ways were gone often.
    assert!(ranges > 200 && crowded > 200, "{ranges} ranges, {crowded} crowded");
}

/// Every way there is to change how somebody can be reached.
#[tokio::test]
async fn whatever_changes_a_person_packs_them_anew() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let mut changes = 0;
    let mut check = |what: &str| {
        let mut core = store.writer.inline_core();
        assert_eq!(reach::differing(&mut core.conn).unwrap(), [0_i64; 0], "{what}");
        let packed: i64 = constant!(BigInt; "SELECT total_changes()").get_result(&mut core.conn).unwrap();
        assert!(packed > std::mem::replace(&mut changes, packed), "{what} changes nothing");
    };
    world_of(&world, 20).await;
    check("registrations and choices");
    let device = world.register("mina", "aa01").await;
    check("a new person");
    world.register("mina", "aa02").await;
    check("a second device");
    world.register("choco", "aa02").await;
    check("a token that moves on");
    world.register("mina", "aa02").await;
    check("a token that comes back");
    world.store().set_opt_in(world.choice("mina", false), world.now()).await.unwrap();
    check("a no");
    let reroute = DeviceChange::Reroute { device: device.id, from: world.apns, to: world.fcm };
    world.pass(1);
    world.opt_in("mina").await;
    world.accept(world.to_users(&["mina"])).await;
    let claimed = world.claim_one().await;
    let update = world.update(&claimed, entries(&claimed.job.targets, ResultCode::MovedToRetry));
    assert!(world.record(JobUpdate { device_changes: vec![reroute], ..update }).await);
    check("a route found elsewhere");
    world.reachable("dubu").await;
    world.accept(world.to_users(&["dubu"])).await;
    let claimed = world.claim_one().await;
    let mut update = world.update(&claimed, entries(&claimed.job.targets, ResultCode::DeadToken));
    let device = claimed.job.targets[0].device;
    update.retirements.push(Retirement { device, since: None, reason: "410 Unregistered".to_owned() });
    assert!(world.record(update).await);
    check("a dead token");
    for number in 0..12 {
        world.register("haru", &format!("bb{number:02}{}", "c".repeat(150))).await;
    }
    check("more than is packed");
    let haru = user_key(&mut store.writer.inline_core().conn, world.app, &user("haru")).unwrap().unwrap();
    let found = reach::of_users(&mut store.writer.inline_core().conn, &comment(), &[haru]).unwrap();
    assert_eq!(found.facts.len(), 12);
    for number in 0..10 {
        let device = found.facts[number].target.device;
        let (named, now) = (Some(user("haru")), world.now());
        world.store().unregister_device(world.app, named, DeviceRef::Id(device), now, now).await.unwrap();
    }
    check("what fits again");
    let device = found.facts[11].target.device;
    for (device, event_type, opted_in) in [
        (Some(device), None, true),
        (None, Some(comment()), false),
        (None, None, false),
        (Some(device), Some(comment()), true),
        (Some(device), None, false),
        (Some(found.facts[0].target.device), None, false),
        (None, Some(comment()), true),
    ] {
        world.pass(1);
        let choice = NewOptIn { event_type, device, ..world.choice("haru", opted_in) };
        world.store().set_opt_in(choice, world.now()).await.unwrap();
        check("a choice");
    }
}

/// A database from before people were packed.
#[tokio::test]
async fn a_start_packs_everybody_once() {
    let OnFile { store, deny, directory } = on_file();
    let path = directory.path().join("nudged.db");
    {
        let fixture = fixture(&store, &deny);
        let world = World::new(&fixture).await;
        world_of(&world, 20).await;
    }
    drop(store);
    let differing = || {
        let mut conn = SqliteConnection::establish(path.to_str().unwrap()).unwrap();
        reach::differing(&mut conn).unwrap().len()
    };
    let mut conn = SqliteConnection::establish(path.to_str().unwrap()).unwrap();
    for sql in ["UPDATE app_user SET reach = NULL", "DELETE FROM watermark WHERE name = 'reach'"] {
        diesel::sql_query(sql).execute(&mut conn).unwrap();
    }
    drop(conn);
    assert_eq!(differing(), 20);
    let opened = open_in(directory);
    assert_eq!(differing(), 0);
    drop(opened);
}
