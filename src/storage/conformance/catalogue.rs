//! The event catalogue.

use std::sync::Arc;

use super::{Fixture, World, comment, user};
use crate::domain::event_type::{Definition, MAX_EVENT_TYPES, OnMaybe, TypeVersion};
use crate::domain::ids::{EventType, TypeVersionId};
use crate::domain::notification::{Audience, NewEvent};
use crate::domain::platform::Lane;
use crate::storage::{Page, StoreError};

fn definition(name: &str, display_name: &str) -> Arc<Definition> {
    Arc::new(Definition { name: name.into(), display_name: Some(display_name.into()), ..Definition::default() })
}

async fn put(world: &World<'_>, name: &str, display_name: &str) -> (TypeVersion, bool) {
    world.store().put_event_type(world.app, definition(name, display_name), world.now()).await.unwrap()
}

async fn current(world: &World<'_>, name: &str) -> Option<TypeVersionId> {
    world.store().event_type(world.app, &EventType::trusted(name)).await.unwrap().current
}

pub async fn the_newest_version_stands_and_old_ones_stay(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let (first, made) = put(&world, "comment.created", "one").await;
    assert_eq!((first.version, made, first.created_at), (1, true, world.now()));
    world.pass(10);
    let (second, made) = put(&world, "comment.created", "two").await;
    assert_eq!((second.version, made), (2, true));
    assert_eq!(current(&world, "comment.created").await, Some(second.id));
    let get = async |version| world.store().get_event_type(world.app, &comment(), version).await;
    assert_eq!(get(None).await.unwrap(), second);
    assert_eq!(get(Some(1)).await.unwrap(), first);
    assert!(matches!(get(Some(3)).await, Err(StoreError::EventTypeNotFound { .. })));
    assert_eq!(world.store().type_definition(first.id).await.unwrap(), *first.definition);

    let other = World::of_app(fixture, "shop").await;
    assert_eq!(current(&other, "comment.created").await, None);
    let foreign = other.store().get_event_type(other.app, &comment(), None).await;
    assert!(matches!(foreign, Err(StoreError::EventTypeNotFound { .. })));
    let unlike = other.store().event_type(other.app, &comment()).await.unwrap();
    assert!(!unlike.any_declared && unlike.nearest.is_empty());
}

pub async fn a_definition_that_says_the_same_is_no_version(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let (first, _) = put(&world, "a", "one").await;
    world.pass(10);
    assert_eq!(put(&world, "a", "one").await, (first.clone(), false));
    put(&world, "a", "two").await;
    let (third, made) = put(&world, "a", "one").await;
    assert_eq!((third.version, made), (3, true), "going back is a version too");
}

pub async fn a_deleted_type_counts_as_never_declared(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let name = comment();
    let delete = async || world.store().delete_event_type(world.app, &name, world.now()).await.unwrap();
    assert!(!delete().await, "there is none");
    let (first, _) = put(&world, name.as_str(), "one").await;
    put(&world, name.as_str(), "two").await;
    assert!(delete().await);
    assert!(!delete().await, "only once");
    let declared = world.store().event_type(world.app, &name).await.unwrap();
    assert_eq!((declared.any_declared, declared.current), (false, None));
    let gone = world.store().get_event_type(world.app, &name, None).await;
    assert!(matches!(gone, Err(StoreError::EventTypeNotFound { .. })));
    assert_eq!(world.store().get_event_type(world.app, &name, Some(1)).await.unwrap(), first);
    assert_eq!(world.store().type_definition(first.id).await.unwrap(), *first.definition);
    let (third, made) = put(&world, name.as_str(), "two").await;
    assert_eq!((third.version, made), (3, true), "versions go on");
    put(&world, "post.published", "post").await;
    delete().await;
    let near = world.store().event_type(world.app, &EventType::trusted("post.publishd")).await.unwrap();
    assert_eq!((near.any_declared, near.current, near.nearest), (true, None, vec!["post.published".to_owned()]));
}

pub async fn declared_types_are_listed_by_name(fixture: &Fixture) {
    let world = World::new(fixture).await;
    for name in ["c", "a", "b", "d"] {
        put(&world, name, "one").await;
    }
    put(&world, "b", "two").await;
    world.store().delete_event_type(world.app, &EventType::trusted("c"), world.now()).await.unwrap();
    let names = |page: &Page<TypeVersion, EventType>| {
        page.items.iter().map(|item| (item.definition.name.clone(), item.version)).collect::<Vec<_>>()
    };
    let first = world.store().list_event_types(world.app, None, 2).await.unwrap();
    assert_eq!(names(&first), [("a".to_owned(), 1), ("b".to_owned(), 2)]);
    let second = world.store().list_event_types(world.app, first.next, 2).await.unwrap();
    assert_eq!(names(&second), [("d".to_owned(), 1)]);
    assert_eq!(second.next, None);
}

pub async fn types_have_a_limit(fixture: &Fixture) {
    let world = World::new(fixture).await;
    for at in 0..MAX_EVENT_TYPES {
        put(&world, &format!("t{at}"), "one").await;
    }
    let store = world.store();
    let refused = store.put_event_type(world.app, definition("one-more", "x"), world.now()).await;
    assert!(matches!(refused, Err(StoreError::TooManyEventTypes { limit: MAX_EVENT_TYPES })), "{refused:?}");
    put(&world, "t7", "another version").await;
    store.delete_event_type(world.app, &EventType::trusted("t7"), world.now()).await.unwrap();
    put(&world, "one-more", "x").await;
}

pub async fn a_notification_keeps_its_version(fixture: &Fixture) {
    let world = World::new(fixture).await;
    world.reachable("mina").await;
    let (first, _) = put(&world, "comment.created", "one").await;
    let event = NewEvent {
        type_version: Some(first.id),
        lane: Some(Lane::Bulk),
        on_maybe: OnMaybe::Drop,
        ..world.event(Audience { user_ids: vec![user("mina")], ..Audience::default() })
    };
    let id = world.accept(event).await;
    put(&world, "comment.created", "two").await;
    let notification = world.store().get_notification(world.app, id).await.unwrap().notification;
    assert_eq!(notification.type_version, Some(first.id));
    assert_eq!((notification.lane, notification.on_maybe), (Lane::Bulk, OnMaybe::Drop));
    let claimed = world.claim(world.apns, Lane::Bulk).await;
    assert_eq!(claimed[0].notification.type_version, Some(first.id));
    assert_eq!(claimed[0].job.lane, Lane::Bulk, "the type's lane holds for few people too");
}
