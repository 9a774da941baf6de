//! The written registry of result codes, and outcome blocks: the append-only history of deliveries.
//!
//! A delivery has no row. Every flush of a job appends one block with the results since the last one; planning appends
//! the people it suppressed. The last block that names a target is its state. Numbers are stored and never reused.

use super::ids::{BlockId, DeviceId, NotificationId, RouteId, UserKey};
use super::targets::{PackError, read_varint, unzigzag, write_varint, zigzag};
use super::time::UnixMs;

/// Where a result stands in the life of a delivery.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum State {
    /// Still to be done; `Retry` and `Deferred` codes too.
    Open,
    Sent,
    Suppressed,
    Expired,
    Cancelled,
    Dead,
}

impl State {
    #[must_use]
    pub const fn is_final(self) -> bool {
        !matches!(self, Self::Open)
    }
}

macro_rules! result_codes {
    ($($(#[$doc:meta])* $variant:ident = $code:literal, $state:ident, $name:literal;)*) => {
        /// What became of one delivery, with its stored number.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[repr(u8)]
        pub enum ResultCode {
            $($(#[$doc])* $variant = $code,)*
        }

        impl ResultCode {
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// `None`: written by a newer version.
            #[must_use]
            pub const fn from_code(code: u8) -> Option<Self> {
                match code {
                    $($code => Some(Self::$variant),)*
                    _ => None,
                }
            }

            #[must_use]
            pub const fn state(self) -> State {
                match self {
                    $(Self::$variant => State::$state,)*
                }
            }

            /// The stable reason callers see, also a metric label.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

result_codes! {
    /// The platform took it.
    Sent = 1, Sent, "SENT";
    /// The TTL ended before the platform took it.
    Expired = 2, Expired, "EXPIRED";
    /// CancelNotification came first.
    Cancelled = 3, Cancelled, "CANCELLED";
    /// The token is dead; the device was retired.
    DeadToken = 16, Dead, "TOKEN_GONE";
    /// The platform refuses this message.
    DeadRejected = 17, Dead, "REJECTED";
    /// Retries ended before the TTL (`give_up_after`).
    DeadRetriesOver = 18, Dead, "RETRIES_OVER";
    /// Alone in flight at three crashes.
    DeadPoison = 19, Dead, "POISON";
    /// The platform took the request and did not answer, and the event type says not to repeat.
    DeadMaybeSent = 20, Dead, "MAYBE_SENT";
    /// Gate 1.
    NoDevice = 64, Suppressed, "NO_DEVICE";
    /// Gate 1: unregistered, or its token was found dead.
    DeviceRetired = 65, Suppressed, "DEVICE_RETIRED";
    /// Gate 1: the phone belongs to somebody else now.
    DeviceMoved = 66, Suppressed, "DEVICE_MOVED";
    /// Gate 1: no replica can send through its route.
    RouteUnknown = 67, Suppressed, "ROUTE_UNKNOWN";
    /// Gate 1: not on the app's staging allow-list (`only_users`, `only_labels`).
    NotAllowedHere = 68, Suppressed, "NOT_ALLOWED_HERE";
    /// Gate 2: never asked.
    NeverOptedIn = 72, Suppressed, "NEVER_OPTED_IN";
    /// Gate 2: said no.
    OptedOut = 73, Suppressed, "OPTED_OUT";
    /// Gate 3: said no to this type.
    TypeOptedOut = 76, Suppressed, "TYPE_OPTED_OUT";
    /// Gate 3: no choice made and the type's default is no.
    TypeDefaultOff = 77, Suppressed, "TYPE_DEFAULT_OFF";
    /// Gate 4: this device said no to everything.
    DeviceOptedOut = 80, Suppressed, "DEVICE_OPTED_OUT";
    /// Gate 4: this device said no to this type.
    DeviceTypeOptedOut = 81, Suppressed, "DEVICE_TYPE_OPTED_OUT";
    /// Gate 5: their own act.
    Actor = 84, Suppressed, "ACTOR";
    /// Gate 8: over the platform's limit.
    PayloadTooLarge = 96, Suppressed, "PAYLOAD_TOO_LARGE";
    /// The content could not be turned into a payload for this platform.
    NotEncodable = 97, Suppressed, "NOT_ENCODABLE";
    /// Not final: waits in another job for its next attempt.
    MovedToRetry = 200, Open, "MOVED_TO_RETRY";
    /// Not final: waits for a better time.
    Deferred = 201, Open, "DEFERRED";
    /// Not final: an operator sent it again after it had died.
    Redriven = 202, Open, "REDRIVEN";
}

impl ResultCode {
    /// The one that callers see by this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.name() == name)
    }

    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }
}

/// One result in a block. `device` is 0 where a person was suppressed as a whole.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Entry {
    pub user: UserKey,
    pub device: DeviceId,
    pub code: ResultCode,
}

/// A block as stored. Entries ascend by (user, device).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OutcomeBlock {
    pub id: BlockId,
    pub notification: NotificationId,
    /// `None`: written at planning.
    pub route: Option<RouteId>,
    pub at: UnixMs,
    pub entries: Vec<Entry>,
}

/// The format written today; the first byte of the packed entries.
pub const FORMAT: u8 = 1;

/// The most entries of one block: a fan-out page's people.
pub const MAX_ENTRIES: usize = 4096;

/// Packs entries, which must ascend by (user, device): a run's code and length, then the pairs as in `targets`.
#[must_use]
pub fn pack(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(entries.len() * 12 + 8);
    bytes.push(FORMAT);
    let (mut user, mut device) = (0_i64, 0_i64);
    for run in entries.chunk_by(|a, b| a.code == b.code) {
        bytes.push(run[0].code.code());
        write_varint(&mut bytes, run.len() as u64);
        for entry in run {
            write_varint(&mut bytes, zigzag(entry.user.0.wrapping_sub(user)));
            write_varint(&mut bytes, zigzag(entry.device.0.wrapping_sub(device)));
            (user, device) = (entry.user.0, entry.device.0);
        }
    }
    bytes
}

/// Reads what [`pack`] wrote. A code of a newer version is an error, not a guess.
pub fn unpack(bytes: &[u8]) -> Result<Vec<Entry>, PackError> {
    let (format, mut rest) = bytes.split_first().ok_or(PackError::Truncated)?;
    if *format != FORMAT {
        return Err(PackError::UnknownFormat(i16::from(*format)));
    }
    let mut entries = Vec::new();
    let (mut user, mut device) = (0_i64, 0_i64);
    while let Some((code, after)) = rest.split_first() {
        rest = after;
        let code = ResultCode::from_code(*code).ok_or(PackError::OutOfRange)?;
        let run = usize::try_from(read_varint(&mut rest)?).map_err(|_| PackError::OutOfRange)?;
        if run > MAX_ENTRIES - entries.len() {
            return Err(PackError::TooLarge);
        }
        for _ in 0..run {
            user = user.checked_add(unzigzag(read_varint(&mut rest)?)).ok_or(PackError::OutOfRange)?;
            device = device.checked_add(unzigzag(read_varint(&mut rest)?)).ok_or(PackError::OutOfRange)?;
            entries.push(Entry { user: UserKey(user), device: DeviceId(device), code });
        }
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn code() -> impl Strategy<Value = ResultCode> {
        (0..ResultCode::ALL.len()).prop_map(|at| ResultCode::ALL[at])
    }

    proptest! {
        #[test]
        fn packed_entries_read_back(
            pairs in proptest::collection::btree_map((1i64..i64::MAX / 2, 0i64..1 << 59), code(), 0..300)
        ) {
            let entries: Vec<Entry> = pairs
                .into_iter()
                .map(|((user, device), code)| Entry { user: UserKey(user), device: DeviceId(device), code })
                .collect();
            prop_assert_eq!(unpack(&pack(&entries)), Ok(entries));
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            let _ = unpack(&bytes);
        }
    }

    #[test]
    fn a_run_that_cannot_be_is_refused_before_it_is_read() {
        let entry = Entry { user: UserKey(1), device: DeviceId(1), code: ResultCode::Sent };
        let mut bytes = pack(&[entry]);
        bytes.push(ResultCode::Sent.code());
        write_varint(&mut bytes, u64::MAX);
        assert_eq!(unpack(&bytes), Err(PackError::TooLarge), "also where the sum overflows");
    }

    #[test]
    fn codes_and_names_are_unique_and_read_back() {
        let names: std::collections::BTreeSet<_> = ResultCode::ALL.iter().map(|code| code.name()).collect();
        assert_eq!(names.len(), ResultCode::ALL.len());
        for code in ResultCode::ALL {
            assert_eq!(ResultCode::from_code(code.code()), Some(*code));
        }
    }
}
