//! A person's reach, packed: how they can be reached and what they chose, as one value of their own row.
//!
//! Their active devices with route, token and language, and every choice of theirs and of those devices: all that planning
//! and gating ask of a person. It repeats what the rows of devices and choices say, which lie at random places among
//! millions; with it a person is found with one way down one tree. The rows count. Whatever changes them packs the person
//! anew in the same transaction.
//!
//! Format 1: the format's number; the person's own choices; the devices, ascending, each with its choices. Lists and texts
//! begin with their length as a varint, ids have eight bytes (little-endian), a choice is its answer (0 or 1) and the name
//! of the event type, empty for all of them.

use super::people::People;
use crate::domain::consent::{DeviceChoice, UserChoice};
use crate::domain::device::Registration;
use crate::domain::ids::{DeviceId, EventType, RouteId, UserKey};
use crate::domain::platform::DeviceToken;
use crate::domain::targets::{read_varint, write_varint};

const FORMAT: u8 = 1;
/// More is not packed: a row is to stay within its page. The few who have more are read from their rows.
pub(super) const MAX_BYTES: usize = 1_536;
/// Of somebody without devices and choices.
pub(super) const NOBODY: [u8; 3] = [FORMAT, 0, 0];

/// The name of an event type, empty for all of them, and the answer.
pub(super) type Choice = (String, bool);

/// An active device, to be packed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct ReachDevice {
    pub id: i64,
    pub route: i64,
    pub token: DeviceToken,
    pub locale: Option<String>,
    pub choices: Vec<Choice>,
}

impl ReachDevice {
    /// As it registers, its choices left out.
    pub fn of(id: DeviceId, registration: &Registration) -> Self {
        let Registration { route, token, details, .. } = registration;
        let locale = details.locale.as_ref().map(|locale| locale.as_str().to_owned());
        Self { id: id.0, route: route.0, token: token.clone(), locale, choices: Vec::new() }
    }
}

/// What is to be packed of a person.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Reach {
    /// Ascending by name, as those of a device.
    pub choices: Vec<Choice>,
    /// Ascending by id.
    pub devices: Vec<ReachDevice>,
}

/// What a step has changed of a person.
#[derive(Clone)]
pub(super) enum Change {
    /// Whatever it was.
    Anything,
    /// This device, its choices left out, is active now or says something else. A new one has no choices yet.
    With { device: ReachDevice, is_new: bool },
    /// This device is not active any more.
    Without(DeviceId),
    /// What they chose, for the device (0: for themselves) and the event type (empty: for all).
    Choice(DeviceId, String, bool),
}

impl Reach {
    /// `None`: more than fits.
    pub fn pack(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![FORMAT];
        write_choices(&mut bytes, &self.choices);
        write_varint(&mut bytes, self.devices.len() as u64);
        for device in &self.devices {
            bytes.extend(device.id.to_le_bytes());
            bytes.extend(device.route.to_le_bytes());
            write_bytes(&mut bytes, device.locale.as_deref().unwrap_or("").as_bytes());
            write_bytes(&mut bytes, device.token.expose().as_bytes());
            write_choices(&mut bytes, &device.choices);
            if bytes.len() > MAX_BYTES {
                return None;
            }
        }
        (bytes.len() <= MAX_BYTES).then_some(bytes)
    }

    /// What [`Reach::pack`] wrote, to be changed. `None` as [`unpack`].
    pub fn read(packed: &[u8]) -> Option<Self> {
        let mut parts = Parts::of(packed)?;
        let mut reach = Self { choices: parts.all_choices()?, devices: Vec::new() };
        for _ in 0..parts.count()? {
            let (id, route, locale, token) = parts.device()?;
            let (token, locale) = (DeviceToken::trusted(token), locale.map(str::to_owned));
            reach.devices.push(ReachDevice { id, route, token, locale, choices: parts.all_choices()? });
        }
        parts.end()?;
        Some(reach)
    }

    /// As [`unpack`] with what is not packed.
    pub fn add_to(self, people: &mut People, user: UserKey, event_type: &EventType) {
        let answers = |choices: &[Choice]| {
            let of = |name: &str| choices.iter().find(|(of, _)| of == name).map(|(_, opted_in)| *opted_in);
            (of(""), of(event_type.as_str()))
        };
        let (all, this_type) = answers(&self.choices);
        people.person(user, UserChoice { all, this_type });
        for ReachDevice { id, route, token, locale, choices } in self.devices {
            let (all, this_type) = answers(&choices);
            let choice = DeviceChoice { all, this_type };
            people.add_device(DeviceId(id), RouteId(route), token, locale.as_deref(), choice);
        }
    }

    /// Makes the change. `false`: it and what was known do not say enough.
    pub fn apply(&mut self, change: Change) -> bool {
        match change {
            Change::Anything => return false,
            Change::With { device, is_new } => match self.devices.binary_search_by_key(&device.id, |known| known.id) {
                Ok(at) => {
                    let choices = std::mem::take(&mut self.devices[at].choices);
                    self.devices[at] = ReachDevice { choices, ..device };
                }
                Err(at) if is_new => self.devices.insert(at, device),
                Err(_) => return false,
            },
            Change::Without(device) => self.devices.retain(|known| known.id != device.0),
            Change::Choice(device, event_type, opted_in) => self.choose(device, &event_type, opted_in),
        }
        true
    }

