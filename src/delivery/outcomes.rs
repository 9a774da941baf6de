//! Takes the senders' answers and makes them durable.
//!
//! One task. Each turn takes every answer that waits, then writes all flights that have ended, and checkpoints those
//! whose oldest unwritten answer is older than the checkpoint interval, in one call of the store: what arrives while a
//! write is under way goes into the next. A write that fails is repeated until it succeeds; meanwhile the flights keep
//! their permits, so nothing piles up. A repeated write is harmless: its fence is spent.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::flight::{Flight, Next};
use super::metrics;
use super::shared::{Shared, Work};
use crate::domain::ids::JobId;
use crate::domain::platform::Platform;
use crate::domain::time::UnixMs;
use crate::senders::Outcomes;
use crate::storage::JobUpdate;

/// Answers taken in one turn.
const TURN: usize = 4_096;
/// Updates in one call of the store.
const WRITE: usize = 256;
/// Between repeats of a failed write.
const REPEAT: Duration = Duration::from_millis(250);

pub struct Writer {
    shared: Arc<Shared>,
    outcomes: mpsc::UnboundedReceiver<Outcomes>,
    /// Flights with unwritten answers.
    dirty: BTreeSet<u64>,
    /// Cancelled once the senders are drained: end when no flight is left.
    finish: CancellationToken,
}

/// What one turn writes.
#[derive(Default)]
struct Writes {
    updates: Vec<(JobUpdate, After)>,
    /// Ended jobs: dropped, with their permits, once the writes are durable.
    ended: Vec<Flight>,
}

/// What follows an update.
#[derive(Clone, Copy)]
struct After {
    platform: Platform,
    release: bool,
    /// Not due before this.
    put_off: Option<UnixMs>,
}

impl Writer {
    pub fn new(shared: Arc<Shared>, outcomes: mpsc::UnboundedReceiver<Outcomes>, finish: CancellationToken) -> Self {
        Self { shared, outcomes, dirty: BTreeSet::new(), finish }
    }

