//! One sentence: did they get it, and why or why not.

use crate::domain::ids::DeviceId;
use crate::domain::outcome::{ResultCode, State};
use crate::domain::time::UnixMs;
use crate::storage::PersonHistory;

use super::{Standing, facts};

/// `whole`: the result of a person suppressed as a whole. `devices`: where the others stand.
pub(super) fn summary(
    history: &PersonHistory,
    whole: Option<(ResultCode, UnixMs)>,
    devices: &[(DeviceId, Standing)],
) -> String {
    let user = &history.user_id;
    if devices.is_empty() {
        return match whole {
            Some((code, at)) => format!("Not sent: {}.", why(history, None, code, at)),
            None if history.expansion_pending => {
                format!("Not decided yet: the audience is still being worked out and has not come to {user}.")
            }
            None if history.user.is_none() => format!("Not sent: nobody called {user} was ever seen in this app."),
            None => format!("Not sent: {user} is not among the people of this notification."),
        };
    }
    if let [(device, standing)] = devices {
        return one(history, *device, standing);
    }
    let count = |state: State| devices.iter().filter(|(_, standing)| standing.state() == state).count();
    let (sent, open) = (count(State::Sent), count(State::Open));
    let rest: Vec<String> = devices
        .iter()
        .filter_map(|(device, standing)| match standing.end() {
            Some((ResultCode::Sent, _)) | None => None,
            Some((code, at)) => Some(why(history, Some(*device), code, at)),
        })
        .collect();
    let mut parts = Vec::new();
    if sent > 0 {
        parts.push(format!("sent to {sent} of {}'s {} devices", user, devices.len()));
    }
    if open > 0 {
        parts.push(format!("waiting for {open} of {user}'s {} devices", devices.len()));
    }
    if !rest.is_empty() {
        let mut reasons = rest.clone();
        reasons.dedup();
        parts.push(format!("not sent to {} of them: {}", rest.len(), reasons.join("; ")));
    }
    sentence(&parts.join("; "))
}

fn one(history: &PersonHistory, device: DeviceId, standing: &Standing) -> String {
    let user = &history.user_id;
    let row = history.devices.iter().find(|row| row.id == device);
    let place = row.map_or_else(|| device.public(), |row| format!("{} ({})", device.public(), row.platform));
    if let (None, Some(at)) = (standing.end(), history.notification.cancelled_at) {
        return format!("Not sent so far, and cancelled at {at}: it is dropped when its turn comes.");
    }
    match (standing.end(), standing.open) {
        (Some((ResultCode::Sent, at)), _) => {
            format!("Sent: the platform took it for {user}'s device {place} at {at}; more nobody can know.")
        }
        (Some((code, at)), _) => format!("Not sent: {}.", why(history, Some(device), code, at)),
        (None, Some((0, due_at))) => format!("Waiting: queued for {user}'s device {place}, due at {due_at}."),
        (None, Some((attempt, due_at))) => {
            format!("Waiting: attempt {} for {user}'s device {place} is due at {due_at}.", attempt + 1)
        }
        (None, None) => format!("Waiting: {user}'s device {place} is being worked on."),
    }
}

/// The clause after "Not sent:".
fn why(history: &PersonHistory, device: Option<DeviceId>, code: ResultCode, at: UnixMs) -> String {
    let user = &history.user_id;
    let event_type = &history.notification.event_type;
    let said = facts::said_no(history, device, code, at);
    let last_answer = || {
        let attempt = history.attempts.iter().rfind(|attempt| Some(attempt.device) == device);
        attempt.map_or_else(String::new, |attempt| format!(" ({})", attempt.answer))
    };
    match code {
        ResultCode::NeverOptedIn => format!("{user} had never opted in"),
        ResultCode::OptedOut => format!("{user} had opted out of everything{said}"),
        ResultCode::TypeOptedOut => format!("{user} had opted out of {event_type}{said}"),
        ResultCode::TypeDefaultOff => {
            format!("{user} had made no choice for {event_type}, and its default is no")
        }
        ResultCode::DeviceOptedOut => format!("{user} had opted out of everything on this device{said}"),
        ResultCode::DeviceTypeOptedOut => format!("{user} had opted out of {event_type} on this device{said}"),
        ResultCode::Actor => format!("{user} caused it"),
        ResultCode::NoDevice => format!("{user} had no active device"),
        ResultCode::DeviceRetired => format!("{user}'s device had been retired"),
        ResultCode::DeviceMoved => "the phone belonged to another user by then".to_owned(),
        ResultCode::RouteUnknown => {
            "no server is configured for the device's credential, environment and bundle".to_owned()
        }
        ResultCode::NotAllowedHere => "this server's allow-list names neither them nor the device".to_owned(),
        ResultCode::Expired => format!("its TTL ended at {}", history.notification.expires_at),
        ResultCode::Cancelled => match history.notification.cancelled_at {
            Some(at) => format!("it was cancelled at {at}"),
            None => "it was cancelled".to_owned(),
        },
        ResultCode::DeadToken => format!("the platform says that the device's token is dead{}", last_answer()),
        ResultCode::DeadRejected => format!("the platform refused the message{}", last_answer()),
        ResultCode::DeadRetriesOver => format!("every attempt failed{}", last_answer()),
        ResultCode::DeadPoison => "it was given up after three crashes".to_owned(),
        ResultCode::DeadMaybeSent => {
            format!("the platform did not answer{}, and the event type says not to repeat", last_answer())
        }
        ResultCode::PayloadTooLarge => "the payload is over the platform's limit".to_owned(),
        ResultCode::NotEncodable => "the content could not be turned into a payload for this platform".to_owned(),
        ResultCode::Sent | ResultCode::MovedToRetry | ResultCode::Deferred | ResultCode::Redriven => {
            "it is still open".to_owned()
        }
    }
}

fn sentence(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map_or_else(String::new, |c| c.to_uppercase().to_string());
    format!("{first}{}.", chars.as_str())
}
