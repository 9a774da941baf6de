//! Takes the senders' answers and makes them durable.
//!
//! One task. Each turn takes every answer that waits, then writes all flights that have ended, and checkpoints those
//! whose oldest unwritten answer is older than the checkpoint interval, in one call of the store: what arrives while a
//! write is under way, or within some milliseconds of its beginning, goes into the next. A write that fails is repeated until it succeeds; meanwhile the flights keep
//! their permits, so nothing piles up. A repeated write is harmless: its fence is spent.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::credential::Credential;
use super::flight::{Flight, Gone, Next};
use super::learn::Learner;
use super::metrics::{Recorded, SentIn};
use super::shared::{Shared, Work};
use crate::domain::device::{GoneVerdict, judge_gone};
use crate::domain::ids::JobId;
use crate::domain::platform::Platform;
use crate::domain::retry::RetryPolicy;
use crate::domain::time::UnixMs;
use crate::planted;
use crate::runtime::Runtime;
use crate::senders::Outcomes;
use crate::storage::{DeviceTimes, JobUpdate};

/// Answers taken in one turn.
const TURN: usize = 4_096;
/// Updates in one call of the store.
const WRITE: usize = 256;
/// Such calls at once. One after the other each waits for a transaction of its own, among as many new events: then small
/// jobs end no faster than they come, the permits run out, and what is accepted goes through the queue, which costs half
/// as much again.
const WRITES: usize = 4;
/// From the beginning of one write to that of the next, at least: a write costs about the same for one answer as for a
/// hundred, and with permits for thousands nobody waits for it.
const GATHER: Duration = Duration::from_millis(10);
/// Between repeats of a failed write.
const REPEAT: Duration = Duration::from_millis(250);
/// How often a shutdown tries to write, and to give back leases: five seconds.
pub const LAST_TRIES: u32 = 20;

pub struct Writer {
    shared: Arc<Shared>,
    outcomes: mpsc::UnboundedReceiver<Outcomes>,
    /// Flights with unwritten answers.
    dirty: BTreeSet<u64>,
    /// Flights with tokens whose end their registrations decide.
    unjudged: BTreeSet<u64>,
    /// How often their registrations could not be read in a row.
    unread: u32,
    /// Credentials whose providers complained just now.
    slowing: Vec<Arc<Credential>>,
    sent_in: SentIn,
    /// Cancelled once the senders are drained: end when no flight is left.
    finish: CancellationToken,
}

/// What one turn writes.
#[derive(Default)]
struct Writes {
    updates: Vec<(JobUpdate, After)>,
    /// Ended jobs: dropped, with their permits, once the writes are durable.
    #[expect(clippy::vec_box, reason = "they come out of a map of boxes, and a flight is large to move")]
    ended: Vec<Box<Flight>>,
}

