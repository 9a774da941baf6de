//! People as they are read for planning: each with their choices and devices, and what gating and sending need of those.

use crate::domain::consent::{DeviceChoice, DeviceFacts, DeviceState, UserChoice};
use crate::domain::ids::{DeviceId, Locale, RouteId, UserKey};
use crate::domain::notification::TargetFacts;
use crate::domain::plan::Person;
use crate::domain::platform::DeviceToken;
use crate::domain::targets::Target;

/// People ascending by user, and the facts of every device they may be reached on, ascending by (user, device).
#[derive(Default)]
pub(super) struct People {
    pub people: Vec<Person>,
    pub facts: Vec<TargetFacts>,
}

impl People {
    /// Somebody who has no row yet, and so neither devices nor choices.
    pub fn stranger(user: UserKey) -> Self {
        let mut found = Self::default();
        found.person(user, UserChoice { all: None, this_type: None });
        found
    }

    /// The last one, or a new one with this choice.
    pub fn person(&mut self, user: UserKey, choice: UserChoice) -> &mut Person {
        if self.people.last().is_none_or(|last| last.user != user) {
            self.people.push(Person { user, choice, devices: Vec::new() });
        }
        self.people.last_mut().expect("pushed above when it was not there")
    }

    /// An active device of the last person.
    pub fn add_device(
        &mut self,
        device: DeviceId,
        route: RouteId,
        token: DeviceToken,
        locale: Option<&str>,
        device_choice: DeviceChoice,
    ) {
        let person = self.people.last_mut().expect("a person comes before their devices");
        person.devices.push((device, facts(DeviceState::Active, route, device_choice)));
        self.facts.push(TargetFacts {
            target: Target { user: person.user, device },
            state: DeviceState::Active,
            route,
            token,
            locale: locale.map(Locale::trusted),
            user_choice: person.choice,
            device_choice,
        });
    }

    /// A device of somebody who is named by it only, whatever its state.
    pub fn add_named(&mut self, found: TargetFacts) {
        let person = self.person(found.target.user, found.user_choice);
        person.devices.push((found.target.device, facts(found.state, found.route, found.device_choice)));
        self.facts.push(found);
    }

    /// Adds people who are not here yet.
    pub fn append(&mut self, mut others: Self) {
        if others.people.is_empty() {
            return;
        }
        self.people.append(&mut others.people);
        self.facts.append(&mut others.facts);
        self.sort();
    }

    /// Into the order that is promised: cheap for what nearly has it, and no store's plan has to.
    pub fn sort(&mut self) {
        for person in &mut self.people {
            person.devices.sort_unstable_by_key(|(device, _)| *device);
        }
        self.people.sort_by_key(|person| person.user);
        self.facts.sort_unstable_by_key(|facts| facts.target);
    }

    pub fn facts_of(&self, target: Target) -> Option<&TargetFacts> {
        let at = self.facts.binary_search_by_key(&target, |facts| facts.target).ok()?;
        self.facts.get(at)
    }
}

/// Planning decides about the route and the allow-list; until then they are taken for good.
fn facts(state: DeviceState, route: RouteId, choice: DeviceChoice) -> DeviceFacts {
    DeviceFacts { state, route, route_known: true, allowed_here: true, choice }
}
