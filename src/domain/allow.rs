//! The staging allow-list: where it is set, nobody else is ever sent to.

use std::collections::BTreeSet;

use super::device::Labels;
use super::ids::UserId;

/// Whom an app may send to at all. Never empty: an app without limits has none of these.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct AllowList {
    /// These people on all their devices …
    pub users: BTreeSet<UserId>,
    /// … and every device with one of these labels; without a value, whatever its value.
    pub labels: Vec<(String, Option<String>)>,
}

impl AllowList {
    #[must_use]
    pub fn allows(&self, user: &UserId, labels: &Labels) -> bool {
        self.users.contains(user)
            || self.labels.iter().any(|(key, wanted)| {
                labels.get(key).is_some_and(|value| wanted.as_ref().is_none_or(|wanted| wanted == value))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_person_or_a_labelled_device_is_allowed_and_nobody_else() {
        let list = AllowList {
            users: [UserId::trusted("tester")].into(),
            labels: vec![("stage".into(), Some("qa".into())), ("internal".into(), None)],
        };
        let labels = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect::<Labels>()
        };
        let someone = UserId::trusted("someone");
        assert!(list.allows(&UserId::trusted("tester"), &labels(&[])));
        assert!(list.allows(&someone, &labels(&[("stage", "qa")])));
        assert!(list.allows(&someone, &labels(&[("internal", "")])));
        assert!(!list.allows(&someone, &labels(&[("stage", "production")])));
        assert!(!list.allows(&someone, &labels(&[])));
    }
}
