//! ExplainDelivery: the chain of decisions for one person and one notification, from what was recorded.
//!
//! Verdicts come from recorded result codes, never from asking the rules again: what was decided then may differ from
//! what would be decided now. The code of the gate that said no makes the gates before it PASSED and those after it
//! NOT_REACHED. The facts told beside a verdict (since when somebody was opted in, and where) come from the consent
//! history as it stood when the decision was recorded. Pure: the store has been asked before.

mod facts;
mod summary;

use std::collections::BTreeMap;

use crate::domain::consent::Gate;
use crate::domain::device::Device;
use crate::domain::identity::IdentityKey;
use crate::domain::ids::{DeviceId, NotificationId, UserId};
use crate::domain::outcome::{ResultCode, State};
use crate::domain::pause::Pauses;
use crate::domain::time::UnixMs;
use crate::storage::{Attempt, PersonHistory};

use super::notifications::DeliveryView;

/// What was decided at a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It went on.
    Passed,
    /// It ended here.
    Blocked,
    /// An earlier decision ended it.
    NotReached,
    /// Still to be decided or repeated.
    Pending,
    /// A fact, not a decision.
    Noted,
}

/// One line of the explanation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Decision {
    /// A gate's name, or one of the `STEP_` constants.
    pub step: &'static str,
    pub verdict: Verdict,
    /// A stable word, empty where there is none.
    pub reason: &'static str,
    /// For people: one sentence.
    pub detail: String,
    pub at: Option<UnixMs>,
    /// `None`: it concerns the person.
    pub device: Option<DeviceId>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Explanation {
    pub notification: NotificationId,
    pub user: UserId,
    pub summary: String,
    pub decisions: Vec<Decision>,
    pub deliveries: Vec<DeliveryView>,
}

pub const STEP_AUDIENCE: &str = "AUDIENCE";
pub const STEP_QUEUE: &str = "QUEUE";
pub const STEP_ATTEMPT: &str = "ATTEMPT";
pub const STEP_RESULT: &str = "RESULT";

pub const REASON_UNKNOWN_USER: &str = "UNKNOWN_USER";
pub const REASON_NOT_IN_AUDIENCE: &str = "NOT_IN_AUDIENCE";
pub const REASON_EXPANDING: &str = "EXPANDING";
pub const REASON_QUEUED: &str = "QUEUED";
pub const REASON_OS_PERMISSION: &str = "OS_PERMISSION";
pub const REASON_NOT_TARGETED: &str = "NOT_TARGETED";
pub const REASON_PAUSED: &str = "PAUSED";

/// Where one device's delivery (or a whole person) stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Standing {
    /// The last recorded result.
    last: Option<(ResultCode, UnixMs)>,
    /// Whether it ever was in a job: recorded by one, or in one now.
    queued: bool,
    /// The attempts made before, and when it is due, while it waits in a job.
    open: Option<(u32, UnixMs)>,
}

impl Standing {
    const NEW: Self = Self { last: None, queued: false, open: None };

    fn state(&self) -> State {
        match (self.open, self.last) {
            (Some(_), _) | (None, None) => State::Open,
            (None, Some((code, _))) => code.state(),
        }
    }

    /// The recorded end, when it came to one.
    fn end(&self) -> Option<(ResultCode, UnixMs)> {
        self.last.filter(|(code, _)| self.open.is_none() && code.state().is_final())
    }

    fn reason(&self) -> &'static str {
        match (self.end(), self.open, self.last) {
            (Some((code, _)), _, _) => code.name(),
            (None, _, Some((code, _))) if !code.state().is_final() => code.name(),
            (None, _, _) => REASON_QUEUED,
        }
    }
}

/// Explains what is known. `focus`: only this device of the person (a `nudged_id` names one).
#[must_use]
pub fn explain(history: &PersonHistory, identity: &IdentityKey, focus: Option<DeviceId>) -> Explanation {
    let standings = standings(history);
    let mut decisions = Vec::new();
    let whole = standings.get(&DeviceId(0)).and_then(|standing| standing.last);
    let devices: Vec<(DeviceId, Standing)> = standings
        .iter()
        .filter(|(device, _)| **device != DeviceId(0) && focus.is_none_or(|focus| focus == **device))
        .map(|(device, standing)| (*device, *standing))
        .collect();
    if standings.is_empty() {
        decisions.push(outside(history));
    } else {
        decisions.push(Decision {
            detail: format!("{} is among the people of this notification.", history.user_id),
            at: Some(history.notification.accepted_at),
            ..line(STEP_AUDIENCE, Verdict::Passed, None)
        });
    }
    if let Some((code, at)) = whole {
        gates(&mut decisions, history, None, code, at, true);
        decisions.push(line(STEP_QUEUE, Verdict::NotReached, None));
        decisions.push(result(code, at, None));
    }
    for (device, standing) in &devices {
        device_decisions(&mut decisions, history, *device, standing);
    }
    if !standings.is_empty() {
        for device in &history.devices {
            if !standings.contains_key(&device.id) && focus.is_none_or(|focus| focus == device.id) {
                decisions.push(bystander(history, device, whole.is_some()));
            }
        }
    }
    let shown =
        standings.iter().filter(|(device, _)| focus.is_none_or(|focus| focus == **device || **device == DeviceId(0)));
    Explanation {
        notification: history.notification.id,
        user: history.user_id.clone(),
        summary: summary::summary(history, whole, &devices),
        decisions,
        deliveries: shown.map(|(device, standing)| view(history, identity, *device, standing)).collect(),
    }
}

