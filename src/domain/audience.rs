//! The audience of a fan-out, packed: what an expansion pages over, kept beside its cursor.
//!
//! Only ids: erasure deletes people and their names, and a packed audience must not keep them. Format 1: the format
//! byte, a flag byte (1: everyone), then three counted lists (topics, users, devices), each ascending and written as
//! distances.

use super::ids::{DeviceId, UserKey};
use super::notification::{MAX_DEVICE_IDS, MAX_TOPICS, MAX_USER_IDS};
use super::targets::{PackError, Target, read_varint, unzigzag, write_varint, zigzag};

/// The format written today; the first byte.
pub const FORMAT: u8 = 1;

const EVERYONE: u8 = 1;

/// Every list sorted and distinct.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PackedAudience {
    pub everyone: bool,
    /// Rows of topics.
    pub topics: Vec<i64>,
    /// Reached on all their devices.
    pub users: Vec<UserKey>,
    /// People named by device only are reached on these.
    pub devices: Vec<Target>,
}

impl PackedAudience {
    #[must_use]
    pub fn pack(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(8 + 9 * (self.topics.len() + self.users.len() + 2 * self.devices.len()));
        bytes.push(FORMAT);
        bytes.push(if self.everyone { EVERYONE } else { 0 });
        pack_ascending(&mut bytes, self.topics.len(), self.topics.iter().copied());
        pack_ascending(&mut bytes, self.users.len(), self.users.iter().map(|user| user.0));
        write_varint(&mut bytes, self.devices.len() as u64);
        let (mut user, mut device) = (0_i64, 0_i64);
        for target in &self.devices {
            write_varint(&mut bytes, target.user.0.wrapping_sub(user).cast_unsigned());
            write_varint(&mut bytes, zigzag(target.device.0.wrapping_sub(device)));
            (user, device) = (target.user.0, target.device.0);
        }
        bytes
    }

    /// Reads what [`PackedAudience::pack`] wrote. Never panics and never allocates beyond an event's limits.
    pub fn unpack(bytes: &[u8]) -> Result<Self, PackError> {
        let (format, rest) = bytes.split_first().ok_or(PackError::Truncated)?;
        if *format != FORMAT {
            return Err(PackError::UnknownFormat(i16::from(*format)));
        }
        let (flags, mut rest) = rest.split_first().ok_or(PackError::Truncated)?;
        if flags & !EVERYONE != 0 {
            return Err(PackError::OutOfRange);
        }
        let topics = unpack_ascending(&mut rest, MAX_TOPICS)?;
        let users = unpack_ascending(&mut rest, MAX_USER_IDS)?.into_iter().map(UserKey).collect();
        let count = read_count(&mut rest, MAX_DEVICE_IDS)?;
        let mut devices = Vec::with_capacity(count);
        let (mut user, mut device) = (0_i64, 0_i64);
        for _ in 0..count {
            user = add(user, read_varint(&mut rest)?)?;
            device = device.checked_add(unzigzag(read_varint(&mut rest)?)).ok_or(PackError::OutOfRange)?;
            devices.push(Target { user: UserKey(user), device: DeviceId(device) });
        }
        if rest.is_empty() {
            Ok(Self { everyone: flags & EVERYONE != 0, topics, users, devices })
        } else {
            Err(PackError::TooLarge)
        }
    }
}

fn pack_ascending(bytes: &mut Vec<u8>, count: usize, ids: impl Iterator<Item = i64>) {
    write_varint(bytes, count as u64);
    let mut previous = 0_i64;
    for id in ids {
        write_varint(bytes, id.wrapping_sub(previous).cast_unsigned());
        previous = id;
    }
}

fn unpack_ascending(rest: &mut &[u8], most: usize) -> Result<Vec<i64>, PackError> {
    let count = read_count(rest, most)?;
    let mut ids = Vec::with_capacity(count);
    let mut previous = 0_i64;
    for _ in 0..count {
        previous = add(previous, read_varint(rest)?)?;
        ids.push(previous);
    }
    Ok(ids)
}

fn read_count(rest: &mut &[u8], most: usize) -> Result<usize, PackError> {
    let count = usize::try_from(read_varint(rest)?).map_err(|_| PackError::OutOfRange)?;
    if count > most { Err(PackError::TooLarge) } else { Ok(count) }
}

fn add(previous: i64, step: u64) -> Result<i64, PackError> {
    let step = i64::try_from(step).map_err(|_| PackError::OutOfRange)?;
    previous.checked_add(step).ok_or(PackError::OutOfRange)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn packed_audience_reads_back(
            everyone: bool,
            topics in proptest::collection::btree_set(1i64..i64::MAX, 0..=MAX_TOPICS),
            users in proptest::collection::btree_set(1i64..i64::MAX, 0..50),
            devices in proptest::collection::btree_set((1i64..i64::MAX, 1i64..1 << 59), 0..50),
        ) {
            let audience = PackedAudience {
                everyone,
                topics: topics.into_iter().collect(),
                users: users.into_iter().map(UserKey).collect(),
                devices: devices
                    .into_iter()
                    .map(|(user, device)| Target { user: UserKey(user), device: DeviceId(device) })
                    .collect(),
            };
            prop_assert_eq!(PackedAudience::unpack(&audience.pack()), Ok(audience));
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            let _ = PackedAudience::unpack(&bytes);
        }
    }

    #[test]
    fn more_than_an_event_may_name_is_refused() {
        let topics = (1..=i64::try_from(MAX_TOPICS).expect("small") + 1).collect();
        let audience = PackedAudience { topics, ..PackedAudience::default() };
        assert_eq!(PackedAudience::unpack(&audience.pack()), Err(PackError::TooLarge));
    }
}
