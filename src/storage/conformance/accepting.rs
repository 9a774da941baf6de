//! Acceptance.

use super::*;
use crate::domain::deny::DenyPosition;
use crate::domain::device::DeviceRef;
use crate::domain::notification::{IDEMPOTENCY_KEPT_MS, SMALL_AUDIENCE};

pub async fn a_repeat_gets_the_first_answer(fixture: &Fixture) {
    let world = World::new(fixture).await;
    world.reachable("mina").await;
    let event = |name: &str, hash| NewEvent { idempotency: Some(key(name, hash)), ..world.to_users(&["mina"]) };
    let first = world.try_accept(event("k", 1)).await.unwrap();
    let again = world.try_accept(event("k", 1)).await.unwrap();
    assert_eq!((again.notification, first.duplicate, again.duplicate), (first.notification, false, true));
    let reused = world.try_accept(event("k", 2)).await;
    assert!(matches!(
        reused, Err(StoreError::IdempotencyKeyReused { notification }) if notification == first.notification
    ));
    assert_ne!(world.accept(event("other", 1)).await, first.notification);
    let toys = World::of_app(fixture, "toys").await;
    let theirs = NewEvent { idempotency: Some(key("k", 9)), ..toys.to_users(&["mina"]) };
    assert!(!toys.try_accept(theirs).await.unwrap().duplicate, "the scope is the app");
    assert_eq!(world.claim(world.apns, Lane::Interactive).await.len(), 2);
    world.pass(IDEMPOTENCY_KEPT_MS);
    let free = world.try_accept(event("k", 2)).await.unwrap();
    assert!(!free.duplicate && free.notification != first.notification);
}

pub async fn a_repeat_after_the_ttl_gets_it_too(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let event = NewEvent { idempotency: Some(key("k", 1)), ..world.to_users(&["mina"]) };
    let first = world.try_accept(event.clone()).await.unwrap();
    world.pass(event.expires_at.0 - world.now().0);
    let again = world.try_accept(event.clone()).await.unwrap();
    assert!(again.duplicate && again.notification == first.notification);
    let new = NewEvent { idempotency: Some(key("k2", 1)), ..event };
    assert!(matches!(world.try_accept(new).await, Err(StoreError::AlreadyExpired)));
}

pub async fn a_refused_event_leaves_nothing(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let other = World::of_app(fixture, "toys").await;
    let (known, foreign) = (world.register("mina", "aa").await.id, other.register("mina", "aa").await.id);
    let mut event = world.to_users(&["stranger"]);
    event.idempotency = Some(key("k", 1));
    event.audience.device_ids = vec![known, DeviceId(7), foreign];
    let refused = world.try_accept(event.clone()).await;
    let Err(StoreError::DeviceNotFound { mut devices }) = refused else { panic!("{refused:?}") };
    devices.sort();
    assert_eq!(devices, [DeviceId(7), foreign]);
    let everyone =
        NewEvent { idempotency: Some(key("k", 2)), ..world.event(Audience { everyone: true, ..Audience::default() }) };
    assert!(matches!(world.try_accept(everyone).await, Err(StoreError::BroadcastNotAllowed)));
    let page = world.store().list_notifications(world.app, None, None, 9).await.unwrap();
    assert!(page.items.is_empty());
    event.audience.device_ids.clear();
    event.idempotency = Some(key("k", 3));
    assert!(!world.try_accept(event).await.unwrap().duplicate, "the key was not taken");
}

pub async fn a_person_named_in_many_ways_is_one_person(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let phone = world.reachable("mina").await.id;
    let tablet = world.register_fcm("mina", "tablet").await.id;
    let juns = world.reachable("jun").await.id;
    let juns_other = world.register("jun", "beef").await.id;
    world.subscribe("mina", "post:1").await;
    world.subscribe("mina", "post:2").await;
    let id = world
        .accept(world.event(Audience {
            user_ids: vec![user("mina"), user("mina")],
            topics: vec![topic("post:1"), topic("post:2"), topic("post:3")],
            device_ids: vec![phone, juns, juns],
            everyone: false,
        }))
        .await;
    assert_eq!(world.view(id).await.people, Some(2));
    let mut reached: Vec<DeviceId> = Vec::new();
    for route in [world.apns, world.fcm] {
        for claimed in world.claim(route, Lane::Interactive).await {
            reached.extend(claimed.job.targets.iter().map(|target| target.device));
        }
    }
    reached.sort();
    assert_eq!(reached, [phone, tablet, juns], "Jun was named by one device");
    // A retired device that is named is explained, not forgotten.
    let retired = DeviceRef::Id(juns_other);
    world.store().unregister_device(world.app, None, retired, world.now(), world.now()).await.unwrap();
    let id = world.accept(world.event(Audience { device_ids: vec![juns_other], ..Audience::default() })).await;
    assert_eq!(world.reasons(id, DeliveryFilter::default()).await, [(juns_other, "DEVICE_RETIRED")]);
}

