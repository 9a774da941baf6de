//! What the routes of one credential share: its rate, its faults, and that its provider asked to slow down.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::pacer::Pacer;
use super::route_state::RouteState;
use super::share::Share;
use crate::domain::ids::{AppKey, DeviceId};
use crate::domain::pacing::Rate;
use crate::domain::platform::{Environment, Platform, RouteSpec};
use crate::domain::time::UnixMs;
use crate::planted;
use crate::runtime::Instant;

/// A 429 that does not say of what it was too much is taken for the device's, until so many come within `UNCLEAR_IN`.
const UNCLEAR: u32 = 20;
const UNCLEAR_IN: Duration = Duration::from_secs(10);
/// Complaints that follow a hold so soon double the next.
const RELAPSE_IN: Duration = Duration::from_secs(120);
/// Devices whose turn to be probed is to come.
const MAX_RESERVED: usize = 10_000;
const LONGEST_HOLD: Duration = Duration::from_secs(10 * 60);
/// Between two lines of the log about faults that pause nothing.
const TELL_EVERY_MS: i64 = 5 * 60_000;

/// By app, platform and name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct CredentialKey {
    pub app: AppKey,
    pub platform: Platform,
    pub name: Arc<str>,
}

impl CredentialKey {
    pub fn of(spec: &RouteSpec) -> Self {
        Self { app: spec.app, platform: spec.platform, name: Arc::clone(&spec.credential) }
    }

    /// The same in every process on the store.
    pub fn stored(&self) -> String {
        format!("{}/{}/{}", self.app.0, self.platform.name(), self.name)
    }
}

pub struct Credential {
    pub key: CredentialKey,
    pub pacer: Pacer,
    pub state: RouteState,
    /// Of the engine's room, by environment.
    shares: [Arc<Share>; 3],
    slow: Mutex<Slow>,
    told_at: AtomicI64,
    probes: Mutex<Probes>,
}

#[derive(Default)]
struct Slow {
    until: Option<Instant>,
    length: Duration,
    unclear: u32,
    unclear_since: Option<Instant>,
}

#[derive(Default)]
struct Probes {
    per_minute: u32,
    next: Option<Instant>,
    /// Turns that are to come, by device.
    reserved: HashMap<DeviceId, Instant>,
}

impl Credential {
    pub fn new(key: CredentialKey, rate: Option<Rate>, now: Instant) -> Self {
        let pacer = Pacer::new(key.stored(), rate);
        Self {
            key,
            pacer,
            state: RouteState::default(),
            shares: [Share::new(now), Share::new(now), Share::new(now)],
            slow: Mutex::default(),
            told_at: AtomicI64::new(i64::MIN),
            probes: Mutex::default(),
        }
    }

    /// What its routes in one environment hold of the room: they share that service's fate.
    pub fn share(&self, environment: Environment) -> &Arc<Share> {
        &self.shares[match environment {
            Environment::None => 0,
            Environment::Production => 1,
            Environment::Sandbox => 2,
        }]
    }

    /// How often the other environment may be asked about a token; 0: never.
    pub fn set_probes(&self, per_minute: u32) {
        self.probes.lock().expect("no panic while held").per_minute = per_minute;
    }

    /// When the other environment may be asked about this device's token: zero for at once; `None` for never. The turn
    /// is kept for it.
    pub fn probe_in(&self, device: DeviceId, now: Instant) -> Option<Duration> {
        let mut probes = self.probes.lock().expect("no panic while held");
        if probes.per_minute == 0 {
            return None;
        }
        if planted::is("probes-unlimited") {
            return Some(Duration::ZERO);
        }
        if let Some(at) = probes.reserved.get(&device).copied() {
            if at <= now {
                probes.reserved.remove(&device);
            }
            return Some(at.saturating_duration_since(now));
        }
        // A turn that nobody took is not saved up, but for one.
        let at = probes.next.map_or(now, |next| next.max(now));
        if at > now {
            if probes.reserved.len() >= MAX_RESERVED {
                probes.reserved.retain(|_, at| *at > now);
            }
            if probes.reserved.len() >= MAX_RESERVED {
                return Some(at - now);
            }
            probes.reserved.insert(device, at);
        }
        probes.next = Some(at + Duration::from_secs(60) / probes.per_minute);
        Some(at - now)
    }

    /// Until when the provider's complaint holds everything.
    pub fn slowed_until(&self, now: Instant) -> Option<Instant> {
        self.slow.lock().expect("no panic while held").until.filter(|until| *until > now)
    }

