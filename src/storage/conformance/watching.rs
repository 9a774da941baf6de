//! What watchers are told: everything once, in one order, whoever they ask.

use std::collections::BTreeSet;
use std::time::Duration;

use super::*;
use crate::domain::device::{DeviceRef, Retirement};
use crate::domain::outcome::State;
use crate::domain::sending::ProviderAnswer;
use crate::domain::watch::WatchPosition;
use crate::runtime::Runtime;
use crate::storage::{Attempt, WatchEvent, WatchFilter, WatchPage, Watched};

/// On a server that others use too, their transactions may hold the horizon.
const PATIENCE: Duration = Duration::from_secs(120);

async fn now(store: &dyn Store, app: AppKey) -> WatchPosition {
    let page = store.watch(app, None, &WatchFilter::default(), 1).await.unwrap();
    assert!(page.events.is_empty() && !page.more);
    page.position
}

/// Pages of `limit` until there have been so many events; none follows.
pub async fn told(
    store: &dyn Store,
    app: AppKey,
    from: WatchPosition,
    filter: &WatchFilter,
    limit: usize,
    count: usize,
) -> Vec<WatchEvent> {
    let runtime = Runtime::production();
    let deadline = runtime.instant() + PATIENCE;
    let (mut position, mut events) = (from, Vec::new());
    loop {
        let WatchPage { events: some, position: next, more } =
            store.watch(app, Some(position), filter, limit).await.unwrap();
        assert!(some.len() <= limit);
        assert!(some.last().is_none_or(|last| more || last.position.transaction <= next.transaction));
        events.extend(some);
        position = next;
        if !more && events.len() >= count {
            assert_eq!(events.len(), count, "{events:#?}");
            return events;
        }
        assert!(runtime.instant() < deadline, "only {} of {count} events are told", events.len());
        if !more {
            runtime.sleep(Duration::from_millis(5)).await;
        }
    }
}

/// What a watcher would print.
fn line(event: &WatchEvent) -> String {
    match &event.watched {
        Watched::Delivery { delivery, .. } => {
            let words = delivery.last_attempt.as_ref().map_or("", |attempt| &attempt.answer.reason);
            format!("{} {} {words}", delivery.user, delivery.reason).trim_end().to_owned()
        }
        Watched::DeviceRetired { user, reason, .. } => format!("{user} retired {reason}"),
    }
}

fn lines(events: &[WatchEvent]) -> Vec<String> {
    events.iter().map(line).collect()
}

/// Five events: bori was never asked; the platform calls mina's first token dead, her second device hears of it, and coco
/// unregisters.
async fn five(world: &World<'_>) -> NotificationId {
    let mina = world.reachable("mina").await;
    world.register("mina", &"b".repeat(64)).await;
    let coco = world.reachable("coco").await;
    world.register("bori", &"c".repeat(64)).await;
    let id = world.accept(world.to_users(&["mina", "bori"])).await;
    let claimed = world.claim_one().await;
    let code = |target: &Target| if target.device == mina.id { ResultCode::DeadToken } else { ResultCode::Sent };
    let of = |target: &Target| Entry { user: target.user, device: target.device, code: code(target) };
    let mut update = world.update(&claimed, claimed.job.targets.iter().map(of).collect());
    let target = claimed.job.targets.iter().find(|target| target.device == mina.id).unwrap();
    update.retirements.push(Retirement { device: mina.id, since: None, reason: "410 Unregistered".to_owned() });
    update.details.push(Attempt {
        user: target.user,
        device: target.device,
        attempt: 1,
        at: world.now(),
        result: "TOKEN_GONE",
        answer: ProviderAnswer::new(410, "Unregistered"),
        next_at: None,
    });
    assert!(world.record(update).await);
    let now = world.now();
    assert!(world.store().unregister_device(world.app, None, DeviceRef::Id(coco.id), now, now).await.unwrap());
    id
}

