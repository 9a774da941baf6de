//! What a step of a store wants done outside its transaction, and the ids it took.
//!
//! Effects are collected while the step runs and done only after COMMIT, in this order: the "no"s, so that they stand
//! before their callers are answered; the jobs; the wake-ups.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::domain::deny::{DenyFeed, DenyKey};
use crate::domain::ids::{DeviceId, IdMaker, RouteId};
use crate::domain::notification::{HandOff, HandedOver};
use crate::domain::outcome::Entry;
use crate::domain::platform::Lane;
use crate::domain::time::UnixMs;
use crate::runtime::Runtime;

/// Ids a step took, in order: a re-run takes the same ones again.
#[derive(Default)]
pub(super) struct Ids {
    taken: Vec<i64>,
    at: usize,
    taken_devices: Vec<DeviceId>,
    at_device: usize,
}

impl Ids {
    /// Some were taken: what they were taken for may have been tried.
    pub fn are_used(&self) -> bool {
        !self.taken.is_empty() || !self.taken_devices.is_empty()
    }

    pub fn restart(&mut self) {
        (self.at, self.at_device) = (0, 0);
    }

    pub fn next(&mut self, maker: &IdMaker, now: UnixMs) -> i64 {
        if self.at == self.taken.len() {
            self.taken.push(maker.next(now));
        }
        self.at += 1;
        self.taken[self.at - 1]
    }

    pub fn next_device(&mut self, maker: &IdMaker, now: UnixMs) -> DeviceId {
        if self.at_device == self.taken_devices.len() {
            self.taken_devices.push(maker.next_device(now));
        }
        self.at_device += 1;
        self.taken_devices[self.at_device - 1]
    }
}

/// Jobs of one transaction that are handed over, for a start: each is some hundred bytes to move when there are more.
const HAND_OVERS: usize = 32;

/// To be done after COMMIT.
#[derive(Default)]
pub(super) struct Effects {
    pub deny: Vec<DenyKey>,
    /// Of one engine, nearly always.
    pub hand_overs: Vec<(Arc<dyn HandOff>, Vec<HandedOver>)>,
    pub wake_jobs: Vec<(Arc<dyn HandOff>, RouteId, Lane)>,
    pub wake_fanouts: Vec<Arc<dyn HandOff>>,
    pub planned: Vec<(Arc<dyn HandOff>, usize, Vec<Entry>)>,
}

impl Effects {
    pub fn hand_over(&mut self, engine: &Arc<dyn HandOff>, job: HandedOver) {
        if let Some((_, jobs)) = self.hand_overs.last_mut().filter(|(other, _)| Arc::ptr_eq(other, engine)) {
            jobs.push(job);
            return;
        }
        let mut jobs = Vec::with_capacity(HAND_OVERS);
        jobs.push(job);
        self.hand_overs.push((Arc::clone(engine), jobs));
    }

    pub fn wake_jobs(&mut self, engine: &Arc<dyn HandOff>, route: RouteId, lane: Lane) {
        let known =
            |(other, r, l): &(Arc<dyn HandOff>, RouteId, Lane)| Arc::ptr_eq(other, engine) && (*r, *l) == (route, lane);
        if !self.wake_jobs.iter().any(known) {
            self.wake_jobs.push((Arc::clone(engine), route, lane));
        }
    }

    pub fn planned(&mut self, engine: &Arc<dyn HandOff>, targets: usize, suppressed: Vec<Entry>) {
        match self.planned.last_mut().filter(|(other, ..)| Arc::ptr_eq(other, engine)) {
            Some((_, known, more)) => {
                *known += targets;
                more.extend(suppressed);
            }
            None => self.planned.push((Arc::clone(engine), targets, suppressed)),
        }
    }

    pub fn wake_fanout(&mut self, engine: &Arc<dyn HandOff>) {
        if !self.wake_fanouts.iter().any(|other| Arc::ptr_eq(other, engine)) {
            self.wake_fanouts.push(Arc::clone(engine));
        }
    }

    pub fn apply(self, deny: &DenyFeed, runtime: &Runtime) {
        deny.publish(&self.deny, runtime.instant().into_std());
        for (engine, jobs) in self.hand_overs {
            guarded("handing jobs over", || engine.deliver_all(jobs));
        }
        for (engine, route, lane) in self.wake_jobs {
            guarded("waking a route", || engine.wake_jobs(route, lane));
        }
        for (engine, targets, suppressed) in self.planned {
            guarded("counting", || engine.planned(targets, &suppressed));
        }
        for engine in self.wake_fanouts {
            guarded("waking the expander", || engine.wake_fanout());
        }
    }
}

/// Foreign code must not take the writer down.
fn guarded(doing: &'static str, call: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(call)).is_err() {
        tracing::error!(doing, "a call out of the store panicked");
    }
}
