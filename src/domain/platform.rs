//! Platforms, routes and lanes: where a push can go and in which queue it waits.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::ids::{AppKey, RouteId};
use super::violation::Violation;
use crate::planted;

/// A push service. The numbers are stored and must not change.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Platform {
    Apns = 1,
    Fcm = 2,
}

impl Platform {
    pub const ALL: [Self; 2] = [Self::Apns, Self::Fcm];

    /// The stored number.
    #[must_use]
    pub const fn code(self) -> i16 {
        self as i16
    }

    #[must_use]
    pub const fn from_code(code: i16) -> Option<Self> {
        match code {
            1 => Some(Self::Apns),
            2 => Some(Self::Fcm),
            _ => None,
        }
    }

    /// The word used in configuration, logs and metric labels.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Apns => "apns",
            Self::Fcm => "fcm",
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What kind of token a device row holds. The numbers are stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DeviceKind {
    Alert = 1,
}

/// Which of Apple's two worlds a token belongs to. The numbers are stored; 0 stands for platforms without one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Environment {
    None = 0,
    Production = 1,
    Sandbox = 2,
}

impl Environment {
    #[must_use]
    pub const fn code(self) -> i16 {
        self as i16
    }

    #[must_use]
    pub const fn from_code(code: i16) -> Option<Self> {
        match code {
            0 => Some(Self::None),
            1 => Some(Self::Production),
            2 => Some(Self::Sandbox),
            _ => None,
        }
    }
}

/// What the phone's operating system said of notifications. Recorded and explained, never a gate. Numbers are stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Permission {
    #[default]
    Unknown = 0,
    Granted = 1,
    Denied = 2,
    Provisional = 3,
}

impl Permission {
    #[must_use]
    pub const fn from_code(code: i16) -> Self {
        match code {
            1 => Self::Granted,
            2 => Self::Denied,
            3 => Self::Provisional,
            _ => Self::Unknown,
        }
    }
}

/// app × platform × credential × environment × bundle: what one job can be sent through.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RouteSpec {
    pub app: AppKey,
    pub platform: Platform,
    /// The credential's name in the configuration, `default` when it has none.
    pub credential: Arc<str>,
    /// [`Environment::None`] but for APNs.
    pub environment: Environment,
    /// APNs: the bundle id, the `apns-topic` of alerts. FCM: empty.
    pub bundle: Arc<str>,
}

/// A route as stored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Route {
    pub id: RouteId,
    pub spec: RouteSpec,
}

/// The two queues that exist at every stage, so that one person's comment never waits behind a million followers.
/// The numbers are stored.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Lane {
    Interactive = 0,
    Bulk = 1,
}

impl Lane {
    pub const ALL: [Self; 2] = [Self::Interactive, Self::Bulk];

    #[must_use]
    pub const fn code(self) -> i16 {
        self as i16
    }

    #[must_use]
    pub const fn from_code(code: i16) -> Option<Self> {
        match code {
            0 => Some(Self::Interactive),
            1 => Some(Self::Bulk),
            _ => None,
        }
    }

    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Bulk => "bulk",
        }
    }

    /// 0 or 1, for arrays with one entry a lane.
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }
}

/// The opaque address a platform gave an app install. Never printed: Debug shows its length only.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct DeviceToken(Arc<str>);

impl DeviceToken {
    /// Apple documents no length; real ones are 64 to some 200 hex digits.
    pub const MAX_APNS_HEX: usize = 512;
    /// FCM tokens are about 160 bytes; Google documents no limit.
    pub const MAX_FCM_BYTES: usize = 4096;

    /// Checks the shape for `platform`. APNs: an even number of hex digits, stored in lower case (Apple compares bytes,
    /// and callers send both). FCM: printable ASCII without spaces.
    pub fn parse(field: &str, platform: Platform, text: &str) -> Result<Self, Violation> {
        if text.is_empty() {
            return Err(Violation::new(field, "must not be empty"));
        }
        match platform {
            Platform::Apns => {
                if text.len() > Self::MAX_APNS_HEX {
                    return Err(Violation::new(field, format!("is longer than {} hex digits", Self::MAX_APNS_HEX)));
                }
                if !text.len().is_multiple_of(2) || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(Violation::new(field, "must be an even number of hex digits for APNS"));
                }
                Ok(Self(Arc::from(text.to_ascii_lowercase())))
            }
            Platform::Fcm => {
                if text.len() > Self::MAX_FCM_BYTES {
                    return Err(Violation::new(field, format!("is longer than {} bytes", Self::MAX_FCM_BYTES)));
                }
                if !text.bytes().all(|b| b.is_ascii_graphic()) {
                    return Err(Violation::new(field, "must be printable ASCII without spaces for FCM"));
                }
                Ok(Self(Arc::from(text)))
            }
        }
    }

    /// For a token that was checked before it was stored.
    #[must_use]
    pub fn trusted(text: &str) -> Self {
        Self(Arc::from(text))
    }

    /// The token itself: for the wire and the database, never for a log.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for DeviceToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if planted::is("token-logged") {
            return write!(f, "DeviceToken({})", self.0);
        }
        write!(f, "DeviceToken({} bytes)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_checked_by_platform_and_never_printed() {
        let token = DeviceToken::parse("token", Platform::Apns, "ABCD12").expect("hex");
        assert_eq!(token.expose(), "abcd12");
        assert!(!format!("{token:?}").contains("abcd"));
        assert!(DeviceToken::parse("token", Platform::Apns, "abc").is_err(), "odd");
        assert!(DeviceToken::parse("token", Platform::Apns, "zz").is_err());
        assert!(DeviceToken::parse("token", Platform::Apns, &"a".repeat(512)).is_ok());
        assert!(DeviceToken::parse("token", Platform::Apns, &"a".repeat(514)).is_err());
        assert!(DeviceToken::parse("token", Platform::Fcm, "a:APA91b-_x").is_ok());
        assert!(DeviceToken::parse("token", Platform::Fcm, "a b").is_err());
        assert!(DeviceToken::parse("token", Platform::Fcm, &"a".repeat(4097)).is_err());
    }
}