/// `count` subscribers of `to`, none with a device.
async fn crowd(world: &World<'_>, to: &str, count: usize) {
    for number in 0..count {
        world.subscribe(&format!("{to}-{number}"), to).await;
    }
}

pub async fn five_hundred_are_small_and_one_more_is_large(fixture: &Fixture) {
    let world = World::new(fixture).await;
    crowd(&world, "post:1", SMALL_AUDIENCE).await;
    let engine = Engine::with_room(0);
    let small = NewEvent { may_broadcast: false, ..world.to_topics(&["post:1"]) };
    let id = world.store().accept(small.clone(), engine.clone(), world.now()).await.unwrap().notification;
    let view = world.view(id).await;
    assert_eq!((view.people, view.expanding, view.notification.lane), (Some(500), false, Lane::Interactive));
    assert_eq!(view.counts.suppressed, 500);
    let mut large = small;
    large.audience.user_ids = vec![user("post:1-7"), user("one more")];
    assert!(matches!(world.try_accept(large.clone()).await, Err(StoreError::BroadcastNotAllowed)));
    large.may_broadcast = true;
    let id = world.store().accept(large, engine.clone(), world.now()).await.unwrap().notification;
    let view = world.view(id).await;
    assert_eq!((view.people, view.expanding, view.notification.lane), (None, true, Lane::Bulk));
    assert_eq!(engine.fanouts_woken.load(Ordering::SeqCst), 1);
}

/// Events to topics of nobody, of a few and of many, with people named besides, all at once: each is met as if alone.
pub async fn topics_of_every_size_at_once(fixture: &Fixture) {
    let world = &World::new(fixture).await;
    let sizes = [0, 1, 2, 63, 64, 65, 200];
    for size in sizes {
        crowd(world, &format!("post:{size}"), size).await;
    }
    world.reachable("mina").await;
    world.reachable("post:1-0").await;
    world.subscribe("mina", "post:2").await;
    world.subscribe("left", "post:1").await;
    let now = world.now();
    world.store().set_subscription(world.app, user("left"), topic("post:1"), false, now, now).await.unwrap();
    // With the people that it is for.
    let mut events = Vec::new();
    for size in sizes {
        let people = if size == 2 { 3 } else { size };
        let event = world.to_topics(&[&format!("post:{size}")]);
        events.push((event.clone(), people));
        let mut named = event;
        named.audience.user_ids = ["mina", "post:1-0", "somebody new"].map(user).to_vec();
        let both = usize::from(size == 1) + usize::from(size == 2);
        events.push((named, people + 3 - both));
    }
    events.push((world.to_topics(&["post:1", "post:2", "post:63", "nobody's"]), 1 + 3 + 63));
    events.push((world.to_topics(&["post:0", "post:1", "post:2", "post:63", "nobody's"]), 1 + 3 + 63));
    events.push((world.to_topics(&["post:2", "post:2"]), 3));
    let mut calls = Vec::new();
    for number in 0..4 {
        for (at, (event, people)) in events.iter().enumerate() {
            let mut event = event.clone();
            // To the last person, and one short.
            event.max_audience = match number {
                0 => None,
                1 => u32::try_from((*people).max(1)).ok(),
                2 if *people > 1 => u32::try_from(people - 1).ok(),
                _ => u32::try_from(people + 1).ok(),
            };
            let short = event.max_audience.is_some_and(|limit| (limit as usize) < *people);
            event.idempotency = Some(key(&format!("{number}-{at}"), 1));
            let (again, people) = (event.clone(), *people);
            calls.push(async move {
                let first = world.try_accept(event).await;
                if short {
                    assert!(matches!(first, Err(StoreError::AudienceTooLarge { .. })), "{people}: {first:?}");
                    return;
                }
                let first = first.unwrap();
                let repeated = world.try_accept(again).await.unwrap();
                assert_eq!(
                    (repeated.notification, first.duplicate, repeated.duplicate),
                    (first.notification, false, true)
                );
                assert_eq!(world.view(first.notification).await.people, Some(people as u64));
            });
        }
    }
    futures_util::future::join_all(calls).await;
    // Mina is named in seven events and follows what four are for; the other follows three, of
    // which one, for that person alone, is never short. Three of the four times that each came are not.
    let claimed = world.claim(world.apns, Lane::Interactive).await;
    let targets: usize = claimed.iter().map(|one| one.job.targets.len()).sum();
    assert_eq!(targets, 3 * (7 + 4) + 3 * (7 + 2) + 4);
}

