//! Devices, apps and routes.

use super::*;
use crate::domain::consent::DeviceState;
use crate::domain::device::{DeviceRef, MAX_DEVICES_PER_USER, Retirement};
use crate::domain::ids::UserKey;
use crate::domain::platform::Permission;
use crate::storage::DeviceChange;

pub async fn rows_of_apps_and_routes_are_made_once(fixture: &Fixture) {
    let (world, again) = (World::new(fixture).await, World::new(fixture).await);
    assert_eq!((world.app, world.apns, world.fcm), (again.app, again.apns, again.fcm));
    let other = World::of_app(fixture, "toys").await;
    assert_ne!((world.app, world.apns), (other.app, other.apns));
    fixture.store.ping().await.unwrap();
}

pub async fn a_repeated_registration_writes_nothing_for_an_hour(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let first = world.try_register(world.registration("mina", "aa")).await.unwrap();
    assert!(first.created && first.device.active);
    world.pass(HOUR - 1);
    let again = world.try_register(world.registration("mina", "aa")).await.unwrap();
    assert_eq!(again, Registered { device: first.device.clone(), created: false });
    let mut changed = world.registration("mina", "aa");
    changed.details.permission = Permission::Granted;
    changed.details.labels.insert("tier".to_owned(), "beta".to_owned());
    let changed = world.try_register(changed).await.unwrap().device;
    assert_eq!((changed.id, changed.details.permission), (first.device.id, Permission::Granted));
    assert_eq!((changed.confirmed_at, changed.details.labels.len()), (world.now(), 1));
    world.pass(HOUR);
    let confirmed = world.register("mina", "aa").await;
    assert_eq!((confirmed.id, confirmed.confirmed_at), (first.device.id, world.now()));
}

pub async fn the_same_token_under_another_user_moves(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let before = world.register("mina", "aa").await;
    let gated = fixture.deny.position();
    let after = world.try_register(world.registration("jun", "aa")).await.unwrap();
    assert!(after.created && after.device.id != before.id);
    let old = &world.store().list_devices(world.app, &user("mina"), None, 9).await.unwrap().items[0];
    assert_eq!((old.id, old.active, old.retired_reason.as_deref()), (before.id, false, Some("MOVED")));
    assert!(fixture.deny.hit(gated, crate::domain::ids::UserKey(1), before.id, NotificationId(1)));
    // And back: each user's own row is taken up again.
    world.pass(1);
    assert_eq!(world.register("mina", "aa").await.id, before.id);
    world.pass(1);
    assert_eq!(world.register("jun", "aa").await.id, after.device.id);
    // Another app's token is another token.
    let other = World::of_app(fixture, "toys").await;
    assert!(other.register("mina", "aa").await.active);
    assert!(world.register("jun", "aa").await.active);
}

pub async fn a_token_that_went_through_many_hands_is_one_persons(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let names: Vec<String> = (0..70).map(|number| format!("u{number}")).collect();
    // Everybody once, then some whose rows are old by now.
    let turns = names.iter().chain([&names[0], &names[69], &names[6], &names[68]]);
    for name in turns {
        world.pass(1);
        world.register(name, "aa").await;
    }
    let mut active = Vec::new();
    for name in &names {
        let page = world.store().list_devices(world.app, &user(name), None, 9).await.unwrap();
        active.extend(page.items.into_iter().filter(|device| device.active).map(|_| name.as_str()));
    }
    assert_eq!(active, ["u68"]);
}

pub async fn a_dead_token_of_somebody_else_recalls_what_waits_for_it(fixture: &Fixture) {
    let world = World::new(fixture).await;
    world.opt_in("mina").await;
    let device = world.register("mina", "aa").await;
    world.accept(world.to_users(&["mina"])).await;
    let claimed = world.claim_one().await;
    let mut update = world.update(&claimed, Vec::new());
    let reason = "410 Unregistered".to_owned();
    update.retirements.push(Retirement { device: device.id, since: None, reason });
    assert!(world.record(update).await);
    // A second push to the phone was gated before that, and still waits at its sender.
    let gated = fixture.deny.position();
    let hit = || fixture.deny.hit(gated, UserKey(1), device.id, NotificationId(1));
    world.pass(1);
    world.register("jun", "bb").await;
    assert!(!hit(), "another token");
    let moved = world.register("jun", "aa").await;
    assert!(moved.active && moved.id != device.id);
    assert!(hit());
}

