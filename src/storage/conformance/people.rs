//! People of every kind, and every way there is to change how somebody can be reached. Each store checks what it packs of them.

use super::*;
use crate::domain::device::{DeviceRef, Retirement};
use crate::domain::ids::Locale;
use crate::storage::{DeviceChange, ImportBatch, ImportItem};

pub fn name(number: usize) -> String {
    format!("u{number:02}")
}

/// Of every kind: without devices, with several, some of them retired; without choices, with the user's and a device's own,
/// for this event type and for others.
pub async fn crowd(world: &World<'_>, people: usize) {
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
                unregister(world, &name, device.id).await;
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

async fn unregister(world: &World<'_>, name: &str, device: DeviceId) {
    let (named, now) = (Some(user(name)), world.now());
    world.store().unregister_device(world.app, named, DeviceRef::Id(device), now, now).await.unwrap();
}

/// `check` is told after each what it was.
pub async fn every_change(world: &World<'_>, mut check: impl AsyncFnMut(&str)) {
    crowd(world, 20).await;
    check("registrations and choices").await;
    let device = world.register("mina", "aa01").await;
    check("a new person").await;
    world.register("mina", "aa02").await;
    check("a second device").await;
    world.register("choco", "aa02").await;
    check("a token that moves on").await;
    world.register("mina", "aa02").await;
    check("a token that comes back").await;
    let mut spoken = world.registration("mina", "aa02");
    spoken.details.locale = Some(Locale::trusted("ko-KR"));
    world.try_register(spoken.clone()).await.unwrap();
    check("a language").await;
    world.store().set_opt_in(world.choice("mina", false), world.now()).await.unwrap();
    check("a no").await;
    let reroute = DeviceChange::Reroute { device: device.id, from: world.apns, to: world.fcm };
    world.pass(1);
    world.opt_in("mina").await;
    world.accept(world.to_users(&["mina"])).await;
    let claimed = world.claim_one().await;
    let update = world.update(&claimed, entries(&claimed.job.targets, ResultCode::MovedToRetry));
    assert!(world.record(JobUpdate { device_changes: vec![reroute], ..update }).await);
    check("a route found elsewhere").await;
    world.reachable("dubu").await;
    world.accept(world.to_users(&["dubu"])).await;
    let claimed = world.claim_one().await;
    let mut update = world.update(&claimed, entries(&claimed.job.targets, ResultCode::DeadToken));
    let device = claimed.job.targets[0].device;
    update.retirements.push(Retirement { device, since: None, reason: "410 Unregistered".to_owned() });
    assert!(world.record(update).await);
    check("a dead token").await;
    let imported = world.registration("nabi", "aa03");
    let device = ImportItem::Device { registration: imported, created_at: world.now() };
    let items = vec![device, ImportItem::OptIn(world.choice("nabi", true))];
    let batch = ImportBatch { app: world.app, name: "import/people".to_owned(), position: 1, items };
    assert!(world.store().import(batch, world.now()).await.unwrap().iter().all(Result::is_ok));
    check("an import").await;
    for number in 0..12 {
        world.register("haru", &format!("bb{number:02}{}", "c".repeat(150))).await;
    }
    check("more than is packed").await;
    let devices = world.store().list_devices(world.app, &user("haru"), None, 20).await.unwrap().items;
    assert_eq!(devices.len(), 12);
    for device in &devices[..10] {
        unregister(world, "haru", device.id).await;
    }
    check("what fits again").await;
    let device = devices[11].id;
    for (device, event_type, opted_in) in [
        (Some(device), None, true),
        (None, Some(comment()), false),
        (None, None, false),
        (Some(device), Some(comment()), true),
        (Some(device), None, false),
        (Some(devices[0].id), None, false),
        (None, Some(comment()), true),
    ] {
        world.pass(1);
        let choice = NewOptIn { event_type, device, ..world.choice("haru", opted_in) };
        world.store().set_opt_in(choice, world.now()).await.unwrap();
        check("a choice").await;
    }
}
