//! After a restore from a backup.

use super::*;
use crate::domain::pause::{Pause, PauseScope};

pub async fn a_restore_holds_everything_until_it_is_confirmed(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let store = world.store();
    let now = world.now();
    assert!(store.restorations().await.unwrap().is_empty());
    assert!(!store.confirm_restorations(now).await.unwrap(), "nothing to confirm");
    let begun = store.begin_restoration("monday", now).await.unwrap();
    assert_eq!((begun.since, begun.confirmed_at), (now, None));
    let later = now.plus(std::time::Duration::from_secs(5));
    assert_eq!(store.begin_restoration("monday", later).await.unwrap(), begun, "it is told of again at each start");
    let pauses = store.pauses().await.unwrap();
    let [held] = &pauses[..] else { panic!("one hold: {pauses:?}") };
    assert_eq!((&held.scope, held.since), (&PauseScope::default(), now));
    assert!(held.reason.contains("confirm-restore"), "{}", held.reason);

    // An operator's pause of everything is another one, and its end changes nothing.
    let paused = Pause { scope: PauseScope::default(), since: later, reason: "outage".to_owned() };
    assert!(store.pause(paused).await.unwrap());
    assert_eq!(store.pauses().await.unwrap().len(), 2);
    assert!(store.resume(&PauseScope::default()).await.unwrap());
    assert!(!store.resume(&PauseScope::default()).await.unwrap());
    assert_eq!(store.pauses().await.unwrap().len(), 1);

    let other = store.begin_restoration("tuesday", later).await.unwrap();
    assert_eq!(store.restorations().await.unwrap(), [begun.clone(), other]);
    assert!(store.confirm_restorations(later).await.unwrap());
    assert!(store.pauses().await.unwrap().is_empty() && store.restorations().await.unwrap().is_empty());
    let again = store.begin_restoration("monday", later).await.unwrap();
    assert_eq!(again.confirmed_at, Some(later), "a name acts once");
    assert!(store.pauses().await.unwrap().is_empty());
}

pub async fn a_restore_cancels_what_was_open_before_it(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let store = world.store();
    for name in ["mina", "bori"] {
        world.reachable(name).await;
    }
    store.set_subscription(world.app, user("mina"), topic("news"), true, world.now(), world.now()).await.unwrap();
    let done = world.accept(world.to_users(&["mina"])).await;
    let claimed = world.claim_one().await;
    assert!(world.record(world.update(&claimed, entries(&claimed.job.targets, ResultCode::Sent))).await);
    let mut old = Vec::new();
    for _ in 0..5 {
        old.push(world.accept(world.to_users(&["mina", "bori"])).await);
    }
    let mut everyone = world.to_users(&[]);
    everyone.audience.everyone = true;
    everyone.may_broadcast = true;
    old.push(world.accept(everyone).await);
    let at = world.now().plus(std::time::Duration::from_secs(60));
    store.begin_restoration("monday", at).await.unwrap();
    let new = store.accept(world.to_users(&["mina"]), Engine::with_room(0), at).await.unwrap().notification;

    // In batches of any size, and harmless to repeat.
    let (mut after, mut sum) = (NotificationId(0), 0);
    while let (Some(last), cancelled) = store.cancel_open(at, after, 2, at).await.unwrap() {
        after = last;
        sum += cancelled;
    }
    assert_eq!(sum, 6);
    assert_eq!(store.cancel_open(at, NotificationId(0), 100, at).await.unwrap(), (Some(old[5]), 0));
    for id in old {
        assert_eq!(world.view(id).await.notification.cancelled_at, Some(at));
    }
    for id in [done, new] {
        assert_eq!(world.view(id).await.notification.cancelled_at, None, "over before, or accepted after");
    }
    let claimed = world.claim(world.apns, Lane::Interactive).await;
    for one in &claimed {
        let (id, targets) = (one.notification.id, &one.job.targets);
        let facts = store.gate_facts(id, &one.notification.event_type, targets).await.unwrap();
        assert_eq!(facts.cancelled, id != new, "the gate ends them");
    }
}
