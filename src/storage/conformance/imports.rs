//! Imports, and audiences that are only looked at.

use super::*;
use crate::domain::ids::UserKey;
use crate::domain::plan::Person;
use crate::storage::{IMPORT_KEPT_MS, ImportBatch, ImportEffect, ImportItem, Imported, NewSubscription};

const NAME: &str = "import/devices/one";
const YEAR: i64 = 365 * 24 * HOUR;

/// A phone as it was seen so long before the cases begin.
fn phone(world: &World<'_>, name: &str, token: &str, ago: i64) -> ImportItem {
    let observed_at = UnixMs(START.0 - ago);
    let registration = Registration { observed_at, ..world.registration(name, token) };
    ImportItem::Device { registration, created_at: UnixMs(START.0 - YEAR) }
}

fn choice(world: &World<'_>, name: &str, opted_in: bool, ago: i64) -> ImportItem {
    ImportItem::OptIn(NewOptIn { observed_at: UnixMs(START.0 - ago), ..world.choice(name, opted_in) })
}

fn follows(world: &World<'_>, name: &str, to: &str, active: bool, ago: i64) -> ImportItem {
    let observed_at = UnixMs(START.0 - ago);
    ImportItem::Subscription(NewSubscription {
        app: world.app,
        user: user(name),
        topic: topic(to),
        active,
        observed_at,
    })
}

async fn import(world: &World<'_>, position: i64, items: Vec<ImportItem>) -> Vec<Imported> {
    let batch = ImportBatch { app: world.app, name: NAME.to_owned(), position, items };
    world.store().import(batch, world.now()).await.unwrap()
}

fn effects(imported: Vec<Imported>) -> Vec<Option<bool>> {
    imported.into_iter().map(|one| one.ok().map(|effect| effect == ImportEffect::Applied)).collect()
}

async fn devices(world: &World<'_>, name: &str) -> Vec<Device> {
    world.store().list_devices(world.app, &user(name), None, 100).await.unwrap().items
}

async fn history_lines(world: &World<'_>, name: &str) -> usize {
    let notification = world.accept(world.to_users(&[name])).await;
    world.store().person_history(world.app, notification, &user(name)).await.unwrap().choices.len()
}

pub async fn an_import_keeps_its_times_and_its_position(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let store = world.store();
    assert_eq!(store.import_position(world.app, NAME).await.unwrap(), 0);
    let items = vec![
        phone(&world, "mina", "aa", 3 * HOUR),
        choice(&world, "mina", true, 2 * HOUR),
        follows(&world, "mina", "author:choco", true, HOUR),
    ];
    assert_eq!(effects(import(&world, 7, items).await), [Some(true); 3]);
    let device = devices(&world, "mina").await.remove(0);
    assert_eq!((device.created_at, device.observed_at), (UnixMs(START.0 - YEAR), UnixMs(START.0 - 3 * HOUR)));
    assert_eq!(device.confirmed_at, device.observed_at, "a platform's \"gone since\" is held against the truth");
    let choices = store.list_opt_ins(world.app, &user("mina")).await.unwrap();
    assert_eq!((choices[0].opted_in, choices[0].observed_at.0), (true, START.0 - 2 * HOUR));
    assert_eq!(choices[0].recorded_at, world.now());
    let topics = store.list_subscriptions(world.app, &user("mina"), None, 10).await.unwrap().items;
    assert_eq!(topics[0].observed_at.0, START.0 - HOUR);

    assert_eq!(store.import_position(world.app, NAME).await.unwrap(), 7);
    assert!(import(&world, 5, Vec::new()).await.is_empty());
    assert_eq!(store.import_position(world.app, NAME).await.unwrap(), 7, "it never goes back");
    let other = World::of_app(fixture, "shop").await;
    assert_eq!(store.import_position(other.app, NAME).await.unwrap(), 0);
    world.pass(IMPORT_KEPT_MS + 1);
    store.retain(START, world.now()).await.unwrap();
    assert_eq!(store.import_position(world.app, NAME).await.unwrap(), 0, "forgotten in the end");
}

