//! Devices as callers register and see them.

use std::collections::BTreeMap;

use super::ids::{AppKey, DeviceId, Locale, RouteId, UserId};
use super::platform::{DeviceKind, DeviceToken, Environment, Permission, Platform};
use super::time::UnixMs;

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

/// A dead token as a platform reported it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Retirement {
    pub device: DeviceId,
    /// When the platform knew; a registration confirmed later than this survives. `None`: now.
    pub since: Option<UnixMs>,
    /// The platform's words, e.g. `410 Unregistered`.
    pub reason: String,
}
