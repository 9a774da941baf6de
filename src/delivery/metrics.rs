//! What the engine counts.

use std::collections::BTreeMap;

use metrics::{Histogram, counter, gauge, histogram};

use super::shared::Shared;
use crate::domain::outcome::{Entry, ResultCode, State};
use crate::domain::platform::{Lane, Platform};
use crate::storage::Backlog;
use crate::telemetry::names;

/// Durable results of one write, added up before they are counted: a counter is looked up by its name and labels, which
/// costs more than the rest of it.
#[derive(Default)]
pub struct Recorded {
    results: BTreeMap<(Platform, ResultCode), u64>,
    retired: BTreeMap<Platform, u64>,
}

impl Recorded {
    pub fn add(&mut self, entries: &[Entry], retirements: usize, platform: Platform) {
        for run in entries.chunk_by(|a, b| a.code == b.code) {
            *self.results.entry((platform, run[0].code)).or_default() += run.len() as u64;
        }
        if retirements > 0 {
            *self.retired.entry(platform).or_default() += retirements as u64;
        }
    }

    pub fn count(self) {
        for ((platform, code), count) in self.results {
            let platform = platform.name();
            match code.state() {
                State::Sent => counter!(names::SENT, "platform" => platform).increment(count),
                State::Open => counter!(names::RETRIED, "platform" => platform).increment(count),
                State::Dead => {
                    counter!(names::FAILED, "platform" => platform, "reason" => code.name()).increment(count);
                }
                State::Suppressed => counter!(names::SUPPRESSED, "reason" => code.name()).increment(count),
                State::Expired => counter!(names::EXPIRED).increment(count),
                State::Cancelled => counter!(names::CANCELLED).increment(count),
            }
        }
        // Devices whose tokens a platform called dead.
        for (platform, devices) in self.retired {
            counter!(names::RETIRED_DEVICES, "platform" => platform.name()).increment(devices);
        }
    }
}

/// A dead token that was not retired, because too many die alike.
pub fn retirement_held(platform: Platform) {
    counter!(names::RETIREMENTS_HELD, "platform" => platform.name()).increment(1);
}

/// An answer that blames the platform's configuration for one kind of device.
pub fn unreachable_target(platform: Platform) {
    counter!(names::UNREACHABLE_TARGETS, "platform" => platform.name()).increment(1);
}

/// A fan-out page's decisions.
pub fn planned(targets: usize, suppressed: &[Entry]) {
    counter!(names::PLANNED).increment(targets as u64);
    let mut codes: Vec<ResultCode> = suppressed.iter().map(|entry| entry.code).collect();
    codes.sort_unstable_by_key(|code| code.code());
    for run in codes.chunk_by(|a, b| a == b) {
        counter!(names::SUPPRESSED, "reason" => run[0].name()).increment(run.len() as u64);
    }
}

/// From hand-over to the sender until its answer: looked up by name and label once, for that costs more than the counting.
#[derive(Default)]
pub struct SentIn(BTreeMap<Platform, Histogram>);

impl SentIn {
    /// For so many answers that came together.
    pub fn record(&mut self, platform: Platform, seconds: f64, answers: usize) {
        if answers > 0 {
            let meter = || histogram!(names::SEND_SECONDS, "platform" => platform.name());
            self.0.entry(platform).or_insert_with(meter).record_many(seconds, answers);
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "gauges are floating point")]
pub fn backlog(shared: &Shared, backlog: &Backlog) {
    gauge!(names::JOBS_OPEN).set(backlog.jobs as f64);
    gauge!(names::TARGETS_OPEN).set(backlog.targets as f64);
    gauge!(names::FANOUTS_OPEN).set(backlog.fanouts as f64);
    let now = shared.runtime.now();
    for lane in Lane::ALL {
        let age = backlog.oldest_ready[lane.index()].map_or(0.0, |at| now.since(at).as_secs_f64());
        gauge!(names::OLDEST_READY_SECONDS, "lane" => lane.name()).set(age);
        gauge!(names::PERMITS_FREE, "lane" => lane.name()).set(shared.permits.free(lane) as f64);
    }
    gauge!(names::DEVICES_QUIET).set(shared.quiet.len() as f64);
    gauge!(names::DENY_ENTRIES).set(shared.deny.len() as f64);
    let table = shared.table();
    for platform in Platform::ALL {
        let (mut connections, mut in_flight, mut queued) = (0, 0, 0);
        let (mut paused, mut slowed, mut silent) = (0, 0, 0);
        let now = shared.runtime.instant();
        for lanes in table.routes.values().filter(|lanes| lanes.route.spec.platform == platform) {
            let status = lanes.link().sender.status();
            connections += status.connections;
            in_flight += status.in_flight;
            queued += status.queued;
            paused += u32::from(lanes.is_broken());
            slowed += u32::from(lanes.credential.slowed_until(now).is_some());
            silent += u32::from(lanes.share.is_silent(now) && lanes.share.is_held());
        }
        let label = platform.name();
        gauge!(names::SENDER_CONNECTIONS, "platform" => label).set(f64::from(connections));
        gauge!(names::SENDER_IN_FLIGHT, "platform" => label).set(f64::from(in_flight));
        gauge!(names::SENDER_QUEUED, "platform" => label).set(f64::from(queued));
        gauge!(names::ROUTES_PAUSED, "platform" => label).set(f64::from(paused));
        gauge!(names::ROUTES_SLOWED, "platform" => label).set(f64::from(slowed));
        gauge!(names::ROUTES_SILENT, "platform" => label).set(f64::from(silent));
    }
}
