//! What callers were told, held against what the providers received: event by event, device by device, identity by
//! identity. Compact, for millions of pushes.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::str::FromStr;

use nudged::sandbox::{Platform, Received};
use uuid::Uuid;

/// Contradictions kept in words; of the others only that there are more.
const MAX_WORDS: usize = 20;

/// The person of an event has one device on each.
pub const PLATFORMS: [Platform; 2] = [Platform::Apns, Platform::Fcm];

/// An event's number and the device it reached.
type Delivery = (u64, Platform);

struct Seen {
    identity: Uuid,
    times: u64,
}

#[derive(Default)]
pub struct Ledger {
    /// Event to notification.
    acknowledged: HashMap<u64, Uuid>,
    seen: HashMap<Delivery, Seen>,
    wrong: Vec<String>,
    /// Of the sandbox's record.
    last_seq: u64,
    repeated: u64,
    pushes: u64,
}

/// What a ledger comes to.
#[derive(Clone, Default, Debug)]
pub struct Verdict {
    pub acknowledged: u64,
    pub pushes: u64,
    /// Pushes received once more, each with its first identity.
    pub repeated: u64,
    /// Deliveries of events that nobody was told of: their caller's answer was killed with the server.
    pub unacknowledged: u64,
    /// Acknowledged and never received.
    pub lost: Vec<Delivery>,
    /// What must not be at all, in words.
    pub wrong: Vec<String>,
}

/// How to falsify a ledger: a harness that cannot fail proves nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tamper {
    /// A delivery that the provider did receive is forgotten.
    Lost,
    /// A push is repeated under another identity.
    OtherIdentity,
    /// Two deliveries have one identity.
    SharedIdentity,
    /// Two events have one notification.
    SharedNotification,
}

impl FromStr for Tamper {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "lost" => Ok(Self::Lost),
            "other-identity" => Ok(Self::OtherIdentity),
            "shared-identity" => Ok(Self::SharedIdentity),
            "shared-notification" => Ok(Self::SharedNotification),
            _ => Err(format!("nothing can be broken by {text}")),
        }
    }
}

impl Ledger {
    pub fn acknowledge(&mut self, number: u64, notification: &str) {
        let notification = Uuid::parse_str(notification).expect("a public id is a UUID");
        if let Some(before) = self.acknowledged.insert(number, notification)
            && before != notification
        {
            self.contradict(format!("event {number} was answered with {before} and with {notification}"));
        }
    }

    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.len() as u64
    }

    pub fn pushes(&self) -> u64 {
        self.pushes
    }

    /// Deliveries of acknowledged events that are not there yet.
    pub fn missing(&self) -> u64 {
        let numbers = self.acknowledged.keys();
        numbers
            .map(|number| PLATFORMS.iter().filter(|on| !self.seen.contains_key(&(*number, **on))).count() as u64)
            .sum()
    }

    /// Where to read the sandbox's record on.
    pub fn last_seq(&self) -> u64 {
        self.last_seq
    }

    /// In the order of the record, nothing left out.
    pub fn receive(&mut self, push: &Received) {
        assert_eq!(push.seq, self.last_seq + 1, "the record has forgotten pushes before they were read");
        self.last_seq = push.seq;
        self.pushes += 1;
        if !push.accepted {
            self.contradict(format!("the provider refused a push: {:?}", push.reason));
            return;
        }
        let identity = push.nudged_id.as_deref().and_then(|id| Uuid::parse_str(id).ok());
        let number = number_of(&push.body);
        let (Some(identity), Some(number)) = (identity, number) else {
            self.contradict(format!("a push without identity or event: {push:?}"));
            return;
        };
        if push.token != super::token(number, push.platform) {
            self.contradict(format!("event {number} reached somebody else's device"));
        }
        self.seen(number, push.platform, identity);
    }

    fn seen(&mut self, number: u64, platform: Platform, identity: Uuid) {
        let seen = self.seen.entry((number, platform)).or_insert(Seen { identity, times: 0 });
        seen.times += 1;
        if seen.times > 1 {
            self.repeated += 1;
        }
        if seen.identity != identity {
            let first = seen.identity;
            self.contradict(format!("event {number} came to {platform:?} as {first} and again as {identity}"));
        }
    }

    fn contradict(&mut self, words: String) {
        if self.wrong.len() < MAX_WORDS {
            self.wrong.push(words);
        }
    }

    /// Some acknowledged events with their notification and their identities by platform.
    pub fn sample(&self, count: usize) -> Vec<(Uuid, BTreeSet<Uuid>)> {
        let step = (self.acknowledged.len() / count.max(1)).max(1);
        let mut numbers: Vec<&u64> = self.acknowledged.keys().collect();
        numbers.sort_unstable();
        let one = |number: &u64| {
            let identities = PLATFORMS.iter().filter_map(|on| self.seen.get(&(*number, *on)));
            (self.acknowledged[number], identities.map(|seen| seen.identity).collect())
        };
        numbers.into_iter().step_by(step).take(count).map(one).collect()
    }

    pub fn tamper(&mut self, how: Tamper) {
        let Some(number) = self.acknowledged.keys().copied().min() else { return };
        let taken = |ledger: &Self| ledger.seen[&(number, Platform::Apns)].identity;
        match how {
            Tamper::Lost => {
                self.seen.remove(&(number, Platform::Fcm));
            }
            Tamper::OtherIdentity => self.seen(number, Platform::Apns, Uuid::from_u128(1)),
            Tamper::SharedIdentity => {
                let identity = taken(self);
                self.seen.insert((number, Platform::Fcm), Seen { identity, times: 1 });
            }
            Tamper::SharedNotification => {
                let notification = self.acknowledged[&number];
                self.acknowledged.values_mut().for_each(|one| *one = notification);
            }
        }
    }

    pub fn verdict(&self) -> Verdict {
        let mut wrong = self.wrong.clone();
        let identities: HashSet<Uuid> = self.seen.values().map(|seen| seen.identity).collect();
        if identities.len() != self.seen.len() {
            wrong.push(format!("{} identities for {} deliveries", identities.len(), self.seen.len()));
        }
        let notifications: HashSet<&Uuid> = self.acknowledged.values().collect();
        if notifications.len() != self.acknowledged.len() {
            wrong.push(format!("{} notifications for {} events", notifications.len(), self.acknowledged.len()));
        }
        let expected = self.acknowledged.keys().flat_map(|number| PLATFORMS.map(|on| (*number, on)));
        Verdict {
            acknowledged: self.acknowledged(),
            pushes: self.pushes,
            repeated: self.repeated,
            unacknowledged: self.seen.keys().filter(|(number, _)| !self.acknowledged.contains_key(number)).count()
                as u64,
            lost: expected.filter(|delivery| !self.seen.contains_key(delivery)).collect(),
            wrong,
        }
    }
}

