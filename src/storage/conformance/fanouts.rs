//! Fan-outs.

use super::*;
use crate::domain::ids::UserKey;
use crate::domain::notification::NewJob;
use crate::domain::outcome::Entry;
use crate::domain::plan::plan;
use crate::storage::{Fanout, NewOptIn, PageWrite};

async fn lease(world: &World<'_>) -> Fanout {
    world.store().claim_fanout(world.fixture.boot, world.now(), &[]).await.unwrap().expect("one is due")
}

/// Expands to the end by pages of `limit`, as an expander does; the people of each page.
async fn expand(world: &World<'_>, limit: usize) -> Vec<Vec<UserKey>> {
    let mut fanout = lease(world).await;
    let mut pages = Vec::new();
    loop {
        let page = world.store().fanout_page(&fanout, limit).await.unwrap();
        assert!(page.people.len() <= limit);
        pages.push(page.people.iter().map(|person| person.user).collect());
        let planned = plan(&page.people, &fanout.notification.rules(), world.now());
        let jobs = planned.jobs.into_iter().map(|(route, targets)| NewJob {
            notification: fanout.notification.id,
            route,
            lane: Lane::Bulk,
            targets,
            attempt: 0,
            claims: 0,
            ready_at: world.now(),
            due_at: world.now(),
            first_attempt_at: None,
        });
        let write = PageWrite {
            app: world.app,
            notification: fanout.notification.id,
            fence: fanout.fence,
            cursor: page.cursor,
            done: page.done,
            jobs: jobs.collect(),
            leased: 0,
            suppressed: planned.suppressed,
        };
        assert!(world.store().write_page(write, world.now()).await.unwrap().is_some());
        fanout.cursor = page.cursor;
        if page.done {
            return pages;
        }
    }
}

pub async fn merged_topics_meet_each_person_once(fixture: &Fixture) {
    let world = World::new(fixture).await;
    // 600 people: every second in topic a, every third in b, every fifth in c, some in several.
    let mut expected = std::collections::BTreeSet::new();
    for number in 0..900 {
        let name = format!("u{number}");
        for (every, to) in [(2, "a"), (3, "b"), (5, "c")] {
            if number % every == 0 {
                world.subscribe(&name, to).await;
                expected.insert(name.clone());
            }
        }
    }
    let phone = world.reachable("u1").await.id;
    world.register("u1", "beef").await;
    world.reachable("u2").await;
    let mut event = world.to_topics(&["a", "b", "c"]);
    event.audience.user_ids = vec![user("u2"), user("u7"), user("newcomer")];
    event.audience.device_ids = vec![phone];
    expected.extend(["u1", "u7", "newcomer"].map(str::to_owned));
    let id = world.accept(event).await;
    let pages = expand(&world, 100).await;
    let met: Vec<UserKey> = pages.concat();
    assert!(met.windows(2).all(|pair| pair[0] < pair[1]), "ascending and distinct");
    assert_eq!(met.len(), expected.len());
    assert!(pages.iter().rev().skip(1).all(|page| page.len() == 100), "pages are full but for the last");
    let mut reached: Vec<DeviceId> = Vec::new();
    for claimed in world.claim(world.apns, Lane::Bulk).await {
        reached.extend(claimed.job.targets.iter().map(|target| target.device));
    }
    assert_eq!(reached.len(), 2, "one phone of the person named by device, one of the other");
    assert!(reached.contains(&phone));
    let view = world.view(id).await;
    assert!(!view.expanding && view.people.is_none());
    assert_eq!(view.counts.suppressed + view.counts.open, expected.len() as u64);
}

pub async fn everyone_is_paged(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let other = World::of_app(fixture, "toys").await;
    for number in 0..20 {
        world.reachable(&format!("u{number}")).await;
        other.reachable(&format!("u{number}")).await;
    }
    let everyone = Audience { everyone: true, user_ids: vec![user("u1")], ..Audience::default() };
    let id = world.accept(NewEvent { may_broadcast: true, ..world.event(everyone) }).await;
    // A page that is full to the last person is the last.
    assert_eq!(expand(&world, 10).await.iter().map(Vec::len).collect::<Vec<_>>(), [10, 10]);
    assert_eq!(world.view(id).await.counts.open, 20);
    assert_eq!(world.store().backlog(world.now()).await.unwrap().fanouts, 0);
}

