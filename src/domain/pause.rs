//! Pauses: an operator holds back what would be sent, until it is resumed or its time to live ends.

use std::fmt;

use super::ids::{AppKey, EventType};
use super::platform::Platform;
use super::time::UnixMs;

/// The most pauses at once: every send looks at all of them.
pub const MAX_PAUSES: usize = 1_000;
/// The longest reason, in bytes.
pub const MAX_REASON_BYTES: usize = 256;

/// What is held: everything that fits all that is given. Nothing given is everything there is.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct PauseScope {
    pub app: Option<AppKey>,
    pub platform: Option<Platform>,
    /// Only together with its app.
    pub event_type: Option<EventType>,
}

impl PauseScope {
    /// Reads what its `Display` wrote.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let mut parts = name.splitn(3, '/');
        let (app, platform, event_type) = (parts.next()?, parts.next()?, parts.next()?);
        let given = |text: &'_ str| text != "*";
        Some(Self {
            app: if given(app) { Some(AppKey(app.parse().ok()?)) } else { None },
            platform: if given(platform) {
                Some(Platform::ALL.into_iter().find(|known| known.name() == platform)?)
            } else {
                None
            },
            event_type: given(event_type).then(|| EventType::trusted(event_type)),
        })
    }

    fn covers(&self, app: AppKey, platform: Option<Platform>) -> bool {
        self.app.is_none_or(|held| held == app) && self.platform.is_none_or(|held| Some(held) == platform)
    }
}

/// The stored name: `<app>/<platform>/<event type>`, each `*` where it is not given.
impl fmt::Display for PauseScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.app {
            Some(app) => write!(f, "{}/", app.0)?,
            None => f.write_str("*/")?,
        }
        f.write_str(self.platform.map_or("*", Platform::name))?;
        write!(f, "/{}", self.event_type.as_ref().map_or("*", EventType::as_str))
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pause {
    pub scope: PauseScope,
    pub since: UnixMs,
    /// The operator's words; may be empty.
    pub reason: String,
}

/// All pauses of a moment.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Pauses(pub Vec<Pause>);

impl Pauses {
    /// What holds everything that one app sends on one platform.
    #[must_use]
    pub fn of_route(&self, app: AppKey, platform: Platform) -> Option<&Pause> {
        self.0.iter().find(|pause| pause.scope.event_type.is_none() && pause.scope.covers(app, Some(platform)))
    }

    /// What holds a notification on a platform.
    #[must_use]
    pub fn of(&self, app: AppKey, platform: Platform, event_type: &EventType) -> Option<&Pause> {
        self.0.iter().find(|pause| {
            pause.scope.covers(app, Some(platform))
                && pause.scope.event_type.as_ref().is_none_or(|held| held == event_type)
        })
    }

    /// What holds a notification on every platform.
    #[must_use]
    pub fn of_notification(&self, app: AppKey, event_type: &EventType) -> Option<&Pause> {
        self.0.iter().find(|pause| {
            pause.scope.covers(app, None) && pause.scope.event_type.as_ref().is_none_or(|held| held == event_type)
        })
    }

    #[must_use]
    pub fn has(&self, scope: &PauseScope) -> bool {
        self.0.iter().any(|pause| pause.scope == *scope)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(app: Option<i64>, platform: Option<Platform>, event_type: Option<&str>) -> PauseScope {
        PauseScope { app: app.map(AppKey), platform, event_type: event_type.map(EventType::trusted) }
    }

    #[test]
    fn a_scope_reads_back_from_its_name() {
        for one in [
            scope(None, None, None),
            scope(Some(7), None, None),
            scope(None, Some(Platform::Fcm), None),
            scope(Some(7), Some(Platform::Apns), Some("comment.created")),
        ] {
            assert_eq!(PauseScope::parse(&one.to_string()), Some(one));
        }
        for bad in ["", "*", "*/*", "x/*/*", "*/carrier-pigeon/*"] {
            assert_eq!(PauseScope::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_pause_holds_exactly_what_fits_all_it_names() {
        let held = |scope: PauseScope, app: i64, platform, event_type: &str| {
            let pauses = Pauses(vec![Pause { scope, since: UnixMs(0), reason: String::new() }]);
            let whole = pauses.of_notification(AppKey(app), &EventType::trusted(event_type)).is_some();
            let route = pauses.of_route(AppKey(app), platform).is_some();
            (route, pauses.of(AppKey(app), platform, &EventType::trusted(event_type)).is_some(), whole)
        };
        assert_eq!(held(scope(None, None, None), 1, Platform::Apns, "a"), (true, true, true));
        assert_eq!(held(scope(Some(1), None, None), 1, Platform::Apns, "a"), (true, true, true));
        assert_eq!(held(scope(Some(2), None, None), 1, Platform::Apns, "a"), (false, false, false));
        assert_eq!(held(scope(None, Some(Platform::Apns), None), 1, Platform::Apns, "a"), (true, true, false));
        assert_eq!(held(scope(None, Some(Platform::Fcm), None), 1, Platform::Apns, "a"), (false, false, false));
        assert_eq!(held(scope(Some(1), None, Some("a")), 1, Platform::Apns, "a"), (false, true, true));
        assert_eq!(held(scope(Some(1), None, Some("b")), 1, Platform::Apns, "a"), (false, false, false));
    }
}