pub async fn an_import_repeated_changes_nothing(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let items = || {
        vec![
            phone(&world, "mina", "aa", 3 * HOUR),
            choice(&world, "mina", false, 3 * HOUR),
            choice(&world, "mina", true, 2 * HOUR),
            follows(&world, "mina", "author:choco", true, HOUR),
            follows(&world, "mina", "author:bori", false, HOUR),
        ]
    };
    assert_eq!(
        effects(import(&world, 1, items()).await),
        [Some(true), Some(true), Some(true), Some(true), Some(false)]
    );
    let before = (devices(&world, "mina").await, history_lines(&world, "mina").await);
    world.pass(50 * HOUR);
    assert_eq!(effects(import(&world, 1, items()).await), [Some(false); 5]);
    assert_eq!((devices(&world, "mina").await, history_lines(&world, "mina").await), before);
    assert_eq!(before.1, 2);
    assert!(world.store().list_opt_ins(world.app, &user("mina")).await.unwrap()[0].opted_in);
}

pub async fn what_was_said_later_stands_against_an_import(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let store = world.store();
    // While the import runs: the phone changes hands, mina says no and leaves a topic.
    let taken = world.register("nabi", "aa").await;
    store.set_opt_in(world.choice("mina", false), world.now()).await.unwrap();
    let now = world.now();
    store.set_subscription(world.app, user("mina"), topic("author:choco"), false, now, now).await.unwrap();
    let items = vec![
        phone(&world, "mina", "aa", HOUR),
        choice(&world, "mina", true, HOUR),
        follows(&world, "mina", "author:choco", true, HOUR),
    ];
    assert_eq!(effects(import(&world, 1, items).await), [Some(false); 3]);
    assert!(devices(&world, "mina").await.is_empty(), "no row is left for what is over");
    assert!(devices(&world, "nabi").await.iter().any(|device| device.id == taken.id && device.active));
    let stands = store.list_opt_ins(world.app, &user("mina")).await.unwrap();
    assert!(!stands[0].opted_in);
    assert_eq!(history_lines(&world, "mina").await, 2, "the older choice is kept as proof");
    assert!(store.list_subscriptions(world.app, &user("mina"), None, 10).await.unwrap().items.is_empty());
    // A "no" from elsewhere reaches what is queued here.
    let before = world.fixture.deny.position();
    assert_eq!(effects(import(&world, 2, vec![choice(&world, "nabi", false, HOUR)]).await), [Some(true)]);
    assert!(world.fixture.deny.position() > before, "published");
}

pub async fn a_refused_item_leaves_nothing_and_the_rest_goes_on(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let theirs = world.register("nabi", "bb").await;
    let stranger = NewOptIn { device: Some(theirs.id), ..world.choice("mina", true) };
    let rotated = Registration { device: Some(theirs.id), ..world.registration("sori", "cc") };
    let items = vec![
        ImportItem::OptIn(stranger),
        ImportItem::Device { registration: rotated, created_at: START },
        choice(&world, "bori", true, HOUR),
    ];
    let assessed = world.store().assess_import(items.clone()).await.unwrap();
    let imported = import(&world, 3, items).await;
    for one in [&assessed, &imported] {
        assert!(matches!(&one[0], Err(StoreError::DeviceNotFound { devices }) if devices[..] == [theirs.id]));
        assert!(matches!(&one[1], Err(StoreError::DeviceNotFound { .. })));
        assert!(matches!(&one[2], Ok(ImportEffect::Applied)));
    }
    assert_eq!(world.store().list_opt_ins(world.app, &user("bori")).await.unwrap().len(), 1);
    let named = Audience { user_ids: vec![user("mina"), user("sori")], ..Audience::default() };
    let resolved = world.store().resolve_audience(world.app, &named, None).await.unwrap();
    assert_eq!(resolved.unknown, [user("mina"), user("sori")], "no rows of theirs");
}

