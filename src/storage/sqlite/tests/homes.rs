//! People are found and reached wherever their row is: at home, beside it, or where an earlier version put it.

use std::collections::HashMap;

use diesel::sql_types::{BigInt, Text};

use super::*;
use crate::domain::audience::PackedAudience;
use crate::domain::ids::{UserId, UserKey};
use crate::storage::conformance::{World, comment, user};
use crate::storage::sqlite::homes::{home, range};
use crate::storage::sqlite::people::user_key;
use crate::storage::sqlite::{fanout, reach};

/// Two names with one home.
fn housemates(app: AppKey) -> [String; 2] {
    let mut seen = HashMap::new();
    for number in 0.. {
        let name = format!("user-{number}");
        if let Some(other) = seen.insert(home(app, &UserId::trusted(&name)), name.clone()) {
            return [other, name];
        }
    }
    unreachable!("some hundred thousand names have two with equal 32 bits")
}

fn key_of(store: &SqliteStore, app: AppKey, name: &str) -> Option<UserKey> {
    user_key(&mut store.writer.inline_core().conn, app, &user(name)).unwrap()
}

/// Everybody that a fan-out to everyone meets, a page of two at a time.
fn everyone(store: &SqliteStore, app: AppKey) -> Vec<UserKey> {
    let mut core = store.writer.inline_core();
    let audience = PackedAudience { everyone: true, ..PackedAudience::default() }.pack();
    let (mut met, mut after) = (Vec::new(), UserKey(0));
    loop {
        let page = fanout::meet(&mut core.conn, app, &comment(), &audience, after, 2).unwrap();
        met.extend(page.found.people.iter().map(|person| person.user));
        if page.done {
            return met;
        }
        after = page.cursor;
    }
}

#[tokio::test]
async fn who_finds_their_home_taken_is_found_by_name() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let app = world.app;
    let [first, second] = housemates(app);
    for name in [&first, &second] {
        assert_eq!(key_of(&store, app, name), None);
    }
    // Both unknown, in one event.
    world.accept(world.to_users(&[&first, &second])).await;
    let keys = [&first, &second].map(|name| key_of(&store, app, name).unwrap());
    let at_home = home(app, &user(&first));
    assert!(keys.contains(&at_home) && keys[0] != keys[1], "{keys:?}");
    let (_, last) = range(app);
    assert!(keys.iter().any(|key| *key > last), "one is homeless: {keys:?}");
    for (name, token) in [(&first, "aa01"), (&second, "aa02")] {
        world.opt_in(name).await;
        let device = world.register(name, token).await;
        assert_eq!(device.user, user(name));
    }
    assert_eq!([&first, &second].map(|name| key_of(&store, app, name).unwrap()), keys, "nobody got a second row");
    for name in [&first, &second] {
        world.accept(world.to_users(&[name])).await;
        assert_eq!(Some(world.claim_one().await.job.targets[0].user), key_of(&store, app, name));
    }
    let mut sorted = keys.to_vec();
    sorted.sort_unstable();
    assert_eq!(everyone(&store, app), sorted);
    // A home that is taken by the row of another app's person, too: no id is used twice.
    let other = World::of_app(&fixture, "cats").await;
    let squatter = home(other.app, &user("mina"));
    diesel::sql_query("INSERT INTO app_user (id, app, external_id, created_at) VALUES (?, ?, 'elsewhere', ?)")
        .bind::<BigInt, _>(squatter.0)
        .bind::<BigInt, _>(app.0)
        .bind::<BigInt, _>(START.0)
        .execute(&mut store.writer.inline_core().conn)
        .unwrap();
    other.register("mina", "aa03").await;
    assert!(key_of(&store, other.app, "mina").unwrap() > last);
    assert_eq!(key_of(&store, other.app, "elsewhere"), None);
}

/// Of a database that was filled before there were homes; the last by a clock that stood at 1970.
#[tokio::test]
async fn rows_from_before_there_were_homes_are_found_and_reached() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let app = world.app;
    let (first, _) = range(app);
    let old = [("old", 1_i64 << 58, START.0), ("older", 1 << 57, START.0), ("oldest", first.0 + 1, 4), ("apart", 7, 4)];
    for (name, id, created_at) in old {
        diesel::sql_query("INSERT INTO app_user (id, app, external_id, created_at) VALUES (?, ?, ?, ?)")
            .bind::<BigInt, _>(id)
            .bind::<BigInt, _>(app.0)
            .bind::<Text, _>(name)
            .bind::<BigInt, _>(created_at)
            .execute(&mut store.writer.inline_core().conn)
            .unwrap();
    }
    reach::pack_all(&mut store.writer.inline_core().conn).unwrap();
    for (number, (name, id, _)) in old.into_iter().enumerate() {
        assert_eq!(key_of(&store, app, name), Some(UserKey(id)));
        world.opt_in(name).await;
        world.register(name, &format!("aa{number:02}")).await;
        world.accept(world.to_users(&[name])).await;
        assert_eq!(world.claim_one().await.job.targets[0].user.0, id);
    }
    for name in ["new", "newer"] {
        world.register(name, name).await;
        assert_eq!(key_of(&store, app, name), Some(home(app, &user(name))));
    }
    let mut all: Vec<UserKey> = old.iter().map(|(_, id, _)| UserKey(*id)).collect();
    all.extend(["new", "newer"].map(|name| home(app, &user(name))));
    all.sort_unstable();
    assert_eq!(everyone(&store, app), all);
    let other = World::of_app(&fixture, "cats").await;
    assert_eq!(everyone(&store, other.app), []);
}
