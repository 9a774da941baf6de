//! Shows in every run that the checker can be red: facts of a green history, with one thing in them that must not be.

use super::checker::{self, Bounds};
use super::facts::{Answer, Ask, Fact, Ms, Notify, Push, Reply};
use super::rules::Rule;

/// Makes facts that must be red of green ones; `None`: not of these.
pub type Forge = fn(&[Fact], &Bounds) -> Option<Vec<Fact>>;

/// What the rule must find. A rule without a forgery does not compile.
pub fn forgery(rule: Rule) -> Forge {
    match rule {
        Rule::Rest => never_at_rest,
        Rule::Lost => without_its_ending,
        Rule::No => pushed_after_a_no,
        Rule::Audience => outside_of_its_audience,
        Rule::Invented => asked_for_by_nobody,
        Rule::Ttl => pushed_after_its_time,
        Rule::Identity => another_identity,
        Rule::Again => taken_and_sent_again,
        Rule::Floor => asked_to_wait_and_sent_at_once,
        Rule::Attempts => attempted_without_end,
        Rule::Doubt => in_doubt_and_sent_again,
        Rule::Answers => asked_and_not_answered,
        Rule::Endings => sent_and_never_taken,
        Rule::Counted => counted_and_not_listed,
    }
}

/// Whether the rule finds its forgery; `None`: these facts do not allow for one.
pub fn finds(rule: Rule, facts: &[Fact], bounds: &Bounds) -> Option<bool> {
    let forged = forgery(rule)(facts, bounds)?;
    Some(checker::check(&forged, bounds).iter().any(|violation| violation.rule == rule.name()))
}

fn last_at(facts: &[Fact]) -> Ms {
    let at = facts.iter().rev().find_map(|fact| match fact {
        Fact::Rested { at, .. } => Some(*at),
        _ => None,
    });
    at.unwrap_or_default()
}

/// A push that the provider took and said so, over a connection that lived on; without crashes, which excuse repeats.
fn taken(facts: &[Fact]) -> Option<&Push> {
    if facts.iter().any(|fact| matches!(fact, Fact::Crashed { .. } | Fact::Cut { .. })) {
        return None;
    }
    facts.iter().find_map(|fact| match fact {
        Fact::Pushed(push) => facts
            .iter()
            .any(|fact| {
                matches!(fact, Fact::Replied { push: number, reply: Reply::Taken { told: true }, at }
                    if *number == push.number && *at < push.at + 1_000)
            })
            .then_some(push),
        _ => None,
    })
}

fn owner<'a>(facts: &'a [Fact], push: &Push) -> Option<&'a str> {
    let names = push.names.as_ref()?;
    let call = facts.iter().find_map(|fact| match fact {
        Fact::Answered { call, answer: Answer::Registered { device, .. }, .. } if *device == names.device => {
            Some(*call)
        }
        _ => None,
    })?;
    facts.iter().find_map(|fact| match fact {
        Fact::Asked { call: number, ask: Ask::Register { user, .. }, .. } if *number == call => Some(user.as_str()),
        _ => None,
    })
}

fn pushed_after_a_no(facts: &[Fact], _: &Bounds) -> Option<Vec<Fact>> {
    let push = taken(facts)?;
    let user = owner(facts, push)?.to_owned();
    // A yes that nobody knows the answer to might still come after the no.
    let is_doubtful = facts.iter().any(|fact| {
        let Fact::Asked { call, ask: Ask::OptIn { user: who, event_type: None, device: None, yes: true }, .. } = fact
        else {
            return false;
        };
        let is_answered =
            |fact: &Fact| matches!(fact, Fact::Answered { call: c, answer: Answer::Chosen { .. }, .. } if c == call);
        *who == user && !facts.iter().any(is_answered)
    });
    if is_doubtful {
        return None;
    }
    let at = last_at(facts);
    let mut forged = facts.to_vec();
    let ask = Ask::OptIn { user, event_type: None, device: None, yes: false };
    forged.push(Fact::Asked { call: u32::MAX, at, ask });
    forged.push(Fact::Answered { call: u32::MAX, at: at + 1, answer: Answer::Chosen { applied: true } });
    forged.push(Fact::Pushed(Push { number: u32::MAX, at: at + 1_100, ..push.clone() }));
    Some(forged)
}

/// Calls for the event of a push: the first, and repeats.
fn is_ask_for(fact: &Fact, push: &Push) -> bool {
    matches!(fact, Fact::Asked { ask: Ask::Notify(notify), .. } if notify.tag == push.tag)
}

