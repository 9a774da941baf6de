//! Holds facts against the contract (`design.md`'s promises, in the README's words) and nothing else.
//!
//! Every rule errs on the side of the server: where a fact leaves open what happened (a call without an answer, two
//! calls at once), whatever would be right is right. So a violation is one.

use std::collections::{BTreeMap, BTreeSet};

use super::facts::{Answer, Ask, Fact, Ms, Named, Notify, Push, Reply};
use super::rules::Rule;

/// A "no" is obeyed by then.
const NO_AFTER_MS: Ms = 1_000;
/// What a process was told by a provider is durable by then, unless it crashed.
const DURABLE_AFTER_MS: Ms = 10_000;
/// An answer over a connection that lives on for so long arrived.
const ARRIVED_AFTER_MS: Ms = 2_000;
/// How long after a connection was cut a request may still be written to it: one that stands still says nothing, and an idle one is
/// asked only every so often (`Settings::keep_alive`).
const UNNOTICED_MS: Ms = 60_000;

/// What the run allows.
#[derive(Clone, Debug)]
pub struct Bounds {
    /// Requests with one identity.
    pub attempts: usize,
    /// … for every crash more.
    pub attempts_per_crash: usize,
    /// The least wait after an answer that asks to try later.
    pub floor_ms: Ms,
    /// An answer that takes longer may find nobody who waits for it.
    pub patience_ms: Ms,
    /// How far the clocks of two processes may be apart.
    pub clocks_apart_ms: Ms,
    /// The event type that is declared to drop what may have been sent.
    pub once: Option<String>,
    /// The database serves every call, so every call is answered.
    pub must_answer: bool,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Violation {
    pub rule: &'static str,
    pub what: String,
}

/// All that the facts contradict; empty when the contract was kept.
pub fn check(facts: &[Fact], bounds: &Bounds) -> Vec<Violation> {
    let mut checker = Checker { story: Story::of(facts), bounds: bounds.clone(), found: Vec::new() };
    checker.rest();
    checker.answers();
    checker.pushes();
    checker.repeats();
    checker.endings();
    checker.kept();
    let mut found = checker.found;
    found.sort();
    found.dedup();
    found
}

struct Call<'a> {
    asked: Ms,
    /// `Ms::MAX`: never.
    answered: Ms,
    ask: &'a Ask,
    answer: Option<&'a Answer>,
}

impl Call<'_> {
    /// It may have taken effect after `other` did.
    fn may_follow(&self, other: &Self) -> bool {
        self.answered >= other.asked
    }

    fn may_have_happened(&self) -> bool {
        !matches!(self.answer, Some(Answer::Refused))
    }
}

#[derive(Default)]
struct Story<'a> {
    calls: BTreeMap<u32, Call<'a>>,
    /// Calls that ended, and nobody said how.
    failed: Vec<(u32, Ms)>,
    pushes: Vec<&'a Push>,
    replies: BTreeMap<u32, (Ms, Reply)>,
    cuts: BTreeMap<u32, Ms>,
    crashes: Vec<Ms>,
    restarts: Vec<Ms>,
    apart: Vec<(Ms, Ms)>,
    jumps: Vec<Ms>,
    rest: Option<(Ms, u64)>,
    counted: Vec<Counted<'a>>,
    ended: Vec<Ended<'a>>,
    /// Who owns a device, and its token.
    owners: BTreeMap<&'a str, (&'a str, &'a str)>,
    /// What is behind each notification that was acknowledged.
    accepted: BTreeMap<&'a str, Accepted<'a>>,
}

/// An event, from the first call that asked for it to the first that was told of it.
#[derive(Clone, Copy)]
struct Accepted<'a> {
    asked: Ms,
    /// `Ms::MAX`: never.
    answered: Ms,
    notify: &'a Notify,
}

impl Accepted<'_> {
    /// When it was decided at the latest who gets it. Everyone is found page by page, some time later.
    fn planned_by(&self) -> Ms {
        if self.notify.everyone { Ms::MAX } else { self.answered }
    }
}