pub async fn max_audience_holds_at_its_boundary(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let limited = |limit, event: NewEvent| NewEvent { max_audience: Some(limit), ..event };
    let three = world.to_users(&["a", "b", "c"]);
    assert!(world.try_accept(limited(3, three.clone())).await.is_ok());
    assert!(matches!(world.try_accept(limited(2, three)).await, Err(StoreError::AudienceTooLarge { limit: 2 })));
    crowd(&world, "post:1", 510).await;
    crowd(&world, "post:2", 5).await;
    world.subscribe("post:1-1", "post:2").await;
    let mut wide = world.to_topics(&["post:1", "post:2"]);
    wide.audience.user_ids = vec![user("post:1-1"), user("nobody yet")];
    world.try_accept(limited(516, wide.clone())).await.unwrap();
    // The one who had no row has one now.
    assert!(matches!(world.try_accept(limited(515, wide.clone())).await, Err(StoreError::AudienceTooLarge { .. })));
    assert!(matches!(world.try_accept(limited(400, wide)).await, Err(StoreError::AudienceTooLarge { .. })));
    let everyone = NewEvent { may_broadcast: true, ..world.event(Audience { everyone: true, ..Audience::default() }) };
    assert!(world.try_accept(limited(1000, everyone.clone())).await.is_ok());
    assert!(matches!(world.try_accept(limited(510, everyone)).await, Err(StoreError::AudienceTooLarge { .. })));
}

pub async fn a_permit_leases_the_job_and_hands_it_over(fixture: &Fixture) {
    let world = World::new(fixture).await;
    world.reachable("mina").await;
    world.register_fcm("mina", "tablet").await;
    let spare = world.register("mina", "beef").await.id;
    let engine = Engine::with_room(1);
    world.store().unregister_device(world.app, None, DeviceRef::Id(spare), world.now(), world.now()).await.unwrap();
    let before = fixture.deny.position();
    assert_ne!(before, DenyPosition::default());
    let event = world.to_users(&["mina"]);
    let id = world.store().accept(event, engine.clone(), world.now()).await.unwrap().notification;
    {
        let handed_over = engine.handed_over.lock().unwrap();
        let [handed] = &handed_over[..] else { panic!("room for one") };
        assert_eq!((handed.job.notification, handed.notification.id), (id, id));
        assert_eq!((handed.job.fence, handed.job.claims, handed.job.route), (1, 1, world.apns));
        // Where others may say no, too, a poll tells once more in the meantime what was said here.
        assert!((before..=fixture.deny.position()).contains(&handed.gated), "{:?} after {before:?}", handed.gated);
        assert_eq!(handed.facts.len(), handed.job.targets.len());
        assert_eq!(handed.facts[0].target, handed.job.targets[0]);
        assert_eq!(handed.facts[0].user_choice.all, Some(true));
        assert_eq!(handed.facts[0].token.expose(), format!("{:x}", md("mina")));
    }
    assert!(world.claim(world.apns, Lane::Interactive).await.is_empty(), "it has an owner");
    assert_eq!(engine.woken.lock().unwrap().get(&(world.fcm, Lane::Interactive)), Some(&1));
    let free = world.claim(world.fcm, Lane::Interactive).await;
    assert_eq!(free[0].job.claims, 1);
    assert_eq!(world.view(id).await.counts.open, 2);
    // Its holder records as any other.
    let handed = engine.handed_over.lock().unwrap().remove(0);
    let claimed = Claimed { job: handed.job, notification: handed.notification };
    let sent = entries(&claimed.job.targets, ResultCode::Sent);
    assert!(world.record(world.update(&claimed, sent)).await);
    assert_eq!(world.view(id).await.counts.sent, 1);
}

