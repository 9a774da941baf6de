//! What can be asked afterwards.

use super::*;
use crate::domain::ids::UserKey;
use crate::domain::notification::NewJob;
use crate::domain::outcome::State;
use crate::domain::targets::Progress;

pub async fn the_last_block_that_names_a_target_wins(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let device = world.reachable("mina").await.id;
    let id = world.accept(world.to_users(&["mina"])).await;
    let all = DeliveryFilter::default;
    assert_eq!(world.reasons(id, all()).await, [(device, "QUEUED")]);
    let claimed = world.claim_one().await;
    let mut update = world.update(&claimed, entries(&claimed.job.targets, ResultCode::Deferred));
    update.progress = Some(Progress::none(1));
    assert!(world.record(update).await);
    assert_eq!(world.reasons(id, all()).await, [(device, "DEFERRED")]);
    assert!(world.record(world.update(&claimed, entries(&claimed.job.targets, ResultCode::Expired))).await);
    assert_eq!(world.reasons(id, all()).await, [(device, "EXPIRED")]);
}

/// People `u00` to `u29`; every third without consent, and a third of the rest sent to.
async fn thirty(world: &World<'_>) -> NotificationId {
    let names: Vec<String> = (0..30).map(|number| format!("u{number:02}")).collect();
    for (number, name) in names.iter().enumerate() {
        if number % 3 == 0 {
            world.register(name, &format!("{:x}", md(name))).await;
        } else {
            world.reachable(name).await;
        }
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let id = world.accept(world.to_users(&names)).await;
    let claimed = world.claim_one().await;
    let mut progress = Progress::none(claimed.job.targets.len());
    let mut sent = Vec::new();
    for (at, target) in claimed.job.targets.iter().enumerate().step_by(4) {
        progress.finish(at);
        sent.push(*target);
    }
    let mut update = world.update(&claimed, entries(&sent, ResultCode::Sent));
    update.progress = Some(progress);
    assert!(world.record(update).await);
    id
}

pub async fn deliveries_are_listed_in_pages(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let id = thirty(&world).await;
    let whole = world.store().list_deliveries(world.app, id, DeliveryFilter::default(), None, 100).await.unwrap();
    assert_eq!((whole.items.len(), whole.next), (30, None));
    assert!(whole.items.windows(2).all(|pair| pair[0].entry < pair[1].entry));
    for limit in [1, 4, 29, 30] {
        let (mut listed, mut after) = (Vec::new(), None);
        loop {
            let page =
                world.store().list_deliveries(world.app, id, DeliveryFilter::default(), after, limit).await.unwrap();
            listed.extend(page.items);
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        assert_eq!(listed, whole.items, "by {limit}");
    }
    let exact = world.store().list_deliveries(world.app, id, DeliveryFilter::default(), None, 30).await.unwrap();
    assert_eq!(exact.next, None);
    let mut names: Vec<_> = whole.items.iter().map(|delivery| delivery.user.to_string()).collect();
    names.sort_unstable();
    assert!(names.into_iter().eq((0..30).map(|number| format!("u{number:02}"))));
}

pub async fn deliveries_are_filtered(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let id = thirty(&world).await;
    let states = |states: &[State]| DeliveryFilter { user: None, states: states.to_vec() };
    assert_eq!(world.reasons(id, states(&[State::Suppressed])).await.len(), 10);
    assert_eq!(world.reasons(id, states(&[State::Sent])).await.len(), 5);
    assert_eq!(world.reasons(id, states(&[State::Open])).await.len(), 15);
    assert_eq!(world.reasons(id, states(&[State::Open, State::Sent])).await.len(), 20);
    assert_eq!(world.reasons(id, states(&[State::Dead])).await, []);
    let of = |name: &str| DeliveryFilter { user: Some(user(name)), states: Vec::new() };
    assert_eq!(world.reasons(id, of("u03")).await, [(DeviceId(0), "NEVER_OPTED_IN")]);
    assert_eq!(world.reasons(id, of("u01")).await.len(), 1);
    assert_eq!(world.reasons(id, of("nobody")).await, []);
}

pub async fn a_person_is_explained(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let device = world.reachable("mina").await;
    world.reachable("jun").await;
    let id = world.accept(world.to_users(&["mina", "jun", "stranger"])).await;
    let of = |name: &'static str| {
        let world = &world;
        async move { world.store().person_history(world.app, id, &user(name)).await.unwrap() }
    };
    let before = of("mina").await;
    assert_eq!((before.user_id.clone(), before.open.len(), before.blocks.len()), (user("mina"), 1, 0));
    assert_eq!((before.open[0].0.device, before.open[0].1, before.open[0].2), (device.id, world.apns, 0));
    assert_eq!(before.devices.len(), 1);
    assert!(!before.expansion_pending && before.choices[0].applied);
    let claimed = world.claim_one().await;
    assert!(world.record(world.update(&claimed, entries(&claimed.job.targets, ResultCode::Sent))).await);
    let after = of("mina").await;
    assert!(after.open.is_empty());
    assert_eq!(after.blocks.len(), 1);
    assert_eq!(after.blocks[0].entries.len(), 1, "only this person's");
    assert_eq!(after.blocks[0].entries[0].device, device.id);
    assert_eq!(after.blocks[0].route, Some(world.apns));
    let stranger = of("stranger").await;
    assert!(stranger.user.is_some() && stranger.blocks[0].route.is_none());
    assert_eq!(stranger.blocks[0].entries[0].code, ResultCode::NoDevice);
    let nobody = of("nobody").await;
    assert!(nobody.user.is_none() && nobody.blocks.is_empty());
}

pub async fn an_expansion_that_has_not_come_is_pending(fixture: &Fixture) {
    let world = World::new(fixture).await;
    world.reachable("mina").await;
    world.reachable("outsider").await;
    world.subscribe("mina", "post:1").await;
    for number in 0..501 {
        world.subscribe(&format!("u{number}"), "post:1").await;
    }
    let id = world.accept(world.to_topics(&["post:1"])).await;
    let pending =
        async |name: &UserId| world.store().person_history(world.app, id, name).await.unwrap().expansion_pending;
    assert!(pending(&user("mina")).await && pending(&user("u77")).await);
    assert!(!pending(&user("outsider")).await);
    let mut fanout = world.store().claim_fanout(fixture.boot, world.now(), &[]).await.unwrap().unwrap();
    let page = world.store().fanout_page(&fanout, 1).await.unwrap();
    fanout.cursor = page.cursor;
    let write = crate::storage::PageWrite {
        app: world.app,
        notification: id,
        fence: fanout.fence,
        cursor: page.cursor,
        done: false,
        jobs: Vec::new(),
        leased: 0,
        suppressed: Vec::new(),
    };
    assert!(world.store().write_page(write, world.now()).await.unwrap().is_some());
    let first = world.store().user_names(&[page.cursor]).await.unwrap().remove(0).unwrap();
    let others = (0..501).map(|number| user(&format!("u{number}"))).chain([user("mina")]);
    for name in others {
        assert_eq!(pending(&name).await, name != first, "{name}");
    }
}

pub async fn another_apps_ids_are_not_found(fixture: &Fixture) {
    let (world, other) = (World::new(fixture).await, World::of_app(fixture, "toys").await);
    let device = world.reachable("mina").await.id;
    let id = world.accept(world.to_users(&["mina"])).await;
    let store = other.store();
    let not_found = |error| matches!(error, StoreError::NotificationNotFound { notification } if notification == id);
    assert!(not_found(store.get_notification(other.app, id).await.unwrap_err()));
    assert!(not_found(store.list_deliveries(other.app, id, DeliveryFilter::default(), None, 9).await.unwrap_err()));
    assert!(not_found(store.person_history(other.app, id, &user("mina")).await.unwrap_err()));
    assert!(not_found(store.cancel_notification(other.app, id, world.now()).await.unwrap_err()));
    assert!(matches!(store.device_owner(other.app, device).await, Err(StoreError::DeviceNotFound { .. })));
    assert!(matches!(
        store.get_notification(other.app, NotificationId(9)).await,
        Err(StoreError::NotificationNotFound { .. })
    ));
    assert_eq!(world.view(id).await.notification.cancelled_at, None);
}

pub async fn notifications_are_listed_newest_first(fixture: &Fixture) {
    let (world, other) = (World::new(fixture).await, World::of_app(fixture, "toys").await);
    let mut made = Vec::new();
    for number in 0..5 {
        world.pass(1);
        let event_type = EventType::trusted(if number == 2 { "post.created" } else { "comment.created" });
        made.push(world.accept(NewEvent { event_type, ..world.to_users(&["mina"]) }).await);
    }
    other.accept(other.to_users(&["mina"])).await;
    made.reverse();
    let (mut listed, mut before) = (Vec::new(), None);
    loop {
        let page = world.store().list_notifications(world.app, None, before, 2).await.unwrap();
        listed.extend(page.items.iter().map(|notification| notification.id));
        before = page.next;
        if before.is_none() {
            break;
        }
    }
    assert_eq!(listed, made);
    let typed =
        world.store().list_notifications(world.app, Some(EventType::trusted("post.created")), None, 9).await.unwrap();
    assert_eq!(typed.items.iter().map(|notification| notification.id).collect::<Vec<_>>(), [made[2]]);
    let declared = world.store().event_type(world.app, &comment()).await.unwrap();
    assert_eq!((declared.any_declared, declared.current), (false, None));
}

pub async fn counts_follow_a_delivery(fixture: &Fixture) {
    let world = World::new(fixture).await;
    for number in 0..6 {
        world.reachable(&format!("u{number}")).await;
    }
    let id = world.accept(world.to_users(&["u0", "u1", "u2", "u3", "u4", "u5"])).await;
    let claimed = world.claim_one().await;
    let codes = [
        ResultCode::Sent,
        ResultCode::DeadToken,
        ResultCode::Expired,
        ResultCode::Cancelled,
        ResultCode::OptedOut,
        ResultCode::MovedToRetry,
    ];
    let results = claimed.job.targets.iter().zip(codes);
    let entries = results.map(|(target, code)| Entry { user: target.user, device: target.device, code }).collect();
    let mut update = world.update(&claimed, entries);
    update.followers.push(NewJob {
        notification: id,
        route: world.apns,
        lane: Lane::Interactive,
        targets: claimed.job.targets[5..].to_vec(),
        attempt: 1,
        claims: 0,
        ready_at: world.now(),
        due_at: world.now(),
        first_attempt_at: Some(world.now()),
    });
    assert!(world.record(update).await);
    let counts = world.view(id).await.counts;
    assert_eq!((counts.sent, counts.dead, counts.expired), (1, 1, 1));
    assert_eq!((counts.cancelled, counts.suppressed, counts.open), (1, 1, 1));
    assert!(world.claim_one().await.job.targets[0].user > UserKey(0));
}
