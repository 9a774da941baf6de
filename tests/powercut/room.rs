//! The engine's side of a hand-over.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use nudged::domain::ids::RouteId;
use nudged::domain::notification::{HandOff, HandedOver, Permit};
use nudged::domain::outcome::Entry;
use nudged::domain::platform::Lane;

/// An engine with room for some targets.
#[derive(Default)]
pub struct Room {
    pub free: AtomicUsize,
    pub handed_over: Mutex<Vec<HandedOver>>,
    /// Deliveries, whoever was suppressed among them.
    pub planned: AtomicUsize,
}

impl HandOff for Room {
    fn try_permit(&self, _: RouteId, _: Lane, targets: usize) -> Option<Permit> {
        let taken = self.free.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |free| free.checked_sub(targets));
        taken.ok().map(|_| Permit::new(Box::new(())))
    }

    fn deliver(&self, job: HandedOver) {
        self.handed_over.lock().unwrap().push(job);
    }

    fn wake_jobs(&self, _: RouteId, _: Lane) {}

    fn wake_fanout(&self) {}

    fn planned(&self, targets: usize, suppressed: &[Entry]) {
        self.planned.fetch_add(targets + suppressed.len(), Ordering::SeqCst);
    }
}
