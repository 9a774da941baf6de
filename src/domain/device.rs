//! Devices as callers register and see them.

use std::collections::BTreeMap;

use super::ids::{AppKey, DeviceId, Locale, RouteId, UserId};
use super::platform::{DeviceKind, DeviceToken, Environment, Permission, Platform};
use super::time::UnixMs;
use crate::planted;

/// Labels in one map, and the bytes of a key and of a value.
pub const MAX_LABELS: usize = 32;
pub const MAX_LABEL_BYTES: usize = 128;
/// `app_version` and `os_version`, `installation_id`, `time_zone`, in bytes.
pub const MAX_TEXT_BYTES: usize = 128;
/// A repeated, unchanged registration within this time writes nothing.
pub const UNCHANGED_FOR_MS: i64 = 3_600_000;
/// The most active devices of one user; registering one more retires the one seen longest ago.
pub const MAX_DEVICES_PER_USER: usize = 50;

pub type Labels = BTreeMap<String, String>;

/// A checked registration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Registration {
    pub app: AppKey,
    pub user: UserId,
    pub platform: Platform,
    pub kind: DeviceKind,
    pub token: DeviceToken,
    pub route: RouteId,
    /// Token rotation: the row whose token is replaced. Another user's is not found.
    pub device: Option<DeviceId>,
    /// The app install's own stable id: a new token of the same install replaces the old row's.
    pub installation_id: Option<String>,
    pub details: DeviceDetails,
    /// When the phone said so; an older one than stored loses.
    pub observed_at: UnixMs,
}

/// What a phone tells of itself.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DeviceDetails {
    pub locale: Option<Locale>,
    /// IANA name.
    pub time_zone: Option<String>,
    pub app_version: Option<String>,
    pub os_version: Option<String>,
    pub permission: Permission,
    pub labels: Labels,
}

/// What RegisterDevice did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Registered {
    pub device: Device,
    pub created: bool,
}

/// A device row as callers see it. Without its token.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Device {
    pub id: DeviceId,
    pub user: UserId,
    pub platform: Platform,
    pub kind: DeviceKind,
    pub route: RouteId,
    pub credential: String,
    pub environment: Environment,
    pub bundle: String,
    pub installation_id: Option<String>,
    pub details: DeviceDetails,
    pub active: bool,
    /// Why it is not active: UNREGISTERED, MOVED, REPLACED, TOO_MANY_DEVICES or the platform's reason.
    pub retired_reason: Option<String>,
    pub created_at: UnixMs,
    pub observed_at: UnixMs,
    /// The last registration that was written: what a platform's "gone since" is held against.
    pub confirmed_at: UnixMs,
    pub retired_at: Option<UnixMs>,
}

/// Which device to unregister.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DeviceRef {
    Id(DeviceId),
    Token(Platform, DeviceToken),
}

/// What follows when a platform says since when a token is gone (APNs' 410).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GoneVerdict {
    /// It was registered again later than the platform knew: the message is worth another try.
    Keep,
    /// It may have been registered again, unchanged, within the hour in which that is not written. Left alone until then,
    /// and asked once more.
    Doubt(UnixMs),
    Retire,
}

/// The least time between two questions about one token.
const ASK_AGAIN_AFTER: std::time::Duration = std::time::Duration::from_secs(60);

/// `confirmed_at`: the last registration that was written. `doubted_at`: when its token was last held in doubt.
#[must_use]
pub fn judge_gone(since: UnixMs, confirmed_at: UnixMs, doubted_at: Option<UnixMs>, now: UnixMs) -> GoneVerdict {
    let written_again_from = UnixMs(confirmed_at.0.saturating_add(UNCHANGED_FOR_MS));
    if (since < confirmed_at) != planted::is("gone-rule-inverted") {
        GoneVerdict::Keep
    } else if since <= written_again_from && doubted_at.is_none_or(|asked| asked < confirmed_at) {
        GoneVerdict::Doubt(written_again_from.max(now.plus(ASK_AGAIN_AFTER)))
    } else {
        GoneVerdict::Retire
    }
}

/// A dead token as a platform reported it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Retirement {
    pub device: DeviceId,
    /// When the platform knew; a registration confirmed later than this survives. `None`: now.
    pub since: Option<UnixMs>,
    /// The platform's words, e.g. `410 Unregistered`.
    pub reason: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gone_token_is_held_against_its_registration_in_milliseconds() {
        let confirmed = UnixMs(1_790_000_000_500);
        let hour = UNCHANGED_FOR_MS;
        let at = |ms: i64| UnixMs(confirmed.0 + ms);
        let judge = |since, doubted, now| judge_gone(at(since), confirmed, doubted, at(now));
        assert_eq!(judge(-1, None, 10 * hour), GoneVerdict::Keep, "a millisecond before");
        assert_eq!(judge(0, None, 10), GoneVerdict::Doubt(at(hour)));
        assert_eq!(
            judge(hour, None, 5 * hour),
            GoneVerdict::Doubt(at(5 * hour + 60_000)),
            "asked once more, late as it is"
        );
        assert_eq!(judge(hour + 1, None, 5 * hour), GoneVerdict::Retire, "any repeat since would have been written");
        assert_eq!(judge(0, Some(at(10)), hour), GoneVerdict::Retire, "asked twice");
        assert_eq!(
            judge(0, Some(at(-10)), 10),
            GoneVerdict::Doubt(at(hour)),
            "that doubt was about an older registration"
        );
        // A timestamp taken for seconds, or seconds taken for milliseconds, must not retire anything.
        assert_eq!(judge_gone(UnixMs(confirmed.0 / 1000), confirmed, None, at(10)), GoneVerdict::Keep);
    }
}
