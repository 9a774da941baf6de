//! Devices that are left alone for a while, because their platform asked for it or because their token is in doubt.
//!
//! Kept with the devices in the store; this is what the engine looks at before each send, and refreshes from there for
//! what other processes were told.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::domain::ids::DeviceId;
use crate::domain::time::UnixMs;
use crate::planted;

/// Devices known at once; those beyond are looked after by the platform's own complaints.
pub const MAX_QUIET: usize = 100_000;

#[derive(Default)]
pub struct Quiet {
    /// Looked at first, so that sends without any take no lock.
    count: AtomicUsize,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// With the round in which it was added.
    until: HashMap<DeviceId, (UnixMs, u64)>,
    round: u64,
}

impl Quiet {
    pub fn add(&self, device: DeviceId, until: UnixMs) {
        let mut known = self.known.lock().expect("no panic while held");
        let round = known.round;
        if known.until.len() < MAX_QUIET || known.until.contains_key(&device) {
            let stands = known.until.entry(device).or_insert((until, round));
            *stands = (until.max(stands.0), round);
        }
        self.count.store(known.until.len(), Ordering::Release);
    }

    /// Until when this one is left alone.
    pub fn until(&self, device: DeviceId, now: UnixMs) -> Option<UnixMs> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let known = self.known.lock().expect("no panic while held");
        known.until.get(&device).map(|(until, _)| *until).filter(|until| *until > now)
    }

    /// What the store knows stands. What it does not know was settled by a registration, unless it was added so lately
    /// that it may not be written yet.
    pub fn replace(&self, stored: Vec<(DeviceId, UnixMs)>) {
        let mut known = self.known.lock().expect("no panic while held");
        known.round += 1;
        let round = known.round;
        known.until.retain(|_, (_, added)| *added + 2 > round && !planted::is("quiet-ends-early"));
        known.until.extend(stored.into_iter().map(|(device, until)| (device, (until, 0))));
        self.count.store(known.until.len(), Ordering::Release);
    }

    pub fn len(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_quiet_until_its_time_and_the_longer_one_stands() {
        let quiet = Quiet::default();
        assert_eq!(quiet.until(DeviceId(1), UnixMs(0)), None);
        quiet.add(DeviceId(1), UnixMs(500));
        quiet.add(DeviceId(1), UnixMs(100));
        assert_eq!(quiet.until(DeviceId(1), UnixMs(499)), Some(UnixMs(500)));
        assert_eq!(quiet.until(DeviceId(1), UnixMs(500)), None);
        assert_eq!(quiet.until(DeviceId(2), UnixMs(0)), None);
        quiet.replace(vec![(DeviceId(2), UnixMs(900))]);
        assert_eq!(
            (quiet.until(DeviceId(1), UnixMs(0)), quiet.len()),
            (Some(UnixMs(500)), 2),
            "not written yet, perhaps"
        );
        quiet.replace(vec![(DeviceId(2), UnixMs(900))]);
        assert_eq!((quiet.until(DeviceId(1), UnixMs(0)), quiet.len()), (None, 1), "settled");
    }
}