impl Verdict {
    /// Nothing lost, nothing that must not be, and no more repeated than was in flight.
    pub fn check(&self, most_repeated: u64) -> Result<(), String> {
        let Self { lost, wrong, repeated, .. } = self;
        if !lost.is_empty() {
            return Err(format!(
                "{} deliveries of acknowledged events are lost: {:?}",
                lost.len(),
                &lost[..lost.len().min(9)]
            ));
        }
        if !wrong.is_empty() {
            return Err(wrong.join("; "));
        }
        if *repeated > most_repeated {
            return Err(format!(
                "{repeated} pushes were repeated, {most_repeated} at most were in flight at the kills"
            ));
        }
        Ok(())
    }

    pub fn add(&mut self, other: &Self) {
        self.acknowledged += other.acknowledged;
        self.pushes += other.pushes;
        self.repeated += other.repeated;
        self.unacknowledged += other.unacknowledged;
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { acknowledged, pushes, repeated, unacknowledged, lost, .. } = self;
        let lost = lost.len();
        write!(
            f,
            "{acknowledged} acknowledged, {pushes} pushes, lost {lost}, {repeated} repeated with the same identity, \
             {unacknowledged} of unacknowledged events"
        )
    }
}

/// The event says its number in its words: `<17>`.
fn number_of(body: &[u8]) -> Option<u64> {
    let start = body.iter().position(|byte| *byte == b'<')? + 1;
    let length = body[start..].iter().position(|byte| *byte == b'>')?;
    std::str::from_utf8(&body[start..start + length]).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn honest() -> Ledger {
        let mut ledger = Ledger::default();
        for number in 0..3 {
            ledger.acknowledge(number, &Uuid::from_u128(100 + u128::from(number)).to_string());
            for (at, platform) in PLATFORMS.into_iter().enumerate() {
                ledger.seen(number, platform, Uuid::from_u128(1_000 + 10 * u128::from(number) + at as u128));
            }
        }
        ledger
    }

    #[test]
    fn an_honest_ledger_is_green_and_every_falsified_one_red() {
        honest().verdict().check(0).unwrap();
        for how in ["lost", "other-identity", "shared-identity", "shared-notification"] {
            let mut ledger = honest();
            ledger.tamper(how.parse().unwrap());
            ledger.verdict().check(10).expect_err(how);
        }
    }

    #[test]
    fn repeats_are_allowed_up_to_what_was_in_flight() {
        let mut ledger = honest();
        ledger.seen(1, Platform::Apns, Uuid::from_u128(1_010));
        let verdict = ledger.verdict();
        assert_eq!(verdict.repeated, 1);
        verdict.check(1).unwrap();
        verdict.check(0).unwrap_err();
    }
}
