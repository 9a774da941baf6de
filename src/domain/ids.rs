//! Identifiers, one type per kind.
//!
//! Internal ids are time-ordered positive `i64` made by the application, the same on both stores:
//! 41-bit milliseconds since 2024-01-01 UTC (to 2093) | 10-bit node | 12-bit sequence. Devices have an 8-bit sequence
//! (59 bits in all), so that a notification's and a device's id together fit the free bits of a `nudged_id`.
//! The caller's own names (`AppId`, `UserId`, …) are opaque, bounded text.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use super::time::UnixMs;
use super::violation::{Violation, text_rule};

/// 2024-01-01T00:00:00Z: ids count from here, for from 1970 41 bits would end in 2039.
pub const EPOCH_MS: i64 = 1_704_067_200_000;
/// The end of 41 bits, in 2093.
const LAST_MS: i64 = (1 << 41) - 1;
/// No clock takes ids below this, 18 hours after the epoch: lower ones are free for other uses, see `storage::sqlite::homes`.
const FIRST_OF_CLOCK_MS: i64 = 1 << 26;
/// No clock takes ids beyond this: a year of them is left, so that one which was set wrong does not use them up.
const LAST_OF_CLOCK_MS: i64 = LAST_MS - 365 * 24 * 3_600_000;
const NODE_BITS: u32 = 10;
const SEQUENCE_BITS: u32 = 12;
const DEVICE_SEQUENCE_BITS: u32 = 8;

macro_rules! internal_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, serde::Serialize, serde::Deserialize)]
        pub struct $name(pub i64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

internal_id!(/** An app's row. */ AppKey);
internal_id!(/** A user's row; never reused, so packed data may hold only this. */ UserKey);
internal_id!(/** A device's row, 59 bits. Public as the opaque string of [`DeviceId::public`]. */ DeviceId);
internal_id!(/** A notification's row, 63 bits. Public as a UUIDv7, see [`super::identity`]. */ NotificationId);
internal_id!(/** A job's row. */ JobId);
internal_id!(/** A route's row. */ RouteId);
internal_id!(/** An outcome block's row. */ BlockId);
internal_id!(/** A version of an event type: its row. */ TypeVersionId);

const BASE32: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

impl DeviceId {
    /// The string callers see: `dev_` and 12 characters of Crockford's base 32.
    #[must_use]
    pub fn public(self) -> String {
        let mut text = String::with_capacity(16);
        text.push_str("dev_");
        let bits = self.0.cast_unsigned();
        for position in (0..12).rev() {
            let index = usize::try_from((bits >> (position * 5)) & 31).expect("five bits fit");
            text.push(char::from(BASE32[index]));
        }
        text
    }

    /// Reads [`DeviceId::public`]; `None` for anything else.
    #[must_use]
    pub fn parse_public(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("dev_")?;
        if digits.len() != 12 {
            return None;
        }
        let mut value: i64 = 0;
        for byte in digits.bytes() {
            let digit = BASE32.iter().position(|b| *b == byte)?;
            value = (value << 5) | i64::try_from(digit).expect("below 32");
        }
        (value > 0 && value < 1 << 59).then_some(Self(value))
    }
}

/// Makes time-ordered ids for one node. Never goes backwards, whatever the clock does.
#[derive(Debug)]
pub struct IdMaker {
    node: i64,
    last: AtomicI64,
    last_device: AtomicI64,
}

impl IdMaker {
    /// `node`: 0 to 1023. `newest` and `newest_device`: the highest ids this node may have made before (0 for none),
    /// so that a clock set back across a restart does not repeat one.
    #[must_use]
    pub fn new(node: u16, newest: i64, newest_device: i64) -> Self {
        assert!(node < 1 << NODE_BITS, "a node number has ten bits");
        Self { node: i64::from(node), last: AtomicI64::new(newest), last_device: AtomicI64::new(newest_device) }
    }

    /// The next id of any kind but a device.
    pub fn next(&self, now: UnixMs) -> i64 {
        Self::advance(&self.last, self.node, now, SEQUENCE_BITS)
    }

    /// No id of any kind but a device was made, or begun with, that is higher.
    #[must_use]
    pub fn newest(&self) -> i64 {
        self.last.load(Ordering::Relaxed)
    }

    pub fn next_device(&self, now: UnixMs) -> DeviceId {
        DeviceId(Self::advance(&self.last_device, self.node, now, DEVICE_SEQUENCE_BITS))
    }

    fn advance(last: &AtomicI64, node: i64, now: UnixMs, sequence_bits: u32) -> i64 {
        let wanted_ms = now.0.saturating_sub(EPOCH_MS).clamp(FIRST_OF_CLOCK_MS, LAST_OF_CLOCK_MS);
        let shift = NODE_BITS + sequence_bits;
        let mut previous = last.load(Ordering::Relaxed);
        loop {
            let (previous_ms, sequence) = (previous >> shift, previous & ((1 << sequence_bits) - 1));
            let next = if wanted_ms > previous_ms {
                (wanted_ms << shift) | (node << sequence_bits)
            } else if sequence + 1 < 1 << sequence_bits {
                (previous_ms << shift) | (node << sequence_bits) | (sequence + 1)
            } else {
                ((previous_ms + 1) << shift) | (node << sequence_bits)
            };
            match last.compare_exchange_weak(previous, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return next,
                Err(actual) => previous = actual,
            }
        }
    }
}

/// When an id (not a device's) was made.
#[must_use]
pub fn made_at(id: i64) -> UnixMs {
    UnixMs((id >> (NODE_BITS + SEQUENCE_BITS)) + EPOCH_MS)
}

/// The lowest id (not a device's) that can be made at a time; 0 for a time before there were any.
#[must_use]
pub fn first_id_at(at: UnixMs) -> i64 {
    at.0.saturating_sub(EPOCH_MS).clamp(0, LAST_MS) << (NODE_BITS + SEQUENCE_BITS)
}

macro_rules! caller_name {
    ($(#[$doc:meta])* $name:ident, $max:expr, $rule:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The longest allowed, in bytes of UTF-8.
            pub const MAX_BYTES: usize = $max;

            /// Checks shape and length; `field` names the request field in the violation.
            pub fn parse(field: &str, text: &str) -> Result<Self, Violation> {
                text_rule(field, text, Self::MAX_BYTES, $rule)?;
                Ok(Self(Arc::from(text)))
            }

            /// For text that was checked before it was stored.
            #[must_use]
            pub fn trusted(text: &str) -> Self {
                Self(Arc::from(text))
            }

            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

fn slug(text: &str) -> Result<(), &'static str> {
    let ok = text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_');
    if ok { Ok(()) } else { Err("must match [a-z0-9][a-z0-9_-]*") }
}

fn event_type(text: &str) -> Result<(), &'static str> {
    let ok = text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.'));
    if ok { Ok(()) } else { Err("must match [a-z][a-z0-9._-]*") }
}

fn printable(text: &str) -> Result<(), &'static str> {
    if text.chars().any(char::is_control) { Err("must have no control characters") } else { Ok(()) }
}

fn locale(text: &str) -> Result<(), &'static str> {
    let ok = text.split('-').enumerate().all(|(at, part)| {
        let shape = part.bytes().all(|b| b.is_ascii_alphanumeric());
        shape && if at == 0 { (2..=8).contains(&part.len()) } else { (1..=8).contains(&part.len()) }
    });
    if ok { Ok(()) } else { Err("must be a BCP 47 tag such as ko or ko-KR") }
}

