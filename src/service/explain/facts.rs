//! The sentences beside the verdicts.

use crate::domain::consent::Gate;
use crate::domain::device::Device;
use crate::domain::ids::{DeviceId, EventType};
use crate::domain::outcome::ResultCode;
use crate::domain::pause::Pause;
use crate::domain::platform::{Environment, Permission};
use crate::domain::time::UnixMs;
use crate::storage::{OptIn, PersonHistory};

/// Why a gate let it through, with the facts as they stood at `at`.
pub(super) fn passed(
    history: &PersonHistory,
    device: Option<(DeviceId, Option<&Device>)>,
    gate: Gate,
    at: UnixMs,
    whole: bool,
) -> String {
    let notification = &history.notification;
    let event_type = &notification.event_type;
    match gate {
        Gate::Device => match device {
            Some((_, Some(row))) => format!("{}, registered at {}.", describe(row), row.created_at),
            Some((_, None)) => "The device was registered.".to_owned(),
            None => "At least one device is registered.".to_owned(),
        },
        Gate::MasterSwitch => match stood(history, None, None, true, at) {
            Some(choice) => format!("Opted in since {}{}.", choice.observed_at, origin(choice)),
            None => "Opted in.".to_owned(),
        },
        Gate::EventType => match stood(history, Some(event_type), None, true, at) {
            Some(choice) => format!("Opted in to {event_type} since {}{}.", choice.observed_at, origin(choice)),
            None if notification.default_opt_in => {
                format!("No choice of their own for {event_type}; its default is yes.")
            }
            None => format!("Opted in to {event_type}."),
        },
        Gate::DeviceChoice if whole => "No device of theirs refuses it.".to_owned(),
        Gate::DeviceChoice => "Nothing was refused on this device.".to_owned(),
        Gate::Actor => match notification.actor {
            Some(_) => "Somebody else's act.".to_owned(),
            None => "No actor was named.".to_owned(),
        },
        Gate::TtlAndSize => format!("Worth delivering until {}.", notification.expires_at),
    }
}

/// Why the gate behind `code` said no.
pub(super) fn blocked(history: &PersonHistory, device: Option<&Device>, code: ResultCode, at: UnixMs) -> String {
    let event_type = &history.notification.event_type;
    let on = device.map(|device| device.id);
    let refused =
        |event_type: Option<&EventType>, device, what: &str| match stood(history, event_type, device, false, at) {
            Some(choice) => format!("Opted out of {what} on {}{}.", choice.observed_at, origin(choice)),
            None => format!("Opted out of {what}."),
        };
    match code {
        ResultCode::NeverOptedIn => "Never opted in: nothing is sent to somebody who was never asked.".to_owned(),
        ResultCode::OptedOut => refused(None, None, "everything"),
        ResultCode::TypeOptedOut => refused(Some(event_type), None, event_type.as_str()),
        ResultCode::TypeDefaultOff => format!("No choice of their own for {event_type}, and its default is no."),
        ResultCode::DeviceOptedOut => refused(None, on, "everything on this device"),
        ResultCode::DeviceTypeOptedOut => refused(Some(event_type), on, &format!("{event_type} on this device")),
        ResultCode::DeviceRetired => match device.and_then(|row| row.retired_at.zip(row.retired_reason.as_deref())) {
            Some((retired_at, reason)) => format!("Retired at {retired_at}: {reason}."),
            None => outcome(code).to_owned(),
        },
        ResultCode::Expired => format!("Its TTL ended at {}.", history.notification.expires_at),
        other => outcome(other).to_owned(),
    }
}