/// Says of what waits that an operator holds it.
pub fn tell_pauses(explanation: &mut Explanation, history: &PersonHistory, pauses: &Pauses) {
    let notification = &history.notification;
    if notification.cancelled_at.is_some() {
        return;
    }
    let (app, event_type) = (notification.app, &notification.event_type);
    let mut told = None;
    for decision in explanation.decisions.iter_mut().filter(|decision| decision.verdict == Verdict::Pending) {
        let pause = match decision.device {
            None => pauses.of_notification(app, event_type),
            Some(id) => {
                let device = history.devices.iter().find(|device| device.id == id);
                device.and_then(|device| pauses.of(app, device.platform, event_type))
            }
        };
        let Some(pause) = pause.filter(|_| decision.step != STEP_ATTEMPT) else { continue };
        decision.reason = REASON_PAUSED;
        decision.detail = facts::held(pause, notification.expires_at);
        told.get_or_insert_with(|| decision.detail.clone());
    }
    if let Some(held) = told {
        explanation.summary = format!("{} {held}", explanation.summary);
    }
}

/// The last recorded result of each device, and what waits. Device 0 is the whole person.
fn standings(history: &PersonHistory) -> BTreeMap<DeviceId, Standing> {
    let mut standings: BTreeMap<DeviceId, Standing> = BTreeMap::new();
    for block in &history.blocks {
        for entry in block.entries.iter().filter(|entry| Some(entry.user) == history.user) {
            let standing = standings.entry(entry.device).or_insert(Standing::NEW);
            standing.last = Some((entry.code, block.at));
            standing.queued |= block.route.is_some();
        }
    }
    for (target, _route, attempt, due_at) in &history.open {
        let standing = standings.entry(target.device).or_insert(Standing::NEW);
        standing.queued = true;
        standing.open = Some((*attempt, *due_at));
    }
    standings
}

/// Somebody who is not, or not yet, among the people of the notification.
fn outside(history: &PersonHistory) -> Decision {
    let user = &history.user_id;
    let (verdict, reason, detail) = if history.expansion_pending {
        let detail = format!("The audience is still being worked out; {user} has not been reached by it yet.");
        (Verdict::Pending, REASON_EXPANDING, detail)
    } else if history.user.is_none() {
        (Verdict::Blocked, REASON_UNKNOWN_USER, format!("Nobody called {user} was ever seen in this app."))
    } else {
        (Verdict::Blocked, REASON_NOT_IN_AUDIENCE, format!("{user} is not among the people of this notification."))
    };
    Decision { reason, detail, ..line(STEP_AUDIENCE, verdict, None) }
}

fn device_decisions(decisions: &mut Vec<Decision>, history: &PersonHistory, id: DeviceId, standing: &Standing) {
    let notification = &history.notification;
    let row = history.devices.iter().find(|device| device.id == id);
    match standing.end() {
        Some((code, at)) => gates(decisions, history, Some((id, row)), code, at, false),
        // Waiting: all gates were passed at planning, and are asked again before the send.
        None => gates(decisions, history, Some((id, row)), ResultCode::Sent, notification.accepted_at, false),
    }
    let queue = match (standing.open, standing.queued) {
        (Some((_, due_at)), _) => Decision {
            reason: standing.reason(),
            detail: match notification.cancelled_at {
                Some(at) => format!("Cancelled at {at}; it is dropped when its turn comes."),
                None => format!("Waits to be sent, due at {due_at}; every rule is asked again before."),
            },
            at: Some(due_at),
            ..line(STEP_QUEUE, Verdict::Pending, Some(id))
        },
        (None, true) => Decision {
            detail: "It was queued; every rule was asked again before the send.".to_owned(),
            ..line(STEP_QUEUE, Verdict::Passed, Some(id))
        },
        (None, false) => line(STEP_QUEUE, Verdict::NotReached, Some(id)),
    };
    decisions.push(queue);
    let mut failed = 0;
    for attempt in attempts(history, id) {
        failed = failed.max(attempt.attempt);
        decisions.push(failed_attempt(attempt, standing));
    }
    match standing.end() {
        Some((ResultCode::Sent, at)) => {
            decisions.push(Decision {
                reason: ResultCode::Sent.name(),
                detail: format!("Attempt {}: the platform took it.", failed + 1),
                at: Some(at),
                ..line(STEP_ATTEMPT, Verdict::Passed, Some(id))
            });
            decisions.push(result(ResultCode::Sent, at, Some(id)));
        }
        Some((code, at)) => decisions.push(result(code, at, Some(id))),
        None => decisions.push(Decision {
            reason: standing.reason(),
            detail: "Still open.".to_owned(),
            ..line(STEP_RESULT, Verdict::Pending, Some(id))
        }),
    }
}