pub async fn assessing_says_the_same_and_writes_nothing(fixture: &Fixture) {
    let world = World::new(fixture).await;
    world.register("nabi", "aa").await;
    world.opt_in("nabi").await;
    world.subscribe("nabi", "author:choco").await;
    let items = || {
        vec![
            phone(&world, "nabi", "aa", 0),
            phone(&world, "mina", "aa", HOUR),
            phone(&world, "mina", "dd", HOUR),
            choice(&world, "nabi", true, 0),
            choice(&world, "nabi", false, HOUR),
            choice(&world, "mina", true, HOUR),
            follows(&world, "nabi", "author:choco", true, 0),
            follows(&world, "nabi", "author:choco", false, 0),
            follows(&world, "mina", "author:bori", true, 0),
            follows(&world, "mina", "author:none", false, 0),
        ]
    };
    let assessed = effects(world.store().assess_import(items()).await.unwrap());
    assert_eq!(assessed, effects(world.store().assess_import(items()).await.unwrap()), "nothing was written");
    assert!(devices(&world, "mina").await.is_empty());
    assert_eq!(assessed, effects(import(&world, 1, items()).await));
    let told: Vec<_> = assessed.into_iter().map(|effect| effect.unwrap()).collect();
    assert_eq!(told, [false, false, true, false, false, true, false, true, true, false]);
}

pub async fn too_many_imported_devices_make_room_by_age(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let most = i64::try_from(crate::domain::device::MAX_DEVICES_PER_USER).unwrap();
    // The newest first, as an export may have them.
    let items = (0..most + 3).map(|ago| phone(&world, "mina", &format!("{ago:04x}"), ago * HOUR)).collect();
    import(&world, 1, items).await;
    let active: Vec<Device> = devices(&world, "mina").await.into_iter().filter(|device| device.active).collect();
    assert_eq!(active.len(), usize::try_from(most).unwrap());
    assert!(active.iter().all(|device| device.observed_at.0 > START.0 - most * HOUR), "the oldest made room");
}

/// Everybody of an audience, over pages of three.
async fn meet(world: &World<'_>, audience: &Audience) -> (Vec<Person>, Vec<UserId>) {
    let resolved = world.store().resolve_audience(world.app, audience, Some(&user("mina"))).await.unwrap();
    let (mut people, mut after) = (Vec::new(), UserKey(0));
    loop {
        let page = world.store().audience_page(world.app, &comment(), &resolved.audience, after, 3).await.unwrap();
        people.extend(page.people);
        after = page.cursor;
        if page.done {
            return (people, resolved.unknown);
        }
    }
}

pub async fn an_audience_can_be_met_without_an_event(fixture: &Fixture) {
    let world = World::new(fixture).await;
    for name in ["mina", "nabi", "sori", "bori"] {
        world.reachable(name).await;
    }
    let tablet = world.register_fcm("dubu", "tablet").await;
    world.register_fcm("dubu", "phone").await;
    world.subscribe("sori", "author:choco").await;
    world.subscribe("mina", "author:choco").await;
    let audience = Audience {
        user_ids: vec![user("nabi"), user("mina"), user("stranger"), user("nobody")],
        topics: vec![topic("author:choco"), topic("author:unheard")],
        device_ids: vec![tablet.id],
        everyone: false,
    };
    let (people, unknown) = meet(&world, &audience).await;
    assert_eq!(unknown, [user("nobody"), user("stranger")]);
    let keys: Vec<UserKey> = people.iter().map(|person| person.user).collect();
    let names = world.store().user_names(&keys).await.unwrap();
    let names: Vec<String> = names.into_iter().map(|name| name.unwrap().to_string()).collect();
    assert_eq!(names.iter().collect::<std::collections::BTreeSet<_>>().len(), 4);
    let devices: BTreeMap<&str, usize> =
        names.iter().map(String::as_str).zip(people.iter().map(|person| person.devices.len())).collect();
    assert_eq!(devices, [("dubu", 1), ("mina", 1), ("nabi", 1), ("sori", 1)].into_iter().collect());

    let (everyone, _) = meet(&world, &Audience { everyone: true, ..Audience::default() }).await;
    assert_eq!(everyone.len(), 5, "strangers still have no row");
    let foreign = Audience { device_ids: vec![DeviceId(77)], ..Audience::default() };
    let refused = world.store().resolve_audience(world.app, &foreign, None).await.unwrap_err();
    assert!(matches!(refused, StoreError::DeviceNotFound { .. }));
    assert_eq!(world.store().user_names(&[UserKey(7), keys[0]]).await.unwrap()[0], None);
}