/// What a result means, whatever the circumstances.
pub(super) const fn outcome(code: ResultCode) -> &'static str {
    match code {
        ResultCode::Sent => "The platform took it; more nobody can know.",
        ResultCode::Expired => "Its TTL ended before the platform took it.",
        ResultCode::Cancelled => "It was cancelled before it was sent.",
        ResultCode::DeadToken => "The platform says that the token is dead; the device was retired.",
        ResultCode::DeadRejected => "The platform refuses this message.",
        ResultCode::DeadRetriesOver => "Retries ended without success.",
        ResultCode::DeadPoison => "It was alone in flight at three crashes and is not tried again.",
        ResultCode::DeadMaybeSent => {
            "The platform took the request and did not answer, and the event type says not to repeat."
        }
        ResultCode::NoDevice => "There is no active device.",
        ResultCode::DeviceRetired => "The device was retired.",
        ResultCode::DeviceMoved => "The phone belongs to another user now.",
        ResultCode::RouteUnknown => {
            "No server is configured to send through the device's credential, environment and bundle."
        }
        ResultCode::NotAllowedHere => {
            "This server sends only to the people and devices of its allow-list (only_users, only_labels)."
        }
        ResultCode::NeverOptedIn => "Never opted in.",
        ResultCode::OptedOut => "Opted out of everything.",
        ResultCode::TypeOptedOut => "Opted out of this event type.",
        ResultCode::TypeDefaultOff => "No choice of their own, and the event type's default is no.",
        ResultCode::DeviceOptedOut => "Opted out of everything on this device.",
        ResultCode::DeviceTypeOptedOut => "Opted out of this event type on this device.",
        ResultCode::Actor => "It is their own act.",
        ResultCode::PayloadTooLarge => "The payload is over the platform's limit.",
        ResultCode::NotEncodable => "The content could not be turned into a payload for this platform.",
        ResultCode::MovedToRetry => "Waits for the next attempt.",
        ResultCode::Deferred => "Waits for a better time.",
        ResultCode::Redriven => "It had died; an operator sent it again.",
    }
}

/// What an operator's pause means for what waits.
pub(super) fn held(pause: &Pause, expires_at: UnixMs) -> String {
    let why = if pause.reason.is_empty() { String::new() } else { format!(" ({})", pause.reason) };
    format!("Delivery is paused since {}{why}; it waits until it is resumed, or until {expires_at}.", pause.since)
}

/// What the phone said of its own settings: a fact, never a gate.
pub(super) fn permission(device: &Device) -> String {
    let said = match device.details.permission {
        Permission::Unknown => "The phone has not said whether it may show notifications",
        Permission::Granted => "The phone may show notifications",
        Permission::Denied => "The phone's settings refuse notifications, so it may show nothing",
        Permission::Provisional => "The phone shows notifications quietly",
    };
    format!("{said}; recorded, never a reason to hold back.")
}

/// Where and how a device is reached, without its token.
pub(super) fn describe(device: &Device) -> String {
    let world = match device.environment {
        Environment::None => String::new(),
        Environment::Production => format!(" production, {}", device.bundle),
        Environment::Sandbox => format!(" sandbox, {}", device.bundle),
    };
    format!("{}{world}", device.platform)
}

/// The applied choice that stood at `at`, if it says what was decided. A decision can be a little older than the moment
/// it was recorded, and an open one is only known to lie after the acceptance; then the nearest choice that fits is told.
fn stood<'a>(
    history: &'a PersonHistory,
    event_type: Option<&EventType>,
    device: Option<DeviceId>,
    opted_in: bool,
    at: UnixMs,
) -> Option<&'a OptIn> {
    let mut before = None;
    let mut after = None;
    for change in history.choices.iter().filter(|change| change.applied) {
        let choice = &change.choice;
        if choice.event_type.as_ref() != event_type || choice.device != device || choice.opted_in != opted_in {
            continue;
        }
        if choice.recorded_at <= at {
            before = Some(choice);
        } else if after.is_none() {
            after = Some(choice);
        }
    }
    before.or(after)
}

/// ` via settings-screen (policy 2026-03)`, as far as the caller told.
pub(super) fn origin(choice: &OptIn) -> String {
    let source = choice.source.as_deref().map_or_else(String::new, |source| format!(" via {source}"));
    let policy = choice.policy_version.as_deref().map_or_else(String::new, |policy| format!(" (policy {policy})"));
    source + &policy
}

/// When the person said the "no" behind `code`, and where, where that is known.
pub(super) fn said_no(history: &PersonHistory, device: Option<DeviceId>, code: ResultCode, at: UnixMs) -> String {
    let event_type = Some(&history.notification.event_type);
    let choice = match code {
        ResultCode::OptedOut => stood(history, None, None, false, at),
        ResultCode::TypeOptedOut => stood(history, event_type, None, false, at),
        ResultCode::DeviceOptedOut => stood(history, None, device, false, at),
        ResultCode::DeviceTypeOptedOut => stood(history, event_type, device, false, at),
        _ => None,
    };
    choice.map_or_else(String::new, |choice| format!(" on {}{}", choice.observed_at, origin(choice)))
}