struct Counted<'a> {
    notification: &'a str,
    open: u64,
    expanding: bool,
    ended: &'a [(&'static str, u64); 5],
}

struct Ended<'a> {
    notification: &'a str,
    user: &'a str,
    device: Option<&'a str>,
    state: &'a str,
    reason: &'a str,
}

impl<'a> Story<'a> {
    fn of(facts: &'a [Fact]) -> Self {
        let mut story = Self::default();
        for fact in facts {
            match fact {
                Fact::Asked { call, at, ask } => {
                    story.calls.insert(*call, Call { asked: *at, answered: Ms::MAX, ask, answer: None });
                }
                Fact::Answered { call, at, answer } => story.answered(*call, *at, answer),
                Fact::Pushed(push) => story.pushes.push(push),
                Fact::Replied { push, at, reply } => {
                    story.replies.insert(*push, (*at, *reply));
                }
                Fact::Cut { connection, at } => {
                    story.cuts.entry(*connection).or_insert(*at);
                }
                Fact::Crashed { at } => story.crashes.push(*at),
                Fact::Restarted { at } => story.restarts.push(*at),
                Fact::Apart { from, to } => story.apart.push((*from, *to)),
                Fact::Opened { .. } => {}
                Fact::Jumped { at, .. } => story.jumps.push(*at),
                Fact::Rested { at, open } => story.rest = Some((*at, *open)),
                Fact::Counted { notification, open, expanding, ended } => {
                    story.counted.push(Counted { notification, open: *open, expanding: *expanding, ended });
                }
                Fact::Ended { notification, user, device, state, reason } => {
                    story.ended.push(Ended { notification, user, device: device.as_deref(), state, reason });
                }
            }
        }
        story
    }

    fn answered(&mut self, number: u32, at: Ms, answer: &'a Answer) {
        let Some(call) = self.calls.get_mut(&number) else { return };
        if *answer == Answer::Unknown {
            self.failed.push((number, at));
        } else {
            call.answered = at;
            call.answer = Some(answer);
        }
        match (call.ask, answer) {
            (Ask::Register { user, token }, Answer::Registered { device, .. }) => {
                self.owners.insert(device, (user, token));
            }
            (Ask::Notify(notify), Answer::Accepted { notification }) => {
                let asked = self.first_asked(notify.tag);
                self.accepted.entry(notification).or_insert(Accepted { asked, answered: at, notify });
            }
            _ => {}
        }
    }

    /// What a process was told in this time may not have become durable.
    fn disturbed_within(&self, from: Ms, to: Ms) -> bool {
        self.crashes.iter().any(|at| (from..=to).contains(at))
            || self.apart.iter().any(|(begin, end)| *begin <= to && *end >= from)
    }

    fn first_asked(&self, tag: u32) -> Ms {
        let asked = self.calls.values().filter_map(|call| match call.ask {
            Ask::Notify(notify) if notify.tag == tag => Some(call.asked),
            _ => None,
        });
        asked.min().unwrap_or_default()
    }

    /// The event behind a notification, also one whose acceptance was never answered.
    fn event(&self, push: &Push) -> Option<Accepted<'a>> {
        let known = push.names.as_ref().and_then(|names| self.accepted.get(names.notification.as_str()));
        known.copied().or_else(|| {
            self.calls.values().find_map(|call| match call.ask {
                Ask::Notify(notify) if notify.tag == push.tag && call.may_have_happened() => {
                    Some(Accepted { asked: call.asked, answered: Ms::MAX, notify })
                }
                _ => None,
            })
        })
    }
}

/// Of a device that no answer names: a user and a token.
#[derive(Clone, Copy)]
enum Owner<'a> {
    Nobody,
    One((&'a str, &'a str)),
    Several,
}

struct Checker<'a> {
    story: Story<'a>,
    bounds: Bounds,
    found: Vec<Violation>,
}

impl<'a> Checker<'a> {
    fn rest(&mut self) {
        match self.story.rest {
            None => self.found.push(violation(Rule::Rest, "it never came to rest")),
            Some((at, open)) if open > 0 => {
                self.found.push(violation(Rule::Rest, format!("{open} jobs or expansions are open at {at}")));
            }
            Some(_) => {}
        }
    }

