//! Where people's rows are: a row's id is made from its person's name, so that a name leads to its row without an index of
//! names. One way down one tree instead of two; of what an event costs the writer the second was a sixth.
//!
//! Such an id is a *home*: 16 bits of the app, so that its people lie together, and 32 of the name. Who finds their home
//! taken by another name is *homeless*: they get an ordinary id, and an index of names holds only them, and everybody whose
//! row is older than homes. Of a million people some hundred are; a caller who chooses names to that end gets what everybody
//! had before, a look-up by name. Two apps that share their 16 bits, one pair in 65 536, share a range: a fan-out to everyone of one
//! passes over the people of the other.
//!
//! Ordinary ids are larger than all homes, for the clock's part of them is ([`crate::domain::ids::IdMaker`] sees to it). Rows that an
//! earlier version made by a clock which stood before that may have ids like homes, and so are told by their time as well.

use std::hash::Hasher as _;

use siphasher::sip::SipHasher13;

use crate::domain::ids::{AppKey, UserId, UserKey};

const NAME_BITS: u32 = 32;

/// As a condition of a query, of the row's own columns: that it may not be at its home. Written as in the conditions of the indexes
/// `app_user_by_name` and `app_user_by_app`, which SQLite uses only then.
macro_rules! homeless {
    () => {
        "(id >= 281474976710656 OR created_at < 1704153600000)"
    };
}
pub(super) use homeless;

/// The row of the person with a name, at home or not: `?1` the home, `?2` the app, `?3` the name.
macro_rules! by_name {
    ($columns:literal) => {
        concat!(
            "SELECT ",
            $columns,
            " FROM app_user WHERE id = ?1 AND app = ?2 AND external_id = ?3 UNION ALL SELECT ",
            $columns,
            " FROM app_user WHERE app = ?2 AND external_id = ?3 AND ",
            $crate::storage::sqlite::homes::homeless!(),
            " LIMIT 1"
        )
    };
}
pub(super) use by_name;

/// The one place where a person's row may be found by their name alone. Stored: it must never change.
pub(super) fn home(app: AppKey, user: &UserId) -> UserKey {
    let mut name = SipHasher13::new();
    name.write(user.as_str().as_bytes());
    let place = first(app) | (name.finish() & ((1 << NAME_BITS) - 1)).cast_signed();
    // Pages begin after 0.
    UserKey(place.max(1))
}

/// The first and the last home of an app's people.
pub(super) fn range(app: AppKey) -> (UserKey, UserKey) {
    let first = first(app);
    (UserKey(first), UserKey(first | ((1 << NAME_BITS) - 1)))
}

fn first(app: AppKey) -> i64 {
    let mut hasher = SipHasher13::new();
    hasher.write(&app.0.to_le_bytes());
    ((hasher.finish() & 0xffff) << NAME_BITS).cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::IdMaker;
    use crate::domain::time::UnixMs;

    /// Of rows that exist.
    #[test]
    fn homes_never_change() {
        let of = |app, name| home(AppKey(app), &UserId::trusted(name)).0;
        assert_eq!(
            [of(1, "u"), of(2, "u"), of(1, "user-1000000")],
            [50_413_021_985_123, 202_407_619_623_267, 50_412_713_267_970]
        );
    }

    #[test]
    fn a_home_lies_in_its_apps_range_and_below_all_other_ids() {
        let lowest = IdMaker::new(0, 0, 0).next(UnixMs(0));
        for app in 0..300 {
            let (first, last) = range(AppKey(app << 22));
            let home = home(AppKey(app << 22), &UserId::trusted(&format!("user-{app}")));
            assert!(home >= first && home <= last && home.0 > 0 && last.0 < lowest, "{app}");
        }
    }
}