const GONE: &str = "410 Unregistered";

/// Platforms called the tokens of these devices dead, in one record.
pub async fn die(world: &World<'_>, devices: &[DeviceId]) {
    let update = dying(world, devices).await;
    assert!(world.record(update).await);
}

/// The record in which they do.
pub async fn dying(world: &World<'_>, devices: &[DeviceId]) -> JobUpdate {
    world.pass(1);
    world.reachable("carrier").await;
    world.accept(world.to_users(&["carrier"])).await;
    let claimed = world.claim_one().await;
    let mut update = world.update(&claimed, entries(&claimed.job.targets, ResultCode::Sent));
    let dead = |device: &DeviceId| Retirement { device: *device, since: None, reason: GONE.to_owned() };
    update.retirements.extend(devices.iter().map(dead));
    update
}

async fn devices_of(world: &World<'_>, name: &str) -> Vec<Device> {
    world.store().list_devices(world.app, &user(name), None, 200).await.unwrap().items
}

pub async fn a_dead_device_is_retired_for_whoever_asks(fixture: &Fixture) {
    let world = World::new(fixture).await;
    world.opt_in("mina").await;
    let (device, tablet) = (world.register("mina", "aa").await, world.register("mina", "bb").await);
    let open = world.accept(world.to_users(&["mina"])).await;
    let claimed = world.claim_one().await;
    die(&world, &[device.id, device.id]).await;
    let died = world.now();
    world.pass(1);
    die(&world, &[device.id]).await;
    let listed = devices_of(&world, "mina").await;
    assert_eq!(listed[1], tablet);
    let expected =
        Device { active: false, retired_reason: Some(GONE.to_owned()), retired_at: Some(died), ..device.clone() };
    assert_eq!(listed[0], expected, "as of the first time");
    // What was planned before does not pass its gate, and nothing is planned for it any more, however it is named.
    let facts = world.store().gate_facts(open, &comment(), &claimed.job.targets).await.unwrap().facts;
    let states: Vec<_> = facts.iter().flatten().map(|facts| (facts.target.device, facts.state)).collect();
    assert_eq!(states, [(device.id, DeviceState::Retired), (tablet.id, DeviceState::Active)]);
    assert!(world.record(world.update(&claimed, entries(&claimed.job.targets, ResultCode::Sent))).await);
    world.accept(world.to_users(&["mina"])).await;
    let claimed = world.claim_one().await;
    assert_eq!(claimed.job.targets.iter().map(|target| target.device).collect::<Vec<_>>(), [tablet.id]);
    let named = Audience { device_ids: vec![device.id], ..Audience::default() };
    world.accept(world.event(named)).await;
    assert!(world.claim(world.apns, Lane::Interactive).await.is_empty());
    // Platforms that speak of it again change nothing.
    let until = UnixMs(world.now().0 + HOUR);
    let update = world.update(&claimed, entries(&claimed.job.targets, ResultCode::Sent));
    let device_changes = vec![
        DeviceChange::Hold { device: device.id, until, doubted: true },
        DeviceChange::Reroute { device: device.id, from: world.apns, to: world.fcm },
    ];
    assert!(world.record(JobUpdate { device_changes, ..update }).await);
    assert!(world.store().held_devices(world.now(), 9).await.unwrap().is_empty());
    assert_eq!(devices_of(&world, "mina").await[0], expected);
    // Nor does whoever unregisters it.
    let now = world.now();
    for device in [DeviceRef::Id(device.id), DeviceRef::Token(Platform::Apns, DeviceToken::trusted("aa"))] {
        assert!(!world.store().unregister_device(world.app, None, device, now, now).await.unwrap());
    }
    assert_eq!(devices_of(&world, "mina").await[0], Device { observed_at: now, ..expected });
}