pub async fn results_and_retirements_are_told_in_their_order(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let from = now(world.store(), world.app).await;
    let id = five(&world).await;
    let events = told(world.store(), world.app, from, &WatchFilter::default(), 100, 5).await;
    let expected = [
        "bori NEVER_OPTED_IN",
        "mina TOKEN_GONE Unregistered",
        "mina SENT",
        "mina retired 410 Unregistered",
        "coco retired UNREGISTERED",
    ];
    assert_eq!(lines(&events), expected);
    let of_ours = |event: &WatchEvent| match event.watched {
        Watched::Delivery { notification, .. } => notification == id,
        Watched::DeviceRetired { .. } => true,
    };
    assert!(events.iter().all(of_ours));
    // In pages of any size, and from behind any of them, the same comes.
    for limit in 1..=6 {
        assert_eq!(told(world.store(), world.app, from, &WatchFilter::default(), limit, 5).await, events);
    }
    for (at, event) in events.iter().enumerate() {
        let rest = told(world.store(), world.app, event.position, &WatchFilter::default(), 2, 4 - at).await;
        assert_eq!(rest, events[at + 1..]);
    }
}

/// Whoever had the token is told of, not who has it now; and a token that only stays with its user is no news.
pub async fn a_token_that_moves_to_another_user_is_told(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let from = now(world.store(), world.app).await;
    let token = "a".repeat(64);
    let before = world.register("mina", &token).await;
    world.register("mina", &token).await;
    let after = world.register("bori", &token).await;
    assert_ne!(before.id, after.id);
    let events = told(world.store(), world.app, from, &WatchFilter::default(), 100, 1).await;
    assert_eq!(lines(&events), ["mina retired MOVED"]);
    assert!(matches!(events[0].watched, Watched::DeviceRetired { device, .. } if device == before.id), "{events:#?}");
    // And back again: each time by its own row.
    world.register("mina", &token).await;
    let events = told(world.store(), world.app, from, &WatchFilter::default(), 1, 2).await;
    assert_eq!(lines(&events), ["mina retired MOVED", "bori retired MOVED"]);
    let of_mina = WatchFilter { deliveries: false, user: Some(user("mina")), ..WatchFilter::default() };
    assert_eq!(lines(&told(world.store(), world.app, from, &of_mina, 100, 1).await), ["mina retired MOVED"]);
}

pub async fn a_watcher_is_told_what_it_asked_for(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let from = now(world.store(), world.app).await;
    let id = five(&world).await;
    let other = world.accept(world.to_users(&["bori"])).await;
    let all = WatchFilter::default;
    let wanted = [
        (
            WatchFilter { deliveries: false, ..all() },
            vec!["mina retired 410 Unregistered", "coco retired UNREGISTERED"],
        ),
        (WatchFilter { retirements: false, states: vec![State::Sent], ..all() }, vec!["mina SENT"]),
        (
            WatchFilter { user: Some(user("mina")), ..all() },
            vec!["mina TOKEN_GONE Unregistered", "mina SENT", "mina retired 410 Unregistered"],
        ),
        (WatchFilter { notification: Some(other), retirements: false, ..all() }, vec!["bori NEVER_OPTED_IN"]),
        (
            WatchFilter {
                notification: Some(id),
                states: vec![State::Suppressed, State::Dead],
                retirements: false,
                ..all()
            },
            vec!["bori NEVER_OPTED_IN", "mina TOKEN_GONE Unregistered"],
        ),
        (WatchFilter { user: Some(user("nobody")), ..all() }, vec![]),
    ];
    // All of it is below the horizon.
    let last = told(world.store(), world.app, from, &all(), 100, 6).await[5].position;
    for (filter, expected) in wanted {
        for limit in [1, 100] {
            assert_eq!(lines(&told(world.store(), world.app, from, &filter, limit, expected.len()).await), expected);
        }
        let page = world.store().watch(world.app, Some(from), &filter, 100).await.unwrap();
        assert!(page.position.transaction >= last.transaction, "also past what it did not ask for");
    }
}

