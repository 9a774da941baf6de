//! Histories of consent against a naive model.
//!
//! The model knows nothing of rows, states or fences: it remembers what everybody ever said, with the time they said
//! it, and reads the rules of consent off that. Whatever order the statements arrive in, planning must choose exactly
//! whom the model allows, the gate must agree with it after every step, and whoever turns from allowed to forbidden
//! must be in the deny feed.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::domain::consent::{DeviceFacts, gates};
use crate::domain::device::DeviceRef;
use crate::domain::ids::UserId;
use crate::domain::notification::{Audience, NewEvent};
use crate::domain::outcome::State;
use crate::domain::platform::{DeviceToken, Platform};
use crate::storage::conformance::{World, user};
use crate::storage::{DeliveryFilter, NewOptIn};

const USERS: usize = 3;
const TOKENS: usize = 3;
/// The second is off unless chosen.
const TYPES: [(&str, bool); 2] = [("comment.created", true), ("sale.begun", false)];
/// The most notifications watched at once.
const WATCHED: usize = 4;
/// Steps are a second apart; a late statement was made this long before it arrives. No two fall on one moment.
const LATENESS: [i64; 4] = [0, 1_300, 2_600, 3_900];

#[derive(Clone, Debug)]
enum Step {
    Register { user: usize, token: usize, late: usize },
    Unregister { token: usize, late: usize },
    Choose { user: usize, event_type: Option<usize>, device: Option<usize>, opted_in: bool, late: usize },
    Notify { users: Vec<usize>, everyone: bool, event_type: usize, actor: Option<usize>, ttl_secs: i64 },
    Cancel { nth: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let late = || prop_oneof![3 => Just(0), 2 => 1..LATENESS.len()];
    prop_oneof![
        4 => (0..USERS, 0..TOKENS, late()).prop_map(|(user, token, late)| Step::Register { user, token, late }),
        1 => (0..TOKENS, late()).prop_map(|(token, late)| Step::Unregister { token, late }),
        5 => (0..USERS, proptest::option::of(0..TYPES.len()), proptest::option::weighted(0.3, 0..TOKENS),
              proptest::bool::weighted(0.7), late())
            .prop_map(|(user, event_type, device, opted_in, late)| {
                Step::Choose { user, event_type, device, opted_in, late }
            }),
        4 => (proptest::collection::vec(0..USERS, 1..4), proptest::bool::weighted(0.2), 0..TYPES.len(),
              proptest::option::weighted(0.3, 0..USERS), 2..30i64)
            .prop_map(|(users, everyone, event_type, actor, ttl_secs)| {
                Step::Notify { users, everyone, event_type, actor, ttl_secs }
            }),
        1 => (0..WATCHED).prop_map(|nth| Step::Cancel { nth }),
    ]
}

/// What was said, never forgotten.
#[derive(Default)]
struct Model {
    /// Of a token: when, and who had it from then on.
    held: Vec<(usize, i64, Option<usize>)>,
    chosen: Vec<Said>,
}

struct Said {
    user: usize,
    event_type: Option<usize>,
    /// The token of theirs that it is about.
    device: Option<usize>,
    at: i64,
    opted_in: bool,
}

impl Model {
    fn holder(&self, token: usize) -> Option<usize> {
        let said = self.held.iter().filter(|(about, ..)| *about == token);
        said.max_by_key(|(_, at, _)| *at).and_then(|(_, _, holder)| *holder)
    }

    fn last_choice(&self, user: usize, event_type: Option<usize>, device: Option<usize>) -> Option<bool> {
        let said =
            self.chosen.iter().filter(|said| (said.user, said.event_type, said.device) == (user, event_type, device));
        said.max_by_key(|said| said.at).map(|said| said.opted_in)
    }

    fn may_notify(&self, user: usize, token: usize, event_type: usize, actor: Option<usize>) -> bool {
        self.holder(token) == Some(user)
            && self.last_choice(user, None, None) == Some(true)
            && self.last_choice(user, Some(event_type), None).unwrap_or(TYPES[event_type].1)
            && self.last_choice(user, None, Some(token)) != Some(false)
            && self.last_choice(user, Some(event_type), Some(token)) != Some(false)
            && actor != Some(user)
    }
}

/// A notification under way.
struct Watched {
    id: NotificationId,
    event_type: usize,
    actor: Option<usize>,
    expires_at: UnixMs,
    cancelled: bool,
    /// The target, and whose device of which token it is.
    targets: Vec<(Target, usize, usize)>,
}

impl Watched {
    fn allowed(&self, model: &Model, now: UnixMs) -> Vec<bool> {
        let open = !self.cancelled && now < self.expires_at;
        let allowed =
            |(_, user, token): &(_, usize, usize)| open && model.may_notify(*user, *token, self.event_type, self.actor);
        self.targets.iter().map(allowed).collect()
    }
}

fn name(user: usize) -> String {
    format!("user-{user}")
}

fn token(number: usize) -> String {
    format!("{number:02x}")
}

struct History<'a> {
    world: World<'a>,
    model: Model,
    /// Rows as they became known: whose, and of which token.
    devices: Vec<(DeviceId, usize, usize)>,
    /// When a token's holder last registered it in a way that was written.
    written: [Option<(usize, i64)>; TOKENS],
    watched: Vec<Watched>,
}