pub async fn a_dead_device_comes_back_and_passes_on(fixture: &Fixture) {
    let world = World::new(fixture).await;
    world.opt_in("mina").await;
    let choice = |device| NewOptIn { device: Some(device), ..world.choice("mina", false) };
    let (device, other) = (world.register("mina", "aa").await, world.register("mina", "bb").await);
    die(&world, &[device.id, other.id]).await;
    world.store().set_opt_in(choice(device.id), world.now()).await.unwrap();
    world.pass(1);
    let again = world.try_register(world.registration("mina", "aa")).await.unwrap();
    assert!(!again.created && again.device.active && again.device.id == device.id);
    assert_eq!((&again.device.retired_reason, again.device.retired_at), (&None, None));
    assert_eq!(devices_of(&world, "mina").await[0], again.device);
    assert!(!devices_of(&world, "mina").await[1].active, "the other one is as dead as it was");
    // It comes back with what was chosen for it.
    world.accept(world.to_users(&["mina"])).await;
    assert!(world.claim(world.apns, Lane::Interactive).await.is_empty());
    // Somebody else's now, and dead once more: it is nobody's, until one of them has it again.
    let theirs = world.register("jun", "aa").await;
    die(&world, &[theirs.id]).await;
    world.pass(1);
    let reasons = |devices: Vec<Device>| devices.into_iter().map(|device| device.retired_reason).collect::<Vec<_>>();
    let said = |reason: &str| Some(reason.to_owned());
    assert_eq!(reasons(devices_of(&world, "mina").await), [said("MOVED"), said(GONE)]);
    assert_eq!(reasons(devices_of(&world, "jun").await), [said(GONE)]);
    assert_eq!(world.register("mina", "aa").await.id, device.id);
    assert_eq!(reasons(devices_of(&world, "jun").await), [said(GONE)]);
    // An install whose token died gets a row for its new one.
    let installed =
        |token: &str| Registration { installation_id: Some("i-1".to_owned()), ..world.registration("jun", token) };
    let first = world.try_register(installed("cc")).await.unwrap().device;
    die(&world, &[first.id]).await;
    world.pass(1);
    let second = world.try_register(installed("dd")).await.unwrap();
    assert!(second.created && second.device.id != first.id);
    // Dead, named by its number and with another token.
    world.pass(1);
    let named = Registration { device: Some(other.id), ..world.registration("mina", "ee") };
    let named = world.try_register(named).await.unwrap().device;
    assert!(named.active && named.id == other.id);
    assert_eq!(reasons(devices_of(&world, "mina").await), [None, None]);
}

/// More of them than anybody else has devices.
pub async fn dead_devices_take_no_room(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let mut made = Vec::new();
    for number in 0..MAX_DEVICES_PER_USER {
        made.push(world.register("mina", &format!("aa{number:02x}")).await.id);
    }
    for dead in made[..30].chunks(3) {
        die(&world, dead).await;
    }
    for number in 0..30 {
        world.pass(1);
        world.register("mina", &format!("bb{number:02x}")).await;
    }
    let devices = devices_of(&world, "mina").await;
    let (dead, active): (Vec<_>, Vec<_>) = devices.iter().partition(|device| !device.active);
    assert_eq!(active.len(), MAX_DEVICES_PER_USER);
    assert_eq!(dead.iter().map(|device| device.id).collect::<Vec<_>>(), made[..30]);
    let times: Vec<_> = dead.iter().map(|device| device.retired_at.unwrap().0 - START.0).collect();
    assert_eq!(times, (0..30).map(|number| 1 + number / 3).collect::<Vec<_>>());
    assert!(dead.iter().all(|device| device.retired_reason.as_deref() == Some(GONE)));
}