pub async fn an_apps_results_are_its_own(fixture: &Fixture) {
    let (world, other) = (World::new(fixture).await, World::of_app(fixture, "shop").await);
    let from = now(world.store(), world.app).await;
    five(&world).await;
    other.register("mina", &"d".repeat(64)).await;
    other.accept(other.to_users(&["mina"])).await;
    let theirs = told(world.store(), other.app, from, &WatchFilter::default(), 100, 1).await;
    assert_eq!(lines(&theirs), ["mina NEVER_OPTED_IN"]);
    assert_eq!(told(world.store(), world.app, from, &WatchFilter::default(), 100, 5).await.len(), 5);
}

pub async fn a_large_result_is_told_in_pages(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let names: Vec<String> = (0..400).map(|number| format!("user-{number}")).collect();
    for name in &names {
        world.register(name, &format!("{:064x}", md(name))).await;
    }
    let from = now(world.store(), world.app).await;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    world.accept(world.to_users(&names)).await;
    world.accept(world.to_users(&names[..3])).await;
    let events = told(world.store(), world.app, from, &WatchFilter::default(), 64, 403).await;
    let people: BTreeSet<String> = events[..400].iter().map(line).collect();
    assert_eq!(people.len(), 400);
    let middle = events[130].position;
    assert_eq!(told(world.store(), world.app, middle, &WatchFilter::default(), 1_000, 272).await, events[131..]);
}

pub async fn old_and_foreign_positions_are_refused(fixture: &Fixture) {
    let world = World::new(fixture).await;
    let from = now(world.store(), world.app).await;
    five(&world).await;
    let events = told(world.store(), world.app, from, &WatchFilter::default(), 100, 5).await;
    let watch = async |position| {
        let page = world.store().watch(world.app, Some(position), &WatchFilter::default(), 100).await;
        page.map(|page| page.events.len())
    };
    let foreign = WatchPosition { epoch: from.epoch ^ 1, ..from };
    assert!(matches!(watch(foreign).await, Err(StoreError::CursorForeign)));
    world.pass(10 * 24 * HOUR);
    let late = world.accept(world.to_users(&["bori"])).await;
    let quiet = told(world.store(), world.app, events[4].position, &WatchFilter::default(), 100, 1).await[0].position;
    world.pass(25 * 24 * HOUR);
    let before = UnixMs(world.now().0 - 30 * 24 * HOUR);
    while world.store().retain(before, world.now()).await.unwrap() > 0 {}
    assert!(world.store().get_notification(world.app, late).await.is_ok(), "younger than that");
    for position in [from, events[0].position, events[3].position] {
        assert!(matches!(watch(position).await, Err(StoreError::CursorExpired)), "{position:?}");
    }
    assert_eq!(watch(quiet).await.unwrap(), 0, "nothing after it was deleted");
    // Whoever keeps reading never expires, however quiet it is.
    let kept = world.store().watch(world.app, Some(quiet), &WatchFilter::default(), 1).await.unwrap().position;
    world.pass(60 * 24 * HOUR);
    while world.store().retain(world.now(), world.now()).await.unwrap() > 0 {}
    assert_eq!(watch(kept).await.unwrap(), 0);
    assert!(matches!(watch(events[4].position).await, Err(StoreError::CursorExpired)));
}

pub async fn watchers_that_reconnect_miss_nothing(fixture: &Fixture) {
    race(&[(Arc::clone(&fixture.store), fixture.boot)], fixture, 4, 12).await;
}

