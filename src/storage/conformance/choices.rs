//! Opt-ins, subscriptions, and the deny feed.

use super::*;
use crate::domain::device::DeviceRef;
use crate::domain::ids::UserKey;

pub async fn the_latest_choice_stands_and_a_tie_is_no(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let at =
        |millis: i64, opted_in| NewOptIn { observed_at: UnixMs(START.0 + millis), ..world.choice("mina", opted_in) };
    let set = |choice| async { world.store().set_opt_in(choice, world.now()).await.unwrap() };
    assert!(set(at(10, true)).await.1);
    assert!(set(at(20, false)).await.1);
    let (stands, applied) = set(at(15, true)).await;
    assert!(!applied && !stands.opted_in && stands.observed_at.0 == START.0 + 20);
    assert!(!set(at(20, true)).await.1, "a tie is a no");
    assert!(set(at(20, false)).await.1, "the same again stands");
    assert!(set(at(30, true)).await.1);
    assert!(set(at(30, false)).await.1, "a tie is a no");
    let listed = world.store().list_opt_ins(world.app, &user("mina")).await.unwrap();
    assert_eq!(listed.len(), 1);
    assert!(!listed[0].opted_in && listed[0].event_type.is_none() && listed[0].device.is_none());
}

pub async fn every_choice_is_kept(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let first = NewOptIn {
        source: Some("signup".to_owned()),
        policy_version: Some("2026-11".to_owned()),
        evidence: Some("box ticked".to_owned()),
        ..world.choice("mina", true)
    };
    world.store().set_opt_in(first, world.now()).await.unwrap();
    world.pass(5);
    let typed = NewOptIn { event_type: Some(comment()), ..world.choice("mina", false) };
    world.store().set_opt_in(typed, world.now()).await.unwrap();
    let late = NewOptIn { observed_at: UnixMs(START.0 - 5), ..world.choice("mina", false) };
    world.store().set_opt_in(late, world.now()).await.unwrap();
    let notification = world.accept(world.to_users(&["mina"])).await;
    let history = world.store().person_history(world.app, notification, &user("mina")).await.unwrap().choices;
    let told: Vec<_> = history.iter().map(|line| (line.choice.opted_in, line.applied)).collect();
    assert_eq!(told, [(true, true), (false, true), (false, false)]);
    assert_eq!(history[0].choice.source.as_deref(), Some("signup"));
    assert_eq!(history[0].choice.policy_version.as_deref(), Some("2026-11"));
    assert_eq!(history[0].choice.evidence.as_deref(), Some("box ticked"));
    assert_eq!(history[0].caller.as_deref(), Some("backend"));
    assert_eq!(history[1].choice.event_type, Some(comment()));
    assert_eq!(history[1].choice.recorded_at, world.now());
}

pub async fn a_choice_on_a_device_reaches_the_gate(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let device = world.reachable("mina").await.id;
    let notification = world.accept(world.to_users(&["mina"])).await;
    let target = world.claim_one().await.job.targets[0];
    let facts = || async {
        let facts = world.store().gate_facts(notification, &comment(), &[target]).await.unwrap();
        facts.facts[0].clone().unwrap()
    };
    let before = facts().await;
    assert_eq!((before.device_choice.all, before.device_choice.this_type), (None, None));
    assert_eq!((before.user_choice.all, before.user_choice.this_type), (Some(true), None));
    let typed = NewOptIn { device: Some(device), event_type: Some(comment()), ..world.choice("mina", false) };
    world.store().set_opt_in(typed, world.now()).await.unwrap();
    let elsewhere = NewOptIn { event_type: Some(EventType::trusted("other")), ..world.choice("mina", false) };
    world.store().set_opt_in(elsewhere, world.now()).await.unwrap();
    let after = facts().await;
    assert_eq!((after.device_choice.all, after.device_choice.this_type), (None, Some(false)));
    assert_eq!((after.user_choice.all, after.user_choice.this_type), (Some(true), None));
    let whole = NewOptIn { device: Some(device), ..world.choice("mina", true) };
    world.store().set_opt_in(whole, world.now()).await.unwrap();
    assert_eq!(facts().await.device_choice.all, Some(true));
}