pub async fn a_token_rotates_on_its_row(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let device = world.register("mina", "aa").await;
    let rotated =
        world.try_register(Registration { device: Some(device.id), ..world.registration("mina", "bb") }).await.unwrap();
    assert_eq!((rotated.device.id, rotated.created), (device.id, false));
    let installed =
        |token: &str| Registration { installation_id: Some("i-1".to_owned()), ..world.registration("mina", token) };
    let first = world.try_register(installed("cc")).await.unwrap().device;
    assert_ne!(first.id, device.id);
    assert_eq!(world.try_register(installed("dd")).await.unwrap().device.id, first.id);
    // Two rows of one user that turn out to be one phone become one.
    let merged =
        world.try_register(Registration { device: Some(first.id), ..world.registration("mina", "bb") }).await.unwrap();
    assert_eq!(merged.device.id, first.id);
    let devices = world.store().list_devices(world.app, &user("mina"), None, 9).await.unwrap().items;
    let replaced = devices.iter().find(|other| other.id == device.id).unwrap();
    assert_eq!((replaced.active, replaced.retired_reason.as_deref()), (false, Some("REPLACED")));
    assert_eq!(devices.len(), 2);
}

pub async fn an_install_that_changes_hands_moves(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let installed = |name: &str, token: &str| Registration {
        installation_id: Some("i-1".to_owned()),
        ..world.registration(name, token)
    };
    let before = world.try_register(installed("mina", "aa")).await.unwrap().device;
    let after = world.try_register(installed("jun", "bb")).await.unwrap();
    assert!(after.created);
    let old = &world.store().list_devices(world.app, &user("mina"), None, 9).await.unwrap().items[0];
    assert_eq!((old.id, old.active, old.retired_reason.as_deref()), (before.id, false, Some("MOVED")));
}

pub async fn a_device_of_another_user_is_not_found(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let other = World::of_app(fixture, "toys").await;
    let minas = world.register("mina", "aa").await.id;
    let theirs = other.register("jun", "bb").await.id;
    for device in [minas, theirs, DeviceId(77)] {
        let result = world.try_register(Registration { device: Some(device), ..world.registration("jun", "cc") }).await;
        assert!(matches!(result, Err(StoreError::DeviceNotFound { devices }) if devices == [device]));
        let choice = NewOptIn { device: Some(device), ..world.choice("jun", false) };
        assert!(matches!(world.store().set_opt_in(choice, world.now()).await, Err(StoreError::DeviceNotFound { .. })));
    }
    assert!(world.store().list_devices(world.app, &user("jun"), None, 9).await.unwrap().items.is_empty());
    assert!(world.store().list_opt_ins(world.app, &user("jun")).await.unwrap().is_empty());
}

pub async fn a_retired_token_comes_back_to_life(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let device = world.register("mina", "aa").await;
    let by_id = DeviceRef::Id(device.id);
    assert!(world.store().unregister_device(world.app, None, by_id, world.now(), world.now()).await.unwrap());
    world.pass(1);
    let back = world.try_register(world.registration("mina", "aa")).await.unwrap();
    assert_eq!((back.device.id, back.device.active, back.created), (device.id, true, false));
    assert_eq!(back.device.retired_reason, None);
}

pub async fn a_late_registration_loses(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let at = |millis: i64| UnixMs(START.0 + millis);
    let seen = |name: &str, token: &str, millis: i64| Registration {
        observed_at: at(millis),
        ..world.registration(name, token)
    };
    world.pass(100);
    // Behind a move: the phone is Jun's by now, and Mina's registration arrives as the past it is.
    let juns = world.try_register(seen("jun", "aa", 50)).await.unwrap().device;
    let late = world.try_register(seen("mina", "aa", 40)).await.unwrap();
    assert_eq!((late.device.active, late.device.retired_reason.as_deref()), (false, Some("MOVED")));
    assert!(!world.try_register(seen("mina", "aa", 41)).await.unwrap().created, "once is enough");
    let devices = world.store().list_devices(world.app, &user("jun"), None, 9).await.unwrap().items;
    assert!(devices[0].active && devices[0].id == juns.id);
    // Behind an unregistration.
    let token = DeviceRef::Token(Platform::Apns, DeviceToken::trusted("aa"));
    assert!(world.store().unregister_device(world.app, None, token, at(60), world.now()).await.unwrap());
    assert!(!world.try_register(seen("jun", "aa", 55)).await.unwrap().device.active);
    assert!(!world.try_register(seen("mina", "aa", 55)).await.unwrap().device.active);
    assert!(world.try_register(seen("jun", "aa", 70)).await.unwrap().device.active);
    // An older report of the same device.
    let mut old = seen("jun", "aa", 65);
    old.details.app_version = Some("1.0".to_owned());
    assert_eq!(world.try_register(old).await.unwrap().device.details.app_version, None);
}