    /// A process that goes away takes its calls with it; otherwise they are answered.
    fn answers(&mut self) {
        for (number, at) in self.story.failed.iter().filter(|_| self.bounds.must_answer) {
            let Some(call) = self.story.calls.get(number) else { continue };
            if !self.story.restarts.iter().any(|restart| (call.asked..=*at).contains(restart)) {
                let what = format!("{:?} asked at {} failed at {at}", call.ask, call.asked);
                self.found.push(violation(Rule::Answers, what));
            }
        }
    }

    /// Every single push: known, of a stable identity, and to somebody who may be sent it now.
    fn pushes(&mut self) {
        let mut found = Vec::new();
        let mut collapse: BTreeMap<&str, &Option<String>> = BTreeMap::new();
        let mut notification_of: BTreeMap<u32, &str> = BTreeMap::new();
        for push in &self.story.pushes {
            let mut wrong = |rule, what: String| found.push(violation(rule, format!("{what}: {push:?}")));
            let Some(names) = &push.names else {
                wrong(Rule::Identity, "its nudged_id cannot be read".to_owned());
                continue;
            };
            if push.header_id.as_ref().is_some_and(|id| *id != push.nudged_id) {
                wrong(Rule::Identity, "apns-id is not the nudged_id".to_owned());
            }
            if **collapse.entry(&push.nudged_id).or_insert(&push.collapse_id) != push.collapse_id {
                wrong(Rule::Identity, "an earlier attempt had another collapse identity".to_owned());
            }
            if *notification_of.entry(push.tag).or_insert(&names.notification) != names.notification {
                wrong(Rule::Identity, format!("an earlier push of event {} was of another notification", push.tag));
            }
            let Some(Accepted { answered, notify, .. }) = self.story.event(push) else {
                wrong(Rule::Invented, "nobody asked for it".to_owned());
                continue;
            };
            if notify.tag != push.tag {
                wrong(Rule::Identity, format!("its notification is event {}", notify.tag));
            }
            let expected = notify.collapse_key.as_ref().unwrap_or(&push.nudged_id);
            if push.collapse_id.as_ref().is_some_and(|id| id != expected) {
                wrong(Rule::Identity, format!("its collapse identity should be {expected}"));
            }
            if self.story.jumps.is_empty()
                && answered < Ms::MAX
                && push.at > answered.saturating_add(notify.ttl_ms + NO_AFTER_MS + self.bounds.clocks_apart_ms)
            {
                wrong(Rule::Ttl, "its time to live had ended".to_owned());
            }
            let known = self.story.owners.get(names.device.as_str()).copied();
            let (user, token) = match known.map_or_else(|| self.unacknowledged_owner(push), Owner::One) {
                Owner::One(owner) => owner,
                Owner::Several => continue,
                Owner::Nobody => {
                    wrong(Rule::Invented, "nobody registered its device".to_owned());
                    continue;
                }
            };
            if token != push.token {
                wrong(Rule::Identity, format!("its device has the token {token}"));
            }
            if let Some(why) = self.not_for(push, notify, user) {
                wrong(Rule::Audience, why);
            }
            if let Some(why) = self.forbidden(push, names, notify, user) {
                wrong(Rule::No, why);
            }
        }
        self.found.append(&mut found);
    }