pub async fn a_no_is_published_before_it_is_answered(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let device = world.reachable("mina").await.id;
    let notification = world.accept(world.to_users(&["mina"])).await;
    let target = world.claim_one().await.job.targets[0];
    let hit = |gated, device| fixture.deny.hit(gated, target.user, device, notification);

    let gated = fixture.deny.position();
    world.pass(1);
    world.opt_in("mina").await;
    assert!(!hit(gated, device), "a yes is not published");
    let late = NewOptIn { observed_at: START, ..world.choice("mina", false) };
    world.store().set_opt_in(late, world.now()).await.unwrap();
    assert!(!hit(gated, device), "a late no changes nothing");

    let on_device = NewOptIn { device: Some(device), ..world.choice("mina", false) };
    world.store().set_opt_in(on_device, world.now()).await.unwrap();
    assert!(hit(gated, device) && !hit(gated, DeviceId(1)));

    let gated = fixture.deny.position();
    let typed = NewOptIn { event_type: Some(comment()), ..world.choice("mina", false) };
    world.store().set_opt_in(typed, world.now()).await.unwrap();
    assert!(hit(gated, DeviceId(1)), "the whole person");

    let gated = fixture.deny.position();
    world.store().cancel_notification(world.app, notification, world.now()).await.unwrap();
    assert!(hit(gated, device));
    assert!(!fixture.deny.hit(gated, UserKey(1), DeviceId(1), NotificationId(1)));
}

pub async fn a_late_subscription_does_not_undo_a_later_one(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let set = |active, millis: i64| {
        let observed_at = UnixMs(START.0 + millis);
        world.store().set_subscription(world.app, user("mina"), topic("post:1"), active, observed_at, world.now())
    };
    assert!(!set(false, 20).await.unwrap(), "an unsubscription that came first is kept");
    assert!(!set(true, 10).await.unwrap());
    assert!(!set(true, 20).await.unwrap(), "a tie is a no");
    assert!(set(true, 30).await.unwrap());
    assert!(!set(true, 40).await.unwrap(), "nothing changed");
    assert!(!set(false, 35).await.unwrap(), "older than the last yes");
    assert!(set(false, 40).await.unwrap(), "a tie is a no");
    let page = world.store().list_subscriptions(world.app, &user("mina"), None, 9).await.unwrap();
    assert!(page.items.is_empty());
}

/// The clock was set back by an hour, or another one runs ahead: what stands was observed "later" than now.
pub async fn a_no_said_now_holds_whatever_clock_the_yes_was_observed_by(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let device = world.reachable("mina").await.id;
    world.subscribe("mina", "post:1").await;
    let notification = world.accept(world.to_users(&["mina"])).await;
    let target = world.claim_one().await.job.targets[0];
    let gated = fixture.deny.position();
    world.pass(-HOUR);
    let (stands, applied) = world.store().set_opt_in(world.choice("mina", false), world.now()).await.unwrap();
    assert!(applied && !stands.opted_in);
    assert!(fixture.deny.hit(gated, target.user, device, notification), "and is published");
    let now = world.now();
    let set = |active, observed_at| {
        world.store().set_subscription(world.app, user("mina"), topic("post:1"), active, observed_at, now)
    };
    assert!(set(false, now).await.unwrap());
    assert!(!set(false, now).await.unwrap(), "it says nothing new");
    // What was observed in between, or before the clock was set back, overturns none of them.
    for observed_at in [UnixMs(now.0 + HOUR / 2), START] {
        let late = NewOptIn { observed_at, ..world.choice("mina", true) };
        let (stands, applied) = world.store().set_opt_in(late, now).await.unwrap();
        assert!(!applied && !stands.opted_in);
        assert!(!set(true, observed_at).await.unwrap());
    }
    let unregistered = world.store().unregister_device(world.app, None, DeviceRef::Id(device), now, now);
    assert!(unregistered.await.unwrap());
    // A phone that changes hands now belongs to whoever has it now, too.
    world.pass(2 * HOUR);
    let first = world.register("jun", "bb").await.id;
    world.pass(-HOUR);
    let second = world.register("hana", "bb").await;
    assert!(second.active && second.id != first);
    let page = world.store().list_devices(world.app, &user("jun"), None, 9).await.unwrap();
    assert!(page.items.iter().all(|device| !device.active));
}

pub async fn subscriptions_are_listed_in_pages(fixture: &Fixture) {
    let world = World::new(fixture).await;
    for number in 0..5 {
        world.subscribe("mina", &format!("post:{number}")).await;
    }
    world.subscribe("jun", "post:9").await;
    let (mut listed, mut after) = (Vec::new(), None);
    loop {
        let page = world.store().list_subscriptions(world.app, &user("mina"), after, 2).await.unwrap();
        listed.extend(page.items.into_iter().map(|subscription| subscription.topic.to_string()));
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(listed, ["post:0", "post:1", "post:2", "post:3", "post:4"]);
}
