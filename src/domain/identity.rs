//! Identities that can be read backwards.
//!
//! `nudged_id` names one notification to one device, the same for every attempt. It is a keyed permutation of the two
//! internal ids (63 + 59 bits) into the 122 free bits of a UUIDv8, so a receipt or a support ticket that quotes it can
//! be resolved without a table of deliveries, and a phone learns nothing about volumes or rows. The key belongs to the
//! installation and lies in its database.
//!
//! A notification's public id is a UUIDv7 with the id's own milliseconds: 48-bit ms | 12-bit sequence | 10-bit node |
//! 52 bits of a keyed hash. It costs no column and no index (the primary key is inside) and cannot be guessed.
//!
//! The permutation is a balanced Feistel network of two 61-bit halves whose round function is SipHash-2-4, a
//! pseudorandom function; four rounds make a strong pseudorandom permutation (Luby and Rackoff 1988), eight are used.

use std::hash::Hasher;

use siphasher::sip::SipHasher24;
use uuid::Uuid;

use super::ids::{DeviceId, EPOCH_MS, NotificationId};

const HALF_BITS: u32 = 61;
const HALF_MASK: u64 = (1 << HALF_BITS) - 1;
const ROUNDS: u8 = 8;
const HASH_MASK: u64 = (1 << 52) - 1;

/// The installation's key: 32 bytes made once, kept in the database's `secret` table.
#[derive(Clone)]
pub struct IdentityKey {
    push: [u8; 16],
    public: [u8; 16],
}

impl IdentityKey {
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        let (mut push, mut public) = ([0; 16], [0; 16]);
        push.copy_from_slice(&bytes[..16]);
        public.copy_from_slice(&bytes[16..]);
        Self { push, public }
    }

    /// The `nudged_id` of this delivery.
    #[must_use]
    pub fn nudged_id(&self, notification: NotificationId, device: DeviceId) -> Uuid {
        let bits = (u128::from(notification.0.cast_unsigned()) << 59) | u128::from(device.0.cast_unsigned());
        let (mut left, mut right) = halves(bits);
        for round in 0..ROUNDS {
            (left, right) = (right, left ^ self.round(round, right));
        }
        into_uuid((u128::from(left) << HALF_BITS) | u128::from(right))
    }

    /// Reads a `nudged_id`; `None` when it cannot be one of this installation's (not a UUIDv8, or ids out of range).
    #[must_use]
    pub fn read_nudged_id(&self, id: Uuid) -> Option<(NotificationId, DeviceId)> {
        let (mut left, mut right) = halves(from_uuid(id)?);
        for round in (0..ROUNDS).rev() {
            (left, right) = (right ^ self.round(round, left), left);
        }
        let bits = (u128::from(left) << HALF_BITS) | u128::from(right);
        let device = i64::try_from(bits & ((1 << 59) - 1)).ok()?;
        let notification = i64::try_from(bits >> 59).ok()?;
        (device > 0 && notification > 0).then_some((NotificationId(notification), DeviceId(device)))
    }

    /// The id that callers see.
    #[must_use]
    pub fn public_notification(&self, id: NotificationId) -> Uuid {
        let bits = id.0.cast_unsigned();
        let unix_ms = u128::from((bits >> 22) + EPOCH_MS.cast_unsigned());
        let (node, sequence) = (u128::from((bits >> 12) & 0x3ff), u128::from(bits & 0xfff));
        let hash = u128::from(self.public_hash(id));
        Uuid::from_u128((unix_ms << 80) | (7 << 76) | (sequence << 64) | (2 << 62) | (node << 52) | hash)
    }

    /// Reads [`IdentityKey::public_notification`]; `None` for anything this installation did not make.
    #[must_use]
    pub fn read_public_notification(&self, id: Uuid) -> Option<NotificationId> {
        let bits = id.as_u128();
        let unix_ms = u64::try_from(bits >> 80).ok()?;
        let since = unix_ms.checked_sub(EPOCH_MS.cast_unsigned())?;
        let sequence = u64::try_from((bits >> 64) & 0xfff).ok()?;
        let node = u64::try_from((bits >> 52) & 0x3ff).ok()?;
        if since >> 41 != 0 {
            return None;
        }
        let candidate = NotificationId(((since << 22) | (node << 12) | sequence).cast_signed());
        (self.public_notification(candidate) == id).then_some(candidate)
    }

    /// A keyed hash for page tokens: proves that we made them.
    #[must_use]
    pub fn seal(&self, bytes: &[u8]) -> u64 {
        let mut hasher = SipHasher24::new_with_key(&self.public);
        hasher.write(b"page");
        hasher.write(bytes);
        hasher.finish()
    }

    fn public_hash(&self, id: NotificationId) -> u64 {
        let mut hasher = SipHasher24::new_with_key(&self.public);
        hasher.write_i64(id.0);
        hasher.finish() & HASH_MASK
    }

    fn round(&self, round: u8, half: u64) -> u64 {
        let mut hasher = SipHasher24::new_with_key(&self.push);
        hasher.write_u8(round);
        hasher.write_u64(half);
        hasher.finish() & HALF_MASK
    }
}

