//! Planning: from people and their devices to jobs and suppressions. Pure, and the same for one person and a million.

use std::collections::BTreeMap;

use super::allow::AllowList;
use super::consent::{self, DeviceFacts, EventRules, UserChoice};
use super::device::Labels;
use super::ids::{DeviceId, RouteId, UserId, UserKey};
use super::outcome::{Entry, ResultCode};
use super::targets::{MAX_TARGETS, Target};
use super::time::UnixMs;

/// One distinct person of an audience.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Person {
    pub user: UserKey,
    pub choice: UserChoice,
    /// The devices this event may reach them on: all active ones, or only those it named. Sorted by id.
    pub devices: Vec<(DeviceId, DeviceFacts)>,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Plan {
    /// Chunks of at most [`MAX_TARGETS`], each on one route, sorted.
    pub jobs: Vec<(RouteId, Vec<Target>)>,
    /// Sorted by (user, device).
    pub suppressed: Vec<Entry>,
}

/// Every device of these people, sorted when they are.
#[must_use]
pub fn targets(people: &[Person]) -> Vec<Target> {
    let of_person = |person: &Person| {
        let user = person.user;
        person.devices.iter().map(|(device, _)| Target { user, device: *device }).collect::<Vec<_>>()
    };
    people.iter().flat_map(of_person).collect()
}

/// Bars every device that the allow-list does not name. `targets`: at least every device of `people`, sorted; `known`:
/// whose each is, and its labels. A device of which nothing is known is barred.
pub fn restrict(people: &mut [Person], list: &AllowList, targets: &[Target], known: &[Option<(UserId, Labels)>]) {
    for person in people {
        for (device, facts) in &mut person.devices {
            let at = targets.binary_search(&Target { user: person.user, device: *device });
            let known = at.ok().and_then(|at| known.get(at)).and_then(Option::as_ref);
            facts.allowed_here = known.is_some_and(|(user, labels)| list.allows(user, labels));
        }
    }
}

/// `people` must ascend by user.
#[must_use]
pub fn plan(people: &[Person], rules: &EventRules, now: UnixMs) -> Plan {
    debug_assert!(people.windows(2).all(|pair| pair[0].user < pair[1].user), "people are sorted and distinct");
    let mut by_route: BTreeMap<RouteId, Vec<Target>> = BTreeMap::new();
    let mut suppressed = Vec::new();
    for person in people {
        let user = person.user;
        let whole = |code| Entry { user, device: DeviceId(0), code };
        if person.devices.is_empty() {
            suppressed.push(whole(ResultCode::NoDevice));
            continue;
        }
        let mut decided = person
            .devices
            .iter()
            .map(|(device, facts)| (*device, facts.route, consent::gates(rules, user, person.choice, facts, now)));
        // A reason that concerns the person is written once, not once a device.
        if let Some(code) = consent::user_gates(rules, user, person.choice)
            && decided.clone().all(|(_, _, verdict)| verdict == Some(code))
        {
            suppressed.push(whole(code));
            continue;
        }
        for (device, route, verdict) in &mut decided {
            match verdict {
                None => by_route.entry(route).or_default().push(Target { user, device }),
                Some(code) => suppressed.push(Entry { user, device, code }),
            }
        }
    }
    let jobs = by_route
        .into_iter()
        .flat_map(|(route, targets)| {
            targets.chunks(MAX_TARGETS).map(|chunk| (route, chunk.to_vec())).collect::<Vec<_>>()
        })
        .collect();
    Plan { jobs, suppressed }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::consent::{DeviceChoice, DeviceState};
    use super::*;

    fn person(user: i64) -> impl Strategy<Value = Person> {
        let choice = (any::<Option<bool>>(), any::<Option<bool>>());
        let device = (1i64..4, any::<Option<bool>>(), any::<Option<bool>>(), 0u8..3, any::<(bool, bool)>());
        (choice, proptest::collection::vec(device, 0..4)).prop_map(move |((all, this_type), devices)| Person {
            user: UserKey(user),
            choice: UserChoice { all, this_type },
            devices: devices
                .into_iter()
                .enumerate()
                .map(|(at, (route, all, this_type, state, (route_known, allowed_here)))| {
                    let state = [DeviceState::Active, DeviceState::Retired, DeviceState::Moved][usize::from(state)];
                    let choice = DeviceChoice { all, this_type };
                    let id = DeviceId(user * 10 + i64::try_from(at).expect("few") + 1);
                    (id, DeviceFacts { state, route: RouteId(route), route_known, allowed_here, choice })
                })
                .collect(),
        })
    }

    proptest! {
        /// The model is written out in words of the rules, not in terms of the gates.
        #[test]
        fn nobody_forbidden_is_chosen_and_nobody_is_forgotten(
            people in (1i64..60).prop_flat_map(|n| (1..=n).map(person).collect::<Vec<_>>()),
            default_opt_in: bool, actor in proptest::option::of(1i64..60),
        ) {
            let rules = EventRules { default_opt_in, actor: actor.map(UserKey), expires_at: UnixMs(10), cancelled: false };
            let plan = plan(&people, &rules, UnixMs(5));
            let chosen: Vec<Target> = plan.jobs.iter().flat_map(|(_, targets)| targets.clone()).collect();
            for person in &people {
                let wants = person.choice.all == Some(true)
                    && person.choice.this_type.unwrap_or(default_opt_in)
                    && actor != Some(person.user.0);
                let mut reached = 0;
                for (device, facts) in &person.devices {
                    let may = wants
                        && facts.state == DeviceState::Active
                        && facts.route_known
                        && facts.allowed_here
                        && facts.choice.all != Some(false)
                        && facts.choice.this_type != Some(false);
                    let target = Target { user: person.user, device: *device };
                    prop_assert_eq!(chosen.iter().filter(|t| **t == target).count(), usize::from(may));
                    reached += usize::from(may);
                    let explained = plan.suppressed.iter().any(|e| {
                        e.user == person.user && (e.device == *device || e.device == DeviceId(0))
                    });
                    prop_assert_eq!(explained, !may);
                }
                if person.devices.is_empty() {
                    prop_assert_eq!(reached, 0);
                    prop_assert!(plan.suppressed.iter().any(|e| e.user == person.user && e.code == ResultCode::NoDevice));
                }
            }
            prop_assert!(plan.suppressed.windows(2).all(|w| (w[0].user, w[0].device) < (w[1].user, w[1].device)));
        }
    }

    #[test]
    fn jobs_are_cut_at_the_limit() {
        let people: Vec<Person> = (1..=1001)
            .map(|user| Person {
                user: UserKey(user),
                choice: UserChoice { all: Some(true), this_type: None },
                devices: vec![(
                    DeviceId(user),
                    DeviceFacts {
                        state: DeviceState::Active,
                        route: RouteId(1),
                        route_known: true,
                        allowed_here: true,
                        choice: DeviceChoice::default(),
                    },
                )],
            })
            .collect();
        let rules = EventRules { default_opt_in: true, actor: None, expires_at: UnixMs(10), cancelled: false };
        let sizes: Vec<usize> = plan(&people, &rules, UnixMs(0)).jobs.iter().map(|(_, t)| t.len()).collect();
        assert_eq!(sizes, [500, 500, 1]);
    }
}
