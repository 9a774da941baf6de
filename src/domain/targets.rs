//! Packed (user, device) pairs: what a job holds.
//!
//! Format 1: pairs ascend by (user, device); each user is a varint of its distance from the one before, each device a
//! zigzag varint of its distance from the device before (a user's devices were mostly made near each other in time).
//! 500 scattered pairs take 5 to 7 kB. Format 2: the number of pairs as a varint, then as format 1, so that bytes which
//! lost their end between two pairs are noticed. The format's number is stored beside the bytes; a replica claims only
//! formats it knows, and writes the newest one that every live replica knows.

use super::ids::{DeviceId, UserKey};

/// One notification for one device.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Target {
    pub user: UserKey,
    pub device: DeviceId,
}

/// The most targets of one job.
pub const MAX_TARGETS: usize = 500;

/// The oldest format that is read.
pub const OLDEST: i16 = 1;
/// The newest format that is read, and written where nobody reads less.
pub const NEWEST: i16 = 2;

/// The largest packed job accepted when reading: bounds memory on a corrupt row.
pub const MAX_PACKED_BYTES: usize = 64 * 1024;

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PackError {
    #[error("the bytes end in the middle of a number")]
    Truncated,
    #[error("a number is out of range")]
    OutOfRange,
    #[error("unknown format {0}")]
    UnknownFormat(i16),
    #[error("larger than a job may be")]
    TooLarge,
    #[error("there are not as many numbers as there should be")]
    Incomplete,
}

/// Packs targets, which must be sorted and distinct (debug builds check), in a format from [`OLDEST`] to [`NEWEST`].
#[must_use]
pub fn pack(format: i16, targets: &[Target]) -> Vec<u8> {
    debug_assert!((OLDEST..=NEWEST).contains(&format), "a format that is known");
    debug_assert!(targets.windows(2).all(|pair| pair[0] < pair[1]), "targets are sorted and distinct");
    let mut bytes = Vec::with_capacity(2 + targets.len() * 12);
    if format > 1 {
        write_varint(&mut bytes, targets.len() as u64);
    }
    let mut previous = Target { user: UserKey(0), device: DeviceId(0) };
    for target in targets {
        write_varint(&mut bytes, (target.user.0 - previous.user.0).cast_unsigned());
        write_varint(&mut bytes, zigzag(target.device.0.wrapping_sub(previous.device.0)));
        previous = *target;
    }
    bytes
}

/// Reads what [`pack`] wrote. Never panics and never allocates beyond the bytes given.
pub fn unpack(format: i16, bytes: &[u8]) -> Result<Vec<Target>, PackError> {
    if !(OLDEST..=NEWEST).contains(&format) {
        return Err(PackError::UnknownFormat(format));
    }
    if bytes.len() > MAX_PACKED_BYTES {
        return Err(PackError::TooLarge);
    }
    let mut rest = bytes;
    let expected = if format > 1 { Some(read_varint(&mut rest)?) } else { None };
    let mut targets = Vec::with_capacity((bytes.len() / 8).min(MAX_TARGETS));
    let (mut user, mut device) = (0_i64, 0_i64);
    while !rest.is_empty() {
        let step = i64::try_from(read_varint(&mut rest)?).map_err(|_| PackError::OutOfRange)?;
        user = user.checked_add(step).ok_or(PackError::OutOfRange)?;
        device = device.checked_add(unzigzag(read_varint(&mut rest)?)).ok_or(PackError::OutOfRange)?;
        if device < 0 {
            return Err(PackError::OutOfRange);
        }
        targets.push(Target { user: UserKey(user), device: DeviceId(device) });
    }
    match expected {
        Some(expected) if expected != targets.len() as u64 => Err(PackError::Incomplete),
        _ => Ok(targets),
    }
}

/// Little-endian base 128.
pub fn write_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(u8::try_from(value & 0x7f).expect("seven bits") | 0x80);
        value >>= 7;
    }
    bytes.push(u8::try_from(value).expect("seven bits"));
}

/// Reads one number from the front of `bytes`.
pub fn read_varint(bytes: &mut &[u8]) -> Result<u64, PackError> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first().ok_or(PackError::Truncated)?;
        *bytes = rest;
        let bits = u64::from(first & 0x7f);
        if shift == 63 && bits > 1 {
            return Err(PackError::OutOfRange);
        }
        value |= bits << shift;
        if first & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(PackError::OutOfRange)
}

#[must_use]
pub const fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)).cast_unsigned()
}

#[must_use]
pub const fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -((value & 1).cast_signed())
}

/// Which of a job's targets are finished: one bit each, in order.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Progress(Vec<u8>);

impl Progress {
    #[must_use]
    pub fn none(targets: usize) -> Self {
        Self(vec![0; targets.div_ceil(8)])
    }

    /// From the stored bytes; a short or absent column means "none finished".
    #[must_use]
    pub fn from_bytes(bytes: &[u8], targets: usize) -> Self {
        let mut bits = vec![0; targets.div_ceil(8)];
        let shared = bits.len().min(bytes.len());
        bits[..shared].copy_from_slice(&bytes[..shared]);
        Self(bits)
    }

    pub fn finish(&mut self, index: usize) {
        self.0[index / 8] |= 1 << (index % 8);
    }

    #[must_use]
    pub fn is_finished(&self, index: usize) -> bool {
        self.0[index / 8] & (1 << (index % 8)) != 0
    }

    /// How many are finished.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.iter().map(|byte| byte.count_ones() as usize).sum()
    }

    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn packed_targets_read_back(pairs in proptest::collection::btree_set((1i64..i64::MAX / 2, 1i64..1 << 59), 0..500)) {
            let targets: Vec<Target> =
                pairs.into_iter().map(|(user, device)| Target { user: UserKey(user), device: DeviceId(device) }).collect();
            for format in OLDEST..=NEWEST {
                prop_assert_eq!(unpack(format, &pack(format, &targets)), Ok(targets.clone()));
            }
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            for format in OLDEST - 1..=NEWEST + 1 {
                let _ = unpack(format, &bytes);
            }
        }

        #[test]
        fn zigzag_reads_back(value: i64) {
            prop_assert_eq!(unzigzag(zigzag(value)), value);
        }
    }

    #[test]
    fn the_second_format_notices_a_lost_end() {
        let target = |number: i64| Target { user: UserKey(number), device: DeviceId(number) };
        let targets = [target(1), target(2), target(3)];
        let whole = pack(1, &targets);
        let cut = whole.len() - pack(1, &targets[..1]).len();
        assert_eq!(unpack(1, &whole[..cut]), Ok(targets[..2].to_vec()), "the first does not");
        let whole = pack(2, &targets);
        assert_eq!(unpack(2, &whole[..whole.len() - 2]), Err(PackError::Incomplete));
        assert_eq!(unpack(3, &whole), Err(PackError::UnknownFormat(3)));
    }

    #[test]
    fn progress_counts_and_survives_storage() {
        let mut progress = Progress::none(10);
        progress.finish(0);
        progress.finish(9);
        assert_eq!(progress.count(), 2);
        let read = Progress::from_bytes(progress.as_bytes(), 10);
        assert!(read.is_finished(9) && !read.is_finished(1));
        assert_eq!(Progress::from_bytes(&[], 10).count(), 0);
    }
}