fn halves(bits: u128) -> (u64, u64) {
    let mask = u128::from(HALF_MASK);
    let left = u64::try_from((bits >> HALF_BITS) & mask).expect("61 bits");
    let right = u64::try_from(bits & mask).expect("61 bits");
    (left, right)
}

/// 122 bits around the version (8) and variant (2) of RFC 9562.
fn into_uuid(bits: u128) -> Uuid {
    let high = bits >> 74;
    let middle = (bits >> 62) & 0xfff;
    let low = bits & ((1 << 62) - 1);
    Uuid::from_u128((high << 80) | (8 << 76) | (middle << 64) | (2 << 62) | low)
}

fn from_uuid(id: Uuid) -> Option<u128> {
    let bits = id.as_u128();
    if (bits >> 76) & 0xf != 8 || (bits >> 62) & 3 != 2 {
        return None;
    }
    Some(((bits >> 80) << 74) | (((bits >> 64) & 0xfff) << 62) | (bits & ((1 << 62) - 1)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key() -> IdentityKey {
        IdentityKey::new(std::array::from_fn(|at| u8::try_from(at).expect("small")))
    }

    proptest! {
        #[test]
        fn nudged_id_reads_back(notification in 1i64.., device in 1i64..1 << 59) {
            let id = key().nudged_id(NotificationId(notification), DeviceId(device));
            prop_assert_eq!(id.get_version_num(), 8);
            prop_assert_eq!(key().read_nudged_id(id), Some((NotificationId(notification), DeviceId(device))));
        }

        #[test]
        fn public_id_reads_back_and_is_a_v7(id in 1i64..) {
            let public = key().public_notification(NotificationId(id));
            prop_assert_eq!(public.get_version_num(), 7);
            prop_assert_eq!(key().read_public_notification(public), Some(NotificationId(id)));
        }

        #[test]
        fn any_uuid_is_read_without_panic(bits: u128) {
            let _ = key().read_nudged_id(Uuid::from_u128(bits));
            prop_assert_eq!(key().read_public_notification(Uuid::from_u128(bits)), None);
        }
    }

    #[test]
    fn neighbours_share_nothing_and_another_key_reads_nothing_of_ours() {
        let id = key().nudged_id(NotificationId(1 << 40), DeviceId(1 << 30));
        let next = key().nudged_id(NotificationId(1 << 40), DeviceId((1 << 30) + 1));
        assert!((id.as_u128() ^ next.as_u128()).count_ones() > 30);
        let other = IdentityKey::new([9; 32]);
        assert_ne!(other.read_nudged_id(id), Some((NotificationId(1 << 40), DeviceId(1 << 30))));
        let public = key().public_notification(NotificationId(1 << 40));
        assert_eq!(other.read_public_notification(public), None);
    }
}