    pub async fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let mut buffer = Vec::with_capacity(64);
        loop {
            let idle = self.dirty.is_empty();
            tokio::select! {
                biased;
                count = self.outcomes.recv_many(&mut buffer, TURN) => {
                    if count == 0 {
                        break;
                    }
                }
                () = shared.settled.notified() => {}
                () = shared.runtime.sleep(shared.settings.checkpoint), if !idle => {}
                () = self.finish.cancelled() => {
                    if self.outcomes.is_empty() && shared.flights.lock().expect("no panic while held").is_empty() {
                        break;
                    }
                    // The drained senders have answered everything; a moment for what is on its way.
                    shared.runtime.sleep(Duration::from_millis(5)).await;
                }
            }
            self.apply(&mut buffer);
            self.write().await;
        }
    }

    fn apply(&mut self, buffer: &mut Vec<Outcomes>) {
        let (now, instant) = (self.shared.runtime.now(), self.shared.runtime.instant());
        let mut flights = self.shared.flights.lock().expect("no panic while held");
        for Outcomes { ticket, results } in buffer.drain(..) {
            let Some(flight) = flights.get_mut(&ticket) else {
                tracing::error!(ticket, "an answer without a flight: a sender answered twice");
                continue;
            };
            // A route that was removed has no state to keep.
            let lanes = self.shared.route(flight.route.id);
            let platform = flight.route.spec.platform;
            let waited = (instant - flight.sent_at()).as_secs_f64();
            let attempts = results.iter().filter(|(_, outcome)| outcome.is_attempt()).count();
            metrics::sent_in(platform, waited, attempts);
            for (index, outcome) in results {
                flight.answer(index, outcome, now, instant);
            }
            let answer = flight.take_broken();
            let Some(lanes) = lanes else {
                self.dirty.insert(ticket);
                continue;
            };
            if let Some(answer) = answer {
                if lanes.state.broke(&answer.to_string(), instant) {
                    tracing::error!(route_id = %flight.route.id, platform = %platform,
                        credential = %flight.route.spec.credential, %answer,
                        "the platform refuses the credential or configuration; the route is paused and its deliveries wait");
                }
            } else if flight.succeeded() && lanes.state.is_broken() && lanes.state.works() {
                tracing::info!(route_id = %flight.route.id, platform = %platform, "the route works again");
                lanes.wake();
            }
            self.dirty.insert(ticket);
        }
        // What settled without an answer: it has nothing outstanding, so it is not waited for.
        for (ticket, flight) in flights.iter() {
            if flight.next() != Next::Wait {
                self.dirty.insert(*ticket);
            }
        }
    }

    async fn write(&mut self) {
        let Writes { updates, ended } = self.collect();
        let mut updates = updates.into_iter().peekable();
        while updates.peek().is_some() {
            let (chunk, after) = updates.by_ref().take(WRITE).unzip();
            self.write_chunk(chunk, after).await;
        }
        drop(ended);
    }

    /// Takes what is to be written now, and sends flights with held targets back to their gate.
    fn collect(&mut self) -> Writes {
        let (now, instant) = (self.shared.runtime.now(), self.shared.runtime.instant());
        let runtime = self.shared.runtime.clone();
        let mut flights = self.shared.flights.lock().expect("no panic while held");
        let mut writes = Writes::default();
        let mut later = BTreeSet::new();
        for ticket in std::mem::take(&mut self.dirty) {
            let Some(flight) = flights.get_mut(&ticket) else { continue };
            let platform = flight.route.spec.platform;
            let policy = self.shared.settings.retry(platform);
            match flight.next() {
                Next::Wait => {
                    let Some(since) = flight.unwritten_since() else { continue };
                    if instant - since < self.shared.settings.checkpoint {
                        later.insert(ticket);
                        continue;
                    }
                    let flush = flight.flush(policy, now, || runtime.random_unit());
                    writes.updates.push((flush.update, After { platform, release: false, put_off: None }));
                }
                Next::Finish | Next::Return => {
                    let mut flight = flights.remove(&ticket).expect("it was just found");
                    let flush = flight.flush(policy, now, || runtime.random_unit());
                    let after = After { platform, release: flush.release, put_off: flush.put_off };
                    writes.updates.push((flush.update, after));
                    writes.ended.push(flight);
                }
                Next::Regate => {
                    let flight = flights.remove(&ticket).expect("it was just found");
                    if let Err(mut flight) = self.regate(flight) {
                        let pending = flight.take_pending().len();
                        flight.put_back(pending);
                        flights.insert(ticket, *flight);
                        later.insert(ticket);
                    }
                }
            }
        }
        self.dirty = later;
        writes
    }

    /// Back to its worker; `Err` when that has ended: shutdown, or the route was removed.
    fn regate(&self, flight: Flight) -> Result<(), Box<Flight>> {
        let (route, lane) = (flight.route.id, flight.job.lane);
        let flight = Box::new(flight);
        let Some(lanes) = self.shared.route(route) else { return Err(flight) };
        match lanes.lanes[lane.index()].work.send(Work::Regate(flight)) {
            Err(mpsc::error::SendError(Work::Regate(flight))) => Err(flight),
            Err(mpsc::error::SendError(Work::HandedOver(_))) | Ok(()) => Ok(()),
        }
    }

    async fn write_chunk(&self, updates: Vec<JobUpdate>, after: Vec<After>) {
        let mut reported = false;
        let held = loop {
            match self.shared.store.record(updates.clone(), self.shared.runtime.now()).await {
                Ok(held) => break held,
                Err(error) => {
                    if !reported {
                        tracing::error!(%error, updates = updates.len(), "outcomes cannot be written; repeating");
                        reported = true;
                    }
                    if self.finish.is_cancelled() {
                        tracing::error!("shutting down with unwritten outcomes; these deliveries may be repeated");
                        return;
                    }
                    self.shared.runtime.sleep(REPEAT).await;
                }
            }
        };
        let mut release: Vec<(JobId, i64)> = Vec::new();
        let mut put_off: Vec<(JobId, i64)> = Vec::new();
        let mut until = UnixMs(0);
        for ((update, after), held) in updates.iter().zip(after).zip(held) {
            if !held {
                tracing::warn!(job_id = %update.job, "another owner has this job; its outcomes are not ours to write");
                continue;
            }
            metrics::recorded(&update.entries, after.platform);
            metrics::retired(update.retirements.len(), after.platform);
            match (after.release, after.put_off) {
                (false, _) => {}
                (true, None) => release.push((update.job, update.fence)),
                (true, Some(at)) => {
                    put_off.push((update.job, update.fence));
                    until = until.max(at);
                }
            }
        }
        if !put_off.is_empty()
            && let Err(error) = self.shared.store.put_off(put_off, until).await
        {
            tracing::warn!(%error, "held jobs could not be put off; the next start frees them");
        }
        if !release.is_empty()
            && let Err(error) = self.shared.store.release(release, self.shared.runtime.now()).await
        {
            tracing::warn!(%error, "leases could not be given back; the next start frees them");
        }
    }
}