/// The gates in their order, judged by the recorded code.
fn gates(
    decisions: &mut Vec<Decision>,
    history: &PersonHistory,
    device: Option<(DeviceId, Option<&Device>)>,
    code: ResultCode,
    at: UnixMs,
    whole: bool,
) {
    let blocking = Gate::of(code);
    let id = device.map(|(id, _)| id);
    for gate in Gate::ALL {
        let verdict = match blocking {
            Some(blocking) if gate == blocking => Verdict::Blocked,
            Some(blocking) if gate > blocking => Verdict::NotReached,
            Some(_) | None => Verdict::Passed,
        };
        // A person suppressed as a whole has no verdict of a device's own choice; before the actor's gate it held for
        // none of the devices.
        let detail = match verdict {
            Verdict::Blocked => facts::blocked(history, device.and_then(|(_, row)| row), code, at),
            Verdict::Passed => facts::passed(history, device, gate, at, whole),
            Verdict::NotReached | Verdict::Pending | Verdict::Noted => String::new(),
        };
        decisions.push(Decision {
            reason: if verdict == Verdict::Blocked { code.name() } else { "" },
            detail,
            at: (verdict == Verdict::Blocked).then_some(at),
            ..line(gate.name(), verdict, id)
        });
        if gate == Gate::Device
            && let Some((id, Some(row))) = device
        {
            decisions.push(Decision {
                reason: REASON_OS_PERMISSION,
                detail: facts::permission(row),
                at: Some(row.observed_at),
                ..line(Gate::Device.name(), Verdict::Noted, Some(id))
            });
        }
    }
}

fn failed_attempt(attempt: &Attempt, standing: &Standing) -> Decision {
    let repeated = attempt.result == ResultCode::MovedToRetry.name();
    let verdict = match (repeated, standing.state()) {
        (true, State::Open) => Verdict::Pending,
        (true, _) => Verdict::Noted,
        (false, _) => Verdict::Blocked,
    };
    let next = attempt.next_at.map_or_else(String::new, |next| format!(" The next attempt was due at {next}."));
    Decision {
        reason: attempt.result,
        detail: format!("Attempt {}: {}.{next}", attempt.attempt, attempt.answer),
        at: Some(attempt.at),
        ..line(STEP_ATTEMPT, verdict, Some(attempt.device))
    }
}

fn result(code: ResultCode, at: UnixMs, device: Option<DeviceId>) -> Decision {
    let verdict = match code.state() {
        State::Sent => Verdict::Passed,
        State::Open => Verdict::Pending,
        State::Suppressed | State::Expired | State::Cancelled | State::Dead => Verdict::Blocked,
    };
    Decision {
        reason: code.name(),
        detail: facts::outcome(code).to_owned(),
        at: Some(at),
        ..line(STEP_RESULT, verdict, device)
    }
}

/// A device of the person that this notification was never for.
fn bystander(history: &PersonHistory, device: &Device, whole: bool) -> Decision {
    let planned_at = history.notification.accepted_at;
    let detail = if device.created_at > planned_at {
        format!("Registered at {}, after the event was accepted.", device.created_at)
    } else if let Some(retired_at) = device.retired_at.filter(|at| *at <= planned_at) {
        format!("Retired at {retired_at}, before the event was accepted.")
    } else if whole {
        "Shares the decision about the person.".to_owned()
    } else {
        "The event was not for this device.".to_owned()
    };
    Decision { reason: REASON_NOT_TARGETED, detail, ..line(Gate::Device.name(), Verdict::Noted, Some(device.id)) }
}

fn view(history: &PersonHistory, identity: &IdentityKey, device: DeviceId, standing: &Standing) -> DeliveryView {
    let notification = history.notification.id;
    let some = (device != DeviceId(0)).then_some(device);
    DeliveryView {
        notification: identity.public_notification(notification),
        user: history.user_id.clone(),
        device: some,
        nudged_id: some.map(|device| identity.nudged_id(notification, device)),
        state: standing.state(),
        reason: standing.reason(),
        at: standing.last.map_or(history.notification.accepted_at, |(_, at)| at),
        last_attempt: attempts(history, device).last().cloned(),
    }
}

/// A device's failed and repeated attempts, oldest first.
fn attempts(history: &PersonHistory, device: DeviceId) -> impl Iterator<Item = &Attempt> {
    history.attempts.iter().filter(move |attempt| attempt.device == device)
}

const fn line(step: &'static str, verdict: Verdict, device: Option<DeviceId>) -> Decision {
    Decision { step, verdict, reason: "", detail: String::new(), at: None, device }
}

#[cfg(test)]
mod tests;