/// Committers on all stores, and readers that change stores and go back to any message they have read: each reads every
/// delivery of the ledger once, in the same order.
pub async fn race(stores: &[(Arc<dyn Store>, BootId)], fixture: &Fixture, committers: usize, rounds: usize) {
    const READERS: usize = 3;
    let world = World::new(fixture).await;
    for name in ["a", "b", "c", "d"] {
        world.reachable(name).await;
    }
    world.register("silent", &"e".repeat(64)).await;
    let from = now(world.store(), world.app).await;
    let names = ["a", "b", "c", "d", "silent"];
    let expected = committers * rounds * names.len();
    let (app, route) = (world.app, world.apns);

    let runtime = Runtime::production();
    let mut tasks = Vec::new();
    for committer in 0..committers {
        let (store, boot) = stores[committer % stores.len()].clone();
        let events: Vec<NewEvent> = (0..rounds).map(|_| world.to_users(&names)).collect();
        let (at, runtime) = (world.now(), runtime.clone());
        tasks.push(runtime.clone().spawn(async move {
            let mut ids = Vec::new();
            let mut events = events.into_iter();
            loop {
                let event = events.next();
                let is_last = event.is_none();
                if let Some(event) = event {
                    ids.push(store.accept(event, Arc::new(NoHandOff), at).await.unwrap().notification);
                }
                let request = ClaimRequest { route, lane: Lane::Interactive, max_targets: 8, max_jobs: 2 };
                let claimed = store.claim(request, boot, at).await.unwrap();
                if claimed.is_empty() && is_last {
                    return ids;
                }
                for one in claimed {
                    runtime.sleep(Duration::from_micros(runtime.random_u64() % 2_000)).await;
                    let update = JobUpdate {
                        job: one.job.id,
                        fence: one.job.fence,
                        app,
                        notification: one.notification.id,
                        route,
                        progress: None,
                        entries: entries(&one.job.targets, ResultCode::Sent),
                        details: Vec::new(),
                        followers: Vec::new(),
                        retirements: Vec::new(),
                        device_changes: Vec::new(),
                    };
                    assert!(store.record(vec![update], at).await.unwrap()[0]);
                }
            }
        }));
    }
    let mut readers = Vec::new();
    for _ in 0..READERS {
        let (stores, runtime) = (stores.to_vec(), runtime.clone());
        readers.push(runtime.clone().spawn(async move {
            let (mut position, mut read) = (from, Vec::<WatchEvent>::new());
            let deadline = runtime.instant() + PATIENCE;
            while read.len() < expected {
                assert!(runtime.instant() < deadline, "only {} of {expected} are told", read.len());
                let random = usize::try_from(runtime.random_u64() >> 33).unwrap();
                let (store, _) = &stores[random % stores.len()];
                let limit = 1 + random % 17;
                let page = store.watch(app, Some(position), &WatchFilter::default(), limit).await.unwrap();
                position = page.position;
                read.extend(page.events);
                if random % 5 == 0 && !read.is_empty() {
                    // Somebody else goes on from a message they have dealt with.
                    read.truncate(read.len() - (random / 5) % read.len().min(9));
                    position = read.last().unwrap().position;
                }
                if !page.more {
                    runtime.sleep(Duration::from_micros(500)).await;
                }
            }
            read
        }));
    }

    let mut ids = Vec::new();
    for task in tasks {
        ids.extend(task.await.unwrap());
    }
    let mut ledger = BTreeSet::new();
    for id in ids {
        let page = world.store().list_deliveries(app, id, DeliveryFilter::default(), None, 100).await.unwrap();
        for delivery in page.items {
            assert!(delivery.state.is_final(), "{delivery:?}");
            assert!(ledger.insert((id, delivery.entry, delivery.reason)));
        }
    }
    assert_eq!(ledger.len(), expected);
    let mut order = None;
    for reader in readers {
        let read = reader.await.unwrap();
        let told: Vec<_> = read
            .iter()
            .map(|event| match &event.watched {
                Watched::Delivery { notification, delivery } => (*notification, delivery.entry, delivery.reason),
                Watched::DeviceRetired { .. } => panic!("no device was retired"),
            })
            .collect();
        assert_eq!(told.iter().copied().collect::<BTreeSet<_>>(), ledger);
        assert_eq!(told.len(), expected, "each once");
        assert_eq!(order.get_or_insert(told.clone()), &told, "one order for all");
    }
}