    /// The person's own choice (device 0) or one of a device of theirs; of one that is not active it is nobody's matter.
    fn choose(&mut self, device: DeviceId, event_type: &str, opted_in: bool) {
        let choices = if device.0 == 0 {
            &mut self.choices
        } else if let Some(known) = self.devices.iter_mut().find(|known| known.id == device.0) {
            &mut known.choices
        } else {
            return;
        };
        match choices.binary_search_by(|(known, _)| known.as_str().cmp(event_type)) {
            Ok(at) => choices[at].1 = opted_in,
            Err(at) => choices.insert(at, (event_type.to_owned(), opted_in)),
        }
    }
}

fn write_bytes(bytes: &mut Vec<u8>, value: &[u8]) {
    write_varint(bytes, value.len() as u64);
    bytes.extend(value);
}

fn write_choices(bytes: &mut Vec<u8>, choices: &[Choice]) {
    write_varint(bytes, choices.len() as u64);
    for (event_type, opted_in) in choices {
        bytes.push(u8::from(*opted_in));
        write_bytes(bytes, event_type.as_bytes());
    }
}

/// Adds the person whose reach this is, with what they chose for this event type and for all. `None`: bytes that no
/// version of ours wrote; the person may be there then in part. Never panics and holds no more than the bytes do.
pub(super) fn unpack(people: &mut People, user: UserKey, event_type: &EventType, packed: &[u8]) -> Option<()> {
    let mut parts = Parts::of(packed)?;
    let (all, this_type) = parts.choices_of(event_type)?;
    people.person(user, UserChoice { all, this_type });
    for _ in 0..parts.count()? {
        let (id, route, locale, token) = parts.device()?;
        let (all, this_type) = parts.choices_of(event_type)?;
        let (token, choice) = (DeviceToken::trusted(token), DeviceChoice { all, this_type });
        people.add_device(DeviceId(id), RouteId(route), token, locale, choice);
    }
    parts.end()
}

/// What is left of the bytes.
struct Parts<'a>(&'a [u8]);

impl<'a> Parts<'a> {
    fn of(packed: &'a [u8]) -> Option<Self> {
        packed.strip_prefix(&[FORMAT]).map(Self)
    }

    fn end(&self) -> Option<()> {
        self.0.is_empty().then_some(())
    }

    fn count(&mut self) -> Option<u64> {
        read_varint(&mut self.0).ok()
    }

    fn id(&mut self) -> Option<i64> {
        let (id, rest) = self.0.split_first_chunk::<8>()?;
        self.0 = rest;
        Some(i64::from_le_bytes(*id))
    }

    fn text(&mut self) -> Option<&'a str> {
        let length = usize::try_from(self.count()?).ok()?;
        let (value, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        std::str::from_utf8(value).ok()
    }

    /// Number, route, language and token.
    fn device(&mut self) -> Option<(i64, i64, Option<&'a str>, &'a str)> {
        let (id, route, locale) = (self.id()?, self.id()?, self.text()?);
        Some((id, route, (!locale.is_empty()).then_some(locale), self.text()?))
    }