impl History<'_> {
    fn row(&self, user: usize, token: usize) -> Option<DeviceId> {
        self.devices.iter().find(|(_, whose, which)| (*whose, *which) == (user, token)).map(|(id, ..)| *id)
    }

    async fn take(&mut self, step: &Step) {
        let now = self.world.now();
        match step {
            Step::Register { user, token: number, late } => {
                let at = now.0 - LATENESS[*late];
                let mut registration = self.world.registration(&name(*user), &token(*number));
                registration.observed_at = UnixMs(at);
                let device = self.world.try_register(registration).await.unwrap().device;
                if self.row(*user, *number).is_none() {
                    self.devices.push((device.id, *user, *number));
                }
                // A repeat within the hour is documented to write nothing, not even its time.
                let repeats = self.model.holder(*number) == Some(*user)
                    && self.written[*number].is_some_and(|(holder, written)| holder == *user && written <= at);
                if !repeats {
                    self.model.held.push((*number, at, Some(*user)));
                    if self.model.holder(*number) == Some(*user) {
                        self.written[*number] = Some((*user, at));
                    }
                }
                assert_eq!(device.active, self.model.holder(*number) == Some(*user));
            }
            Step::Unregister { token: number, late } => {
                let at = now.0 - LATENESS[*late];
                let device = DeviceRef::Token(Platform::Apns, DeviceToken::trusted(&token(*number)));
                let before = self.model.holder(*number);
                let existed =
                    self.world.store().unregister_device(self.world.app, None, device, UnixMs(at), now).await.unwrap();
                // What was never registered cannot be unregistered.
                if self.model.held.iter().any(|(about, ..)| about == number) {
                    self.model.held.push((*number, at, None));
                }
                assert_eq!(existed, before.is_some() && self.model.holder(*number).is_none());
            }
            Step::Choose { user: whose, event_type, device, opted_in, late } => {
                let row = match device {
                    None => None,
                    Some(device) => match self.row(*whose, *device) {
                        None => return,
                        row => row,
                    },
                };
                let at = now.0 - LATENESS[*late];
                let choice = NewOptIn {
                    event_type: event_type.map(|number| EventType::trusted(TYPES[number].0)),
                    device: row,
                    observed_at: UnixMs(at),
                    ..self.world.choice(&name(*whose), *opted_in)
                };
                let (stands, applied) = self.world.store().set_opt_in(choice, now).await.unwrap();
                let (user, event_type, device, opted_in) = (*whose, *event_type, *device, *opted_in);
                self.model.chosen.push(Said { user, event_type, device, at, opted_in });
                let last = self.model.last_choice(user, event_type, device);
                assert_eq!(Some(stands.opted_in), last);
                assert_eq!(applied, stands.observed_at.0 == at);
            }
            Step::Notify { users, everyone, event_type, actor, ttl_secs } => {
                self.notify(users, *everyone, *event_type, *actor, now.0 + ttl_secs * 1_000).await;
            }
            Step::Cancel { nth } => {
                if let Some(watched) = self.watched.get_mut(*nth) {
                    self.world.store().cancel_notification(self.world.app, watched.id, now).await.unwrap();
                    watched.cancelled = true;
                }
            }
        }
    }

    async fn notify(
        &mut self,
        users: &[usize],
        everyone: bool,
        event_type: usize,
        actor: Option<usize>,
        expires_at: i64,
    ) {
        let named: BTreeSet<usize> = users.iter().copied().collect();
        let audience = if everyone {
            Audience { everyone: true, ..Audience::default() }
        } else {
            let user_ids: Vec<UserId> = users.iter().map(|number| user(&name(*number))).collect();
            Audience { user_ids, ..Audience::default() }
        };
        let id = self
            .world
            .accept(NewEvent {
                event_type: EventType::trusted(TYPES[event_type].0),
                default_opt_in: TYPES[event_type].1,
                actor: actor.map(|number| user(&name(number))),
                expires_at: UnixMs(expires_at),
                may_broadcast: true,
                ..self.world.event(audience)
            })
            .await;
        let chosen: BTreeSet<(DeviceId, i64)> = if everyone { self.expanded().await } else { self.planned(id).await };
        let expected: BTreeSet<DeviceId> = self
            .devices
            .iter()
            .filter(|(_, user, token)| {
                (everyone || named.contains(user)) && self.model.may_notify(*user, *token, event_type, actor)
            })
            .map(|(device, ..)| *device)
            .collect();
        assert_eq!(chosen.iter().map(|(device, _)| *device).collect::<BTreeSet<_>>(), expected);
        let targets = chosen
            .into_iter()
            .map(|(device, user)| {
                let known = self.devices.iter().find(|(id, ..)| *id == device).expect("a row we made");
                (Target { user: crate::domain::ids::UserKey(user), device }, known.1, known.2)
            })
            .collect();
        let expires_at = UnixMs(expires_at);
        self.watched.push(Watched { id, event_type, actor, expires_at, cancelled: false, targets });
        if self.watched.len() > WATCHED {
            self.watched.remove(0);
        }
    }

    /// What acceptance put into jobs.
    async fn planned(&self, id: NotificationId) -> BTreeSet<(DeviceId, i64)> {
        let filter = DeliveryFilter { user: None, states: vec![State::Open] };
        let page = self.world.store().list_deliveries(self.world.app, id, filter, None, 100).await.unwrap();
        page.items.into_iter().map(|delivery| (delivery.entry.device, delivery.entry.user.0)).collect()
    }

    /// What the expander would put into jobs, by pages of two.
    async fn expanded(&self) -> BTreeSet<(DeviceId, i64)> {
        let store = self.world.store();
        let mut fanout =
            store.claim_fanout(self.world.fixture.boot, self.world.now(), &[]).await.unwrap().expect("one is due");
        let mut chosen = BTreeSet::new();
        loop {
            let page = store.fanout_page(&fanout, 2).await.unwrap();
            let plan = crate::domain::plan::plan(&page.people, &fanout.notification.rules(), self.world.now());
            let targets = plan.jobs.into_iter().flat_map(|(_, targets)| targets);
            chosen.extend(targets.map(|target| (target.device, target.user.0)));
            fanout.cursor = page.cursor;
            if page.done {
                return chosen;
            }
        }
    }

    /// The gate before a send, as the engine asks it.
    async fn gate(&self, watched: &Watched) -> Vec<bool> {
        let store = self.world.store();
        let notification = store.get_notification(self.world.app, watched.id).await.unwrap().notification;
        let targets: Vec<Target> = watched.targets.iter().map(|(target, ..)| *target).collect();
        let found = store.gate_facts(watched.id, &notification.event_type, &targets).await.unwrap();
        let mut rules = notification.rules();
        rules.cancelled = found.cancelled;
        let allows = |facts: crate::domain::notification::TargetFacts| {
            let device = DeviceFacts {
                state: facts.state,
                route: facts.route,
                route_known: true,
                allowed_here: true,
                choice: facts.device_choice,
            };
            gates(&rules, facts.target.user, facts.user_choice, &device, self.world.now()).is_none()
        };
        found.facts.into_iter().map(|facts| facts.is_some_and(allows)).collect()
    }
}

async fn replay(steps: Vec<Step>) {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let mut history =
        History { world, model: Model::default(), devices: Vec::new(), written: [None; TOKENS], watched: Vec::new() };
    for step in steps {
        history.world.pass(1_000);
        let now = history.world.now();
        let before: Vec<(NotificationId, Vec<bool>)> =
            history.watched.iter().map(|watched| (watched.id, watched.allowed(&history.model, now))).collect();
        let gated = deny.position();
        history.take(&step).await;
        for watched in &history.watched {
            let allowed = watched.allowed(&history.model, now);
            assert_eq!(history.gate(watched).await, allowed, "after {step:?}");
            let Some((_, before)) = before.iter().find(|(id, _)| *id == watched.id) else { continue };
            for ((target, ..), (before, after)) in watched.targets.iter().zip(before.iter().zip(&allowed)) {
                let hit = deny.hit(gated, target.user, target.device, watched.id);
                assert!(!*before || *after || hit, "{step:?} forbade a target and did not say so");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn no_history_lets_a_forbidden_push_through(steps in proptest::collection::vec(step(), 1..60)) {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(replay(steps));
    }
}
