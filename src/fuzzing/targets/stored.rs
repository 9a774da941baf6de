//! What we wrote ourselves and read again, from a row or from a caller's hands.

use crate::domain::identity::IdentityKey;
use crate::domain::ids::{AppKey, DeviceId, UserKey};
use crate::domain::outcome::{self, Entry, MAX_ENTRIES};
use crate::domain::targets::{self, MAX_PACKED_BYTES, NEWEST, OLDEST, Progress, Target};
use crate::domain::time::UnixMs;
use crate::domain::violation::Violations;
use crate::domain::watch::WatchPosition;
use crate::fuzzing::shape;
use crate::service::fuzzing::{issue_cursor, read_cursor};
use crate::service::page_token::PageScope;
use crate::storage::reach::reads_alike;

use super::text;

pub const WORDS: &[&str] = &["AQAAAAAAAAAA", "_", "-", "=", "A"];

/// A format's number, then the packed bytes.
pub fn targets(input: &[u8]) -> u64 {
    let Some((format, packed)) = input.split_first() else { return 0 };
    let format = i16::from(*format);
    let read = targets::unpack(format, packed);
    if let Ok(read) = &read {
        assert!((OLDEST..=NEWEST).contains(&format) && packed.len() <= MAX_PACKED_BYTES);
        assert!(read.len() <= packed.len() / 2, "two bytes or more for each");
        assert!(read.iter().all(|target| target.user.0 >= 0 && target.device.0 >= 0));
        if read.is_sorted_by(|a, b| a < b) {
            for format in OLDEST..=NEWEST {
                let again = targets::pack(format, read);
                assert!(again.len() <= packed.len() + 2, "what we write is the shortest form");
                assert_eq!(targets::unpack(format, &again).as_ref(), Ok(read));
            }
        }
        let progress = Progress::from_bytes(packed, read.len());
        assert!(progress.count() <= read.len().next_multiple_of(8));
        assert_eq!(Progress::from_bytes(progress.as_bytes(), read.len()), progress);
    }
    // The same numbers the other way round: any sorted pairs can be packed.
    let pairs = packed.chunks_exact(12).map(|chunk| {
        let part =
            |at: usize, len: usize| chunk[at..at + len].iter().fold(0, |sum, byte| (sum << 8) | i64::from(*byte));
        Target { user: UserKey(part(0, 6) << 15), device: DeviceId(part(6, 6) << 11) }
    });
    let mut pairs: Vec<Target> = pairs.collect();
    pairs.sort_unstable();
    pairs.dedup();
    for format in OLDEST..=NEWEST {
        assert_eq!(targets::unpack(format, &targets::pack(format, &pairs)).as_ref(), Ok(&pairs));
    }
    shape(&(read.map(|read| read.len().min(9)).map_err(|error| format!("{error:?}")), pairs.len().min(3)))
}

/// What is packed of a person; the input is also tried behind the format's number, which few inputs begin with.
pub fn reach(input: &[u8]) -> u64 {
    let mut numbered = vec![1];
    numbered.extend(input);
    shape(&(reads_alike(input).map(|devices| devices.min(9)), reads_alike(&numbered).map(|devices| devices.min(9))))
}

pub fn outcome_block(input: &[u8]) -> u64 {
    let read = outcome::unpack(input);
    if let Ok(entries) = &read {
        assert!(entries.len() <= MAX_ENTRIES && entries.len() <= input.len());
        assert_eq!(outcome::unpack(&outcome::pack(entries)).as_ref(), Ok(entries));
    }
    // Any entries can be packed: a byte for the code, two for the people.
    let code = |byte: u8| outcome::ResultCode::ALL[usize::from(byte) % outcome::ResultCode::ALL.len()];
    let entries: Vec<Entry> = input
        .chunks_exact(3)
        .take(MAX_ENTRIES)
        .map(|chunk| Entry {
            user: UserKey(i64::from(chunk[1]) << 54 | 1),
            device: DeviceId(i64::from(chunk[2]) << 50),
            code: code(chunk[0]),
        })
        .collect();
    assert_eq!(outcome::unpack(&outcome::pack(&entries)).as_ref(), Ok(&entries));
    let codes = read.map(|entries| {
        let mut codes: Vec<u8> = entries.iter().map(|entry| entry.code.code()).collect();
        codes.dedup();
        codes.truncate(6);
        codes
    });
    shape(&codes.map_err(|error| format!("{error:?}")))
}

fn identity() -> IdentityKey {
    IdentityKey::new([7; 32])
}

/// A caller's text is never a token of ours, and no altered token is.
pub fn page_token(input: &[u8]) -> u64 {
    let identity = identity();
    let scope = |app: i64| PageScope::new(&identity, "ListX", AppKey(app)).with(input.get(..3).unwrap_or_default());
    let told = text(input);
    let mut violations = Violations::default();
    let read = scope(1).read::<1>(&mut violations, &told);
    assert!(read.is_none(), "a token that we did not make: {told:?}");
    assert_eq!(violations.is_empty(), told.is_empty(), "a wrong token is a violation, none is the first page");
    let mut numbers = [0_i64; 2];
    for (number, bytes) in numbers.iter_mut().zip(input.chunks_exact(8)) {
        *number = i64::from_be_bytes(bytes.try_into().expect("eight bytes"));
    }
    let token = scope(1).issue(numbers);
    assert_eq!(scope(1).read(&mut Violations::default(), &token), Some(numbers));
    assert_eq!(scope(2).read::<2>(&mut Violations::default(), &token), None);
    assert_eq!(scope(1).read::<1>(&mut Violations::default(), &token), None);
    if let Some(last) = input.last() {
        let mut altered = token.clone().into_bytes();
        let at = usize::from(*last) % altered.len();
        altered[at] = if altered[at] == b'A' { b'B' } else { b'A' };
        let altered = String::from_utf8(altered).expect("ASCII");
        assert_eq!(scope(1).read::<2>(&mut Violations::default(), &altered), None, "{token} as {altered}");
    }
    shape(&(told.len().min(100) / 8, told.is_ascii()))
}

pub fn watch_cursor(input: &[u8]) -> u64 {
    let identity = identity();
    let told = text(input);
    let read = read_cursor(&identity, AppKey(1), &told);
    assert!(!matches!(read, Some(Ok(_))), "a cursor that we did not make: {told:?}");
    let number =
        |at: usize| input.get(at..at + 8).map_or(0, |bytes| i64::from_be_bytes(bytes.try_into().expect("eight bytes")));
    let entry = input.get(32..36).map_or(0, |bytes| u32::from_be_bytes(bytes.try_into().expect("four bytes")));
    let position =
        WatchPosition { epoch: number(0), transaction: number(8), row: number(16), entry, at: UnixMs(number(24)) };
    let cursor = issue_cursor(&identity, AppKey(1), &position);
    assert!(matches!(read_cursor(&identity, AppKey(1), &cursor), Some(Ok(read)) if read == position));
    assert!(matches!(read_cursor(&identity, AppKey(2), &cursor), Some(Err(_))), "another app's");
    // What a store does with a position, however odd.
    let (transaction, row) = position.read_after();
    assert!(transaction == position.transaction && row <= position.row);
    assert!(!position.misses(i64::MIN) || position.transaction == i64::MIN);
    let _ = WatchPosition::within(position.epoch, transaction, row, entry);
    shape(&(read.is_some(), told.len().min(100) / 8))
}