    /// The provider says that everything is too fast. Whether that is news: then the rate is lowered too.
    pub fn slowed(&self, hold: Duration, now: Instant) -> bool {
        let mut slow = self.slow.lock().expect("no panic while held");
        match slow.until {
            // Many requests were under way.
            Some(until) if until > now => {
                slow.until = Some(until.max(now + hold));
                return false;
            }
            Some(until) if now < until + RELAPSE_IN && !planted::is("relapse-forgotten") => {
                slow.length = (slow.length * 2).min(LONGEST_HOLD).max(hold);
            }
            _ => slow.length = hold,
        }
        slow.until = Some(now + slow.length);
        true
    }

    /// A 429 that says nothing. Whether there were so many that they are not about devices.
    pub fn unclear(&self, now: Instant) -> bool {
        let mut slow = self.slow.lock().expect("no panic while held");
        if slow.unclear_since.is_none_or(|since| now > since + UNCLEAR_IN) {
            (slow.unclear, slow.unclear_since) = (0, Some(now));
        }
        slow.unclear += 1;
        slow.unclear >= UNCLEAR
    }

    /// It has new keys: whatever was wrong with the old ones is over.
    pub fn renewed(&self) {
        self.state.works();
        *self.slow.lock().expect("no panic while held") = Slow::default();
    }

    /// Whether it is time to say again that some of its devices cannot be reached.
    pub fn tells(&self, now: UnixMs) -> bool {
        let told = self.told_at.load(Ordering::Relaxed);
        if now.0.saturating_sub(told) < TELL_EVERY_MS {
            return false;
        }
        self.told_at.compare_exchange(told, now.0, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::Runtime;

    fn credential(runtime: &Runtime) -> Credential {
        let key = CredentialKey { app: AppKey(1), platform: Platform::Apns, name: "default".into() };
        Credential::new(key, None, runtime.instant())
    }

    #[tokio::test(start_paused = true)]
    async fn probes_are_spread_over_the_minute() {
        let runtime = Runtime::simulated(1, UnixMs(0));
        let credential = credential(&runtime);
        assert_eq!(credential.probe_in(DeviceId(1), runtime.instant()), None, "switched off");
        credential.set_probes(6);
        let in_secs = |id| credential.probe_in(DeviceId(id), runtime.instant()).map(|wait| wait.as_secs());
        assert_eq!([in_secs(1), in_secs(2), in_secs(3), in_secs(2)], [Some(0), Some(10), Some(20), Some(10)]);
        runtime.sleep(Duration::from_secs(600)).await;
        assert_eq!([in_secs(4), in_secs(5)], [Some(0), Some(10)], "turns are not saved up");
        assert_eq!([in_secs(3), in_secs(3)], [Some(0), Some(20)], "but for whom they were kept, once");
    }

    #[tokio::test(start_paused = true)]
    async fn complaints_hold_everything_and_relapses_hold_it_longer() {
        let runtime = Runtime::simulated(1, UnixMs(0));
        let credential = credential(&runtime);
        let minute = Duration::from_secs(60);
        assert!(credential.slowed(minute, runtime.instant()));
        assert!(!credential.slowed(minute, runtime.instant()), "the same complaint");
        assert_eq!(credential.slowed_until(runtime.instant()), Some(runtime.instant() + minute));
        runtime.sleep(minute).await;
        assert_eq!(credential.slowed_until(runtime.instant()), None);
        assert!(credential.slowed(minute, runtime.instant()));
        assert_eq!(credential.slowed_until(runtime.instant()), Some(runtime.instant() + 2 * minute));
        runtime.sleep(10 * minute).await;
        assert!(credential.slowed(minute, runtime.instant()));
        assert_eq!(credential.slowed_until(runtime.instant()), Some(runtime.instant() + minute), "long ago");
    }

    #[tokio::test(start_paused = true)]
    async fn a_few_unclear_complaints_are_about_devices() {
        let runtime = Runtime::simulated(1, UnixMs(0));
        let credential = credential(&runtime);
        for _ in 1..UNCLEAR {
            assert!(!credential.unclear(runtime.instant()));
        }
        runtime.sleep(UNCLEAR_IN + Duration::from_secs(1)).await;
        for _ in 1..UNCLEAR {
            assert!(!credential.unclear(runtime.instant()), "the others are forgotten");
        }
        assert!(credential.unclear(runtime.instant()));
    }
}