    /// Whose registration of its token was never answered.
    fn unacknowledged_owner(&self, push: &Push) -> Owner<'a> {
        let mut owner = Owner::Nobody;
        for call in self.story.calls.values() {
            let Ask::Register { user, token } = call.ask else { continue };
            if *token != push.token || call.answer.is_some() || call.asked > push.at {
                continue;
            }
            owner = match owner {
                Owner::Nobody => Owner::One((user, token)),
                Owner::One((known, _)) if known == user => owner,
                Owner::One(_) | Owner::Several => Owner::Several,
            };
        }
        owner
    }

    /// Why the event cannot be for this user.
    fn not_for(&self, push: &Push, notify: &Notify, user: &str) -> Option<String> {
        if notify.actor.as_deref() == Some(user) {
            return Some(format!("{user} did it themselves"));
        }
        let named = notify.everyone || notify.users.iter().any(|named| named == user);
        let by_device = notify.devices.iter().any(|device| {
            push.names.as_ref().is_some_and(|names| names.device == *device)
                || self.story.owners.get(device.as_str()).is_some_and(|(owner, _)| *owner == user)
        });
        let subscribed = self.story.calls.values().any(|call| match call.ask {
            Ask::Subscribe { user: who, topic, active: true } => {
                who == user && notify.topics.contains(topic) && call.may_have_happened() && call.asked <= push.at
            }
            _ => false,
        });
        (!named && !by_device && !subscribed).then(|| format!("{user} is not in its audience"))
    }

    /// Which "no" it disobeys.
    fn forbidden(&self, push: &Push, names: &Named, notify: &Notify, user: &str) -> Option<String> {
        let calls = || self.story.calls.values().filter(|call| call.asked <= push.at && call.may_have_happened());
        let asked_yes = calls().any(|call| {
            matches!(call.ask, Ask::OptIn { user: who, event_type: None, device: None, yes: true } if who == user)
        });
        if !asked_yes {
            return Some(format!("{user} never opted in"));
        }
        let binding = |call: &Call<'_>| call.answered.saturating_add(NO_AFTER_MS) < push.at;
        calls().filter(|call| binding(call)).find_map(|no| {
            let says = says_no(no, push, names, notify, user);
            let taken_back = || calls().any(|call| takes_back(no.ask, call.ask, push, user) && call.may_follow(no));
            (says && !taken_back()).then(|| format!("{:?}, answered at {}", no.ask, no.answered))
        })
    }

    /// Attempts of one identity: few, apart, and none after an end.
    fn repeats(&mut self) {
        let mut attempts: BTreeMap<&str, Vec<&Push>> = BTreeMap::new();
        for push in &self.story.pushes {
            attempts.entry(&push.nudged_id).or_default().push(push);
        }
        let most = self.bounds.attempts + self.bounds.attempts_per_crash * self.story.crashes.len();
        let mut found = Vec::new();
        for (id, pushes) in attempts {
            if pushes.len() > most {
                found.push(violation(Rule::Attempts, format!("{} requests for {id}", pushes.len())));
            }
            for pair in pushes.windows(2) {
                found.extend(self.repeat(pair[0], pair[1]).or_else(|| self.doubt(pair[0], pair[1])));
            }
        }
        self.found.append(&mut found);
    }

    /// Of an event type that drops what is in doubt.
    fn is_once(&self, push: &Push) -> bool {
        let event_type = self.story.event(push).map(|event| &event.notify.event_type);
        event_type.is_some() && event_type == self.bounds.once.as_ref()
    }

    /// What is wrong with sending `next` after `push`, both of one identity, when `push` may have been taken.
    fn doubt(&self, push: &Push, next: &Push) -> Option<Violation> {
        let reply = self.story.replies.get(&push.number).map(|(_, reply)| *reply);
        let is_open = matches!(reply, None | Some(Reply::Taken { .. } | Reply::Silent));
        (is_open && self.is_once(push) && !self.story.disturbed_within(push.at, next.at))
            .then(|| violation(Rule::Doubt, format!("the provider may have taken it at {}: {next:?}", push.at)))
    }

    /// … and when `push` was answered.
    fn repeat(&self, push: &Push, next: &Push) -> Option<Violation> {
        let (replied, reply) = *self.story.replies.get(&push.number)?;
        let late = replied - push.at >= self.bounds.patience_ms;
        let cut = self.story.cuts.get(&push.connection).is_some_and(|at| *at <= replied + ARRIVED_AFTER_MS);
        if late || cut || next.at < replied || self.story.disturbed_within(push.at, replied + DURABLE_AFTER_MS) {
            return None;
        }
        match reply {
            Reply::Taken { told: true } => {
                Some(violation(Rule::Again, format!("the provider had taken it at {replied}: {next:?}")))
            }
            Reply::Rejected => Some(violation(Rule::Again, format!("the provider refused it at {replied}: {next:?}"))),
            Reply::Later { hint_ms } => {
                let jumped = self.story.jumps.iter().any(|at| (push.at..=next.at).contains(at));
                let floor = hint_ms.unwrap_or(0).max(self.bounds.floor_ms) - self.bounds.clocks_apart_ms;
                (!jumped && next.at - replied < floor).then(|| {
                    violation(Rule::Floor, format!("the provider asked at {replied} to wait {floor} ms: {next:?}"))
                })
            }
            Reply::Taken { told: false } | Reply::Gone { .. } | Reply::Broken | Reply::NotProcessed | Reply::Silent => {
                None
            }
        }
    }

    /// What the last look says agrees with what providers and callers did.
    fn endings(&mut self) {
        let mut found = Vec::new();
        for Counted { notification, open, expanding, ended } in &self.story.counted {
            if *open > 0 || *expanding {
                found.push(violation(Rule::Rest, format!("{notification} has {open} open, expanding {expanding}")));
            }
            for (state, count) in *ended {
                let of_it = |other: &&Ended<'_>| other.notification == *notification && other.state == *state;
                let listed = self.story.ended.iter().filter(of_it).count() as u64;
                if listed != *count {
                    found.push(violation(
                        Rule::Counted,
                        format!("{notification} has {listed} {state}, and counts {count}"),
                    ));
                }
            }
        }
        // Of what was never acknowledged nobody can say which event it is.
        for ended in self.story.ended.iter().filter(|ended| self.story.accepted.contains_key(ended.notification)) {
            if let Some(why) = self.contradicts(ended) {
                let Ended { notification, user, device, state, reason } = ended;
                let what = format!("{why}: {notification} for {user} on {device:?} is {state} {reason}");
                found.push(violation(Rule::Endings, what));
            }
        }
        self.found.append(&mut found);
    }

    fn contradicts(&self, ended: &Ended<'_>) -> Option<&'static str> {
        let story = &self.story;
        let pushes = || {
            story.pushes.iter().filter(|push| {
                push.names.as_ref().is_some_and(|names| {
                    names.notification == ended.notification && Some(names.device.as_str()) == ended.device
                })
            })
        };
        let replied = |wanted: &dyn Fn(Reply) -> bool| {
            pushes().any(|push| story.replies.get(&push.number).is_some_and(|(_, reply)| wanted(*reply)))
        };
        let asked = |wanted: &dyn Fn(&Ask) -> bool| story.calls.values().any(|call| wanted(call.ask));
        let token = ended.device.and_then(|device| story.owners.get(device)).map(|(_, token)| *token);
        // The provider said it of any push to the token.
        let gone = || {
            story.pushes.iter().any(|push| {
                token.is_none_or(|token| push.token == token)
                    && matches!(story.replies.get(&push.number), Some((_, Reply::Gone { .. })))
            })
        };
        let plausible = match (ended.state, ended.reason) {
            ("Open", _) => return Some("it is open"),
            ("Sent", _) => replied(&|reply| matches!(reply, Reply::Taken { told: true })),
            ("Cancelled", _) => {
                asked(&|ask| matches!(ask, Ask::Cancel { notification } if notification == ended.notification))
            }
            ("Dead", "TOKEN_GONE") => replied(&|reply| matches!(reply, Reply::Gone { .. })),
            ("Dead", "REJECTED") => replied(&|reply| reply == Reply::Rejected),
            // A connection that never came to be is an attempt, too.
            ("Dead", "RETRIES_OVER") | ("Expired", _) => true,
            ("Dead", "MAYBE_SENT") => {
                let event = story.accepted.get(ended.notification);
                event.is_some_and(|event| Some(&event.notify.event_type) == self.bounds.once.as_ref())
                    && (pushes().any(|push| self.may_be_taken(push)) || self.may_be_unread(event))
            }
            ("Dead", "POISON") => story.crashes.len() >= 3,
            ("Suppressed", "OPTED_OUT" | "TYPE_OPTED_OUT" | "DEVICE_OPTED_OUT" | "DEVICE_TYPE_OPTED_OUT") => {
                asked(&|ask| matches!(ask, Ask::OptIn { yes: false, .. }))
            }
            ("Suppressed", "NEVER_OPTED_IN") => {
                let accepted = story.accepted.get(ended.notification).map(|accepted| accepted.asked);
                !story.calls.values().any(|call| {
                    matches!(call.ask, Ask::OptIn { user, event_type: None, device: None, .. } if user == ended.user)
                        && matches!(call.answer, Some(Answer::Chosen { applied: true }))
                        && accepted.is_some_and(|at| call.answered < at)
                })
            }
            ("Suppressed", "DEVICE_MOVED") => asked(
                &|ask| matches!(ask, Ask::Register { user, token: t } if user != ended.user && token.is_none_or(|token| t == token)),
            ),
            ("Suppressed", "DEVICE_RETIRED") => gone() || asked(&|ask| matches!(ask, Ask::Unregister { .. })),
            ("Suppressed", "NO_DEVICE") => !self.had_device(ended) || gone(),
            ("Suppressed", "ACTOR") => {
                let accepted = story.accepted.get(ended.notification);
                accepted.is_some_and(|accepted| accepted.notify.actor.as_deref() == Some(ended.user))
            }
            _ => false,
        };
        (!plausible).then_some("nothing that happened explains it")
    }

    /// Our side need not know whether the provider took it.
    fn may_be_taken(&self, push: &Push) -> bool {
        let Some((replied, reply)) = self.story.replies.get(&push.number) else { return true };
        let cut = self.story.cuts.get(&push.connection).is_some_and(|at| *at <= replied + ARRIVED_AFTER_MS);
        matches!(reply, Reply::Taken { .. } | Reply::Silent) || cut || replied - push.at >= self.bounds.patience_ms
    }

    /// A request for the event may have been lost on its way to the provider.
    fn may_be_unread(&self, event: Option<&Accepted<'_>>) -> bool {
        let since = event.map_or(0, |event| event.asked);
        [&self.story.crashes, &self.story.restarts].iter().any(|ends| ends.iter().any(|at| *at >= since))
            || self.story.cuts.values().any(|at| at + UNNOTICED_MS >= since)
    }

    /// The user certainly had a device when the notification was accepted.
    fn had_device(&self, ended: &Ended<'_>) -> bool {
        let accepted = self.story.accepted.get(ended.notification);
        accepted.is_some_and(|accepted| !self.certain_devices(accepted, ended.user).is_empty())
    }

    /// Devices of a user that were surely registered, and nothing else, while `accept` was under way.
    fn certain_devices(&self, accept: &Accepted<'_>, user: &str) -> Vec<&'a str> {
        let story = &self.story;
        let mut devices = BTreeSet::new();
        for call in story.calls.values() {
            let (Ask::Register { user: who, token }, Some(Answer::Registered { device, active: true })) =
                (call.ask, call.answer)
            else {
                continue;
            };
            if who != user || call.answered >= accept.asked {
                continue;
            }
            // Nobody may have taken it away between its registration and the acceptance.
            let doubtful = story.calls.values().any(|other| {
                let touches = match other.ask {
                    Ask::Register { token: t, user: w } => t == token && w != user,
                    Ask::Unregister { device: d, token: t } => {
                        t == token || d.as_ref().is_some_and(|name| name == device)
                    }
                    _ => false,
                };
                touches && other.may_have_happened() && other.asked <= accept.planned_by() && other.may_follow(call)
            });
            let died = story.pushes.iter().any(|push| {
                push.token == *token
                    && push.at <= accept.planned_by()
                    && matches!(story.replies.get(&push.number), Some((_, Reply::Gone { .. })))
            });
            if !doubtful && !died {
                devices.insert(device.as_str());
            }
        }
        devices.into_iter().collect()
    }

    /// Acknowledged is kept: everybody whom the event was surely for has an ending.
    fn kept(&mut self) {
        let mut found = Vec::new();
        let mut endings: BTreeMap<(&str, &str), Vec<&Ended<'_>>> = BTreeMap::new();
        for ended in &self.story.ended {
            endings.entry((ended.notification, ended.user)).or_default().push(ended);
        }
        for (notification, accept) in &self.story.accepted {
            let notify = accept.notify;
            for user in self.certain_audience(accept) {
                if notify.actor.as_deref() == Some(user) {
                    continue;
                }
                let ended = endings.get(&(*notification, user));
                let Some(ended) = ended else {
                    let what = format!("{notification} (event {}) has no ending for {user}", notify.tag);
                    found.push(violation(Rule::Lost, what));
                    continue;
                };
                if ended.iter().any(|ended| ended.device.is_none()) {
                    continue;
                }
                for device in self.certain_devices(accept, user) {
                    if !ended.iter().any(|ended| ended.device == Some(device)) {
                        let what = format!("{notification} (event {}) has no ending for {user}'s {device}", notify.tag);
                        found.push(violation(Rule::Lost, what));
                    }
                }
            }
        }
        self.found.append(&mut found);
    }

    /// Users whom the event was surely for: known before, and named or subscribed all the while.
    fn certain_audience(&self, accept: &Accepted<'a>) -> BTreeSet<&'a str> {
        let (story, notify) = (&self.story, accept.notify);
        let mut users: BTreeSet<&'a str> = BTreeSet::new();
        for call in story.calls.values() {
            let known = match (call.ask, call.answer) {
                (Ask::Register { user, .. }, Some(Answer::Registered { .. })) if call.answered < accept.asked => user,
                _ => continue,
            };
            if notify.everyone || notify.users.contains(known) {
                users.insert(known);
            }
        }
        for call in story.calls.values() {
            let (Ask::Subscribe { user, topic, active: true }, Some(Answer::Subscribed)) = (call.ask, call.answer)
            else {
                continue;
            };
            let left = story.calls.values().any(|other| {
                matches!(other.ask, Ask::Subscribe { user: u, topic: t, active: false } if u == user && t == topic)
                    && other.asked <= accept.answered
                    && other.may_follow(call)
            });
            // With a clock that jumps a later call may be the older one.
            let certain = story.jumps.is_empty() && !left;
            if notify.topics.contains(topic) && call.answered < accept.asked && certain {
                users.insert(user);
            }
        }
        users
    }
}

fn violation(rule: Rule, what: impl Into<String>) -> Violation {
    Violation { rule: rule.name(), what: what.into() }
}

/// Whether a call, as it was answered, forbids this push to this user.
fn says_no(no: &Call<'_>, push: &Push, names: &Named, notify: &Notify, user: &str) -> bool {
    match (no.ask, no.answer) {
        (Ask::OptIn { user: who, event_type, device, yes: false }, Some(Answer::Chosen { applied: true })) => {
            who == user
                && event_type.as_ref().is_none_or(|name| *name == notify.event_type)
                && device.as_ref().is_none_or(|name| *name == names.device)
        }
        (Ask::Unregister { device: Some(device), .. }, Some(Answer::Unregistered { existed: true })) => {
            *device == names.device
        }
        (Ask::Unregister { device: None, token }, Some(Answer::Unregistered { existed: true })) => *token == push.token,
        // The phone is somebody else's now.
        (Ask::Register { user: who, token }, Some(Answer::Registered { active: true, .. })) => {
            *token == push.token && who != user
        }
        (Ask::Cancel { notification }, Some(Answer::Cancelled)) => *notification == names.notification,
        _ => false,
    }
}

/// Whether `ask` undoes the "no".
fn takes_back(no: &Ask, ask: &Ask, push: &Push, user: &str) -> bool {
    match (no, ask) {
        (
            Ask::OptIn { user: who, event_type, device, .. },
            Ask::OptIn { user: w, event_type: e, device: d, yes: true },
        ) => w == who && e == event_type && d == device,
        (Ask::Unregister { device: None, token }, Ask::Register { token: t, .. }) => t == token,
        (Ask::Unregister { .. } | Ask::Register { .. }, Ask::Register { user: w, token: t }) => {
            w == user && *t == push.token
        }
        _ => false,
    }
}
