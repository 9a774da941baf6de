//! When to look for leases that nobody knows of.
//!
//! A step whose answer was lost may have leased jobs to this replica, and as long as its heart beats no other takes them
//! up. So the heartbeat frees what is leased to it and not held by it, whenever somebody had to give up on an answer. It
//! may have to give up, too, most likely just then: what was not done to its end is still due.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::planted;

#[derive(Default)]
pub(super) struct Sweep {
    due: AtomicBool,
}

impl Sweep {
    /// Leases may have been taken that nobody knows of.
    pub fn ask(&self) {
        self.due.store(true, Ordering::Release);
    }

    /// If one is due. What is asked from now on is for the next one, for this may have looked already.
    pub fn begin(&self) -> Option<Sweeping<'_>> {
        self.due.swap(false, Ordering::AcqRel).then_some(Sweeping { sweep: self, is_done: false })
    }
}

/// A sweep under way. Dropped before [`Sweeping::done`], it is due again.
pub(super) struct Sweeping<'a> {
    sweep: &'a Sweep,
    is_done: bool,
}

impl Sweeping<'_> {
    pub fn done(mut self) {
        self.is_done = true;
    }
}

impl Drop for Sweeping<'_> {
    fn drop(&mut self) {
        if !self.is_done && !planted::is("sweep-given-up-counts-as-done") {
            self.sweep.ask();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_up_is_due_again_and_what_is_done_is_not() {
        let sweep = Sweep::default();
        assert!(sweep.begin().is_none());
        sweep.ask();
        drop(sweep.begin().expect("asked for"));
        let again = sweep.begin().expect("given up");
        sweep.ask();
        again.done();
        sweep.begin().expect("asked for meanwhile").done();
        assert!(sweep.begin().is_none());
    }
}