fn outside_of_its_audience(facts: &[Fact], _: &Bounds) -> Option<Vec<Fact>> {
    let push = taken(facts)?;
    owner(facts, push)?;
    let mut forged = facts.to_vec();
    for fact in forged.iter_mut().filter(|fact| is_ask_for(fact, push)) {
        if let Fact::Asked { ask: Ask::Notify(notify), .. } = fact {
            let Notify { users, topics, devices, everyone, .. } = notify;
            (*users, *topics, *devices, *everyone) = (vec!["nobody".to_owned()], Vec::new(), Vec::new(), false);
        }
    }
    Some(forged)
}

fn asked_for_by_nobody(facts: &[Fact], _: &Bounds) -> Option<Vec<Fact>> {
    let push = taken(facts)?;
    Some(facts.iter().filter(|fact| !is_ask_for(fact, push)).cloned().collect())
}

fn pushed_after_its_time(facts: &[Fact], bounds: &Bounds) -> Option<Vec<Fact>> {
    let push = taken(facts)?;
    if facts.iter().any(|fact| matches!(fact, Fact::Jumped { .. })) {
        return None;
    }
    let accepted = |fact: &Fact| match fact {
        Fact::Answered { call, at, answer: Answer::Accepted { notification } }
            if push.names.as_ref().is_some_and(|names| names.notification == *notification) =>
        {
            Some((*call, *at))
        }
        _ => None,
    };
    let (call, answered) = facts.iter().find_map(accepted)?;
    let ttl_ms = facts.iter().find_map(|fact| match fact {
        Fact::Asked { call: number, ask: Ask::Notify(notify), .. } if *number == call => Some(notify.ttl_ms),
        _ => None,
    })?;
    let at = answered + ttl_ms + bounds.clocks_apart_ms + 1_001;
    let mut forged = facts.to_vec();
    forged.push(Fact::Pushed(Push { number: u32::MAX, at, ..push.clone() }));
    Some(forged)
}

fn without_its_ending(facts: &[Fact], _: &Bounds) -> Option<Vec<Fact>> {
    // Somebody who certainly belongs to the audience: the checker itself must know that from calls alone.
    let taken = taken(facts)?;
    let names = taken.names.as_ref()?;
    let is_plain = facts.iter().all(|fact| {
        !matches!(
            fact,
            Fact::Asked { ask: Ask::Unregister { .. }, .. }
                | Fact::Replied { reply: Reply::Gone { .. }, .. }
                | Fact::Answered { answer: Answer::Unknown, .. }
                | Fact::Jumped { .. }
        )
    });
    let registered_once = facts
        .iter()
        .filter(|fact| matches!(fact, Fact::Asked { ask: Ask::Register { token, .. }, .. } if *token == taken.token))
        .count()
        == 1;
    let user = owner(facts, taken)?;
    let is_named = facts.iter().any(|fact| {
        matches!(fact, Fact::Asked { ask: Ask::Notify(notify), .. }
            if notify.tag == taken.tag && notify.users.iter().any(|named| named == user))
    });
    let registered_at = facts.iter().find_map(|fact| match fact {
        Fact::Answered { at, answer: Answer::Registered { device, .. }, .. } if *device == names.device => Some(*at),
        _ => None,
    })?;
    let asked_at = facts.iter().find_map(|fact| match fact {
        Fact::Asked { at, ask: Ask::Notify(notify), .. } if notify.tag == taken.tag => Some(*at),
        _ => None,
    })?;
    if !is_plain || !registered_once || !is_named || registered_at >= asked_at {
        return None;
    }
    let of_it = |fact: &Fact| {
        matches!(fact, Fact::Ended { notification, device, .. }
            if *notification == names.notification && device.as_ref() == Some(&names.device))
    };
    Some(facts.iter().filter(|fact| !of_it(fact)).cloned().collect())
}

fn taken_and_sent_again(facts: &[Fact], _: &Bounds) -> Option<Vec<Fact>> {
    let push = taken(facts)?;
    let mut forged = facts.to_vec();
    forged.push(Fact::Pushed(Push { number: u32::MAX, at: last_at(facts) + 1, ..push.clone() }));
    Some(forged)
}