caller_name!(/** One mobile product: a slug of 1 to 63 bytes. */ AppId, 63, slug);
caller_name!(/** The caller's own id of a person: 1 to 256 bytes, opaque, no control characters. */ UserId, 256, printable);
caller_name!(/** e.g. `comment.created`: 1 to 100 bytes of `[a-z][a-z0-9._-]*`. */ EventType, 100, event_type);
caller_name!(/** e.g. `author:choco`: 1 to 256 bytes, opaque, no control characters. */ Topic, 256, printable);
caller_name!(/** A repeat with the same key is harmless: 1 to 256 bytes. */ IdempotencyKey, 256, printable);
caller_name!(/** Newer replaces older on the device: 1 to 64 bytes (Apple's limit, in bytes). */ CollapseKey, 64, printable);
caller_name!(/** A BCP 47 language tag, 2 to 35 bytes. */ Locale, 35, locale);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_ascend_even_when_the_clock_goes_back() {
        let maker = IdMaker::new(3, 0, 0);
        let mut last = 0;
        for step in 0..10_000_i64 {
            let now = UnixMs(EPOCH_MS + 1_000_000 - step * 3);
            let id = maker.next(now);
            assert!(id > last);
            last = id;
        }
        let mut last = DeviceId(0);
        for _ in 0..1_000 {
            let id = maker.next_device(UnixMs(EPOCH_MS + 5));
            assert!(id > last && id.0 < 1 << 59);
            last = id;
        }
    }

    #[test]
    fn no_clock_makes_an_id_negative_or_the_same_twice() {
        let maker = IdMaker::new(1023, 0, 0);
        let (mut last, mut last_device) = (0, DeviceId(0));
        for now in [i64::MIN, -1, 0, EPOCH_MS, UnixMs::MAX.0, i64::MAX, 0, i64::MAX] {
            for _ in 0..10_000 {
                let (id, device) = (maker.next(UnixMs(now)), maker.next_device(UnixMs(now)));
                assert!(id > last && device > last_device && device.0 < 1 << 59);
                (last, last_device) = (id, device);
            }
            assert!(first_id_at(UnixMs(now)) >= 0);
        }
    }

    #[test]
    fn the_first_id_of_a_time_is_below_all_of_it() {
        let at = UnixMs(EPOCH_MS + FIRST_OF_CLOCK_MS + 77);
        let made = IdMaker::new(0, 0, 0).next(at);
        assert!(first_id_at(at) <= made && made < first_id_at(UnixMs(at.0 + 1)));
        assert_eq!((made_at(first_id_at(at)), first_id_at(UnixMs(0))), (at, 0));
    }

    #[test]
    fn public_device_id_reads_back() {
        let maker = IdMaker::new(1023, 0, 0);
        let id = maker.next_device(UnixMs(EPOCH_MS + (1 << 40)));
        assert_eq!(DeviceId::parse_public(&id.public()), Some(id));
        assert_eq!(DeviceId::parse_public("dev_zzzzzzzzzzz"), None);
        assert_eq!(DeviceId::parse_public("dev_uuuuuuuuuuuu"), None);
        assert_eq!(DeviceId::parse_public("dev_zzzzzzzzzzzz"), None, "60 bits are no device");
    }

    #[test]
    fn names_hold_their_limits() {
        assert!(AppId::parse("app_id", &"a".repeat(63)).is_ok());
        assert!(AppId::parse("app_id", &"a".repeat(64)).is_err());
        assert!(AppId::parse("app_id", "Pets").is_err());
        assert!(UserId::parse("user_id", "a\0b").is_err());
        assert!(UserId::parse("user_id", "").is_err());
        assert!(CollapseKey::parse("collapse_key", &"é".repeat(32)).is_ok());
        assert!(CollapseKey::parse("collapse_key", &"é".repeat(33)).is_err());
        assert!(Locale::parse("locale", "zh-Hant-TW").is_ok());
        assert!(Locale::parse("locale", "ko_KR").is_err());
    }
}
