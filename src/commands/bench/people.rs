//! Who is who: everything about a person follows from their number, in every process.

use crate::domain::ids::UserId;
use crate::domain::platform::{DeviceToken, Platform};
use crate::sandbox::token_hash;
use crate::storage::seed::SeedPerson;
use std::fmt::Write as _;

/// The first so many people are watched: the fake providers keep their pushes.
pub const WATCHED: u32 = 1_000;
/// What the tokens of watched people start with, on both platforms.
pub const WATCHED_PREFIX: &str = "feedface";

/// Of a thousand people so many said yes.
const OPTED_IN_PER_MILLE: u64 = 900;

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// The caller's id of a person.
pub fn name(number: u32) -> String {
    format!("user-{number:08}")
}

pub fn platform(number: u32) -> Platform {
    if number.is_multiple_of(2) { Platform::Apns } else { Platform::Fcm }
}

/// A UUID of version 4, by the look of it.
pub fn scattered_key(salt: u64, at: u32) -> String {
    let high = mix(salt.wrapping_mul(0x0100_0001) ^ u64::from(at));
    let random = (u128::from(high) << 64) | u128::from(mix(high));
    uuid::Builder::from_random_bytes(random.to_be_bytes()).into_uuid().to_string()
}

/// Watched people always did.
pub fn opted_in(number: u32) -> bool {
    number < WATCHED || mix(u64::from(number) ^ 0x5eed) % 1000 < OPTED_IN_PER_MILLE
}

/// As long as real ones: 64 hex digits, and Google's 163 characters.
pub fn token(number: u32) -> String {
    token_of(platform(number), number, number < WATCHED)
}

/// `number` may also be beyond the registered people, for new devices.
pub fn token_of(platform: Platform, number: u32, watched: bool) -> String {
    let mut state = u64::from(number);
    let mut next = || {
        state = mix(state.wrapping_add(0x9e37_79b9_7f4a_7c15));
        state
    };
    let mut token = String::with_capacity(163);
    if watched {
        token.push_str(WATCHED_PREFIX);
    }
    match platform {
        Platform::Apns => {
            while token.len() < 64 {
                let _ = write!(token, "{:016x}", next());
            }
            token.truncate(64);
            if !watched && token.starts_with(WATCHED_PREFIX) {
                token.replace_range(0..1, "0");
            }
        }
        Platform::Fcm => {
            let mut random = |token: &mut String, until: usize| {
                while token.len() < until {
                    let bits = next();
                    for at in 0..10 {
                        let digit = usize::try_from((bits >> (6 * at)) & 63).expect("six bits fit");
                        token.push(char::from(BASE64[digit]));
                    }
                }
                token.truncate(until);
            };
            random(&mut token, 22);
            token.push_str(":APA91b");
            random(&mut token, 163);
        }
    }
    token
}

pub fn seed_person(number: u32) -> SeedPerson {
    SeedPerson {
        user: UserId::trusted(&name(number)),
        platform: platform(number),
        token: DeviceToken::trusted(&token(number)),
        opted_in: opted_in(number),
    }
}

/// What an event can be addressed to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Topic {
    /// The subscribers of the plan.
    All,
    /// Those of one platform among the first [`APART`] people.
    Of(Platform),
    /// One person, and a thousand.
    One,
    Thousand,
}

/// People among whom the topics of one platform are.
pub const APART: u32 = 400_000;

impl Topic {
    pub const EVERY: [Self; 5] =
        [Self::All, Self::Of(Platform::Apns), Self::Of(Platform::Fcm), Self::One, Self::Thousand];

    pub const fn name(self) -> &'static str {
        match self {
            Self::All => "author:choco",
            Self::Of(Platform::Apns) => "on:apns",
            Self::Of(Platform::Fcm) => "on:fcm",
            Self::One => "post:one",
            Self::Thousand => "post:thousand",
        }
    }

    /// Whether this person has it, with so many subscribers of the largest.
    pub fn has(self, number: u32, subscribers: u32) -> bool {
        match self {
            Self::All => number < subscribers,
            Self::Of(wanted) => number < APART && platform(number) == wanted,
            // Not the watched: nobody looks at their pushes.
            Self::One => number == (WATCHED..2 * WATCHED).find(|number| opted_in(*number)).unwrap_or(WATCHED),
            Self::Thousand => (WATCHED..2 * WATCHED).contains(&number),
        }
    }
}

/// Who of the registered an event to a topic reaches: how many, and the sum of their tokens' hashes.
pub fn reached(topic: Topic, devices: u32, subscribers: u32) -> (u64, u64) {
    (0..devices)
        .filter(|number| topic.has(*number, subscribers) && opted_in(*number))
        .fold((0, 0), |(count, sum), number| (count + 1, sum.wrapping_add(token_hash(&token(number)))))
}

/// A scattered choice of people who said yes: the `at`-th of `salt`.
pub fn someone(devices: u32, salt: u64, at: u32) -> u32 {
    let mut bits = mix(salt.wrapping_mul(0x0100_0001) ^ u64::from(at));
    loop {
        let number = u32::try_from(bits % u64::from(devices)).unwrap_or(0);
        // Not the watched: rows that watch them want nobody else's pushes.
        if number >= WATCHED.min(devices / 2) && opted_in(number) {
            return number;
        }
        bits = mix(bits);
    }
}

/// splitmix64's finish.
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (bits ^ (bits >> 31)).wrapping_add(0x9e37_79b9)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn tokens_are_valid_distinct_and_watched_where_they_should_be() {
        let mut seen = HashSet::new();
        for number in 0..20_000 {
            let token = token(number);
            assert_eq!(token.len(), if platform(number) == Platform::Apns { 64 } else { 163 });
            assert!(DeviceToken::parse("token", platform(number), &token).is_ok(), "{token}");
            assert_eq!(token.starts_with(WATCHED_PREFIX), number < WATCHED);
            assert!(seen.insert(token));
        }
    }

    #[test]
    fn topics_have_who_they_should() {
        assert_eq!(reached(Topic::One, 10_000, 10_000).0, 1);
        let (all, apns, fcm) = (
            reached(Topic::All, 10_000, 10_000),
            reached(Topic::Of(Platform::Apns), 10_000, 10_000),
            reached(Topic::Of(Platform::Fcm), 10_000, 10_000),
        );
        assert_eq!(all.0, apns.0 + fcm.0);
        assert_eq!(all.1, apns.1.wrapping_add(fcm.1));
        assert!((850..=950).contains(&reached(Topic::Thousand, 10_000, 1).0));
    }

    #[test]
    fn nine_of_ten_said_yes() {
        let yes = (WATCHED..101_000).filter(|number| opted_in(*number)).count();
        assert!((89_000..91_000).contains(&yes), "{yes}");
    }
}