pub async fn a_page_is_written_under_its_fence(fixture: &Fixture) {
    let world = World::new(fixture).await;
    for number in 0..3 {
        world.reachable(&format!("u{number}")).await;
    }
    let everyone = Audience { everyone: true, ..Audience::default() };
    let id = world.accept(NewEvent { may_broadcast: true, ..world.event(everyone) }).await;
    let old = lease(&world).await;
    assert!(world.store().claim_fanout(fixture.boot, world.now(), &[]).await.unwrap().is_none(), "it is leased");
    let page = world.store().fanout_page(&old, 2).await.unwrap();
    assert_eq!((page.people.len(), page.done, page.cursor), (2, false, page.people[1].user));
    assert_eq!(page.people[0].choice.all, Some(true));
    assert_eq!(page.people[0].devices.len(), 1);
    let write = |fanout: &Fanout| PageWrite {
        app: world.app,
        notification: id,
        fence: fanout.fence,
        cursor: page.cursor,
        done: false,
        jobs: Vec::new(),
        leased: 0,
        suppressed: vec![Entry { user: page.people[0].user, device: DeviceId(0), code: ResultCode::OptedOut }],
    };
    world.store().release_fanout(id, old.fence).await.unwrap();
    assert_eq!(world.store().write_page(write(&old), world.now()).await.unwrap(), None);
    assert_eq!(world.view(id).await.counts.suppressed, 0);
    assert!(world.store().claim_fanout(fixture.boot, world.now(), &[id]).await.unwrap().is_none(), "skipped");
    let dead = BootId(fixture.boot.0 + 1);
    let new = world.store().claim_fanout(dead, world.now(), &[]).await.unwrap().expect("it is free again");
    assert!(new.fence > old.fence && new.cursor == UserKey(0));
    assert!(world.store().write_page(write(&new), world.now()).await.unwrap().is_some());
    // After a crash the next start goes on behind the cursor.
    assert_eq!(world.store().release_others(fixture.boot, world.now()).await.unwrap(), 0);
    let next = lease(&world).await;
    assert_eq!(next.cursor, page.cursor);
    let rest = world.store().fanout_page(&next, 2).await.unwrap();
    assert_eq!((rest.people.len(), rest.done), (1, true));
}

pub async fn apps_take_turns(fixture: &Fixture) {
    let (pets, toys) = (World::new(fixture).await, World::of_app(fixture, "toys").await);
    for (world, events) in [(&pets, 4), (&toys, 2)] {
        world.reachable("mina").await;
        for _ in 0..events {
            let everyone = Audience { everyone: true, ..Audience::default() };
            world.accept(NewEvent { may_broadcast: true, ..world.event(everyone) }).await;
        }
    }
    let mut turns = Vec::new();
    while let Some(fanout) = pets.store().claim_fanout(fixture.boot, pets.now(), &[]).await.unwrap() {
        turns.push(fanout.notification.app);
    }
    assert_eq!(turns, [pets.app, toys.app, pets.app, toys.app, pets.app, pets.app]);
}

pub async fn a_fanout_waits_for_its_time(fixture: &Fixture) {
    let world = World::new(fixture).await;
    world.reachable("mina").await;
    let everyone = Audience { everyone: true, ..Audience::default() };
    let later = UnixMs(world.now().0 + 1_000);
    let event = NewEvent { may_broadcast: true, not_before: Some(later), ..world.event(everyone) };
    world.accept(event).await;
    assert!(world.store().claim_fanout(fixture.boot, world.now(), &[]).await.unwrap().is_none());
    world.pass(1_000);
    // A "no" said meanwhile is seen by the page.
    world.store().set_opt_in(NewOptIn { ..world.choice("mina", false) }, world.now()).await.unwrap();
    let fanout = lease(&world).await;
    let page = world.store().fanout_page(&fanout, 10).await.unwrap();
    assert_eq!(page.people[0].choice.all, Some(false));
}

pub async fn the_actor_of_a_fanout_has_a_row(fixture: &Fixture) {
    let world = World::new(fixture).await;
    world.reachable("mina").await;
    let everyone = Audience { everyone: true, ..Audience::default() };
    let event = NewEvent { may_broadcast: true, actor: Some(user("author")), ..world.event(everyone) };
    let id = world.accept(event).await;
    // The author turns up only now, before the expansion comes to them.
    world.reachable("author").await;
    expand(&world, 10).await;
    let filter = DeliveryFilter { user: Some(user("author")), ..DeliveryFilter::default() };
    assert_eq!(world.reasons(id, filter).await, [(DeviceId(0), "ACTOR")]);
}