/// The next attempt comes as soon as the provider asked for a pause.
fn asked_to_wait_and_sent_at_once(facts: &[Fact], bounds: &Bounds) -> Option<Vec<Fact>> {
    let (at, push, replied) = facts.iter().enumerate().find_map(|(at, fact)| {
        let Fact::Pushed(push) = fact else { return None };
        let replied = facts.iter().find_map(|fact| match fact {
            Fact::Replied { push: number, at, reply: Reply::Later { .. } } if *number == push.number => Some(*at),
            _ => None,
        })?;
        // Nothing that would excuse a process for what it was told.
        let is_excused = facts.iter().any(|fact| match fact {
            Fact::Crashed { at } | Fact::Jumped { at, .. } => (push.at..replied + 20_000).contains(at),
            Fact::Cut { connection, at } => *connection == push.connection && *at < replied + 20_000,
            Fact::Apart { .. } => true,
            _ => false,
        });
        (!is_excused && replied - push.at < bounds.patience_ms).then_some((at, push, replied))
    })?;
    let mut forged = facts.to_vec();
    forged.insert(at + 1, Fact::Pushed(Push { number: u32::MAX, at: replied + 1, ..push.clone() }));
    Some(forged)
}

fn attempted_without_end(facts: &[Fact], bounds: &Bounds) -> Option<Vec<Fact>> {
    let push = taken(facts)?;
    let mut forged = facts.to_vec();
    let more = (0..bounds.attempts).map(|_| Fact::Pushed(Push { number: u32::MAX, ..push.clone() }));
    forged.extend(more);
    Some(forged)
}

fn another_identity(facts: &[Fact], _: &Bounds) -> Option<Vec<Fact>> {
    let push = taken(facts)?;
    let mut forged = facts.to_vec();
    let header_id = Some("another".to_owned());
    forged.push(Fact::Pushed(Push { number: u32::MAX, header_id, ..push.clone() }));
    Some(forged)
}

fn never_at_rest(facts: &[Fact], _: &Bounds) -> Option<Vec<Fact>> {
    let rested = facts.iter().any(|fact| matches!(fact, Fact::Rested { .. }));
    rested.then(|| facts.iter().filter(|fact| !matches!(fact, Fact::Rested { .. })).cloned().collect())
}

fn sent_and_never_taken(facts: &[Fact], _: &Bounds) -> Option<Vec<Fact>> {
    let names = taken(facts)?.names.as_ref()?;
    // Only of what was acknowledged there is a last look.
    facts.iter().find(|fact| {
        matches!(fact, Fact::Ended { notification, device, state, .. }
            if *notification == names.notification && device.as_ref() == Some(&names.device) && state == "Sent")
    })?;
    Some(facts.iter().filter(|fact| !matches!(fact, Fact::Replied { .. })).cloned().collect())
}

fn counted_and_not_listed(facts: &[Fact], _: &Bounds) -> Option<Vec<Fact>> {
    let mut forged = facts.to_vec();
    let counted = forged.iter_mut().find_map(|fact| match fact {
        Fact::Counted { ended, .. } => Some(ended),
        _ => None,
    })?;
    counted[0].1 += 1;
    Some(forged)
}

fn in_doubt_and_sent_again(facts: &[Fact], _: &Bounds) -> Option<Vec<Fact>> {
    if facts.iter().any(|fact| matches!(fact, Fact::Crashed { .. })) {
        return None;
    }
    let is_dropped = |push: &Push| {
        facts.iter().any(|fact| {
            matches!((fact, &push.names), (Fact::Ended { notification, device, reason, .. }, Some(names))
                if *notification == names.notification && device.as_ref() == Some(&names.device) && reason == "MAYBE_SENT")
        })
    };
    let push = facts.iter().rev().find_map(|fact| match fact {
        Fact::Pushed(push) if is_dropped(push) => Some(push),
        _ => None,
    })?;
    let is_in_doubt = |fact: &Fact| {
        matches!(fact, Fact::Replied { push: number, reply: Reply::Taken { .. } | Reply::Silent, .. }
            if *number == push.number)
    };
    facts.iter().any(is_in_doubt).then(|| {
        let mut forged = facts.to_vec();
        forged.push(Fact::Pushed(Push { number: u32::MAX, at: last_at(facts) + 1, ..push.clone() }));
        forged
    })
}

fn asked_and_not_answered(facts: &[Fact], bounds: &Bounds) -> Option<Vec<Fact>> {
    if !bounds.must_answer || facts.iter().any(|fact| matches!(fact, Fact::Restarted { .. })) {
        return None;
    }
    let mut forged = facts.to_vec();
    let answer = forged.iter_mut().rev().find_map(|fact| match fact {
        Fact::Answered { answer, .. } => Some(answer),
        _ => None,
    })?;
    *answer = Answer::Unknown;
    Some(forged)
}
