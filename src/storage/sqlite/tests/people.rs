//! A page of people read as a range says what looking each of them up says.

use super::*;
use crate::domain::device::DeviceRef;
use crate::domain::ids::UserKey;
use crate::storage::NewOptIn;
use crate::storage::conformance::{World, comment, user};
use crate::storage::sqlite::people::{People, user_key};

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
async fn a_range_says_what_looking_each_person_up_does() {
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
    let (mut ranges, mut crowded) = (0, 0);
    for step in [1, 2, 3, 7, 20] {
        for from in 0..PEOPLE {
            for count in [0, 1, 2, 9, PEOPLE] {
                let users: Vec<UserKey> = keys[from..].iter().step_by(step).take(count).copied().collect();
                let looked_up = People::of_users(conn, &comment(), &users).unwrap();
                let page = People::of_page(conn, &comment(), &users).unwrap();
                assert_eq!(page.people, looked_up.people);
                assert_eq!(page.facts, looked_up.facts);
                match People::of_range(conn, &comment(), &users).unwrap() {
                    None => crowded += 1,
                    Some(range) => {
                        ranges += 1;
                        assert_eq!(range.people, looked_up.people);
                        assert_eq!(range.facts, looked_up.facts);
                    }
                }
            }
        }
    }
    // Both ways were gone often.
    assert!(ranges > 200 && crowded > 200, "{ranges} ranges, {crowded} crowded");
}