pub async fn what_is_not_due_is_never_handed_over(fixture: &Fixture) {
    let world = World::new(fixture).await;
    world.reachable("mina").await;
    let engine = Engine::with_room(100);
    let later = UnixMs(world.now().0 + 5_000);
    let event = NewEvent { not_before: Some(later), ..world.to_users(&["mina"]) };
    world.store().accept(event, engine.clone(), world.now()).await.unwrap();
    assert!(engine.handed_over.lock().unwrap().is_empty());
    assert!(world.claim(world.apns, Lane::Interactive).await.is_empty());
    assert_eq!(world.store().next_due(world.apns, Lane::Interactive).await.unwrap(), Some(later));
    world.pass(5_000);
    assert_eq!(world.claim_one().await.job.ready_at, later);
}

pub async fn whoever_is_left_out_is_recorded(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let device = world.reachable("mina").await.id;
    world.register("never", "02").await;
    world.opt_in("deviceless").await;
    world.reachable("out").await;
    world.pass(1);
    world.store().set_opt_in(world.choice("out", false), world.now()).await.unwrap();
    world.reachable("actor").await;
    let mut event = world.to_users(&["mina", "never", "deviceless", "out", "actor", "stranger"]);
    event.actor = Some(user("actor"));
    let id = world.accept(event).await;
    let mut reasons: Vec<_> = world.reasons(id, DeliveryFilter::default()).await;
    reasons.sort_unstable_by_key(|(device, reason)| (*reason, *device));
    let whole = DeviceId(0);
    assert_eq!(
        reasons,
        [
            (whole, "ACTOR"),
            (whole, "NEVER_OPTED_IN"),
            (whole, "NO_DEVICE"),
            (whole, "NO_DEVICE"),
            (whole, "OPTED_OUT"),
            (device, "QUEUED"),
        ]
    );
    let counts = world.view(id).await.counts;
    assert_eq!((counts.open, counts.suppressed), (1, 5));
    // Nobody at all is fine too.
    let id = world.accept(world.to_topics(&["nobody's"])).await;
    assert_eq!((world.view(id).await.people, world.view(id).await.counts.open), (Some(0), 0));
}

pub async fn an_unknown_route_is_suppressed(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let device = world.reachable("mina").await.id;
    let engine = Arc::new(Engine { unknown_routes: vec![world.apns], ..Engine::default() });
    let event = world.to_users(&["mina"]);
    let id = world.store().accept(event, engine, world.now()).await.unwrap().notification;
    assert_eq!(world.reasons(id, DeliveryFilter::default()).await, [(device, "ROUTE_UNKNOWN")]);
}

pub async fn an_allow_list_bars_everybody_else(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let named = world.reachable("tester").await.id;
    world.opt_in("mina").await;
    let mut labelled = world.registration("mina", "aa01");
    labelled.details.labels = [("stage".to_owned(), "qa".to_owned())].into();
    let labelled = world.try_register(labelled).await.unwrap().device.id;
    let other = world.register("mina", "aa02").await.id;
    let list = AllowList { users: [user("tester")].into(), labels: vec![("stage".into(), Some("qa".into()))] };
    let engine = Arc::new(Engine { allow_list: Some(Arc::new(list)), ..Engine::default() });
    let event = NewEvent { max_audience: Some(2), ..world.to_users(&["tester", "mina"]) };
    let id = world.store().accept(event, engine, world.now()).await.unwrap().notification;
    let mut reasons = world.reasons(id, DeliveryFilter::default()).await;
    reasons.sort_unstable();
    let mut expected = [(named, "QUEUED"), (labelled, "QUEUED"), (other, "NOT_ALLOWED_HERE")];
    expected.sort_unstable();
    assert_eq!(reasons, expected);
}