    fn choices(&mut self, mut each: impl FnMut(&'a str, bool)) -> Option<()> {
        for _ in 0..self.count()? {
            let (opted_in, rest) = self.0.split_first()?;
            self.0 = rest;
            each(self.text()?, *opted_in != 0);
        }
        Some(())
    }

    fn all_choices(&mut self) -> Option<Vec<Choice>> {
        let mut choices = Vec::new();
        self.choices(|name, opted_in| choices.push((name.to_owned(), opted_in)))?;
        Some(choices)
    }

    /// The answers for all event types and for this one.
    fn choices_of(&mut self, event_type: &EventType) -> Option<(Option<bool>, Option<bool>)> {
        let (mut all, mut this_type) = (None, None);
        self.choices(|name, opted_in| {
            if name.is_empty() {
                all = Some(opted_in);
            } else if name == event_type.as_str() {
                this_type = Some(opted_in);
            }
        })?;
        Some((all, this_type))
    }
}

/// For the fuzzer: what can be read at all is read the same in both ways, and packed again says the same. How many devices.
#[cfg(any(test, feature = "fuzzing"))]
pub fn reads_alike(packed: &[u8]) -> Option<usize> {
    let mut people = People::default();
    let event_type = EventType::trusted("comment");
    let unpacked = unpack(&mut people, UserKey(7), &event_type, packed);
    let reach = Reach::read(packed)?;
    unpacked.expect("what can be read can be unpacked");
    assert_eq!(people.facts.len(), reach.devices.len());
    if let Some(again) = reach.pack() {
        assert!(again.len() <= packed.len(), "what we write is the shortest form");
        assert_eq!(Reach::read(&again), Some(reach.clone()));
    }
    Some(reach.devices.len())
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::domain::ids::Locale;

    fn choices() -> impl Strategy<Value = Vec<Choice>> {
        vec((prop_oneof![Just(String::new()), Just("comment".to_owned()), "[a-z]{1,12}"], any::<bool>()), 0..4)
    }

    fn device() -> impl Strategy<Value = ReachDevice> {
        let token = "[0-9a-f]{64}|[0-9A-Za-z:_-]{100,170}";
        (0..i64::MAX, 0..i64::MAX, token, proptest::option::of("[a-z]{2}-[A-Z]{2}"), choices()).prop_map(
            |(id, route, token, locale, choices)| ReachDevice {
                id,
                route,
                token: DeviceToken::trusted(&token),
                locale,
                choices,
            },
        )
    }

    fn answer(choices: &[Choice], name: &str) -> Option<bool> {
        choices.iter().rfind(|(of, _)| of == name).map(|(_, opted_in)| *opted_in)
    }

    proptest! {
        #[test]
        fn what_is_packed_is_read_back(choices in choices(), devices in vec(device(), 0..6)) {
            let reach = Reach { choices, devices };
            let event_type = EventType::trusted("comment");
            let Some(packed) = reach.pack() else { return Ok(()) };
            let read = Reach::read(&packed);
            prop_assert_eq!(read.as_ref(), Some(&reach));
            let mut found = People::default();
            prop_assert_eq!(unpack(&mut found, UserKey(7), &event_type, &packed), Some(()));
            prop_assert_eq!(found.people.len(), 1);
            let person = &found.people[0];
            prop_assert_eq!(person.user, UserKey(7));
            prop_assert_eq!(person.choice.all, answer(&reach.choices, ""));
            prop_assert_eq!(person.choice.this_type, answer(&reach.choices, "comment"));
            prop_assert_eq!(found.facts.len(), reach.devices.len());
            for (facts, device) in found.facts.iter().zip(&reach.devices) {
                prop_assert_eq!(facts.target.device.0, device.id);
                prop_assert_eq!(facts.route.0, device.route);
                prop_assert_eq!(facts.token.expose(), device.token.expose());
                prop_assert_eq!(facts.locale.as_ref().map(Locale::as_str), device.locale.as_deref());
                prop_assert_eq!(facts.user_choice, person.choice);
                prop_assert_eq!(facts.device_choice.all, answer(&device.choices, ""));
                prop_assert_eq!(facts.device_choice.this_type, answer(&device.choices, "comment"));
            }
        }

        #[test]
        fn nothing_panics_and_no_part_is_taken_for_the_whole(bytes in vec(any::<u8>(), 0..200), device in device()) {
            let event_type = EventType::trusted("comment");
            let _ = unpack(&mut People::default(), UserKey(7), &event_type, &bytes);
            let _ = Reach::read(&bytes);
            let packed = Reach { choices: Vec::new(), devices: vec![device] }.pack().expect("it fits");
            for end in 0..packed.len() {
                prop_assert_eq!(unpack(&mut People::default(), UserKey(7), &event_type, &packed[..end]), None);
            }
        }
    }

    #[test]
    fn a_device_keeps_its_choices_and_none_is_made_up() {
        let device = |id, token: &str| ReachDevice {
            id,
            route: 1,
            token: DeviceToken::trusted(token),
            locale: None,
            choices: Vec::new(),
        };
        let with = |id, token, is_new| Change::With { device: device(id, token), is_new };
        let mut reach = Reach::default();
        assert!(reach.apply(with(7, "aa", true)) && reach.apply(with(5, "bb", true)));
        assert!(reach.apply(Change::Choice(DeviceId(7), "comment".to_owned(), false)));
        assert!(reach.apply(with(7, "cc", false)));
        let kept = vec![("comment".to_owned(), false)];
        let known = ReachDevice { choices: kept, ..device(7, "cc") };
        assert_eq!(reach.devices, [device(5, "bb"), known], "ascending");
        assert!(!reach.apply(with(6, "dd", false)), "one that comes back may have chosen before");
        assert!(!reach.apply(Change::Anything));
        assert!(reach.apply(Change::Without(DeviceId(5))));
        assert_eq!(reach.devices.len(), 1);
    }

    #[test]
    fn more_than_fits_is_not_packed() {
        let token = DeviceToken::trusted(&"a".repeat(160));
        let device = |id| ReachDevice { id, route: 1, token: token.clone(), locale: None, choices: Vec::new() };
        let of = |count| Reach { choices: Vec::new(), devices: (1..=count).map(device).collect() };
        assert!(of(8).pack().is_some());
        assert_eq!(of(9).pack(), None);
        let many = (0..200).map(|at| (format!("event_type_{at}"), true)).collect();
        assert_eq!(Reach { choices: many, devices: Vec::new() }.pack(), None);
        assert_eq!(Reach::default().pack().as_deref(), Some(&NOBODY[..]));
    }
}
