//! The rules of consent: who may be notified, decided the same way at planning and before each send.
//!
//! The order of the gates is the order in which ExplainDelivery prints them. The first one that says no decides.

use super::ids::{RouteId, UserKey};
use super::outcome::ResultCode;
use super::time::UnixMs;
use crate::planted;

/// The gates in their order. Numbers are those of the published rules; 6 and 7 (quiet hours, caps) come with a later
/// version.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Gate {
    Device = 1,
    MasterSwitch = 2,
    EventType = 3,
    DeviceChoice = 4,
    Actor = 5,
    TtlAndSize = 8,
}

impl Gate {
    pub const ALL: [Self; 6] =
        [Self::Device, Self::MasterSwitch, Self::EventType, Self::DeviceChoice, Self::Actor, Self::TtlAndSize];

    /// Which gate gave this result; `None` for results that no gate gives.
    #[must_use]
    pub const fn of(code: ResultCode) -> Option<Self> {
        match code {
            ResultCode::NoDevice
            | ResultCode::DeviceRetired
            | ResultCode::DeviceMoved
            | ResultCode::RouteUnknown
            | ResultCode::NotAllowedHere => Some(Self::Device),
            ResultCode::NeverOptedIn | ResultCode::OptedOut => Some(Self::MasterSwitch),
            ResultCode::TypeOptedOut | ResultCode::TypeDefaultOff => Some(Self::EventType),
            ResultCode::DeviceOptedOut | ResultCode::DeviceTypeOptedOut => Some(Self::DeviceChoice),
            ResultCode::Actor => Some(Self::Actor),
            ResultCode::Expired | ResultCode::PayloadTooLarge | ResultCode::NotEncodable => Some(Self::TtlAndSize),
            ResultCode::Sent
            | ResultCode::Cancelled
            | ResultCode::DeadToken
            | ResultCode::DeadRejected
            | ResultCode::DeadRetriesOver
            | ResultCode::DeadPoison
            | ResultCode::DeadMaybeSent
            | ResultCode::MovedToRetry
            | ResultCode::Deferred
            | ResultCode::Redriven => None,
        }
    }

    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Device => "DEVICE",
            Self::MasterSwitch => "MASTER_SWITCH",
            Self::EventType => "EVENT_TYPE",
            Self::DeviceChoice => "DEVICE_CHOICE",
            Self::Actor => "ACTOR",
            Self::TtlAndSize => "TTL_AND_SIZE",
        }
    }
}

/// Whether a device row can be sent to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DeviceState {
    Active,
    /// Unregistered by a call or found dead by a platform.
    Retired,
    /// Its token was registered by another user.
    Moved,
}

/// What a person chose; `None` where they never did.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct UserChoice {
    /// The master switch.
    pub all: Option<bool>,
    /// For the event type at hand.
    pub this_type: Option<bool>,
}

/// What was chosen on one device. It can only narrow what the user allowed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct DeviceChoice {
    pub all: Option<bool>,
    pub this_type: Option<bool>,
}

/// What the event says about itself, as far as the gates care.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EventRules {
    /// Applies when the user made no choice for the type. Always false for advertising.
    pub default_opt_in: bool,
    /// Left out, unless `notify_actor`.
    pub actor: Option<UserKey>,
    pub expires_at: UnixMs,
    pub cancelled: bool,
}

/// One device as the gates see it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceFacts {
    pub state: DeviceState,
    pub route: RouteId,
    /// Whether some live replica can send through the route.
    pub route_known: bool,
    /// Whether the app's staging allow-list, where it has one, allows it.
    pub allowed_here: bool,
    pub choice: DeviceChoice,
}

/// Gates that concern the person, whatever the device: 2, 3 and 5. `Some` is the reason for suppression.
#[must_use]
pub fn user_gates(rules: &EventRules, user: UserKey, choice: UserChoice) -> Option<ResultCode> {
    match choice.all {
        None if planted::is("master-switch-default-on") => {}
        None => return Some(ResultCode::NeverOptedIn),
        Some(false) => return Some(ResultCode::OptedOut),
        Some(true) => {}
    }
    match choice.this_type {
        Some(false) => return Some(ResultCode::TypeOptedOut),
        None if !rules.default_opt_in => return Some(ResultCode::TypeDefaultOff),
        Some(true) | None => {}
    }
    (rules.actor == Some(user) && !planted::is("actor-notified")).then_some(ResultCode::Actor)
}