pub async fn a_late_unregistration_loses(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let device = world.register("mina", "aa").await;
    let before = UnixMs(world.now().0 - 1);
    let gone = |observed_at| {
        world.store().unregister_device(world.app, None, DeviceRef::Id(device.id), observed_at, world.now())
    };
    assert!(!gone(before).await.unwrap());
    assert!(world.store().list_devices(world.app, &user("mina"), None, 9).await.unwrap().items[0].active);
    assert!(gone(world.now()).await.unwrap());
    // A second one later moves the tombstone on.
    assert!(!gone(UnixMs(world.now().0 + 20)).await.unwrap());
    let between = Registration { observed_at: UnixMs(world.now().0 + 10), ..world.registration("mina", "aa") };
    assert!(!world.try_register(between).await.unwrap().device.active);
}

pub async fn the_device_seen_longest_ago_makes_room(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let first = world.register("mina", "aa").await;
    for number in 1..MAX_DEVICES_PER_USER {
        world.pass(1);
        world.register("mina", &format!("{number:04x}")).await;
    }
    let active = || async {
        let page = world.store().list_devices(world.app, &user("mina"), None, 200).await.unwrap();
        page.items.into_iter().filter(|device| device.active).map(|device| device.id).collect::<Vec<_>>()
    };
    assert_eq!(active().await.len(), MAX_DEVICES_PER_USER);
    assert!(active().await.contains(&first.id));
    world.pass(1);
    let newest = world.register("mina", "ffff").await;
    let left = active().await;
    assert_eq!(left.len(), MAX_DEVICES_PER_USER);
    assert!(left.contains(&newest.id) && !left.contains(&first.id));
    let page = world.store().list_devices(world.app, &user("mina"), None, 200).await.unwrap();
    assert_eq!(page.items[0].retired_reason.as_deref(), Some("TOO_MANY_DEVICES"));
}

pub async fn devices_are_listed_in_pages(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let mut made = Vec::new();
    for number in 0..5 {
        made.push(world.register("mina", &format!("{number:02x}")).await.id);
    }
    world.register("jun", "aa").await;
    let (mut listed, mut after) = (Vec::new(), None);
    loop {
        let page = world.store().list_devices(world.app, &user("mina"), after, 2).await.unwrap();
        listed.extend(page.items.iter().map(|device| device.id));
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(listed, made);
    let device = &world.store().list_devices(world.app, &user("mina"), None, 1).await.unwrap().items[0];
    assert_eq!((&*device.credential, &*device.bundle), ("default", "com.example.pets"));
    assert_eq!(world.store().list_devices(world.app, &user("nobody"), None, 2).await.unwrap().items, []);
    assert_eq!(world.store().device_owner(world.app, made[0]).await.unwrap(), user("mina"));
}

pub async fn unregistering_publishes_a_no_and_obeys_its_precondition(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let other = World::of_app(fixture, "toys").await;
    let device = world.register("mina", "aa").await.id;
    let gone = |app, name: Option<&str>, device| {
        world.store().unregister_device(app, name.map(user), device, world.now(), world.now())
    };
    let token = DeviceRef::Token(Platform::Apns, DeviceToken::trusted("aa"));
    let not_found = |result| matches!(result, Err(StoreError::DeviceNotFound { .. }));
    assert!(not_found(gone(world.app, Some("jun"), DeviceRef::Id(device)).await));
    assert!(not_found(gone(world.app, Some("jun"), token.clone()).await));
    assert!(not_found(gone(other.app, None, DeviceRef::Id(device)).await));
    assert!(!gone(other.app, None, token.clone()).await.unwrap());
    assert!(!gone(world.app, None, DeviceRef::Id(DeviceId(5))).await.unwrap());
    let gated = fixture.deny.position();
    assert!(gone(world.app, Some("mina"), token.clone()).await.unwrap());
    assert!(fixture.deny.hit(gated, crate::domain::ids::UserKey(1), device, NotificationId(1)));
    assert!(!gone(world.app, Some("mina"), token).await.unwrap());
}
