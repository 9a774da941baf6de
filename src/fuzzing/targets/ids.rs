//! Names and addresses: what callers call things, and what we call them.

use uuid::Uuid;

use crate::domain::identity::IdentityKey;
use crate::domain::ids::{
    AppId, CollapseKey, DeviceId, EventType, IdMaker, IdempotencyKey, Locale, NotificationId, Topic, UserId,
    first_id_at, made_at,
};
use crate::domain::platform::{DeviceToken, Platform};
use crate::domain::time::UnixMs;
use crate::domain::violation::Violation;
use crate::fuzzing::shape;

use super::text;

pub const WORDS: &[&str] = &[
    "dev_",
    "0a1b2c3d4e5f",
    "ko-KR",
    "zh-Hant-TW",
    "comment.created",
    "Asia/Seoul",
    "a:APA91b",
    "0123456789abcdef",
    "\u{0}",
];

pub fn device_token(input: &[u8]) -> u64 {
    let text = text(input);
    let mut came_to = Vec::new();
    for platform in Platform::ALL {
        let read = DeviceToken::parse("token", platform, &text);
        let expected = !text.is_empty()
            && match platform {
                Platform::Apns => {
                    text.len() <= 512 && text.len().is_multiple_of(2) && text.chars().all(|c| c.is_ascii_hexdigit())
                }
                Platform::Fcm => text.len() <= 4096 && text.chars().all(|c| ('!'..='~').contains(&c)),
            };
        assert_eq!(read.is_ok(), expected, "{platform} {text:?}");
        if let Ok(token) = &read {
            assert!(token.expose().eq_ignore_ascii_case(&text));
            assert_eq!(DeviceToken::parse("token", platform, token.expose()).as_ref(), Ok(token), "one form");
            assert!(format!("{token:?}").starts_with("DeviceToken("), "never printed");
        }
        if let Err(violation) = &read {
            assert!(text.len() < 24 || !violation.to_string().contains(&*text), "never repeated");
        }
        came_to.push(read.map(|token| token.expose().len() / 64).map_err(|violation| violation.description.len()));
    }
    shape(&format!("{came_to:?}"))
}

/// Reading backwards: what reads is exactly what we would write.
pub fn identity(input: &[u8]) -> u64 {
    let key = IdentityKey::new([7; 32]);
    let number = |at: usize| {
        let bytes = input.get(at..at + 8).map_or([0; 8], |bytes| bytes.try_into().expect("eight bytes"));
        u64::from_be_bytes(bytes)
    };
    let uuid = Uuid::from_u64_pair(number(0), number(8));
    let nudged = key.read_nudged_id(uuid);
    if let Some((notification, device)) = nudged {
        assert_eq!(key.nudged_id(notification, device), uuid);
    }
    assert_eq!(key.read_public_notification(uuid), None, "52 bits of a keyed hash cannot be guessed");
    let notification = NotificationId((number(0) >> 1).cast_signed().max(1));
    let device = DeviceId((number(8) >> 5).cast_signed().max(1));
    assert_eq!(key.read_nudged_id(key.nudged_id(notification, device)), Some((notification, device)));
    assert_eq!(key.read_public_notification(key.public_notification(notification)), Some(notification));
    assert_eq!(DeviceId::parse_public(&device.public()), Some(device));
    let text = text(input);
    let public = DeviceId::parse_public(&text);
    if let Some(device) = public {
        assert_eq!(device.public(), text);
    }
    // Whatever the clock says, ids are positive and ascend.
    let now = UnixMs(number(0).cast_signed());
    let maker = IdMaker::new(u16::try_from(number(8) & 0x3ff).expect("ten bits"), 0, 0);
    let (first, second) = (maker.next(now), maker.next(UnixMs(0)));
    assert!(0 < first && first < second);
    assert!(made_at(second) >= made_at(first) && first_id_at(now) >= 0);
    shape(&(nudged.is_some(), public.is_some(), uuid.get_version_num(), text.len().min(20)))
}

/// One rule for all names: bounded, one form, no U+0000, and what was taken is taken again.
pub fn names(input: &[u8]) -> u64 {
    let text = text(input);
    let mut taken = 0_u64;
    let mut check = |read: Result<String, Violation>, max: usize, extra: fn(&str) -> bool| {
        taken <<= 1;
        match read {
            Ok(name) => {
                assert!(name == *text && !name.is_empty() && name.len() <= max && !name.contains('\0'));
                assert!(extra(&name), "{name:?}");
                taken |= 1;
            }
            Err(violation) => {
                assert_eq!(violation.field, "name");
                assert!(!violation.description.is_empty() && violation.description.len() < 200);
            }
        }
    };
    let one_line = |name: &str| !name.chars().any(char::is_control);
    check(AppId::parse("name", &text).map(|id| id.to_string()), AppId::MAX_BYTES, str::is_ascii);
    check(UserId::parse("name", &text).map(|id| id.to_string()), UserId::MAX_BYTES, |_| true);
    check(Topic::parse("name", &text).map(|id| id.to_string()), Topic::MAX_BYTES, |_| true);
    check(EventType::parse("name", &text).map(|id| id.to_string()), EventType::MAX_BYTES, str::is_ascii);
    check(CollapseKey::parse("name", &text).map(|id| id.to_string()), CollapseKey::MAX_BYTES, one_line);
    check(IdempotencyKey::parse("name", &text).map(|id| id.to_string()), IdempotencyKey::MAX_BYTES, |_| true);
    check(Locale::parse("name", &text).map(|id| id.to_string()), Locale::MAX_BYTES, str::is_ascii);
    let ttl = crate::domain::event_type::Ttl::parse("name", &text);
    if let Ok(ttl) = ttl {
        assert_eq!(crate::domain::event_type::Ttl::parse("name", &ttl.to_string()), Ok(ttl), "one written form");
    }
    let known = match jiff::tz::db().get(&text) {
        Ok(zone) => zone.to_offset(jiff::Timestamp::UNIX_EPOCH).seconds(),
        Err(_) => -1,
    };
    shape(&(taken, ttl.is_ok(), known, text.len().min(300) / 16))
}