/// All gates for one device, in order. `Some` is the reason it must not be sent to.
#[must_use]
pub fn gates(
    rules: &EventRules,
    user: UserKey,
    choice: UserChoice,
    device: &DeviceFacts,
    now: UnixMs,
) -> Option<ResultCode> {
    if rules.cancelled && !planted::is("cancelled-sent") {
        return Some(ResultCode::Cancelled);
    }
    match device.state {
        DeviceState::Active if !device.route_known => return Some(ResultCode::RouteUnknown),
        DeviceState::Active if !device.allowed_here => return Some(ResultCode::NotAllowedHere),
        DeviceState::Active => {}
        DeviceState::Retired => return Some(ResultCode::DeviceRetired),
        DeviceState::Moved => return Some(ResultCode::DeviceMoved),
    }
    let widened = device.choice.all == Some(true) && planted::is("device-widens");
    let by_user = user_gates(rules, user, choice).filter(|_| !widened);
    if let Some(code) = by_user
        && code != ResultCode::Actor
    {
        return by_user;
    }
    if device.choice.all == Some(false) {
        return Some(ResultCode::DeviceOptedOut);
    }
    if device.choice.this_type == Some(false) {
        return Some(ResultCode::DeviceTypeOptedOut);
    }
    if by_user.is_some() {
        return by_user;
    }
    (rules.expires_at <= now && !planted::is("expired-sent")).then_some(ResultCode::Expired)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: EventRules =
        EventRules { default_opt_in: true, actor: Some(UserKey(7)), expires_at: UnixMs(100), cancelled: false };
    const YES: UserChoice = UserChoice { all: Some(true), this_type: None };
    const DEVICE: DeviceFacts = DeviceFacts {
        state: DeviceState::Active,
        route: RouteId(1),
        route_known: true,
        allowed_here: true,
        choice: DeviceChoice { all: None, this_type: None },
    };

    fn gate(rules: EventRules, user: i64, choice: UserChoice, device: DeviceFacts, now: i64) -> Option<ResultCode> {
        gates(&rules, UserKey(user), choice, &device, UnixMs(now))
    }

    #[test]
    fn each_gate_has_its_reason() {
        assert_eq!(gate(RULES, 1, YES, DEVICE, 99), None);
        assert_eq!(gate(RULES, 1, YES, DEVICE, 100), Some(ResultCode::Expired));
        assert_eq!(gate(RULES, 7, YES, DEVICE, 99), Some(ResultCode::Actor));
        let never = UserChoice::default();
        assert_eq!(gate(RULES, 1, never, DEVICE, 99), Some(ResultCode::NeverOptedIn));
        let no_type = UserChoice { all: Some(true), this_type: Some(false) };
        assert_eq!(gate(RULES, 1, no_type, DEVICE, 99), Some(ResultCode::TypeOptedOut));
        let advertising = EventRules { default_opt_in: false, ..RULES };
        assert_eq!(gate(advertising, 1, YES, DEVICE, 99), Some(ResultCode::TypeDefaultOff));
        let moved = DeviceFacts { state: DeviceState::Moved, ..DEVICE };
        assert_eq!(gate(RULES, 1, never, moved, 99), Some(ResultCode::DeviceMoved), "the first gate decides");
        let barred = DeviceFacts { allowed_here: false, ..DEVICE };
        assert_eq!(gate(RULES, 1, never, barred, 99), Some(ResultCode::NotAllowedHere));
        let quiet = DeviceFacts { choice: DeviceChoice { all: Some(false), this_type: Some(true) }, ..DEVICE };
        assert_eq!(gate(RULES, 1, YES, quiet, 99), Some(ResultCode::DeviceOptedOut));
        assert_eq!(gate(EventRules { cancelled: true, ..RULES }, 1, YES, DEVICE, 99), Some(ResultCode::Cancelled));
    }

    #[test]
    fn a_device_never_widens_what_the_user_allowed() {
        let eager = DeviceFacts { choice: DeviceChoice { all: Some(true), this_type: Some(true) }, ..DEVICE };
        let out = UserChoice { all: Some(false), this_type: Some(true) };
        assert_eq!(gate(RULES, 1, out, eager, 0), Some(ResultCode::OptedOut));
    }
}