impl Writes {
    /// What is known of a flight by now.
    fn add(&mut self, flight: &mut Flight, policy: &RetryPolicy, now: UnixMs, runtime: &Runtime) {
        let flush = flight.flush(policy, now, || runtime.random_unit());
        let platform = flight.route.spec.platform;
        self.updates.push((flush.update, After { platform, release: flush.release, put_off: flush.put_off }));
    }
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
        let (dirty, unjudged, slowing) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
        Self { shared, outcomes, dirty, unjudged, unread: 0, slowing, sent_in: SentIn::default(), finish }
    }

    pub async fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let mut buffer = Vec::with_capacity(64);
        let mut next_write_at = shared.runtime.instant();
        loop {
            let idle = self.dirty.is_empty();
            tokio::select! {
                biased;
                count = self.outcomes.recv_many(&mut buffer, TURN) => {
                    if count == 0 {
                        break;
                    }
                }
                () = shared.settled.told() => {}
                () = shared.runtime.sleep(shared.settings.checkpoint), if !idle => {}
                () = self.finish.cancelled() => {
                    if self.outcomes.is_empty() && shared.flights.lock().expect("no panic while held").is_empty() {
                        break;
                    }
                    // The drained senders have answered everything; a moment for what is on its way.
                    shared.runtime.sleep(Duration::from_millis(5)).await;
                }
            }
            if !self.finish.is_cancelled() {
                shared.runtime.sleep_until(next_write_at).await;
            }
            while buffer.len() < TURN
                && let Ok(answer) = self.outcomes.try_recv()
            {
                buffer.push(answer);
            }
            next_write_at = shared.runtime.instant() + GATHER;
            self.apply(&mut buffer);
            for credential in std::mem::take(&mut self.slowing) {
                credential.pacer.slow_down(&shared.runtime, &*shared.store).await;
            }
            self.judge_gone().await;
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
            self.sent_in.record(platform, waited, attempts);
            self.dirty.insert(ticket);
            let Some(lanes) = lanes else {
                for (index, outcome) in results {
                    flight.answer(index, outcome, now, instant);
                }
                continue;
            };
            if flight.probing().is_none() && results.iter().any(|(_, outcome)| outcome.is_answer()) {
                lanes.share.answered(instant);
            }
            let mut learner = Learner { shared: &self.shared, lanes: &lanes, slowing: &mut self.slowing, now, instant };
            learner.learn(flight, results);
            if !flight.gone().is_empty() {
                self.unjudged.insert(ticket);
            }
        }
        // What settled without an answer has nothing outstanding, so it is not waited for.
        self.dirty.extend(self.shared.settled.take());
    }

    /// Tokens that a platform called gone since a time: one look at all their registrations, then each is retired, held in
    /// doubt or kept. When they cannot be read the flights wait for the next turn.
    async fn judge_gone(&mut self) {
        if self.unjudged.is_empty() {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let (tickets, devices) = {
            let flights = shared.flights.lock().expect("no panic while held");
            let mut asked = (Vec::new(), Vec::new());
            for ticket in &self.unjudged {
                let Some(flight) = flights.get(ticket) else { continue };
                asked.0.push((*ticket, flight.gone().len()));
                asked.1.extend(flight.gone().iter().map(|gone| gone.device));
            }
            asked
        };
        let times = match shared.store.device_times(&devices).await {
            Ok(times) => Some(times),
            Err(error) => {
                tracing::debug!(%error, "registrations cannot be read; asking again");
                self.unread += 1;
                if !self.finish.is_cancelled() || self.unread < LAST_TRIES {
                    return;
                }
                None
            }
        };
        self.unread = 0;
        let now = shared.runtime.now();
        // Nothing is retired unseen: the next start asks again.
        let mut times = times.map(Vec::into_iter);
        let mut flights = shared.flights.lock().expect("no panic while held");
        for (ticket, count) in tickets {
            let times: Option<Vec<_>> = times.as_mut().map(|times| times.by_ref().take(count).collect());
            let Some(flight) = flights.get_mut(&ticket) else { continue };
            let verdicts: Vec<GoneVerdict> = match times {
                None => vec![GoneVerdict::Keep; count],
                Some(times) => {
                    let of_flight = flight.gone().iter().zip(times);
                    let verdict = |(gone, times): (&Gone, Option<DeviceTimes>)| match times {
                        // The row went with its person.
                        None => GoneVerdict::Retire,
                        Some(times) => judge_gone(gone.since, times.confirmed_at, times.doubted_at, now),
                    };
                    of_flight.map(verdict).collect()
                }
            };
            let policy = shared.settings.retry(flight.route.spec.platform);
            for (device, until) in flight.judge_gone(&verdicts, shared.runtime.random_unit(), policy) {
                shared.quiet.add(device, until);
            }
        }
        drop(flights);
        self.unjudged.clear();
    }

    async fn write(&mut self) {
        let Writes { updates, ended } = self.collect();
        let mut updates = updates.into_iter().peekable();
        let mut chunks = Vec::new();
        while updates.peek().is_some() {
            let (chunk, after): (Vec<_>, Vec<_>) = updates.by_ref().take(WRITE).unzip();
            chunks.push((chunk, after));
        }
        let this = &*self;
        futures_util::stream::iter(chunks)
            .for_each_concurrent(WRITES, |(chunk, after)| this.write_chunk(chunk, after))
            .await;
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
            let policy = self.shared.settings.retry(flight.route.spec.platform);
            if !flight.gone().is_empty() {
                later.insert(ticket);
                continue;
            }
            match flight.next() {
                Next::Wait => {
                    let Some(since) = flight.unwritten_since() else { continue };
                    if instant - since < self.shared.settings.checkpoint {
                        later.insert(ticket);
                        continue;
                    }
                    writes.add(flight, policy, now, &runtime);
                }
                Next::Finish | Next::Return => {
                    let mut flight = flights.remove(&ticket).expect("it was just found");
                    writes.add(&mut flight, policy, now, &runtime);
                    writes.ended.push(flight);
                }
                // Not alone in flight while it waits for its gate: another claim counts it anew.
                Next::Regate if flight.is_suspect() && !flight.looks_elsewhere() => {
                    flight.put_back_pending();
                    later.insert(ticket);
                }
                Next::Regate => {
                    let mut flight = flights.remove(&ticket).expect("it was just found");
                    // Its next answer may be long in coming.
                    if flight.unwritten_since().is_some() && !planted::is("gated-again-unwritten") {
                        writes.add(&mut flight, policy, now, &runtime);
                    }
                    flight.let_go();
                    if let Err(mut flight) = self.regate(flight) {
                        let pending = flight.take_pending().len();
                        flight.put_back(pending);
                        flights.insert(ticket, flight);
                        later.insert(ticket);
                    }
                }
            }
        }
        self.dirty = later;
        writes
    }

    /// Back to its worker; `Err` when that has ended: shutdown, or the route was removed.
    fn regate(&self, flight: Box<Flight>) -> Result<(), Box<Flight>> {
        let (route, lane) = (flight.route.id, flight.job.lane);
        let Some(lanes) = self.shared.route(route) else { return Err(flight) };
        match lanes.lanes[lane.index()].work.send(Work::Regate(flight)) {
            Err(mpsc::error::SendError(Work::Regate(flight))) => Err(flight),
            Err(mpsc::error::SendError(Work::HandedOver(_))) | Ok(()) => Ok(()),
        }
    }

    async fn write_chunk(&self, updates: Vec<JobUpdate>, after: Vec<After>) {
        let (mut reported, mut tries) = (false, 0);
        let held = loop {
            match self.shared.store.record(updates.clone(), self.shared.runtime.now()).await {
                Ok(held) => break held,
                Err(error) => {
                    if !reported {
                        tracing::error!(%error, updates = updates.len(), "outcomes cannot be written; repeating");
                        reported = true;
                    }
                    if self.finish.is_cancelled() {
                        tries += 1;
                        if tries >= LAST_TRIES {
                            // Their leases stay with this owner, so that the next start takes them up, none before.
                            tracing::error!("shutting down with unwritten outcomes; these deliveries may be repeated");
                            return;
                        }
                    }
                    self.shared.runtime.sleep(REPEAT).await;
                }
            }
        };
        let mut release: Vec<(JobId, i64)> = Vec::new();
        let mut put_off: BTreeMap<UnixMs, Vec<(JobId, i64)>> = BTreeMap::new();
        let mut recorded = Recorded::default();
        for ((update, after), held) in updates.iter().zip(after).zip(held) {
            if !held {
                tracing::warn!(job_id = %update.job, "another owner has this job; its outcomes are not ours to write");
                continue;
            }
            recorded.add(&update.entries, update.retirements.len(), after.platform);
            let ended = update.entries.iter().filter(|entry| entry.code.state().is_final()).count() as u64;
            self.shared.room.ended(ended, u64::from(update.progress.is_none()));
            self.shared.room.opened(0, update.followers.len() as u64);
            match (after.release, after.put_off) {
                (false, _) => {}
                (true, None) => release.push((update.job, update.fence)),
                (true, Some(at)) => put_off.entry(at).or_default().push((update.job, update.fence)),
            }
        }
        recorded.count();
        for (until, jobs) in put_off {
            if let Err(error) = self.shared.store.put_off(jobs.clone(), until).await {
                tracing::warn!(%error, "held jobs could not be put off yet");
                self.shared.give_back_later(jobs, Some(until));
            }
        }
        if !release.is_empty()
            && let Err(error) = self.shared.store.release(release.clone(), self.shared.runtime.now()).await
        {
            tracing::warn!(%error, "leases could not be given back yet");
            self.shared.give_back_later(release, None);
        }
    }
}
