//! Changes of devices and choices that share a transaction: each has the answer it would have had alone.

use super::replicas::{count, eventually, fixture};
use super::*;
use crate::domain::device::DeviceRef;
use crate::domain::ids::{DeviceId, UserId};
use crate::domain::platform::DeviceToken;
use crate::storage::conformance::{World, topic, user};

const ACTIVE: &str = "SELECT count(*) AS count FROM device WHERE state = 1";

#[tokio::test]
async fn registrations_that_touch_each_other_come_one_after_the_other() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let token = |number: u64| format!("{number:064x}");
    let mut registrations = Vec::new();
    for number in 0..20 {
        registrations.push(world.registration(&format!("person-{number}"), &token(number)));
    }
    for number in 0..5 {
        // One phone that goes from hand to hand, one person with many, and one install whose token changes.
        registrations.push(world.registration(&format!("next-{number}"), &token(100)));
        registrations.push(world.registration("many", &token(200 + number)));
        let mut rotated = world.registration("rotating", &token(300 + number));
        rotated.installation_id = Some("install".to_owned());
        registrations.push(rotated);
    }
    let count_of_calls = registrations.len();
    let calls = registrations.into_iter().map(|registration| store.register_device(registration, world.now()));
    let answers = futures_util::future::join_all(calls).await;
    let devices: Vec<_> = answers.into_iter().map(|answer| answer.unwrap()).collect();
    assert_eq!(devices.len(), count_of_calls);
    assert!(devices.iter().all(|registered| registered.device.active));
    assert_eq!(count(&database, ACTIVE).await, 20 + 1 + 5 + 1);
    for (name, active) in [("many", 5), ("rotating", 1)] {
        let listed = store.list_devices(world.app, &user(name), None, 50).await.unwrap();
        assert_eq!(listed.items.iter().filter(|device| device.active).count(), active, "{name}");
    }
    let retired = "SELECT count(*) AS count FROM device_retirement WHERE reason = 'MOVED'";
    assert_eq!(count(&database, retired).await, 4, "each but the last lost it");
    // Said once more, nothing is written.
    let repeated = store.register_device(world.registration("person-3", &token(3)), world.now()).await.unwrap();
    assert!(!repeated.created);
}

#[tokio::test]
async fn what_the_server_refuses_does_not_take_others_along() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let calls = (0..30_u64).map(|number| {
        let mut registration = world.registration(&format!("person-{number}"), &format!("{number:064x}"));
        if number == 17 {
            // The API refuses it; Postgres' text cannot hold it either.
            registration.details.app_version = Some("1\0".to_owned());
        }
        store.register_device(registration, world.now())
    });
    let answers = futures_util::future::join_all(calls).await;
    let failed: Vec<usize> = (0..answers.len()).filter(|at| answers[*at].is_err()).collect();
    assert_eq!(failed, [17]);
    assert_eq!(count(&database, ACTIVE).await, 29);
    // One that is refused by itself: nobody's device.
    let mut named = world.registration("person-1", &format!("{:064x}", 500));
    named.device = Some(DeviceId(12_345));
    let other = world.registration("person-2", &format!("{:064x}", 501));
    let (refused, registered) =
        tokio::join!(store.register_device(named, world.now()), store.register_device(other, world.now()));
    assert!(matches!(refused, Err(StoreError::DeviceNotFound { .. })), "{refused:?}");
    assert!(registered.unwrap().created);
}

#[tokio::test]
async fn choices_of_a_group_are_weighed_one_by_one() {
    let database = Database::new().await;
    let (store, deny, proxy) = database.open_behind_a_proxy().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let now = world.now();
    // A later "yes" and an earlier "no", in every order, and one each of other people.
    let calls = (0..40_i64).map(|number| {
        let name = if number < 20 { "mina".to_owned() } else { format!("person-{number}") };
        let mut choice = world.choice(&name, number % 2 == 1);
        choice.observed_at = UnixMs(now.0 - 100 + number);
        store.set_opt_in(choice, now)
    });
    let answers = futures_util::future::join_all(calls).await;
    assert!(answers.iter().all(Result::is_ok));
    assert_eq!(store.list_opt_ins(world.app, &user("mina")).await.unwrap()[0].observed_at, UnixMs(now.0 - 81));
    let history = "SELECT count(*) AS count FROM opt_in_history";
    assert_eq!(count(&database, history).await, 40, "also what lost");

    proxy.lose_answer_to(b"COMMIT");
    let (_, applied) = store.set_opt_in(world.choice("bori", false), now).await.unwrap();
    assert!(proxy.is_lost() && applied);
    assert_eq!(count(&database, history).await, 41, "one line, however often it was run");
}

#[tokio::test]
async fn subscriptions_and_goodbyes_share_their_transactions() {
    let database = Database::new().await;
    let (store, deny) = database.open().await;
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let now = world.now();
    let calls = (0..30).map(|number| {
        let (name, to) = (format!("person-{}", number % 10), format!("topic-{}", number % 5));
        store.set_subscription(world.app, user(&name), topic(&to), true, now, now)
    });
    let changed = futures_util::future::join_all(calls).await;
    let changed = changed.into_iter().filter(|changed| *changed.as_ref().unwrap()).count();
    assert_eq!(changed, 10, "each person and topic once");
    assert_eq!(count(&database, "SELECT count(*) AS count FROM topic").await, 5);

    let device = world.register("mina", &format!("{:064x}", 1)).await;
    world.register("bori", &format!("{:064x}", 2)).await;
    let by_token = || DeviceRef::Token(device.platform, DeviceToken::trusted(&format!("{:064x}", 1)));
    let end = |user_id: Option<UserId>, device| store.unregister_device(world.app, user_id, device, now, now);
    let bori = DeviceRef::Token(device.platform, DeviceToken::trusted(&format!("{:064x}", 2)));
    let (first, second, third, foreign) = tokio::join!(
        end(Some(user("mina")), DeviceRef::Id(device.id)),
        end(None, by_token()),
        end(None, DeviceRef::Id(device.id)),
        end(Some(user("mina")), bori),
    );
    let ended = [first.unwrap(), second.unwrap(), third.unwrap()].into_iter().filter(|ended| *ended).count();
    assert_eq!(ended, 1, "it ends once");
    assert!(matches!(foreign, Err(StoreError::DeviceNotFound { .. })), "{foreign:?}");
    eventually("only the other is left", async || count(&database, ACTIVE).await == 1).await;
}
