//! One route and lane: claim, gate, render, hand to the sender.

mod encoding;
mod gating;
mod suspects;

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use self::encoding::EncodedKey;
use super::flight::Flight;
use super::shared::{Link, RouteLanes, Shared, Work};
use crate::domain::deny::DenyPosition;
use crate::domain::device::Labels;
use crate::domain::event_type::{Definition, LocaleTemplate};
use crate::domain::ids::{RouteId, UserId};
use crate::domain::notification::{HandedOver, Notification, Permit, TargetFacts};
use crate::domain::outcome::ResultCode;
use crate::domain::platform::Lane;
use crate::domain::time::UnixMs;
use crate::planted;
use crate::render::Templates;
use crate::runtime::Instant;
use crate::senders::{Batch, Encoded, SendTarget, Sink};
use crate::storage::{ClaimRequest, Claimed, GateQuestion, StoreError};

/// How long a worker leaves the store alone after it failed.
const STORE_PAUSE: Duration = Duration::from_millis(500);
/// A worker looks at some jobs of a route that an operator or a fault holds so often, to end those past their TTL or to ask
/// whether it works again.
const HELD_PAUSE: Duration = Duration::from_millis(250);
/// How exactly our clock is known to be the store's.
const CLOCK_GRAIN: Duration = Duration::from_millis(5);
/// How long a worker waits after its sender took nothing.
const SENDER_PAUSE: Duration = Duration::from_millis(100);
/// … and so often where none is due.
const LOOK_PAUSE: Duration = Duration::from_secs(1);

pub struct Worker {
    shared: Arc<Shared>,
    lanes: Arc<RouteLanes>,
    route: RouteId,
    lane: Lane,
    work: mpsc::UnboundedReceiver<Work>,
    encoded: HashMap<EncodedKey, Result<Encoded, ResultCode>>,
    /// What `encoded` was made for.
    link: Arc<Link>,
    aim: Aim,
    /// Looks put jobs off, to be taken up when the fault is over.
    put_off: bool,
}

/// What is claimed now is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Aim {
    Send,
    /// One target asks whether a route that had a fault works again.
    Probe,
    /// It cannot be sent, for the route has a fault: what is past its TTL ends, the rest is put off.
    Look,
}

/// The names and labels of a job's targets, where they are asked for.
type Known = Option<Vec<Option<(UserId, Labels)>>>;

/// What a claim round came to.
enum Round {
    /// There may be more.
    Busy,
    /// Nothing is due before this.
    Idle(Option<UnixMs>),
    /// Leave the store or sender alone for a moment.
    Trouble(Duration),
}

impl Worker {
    pub fn new(shared: Arc<Shared>, lanes: Arc<RouteLanes>, lane: Lane, work: mpsc::UnboundedReceiver<Work>) -> Self {
        let (route, link) = (lanes.route.id, lanes.link());
        Self { shared, lanes, route, lane, work, encoded: HashMap::new(), link, aim: Aim::Send, put_off: false }
    }

    /// Runs until the engine stops or the route is removed; then what is in the inbox goes back to the queue.
    pub async fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let lanes = Arc::clone(&self.lanes);
        let spec = &lanes.route.spec;
        let mut pauses = shared.holds.watched();
        let inbox = &lanes.lanes[self.lane.index()];
        let mut claim_at = Some(shared.runtime.instant());
        loop {
            let now = shared.runtime.instant();
            // From a route that an operator holds only a little is claimed at a time, and put off: see [`Worker::claim`].
            let held = pauses.now().of_route(spec.app, spec.platform).is_some();
            let claim_now = claim_at.is_some_and(|at| at <= now);
            let is_broken = lanes.is_broken();
            if !is_broken && std::mem::take(&mut self.put_off) {
                shared.holds.fault_is_over(self.route);
            }
            let pause = lanes.paused_until(self.lane, now);
            // A fault's pause is for sending; it is looked on for what is past its TTL.
            let waits = pause.is_some() && !is_broken;
            let next = match (pause, claim_at) {
                (Some(pause), Some(claim)) if is_broken => Some(pause.min(claim)),
                _ => pause.or(claim_at),
            };
            tokio::select! {
                biased;
                () = shared.stopping.cancelled() => break,
                () = lanes.removed.cancelled() => break,
                () = pauses.changed() => claim_at = Some(shared.runtime.instant()),
                work = self.work.recv() => match work {
                    Some(work) => {
                        if !self.take(work).await {
                            shared.runtime.sleep(SENDER_PAUSE).await;
                        }
                    }
                    None => break,
                },
                () = inbox.wake.notified(), if !claim_now && !held => {
                    let soon = shared.runtime.instant() + if lanes.is_broken() { HELD_PAUSE } else { Duration::ZERO };
                    claim_at = Some(claim_at.map_or(soon, |at| at.min(soon)));
                }
                () = shared.runtime.sleep_until(next.unwrap_or(now + shared.settings.poll)), if waits || !claim_now => {
                    claim_at = Some(shared.runtime.instant());
                }
                () = std::future::ready(()), if !waits && claim_now => {
                    claim_at = match self.claim().await {
                        Round::Busy => Some(shared.runtime.instant()),
                        Round::Idle(next) => Some(self.wake_at(next)),
                        Round::Trouble(pause) => Some(shared.runtime.instant() + pause),
                    };
                }
            }
        }
        self.give_back().await;
    }

    /// When to look again although nothing woke us. Nothing was due when we looked: where our clock says otherwise it is not
    /// quite the store's, and must not make us ask without a pause.
    fn wake_at(&self, next_due: Option<UnixMs>) -> Instant {
        let now = self.shared.runtime.instant();
        let poll = self.shared.settings.poll;
        match next_due {
            Some(due) => now + due.since(self.shared.runtime.now()).max(CLOCK_GRAIN).min(poll),
            None => now + poll,
        }
    }

    /// What is past its TTL waits for nothing, and only a look at it tells. So a route that an operator or a fault holds is
    /// claimed from, too, but slowly: what is still to wait is put off behind what was not looked at yet, and as long as some
    /// of a round was past its TTL the next one follows at once.
    async fn claim(&mut self) -> Round {
        let shared = Arc::clone(&self.shared);
        let settings = &shared.settings;
        let now = shared.runtime.instant();
        let aim = if !self.lanes.is_broken() {
            Aim::Send
        } else if self.lanes.paused_until(self.lane, now).is_none() && self.lanes.begin_probe(now) {
            Aim::Probe
        } else {
            Aim::Look
        };
        if aim == Aim::Look && planted::is("expired-waits-for-the-probe") {
            return Round::Trouble(LOOK_PAUSE);
        }
        let (max_jobs, most) = match aim {
            Aim::Probe => (1, 1),
            Aim::Send | Aim::Look => (settings.max_claim_jobs, settings.max_claim_targets),
        };
        let share = Arc::clone(&self.lanes.share);
        let mut room = {
            let mut room = std::pin::pin!(shared.permits.claim(&shared.runtime, &share, self.lane, most));
            loop {
                tokio::select! {
                    biased;
                    () = shared.stopping.cancelled() => return Round::Idle(None),
                    () = self.lanes.removed.cancelled() => return Round::Idle(None),
                    // What comes back, or is handed over, has room of its own, which may be all that there is: to wait for
                    // some with the inbox unread could be for ever.
                    work = self.work.recv() => match work {
                        Some(work) => {
                            if !self.take(work).await {
                                shared.runtime.sleep(SENDER_PAUSE).await;
                            }
                        }
                        None => return Round::Idle(None),
                    },
                    room = &mut room => break room,
                }
            }
        };
        let request = ClaimRequest {
            route: self.route,
            lane: self.lane,
            max_targets: match aim {
                Aim::Probe => 1,
                Aim::Look => room.targets(),
                Aim::Send => self.lanes.credential.pacer.claimable(room.targets()),
            },
            max_jobs,
        };
        let now = shared.runtime.now();
        let claimed = match self.claim_for(request, aim, now).await {
            Ok(claimed) => claimed,
            Err(error) => {
                self.end_probe(aim);
                return self.store_trouble("claiming jobs", &error);
            }
        };
        if claimed.is_empty() {
            drop(room);
            self.end_probe(aim);
            if aim != Aim::Send {
                return Round::Trouble(LOOK_PAUSE);
            }
            return match shared.store.next_due(self.route, self.lane).await {
                Ok(next) => Round::Idle(next),
                Err(error) => self.store_trouble("looking for due jobs", &error),
            };
        }
        let mut trouble = None;
        let spec = &self.lanes.route.spec;
        let is_held = aim != Aim::Send || shared.holds.now().of_route(spec.app, spec.platform).is_some();
        let idles = is_held && claimed.iter().all(|one| one.notification.expires_at > now);
        self.aim = aim;
        let mut together = Vec::with_capacity(claimed.len());
        let mut suspects = Vec::new();
        for Claimed { job, notification } in claimed {
            let permit = room.split(job.targets.len());
            let flight = self.flight(job, notification, permit);
            if flight.is_suspect() { suspects.push(flight) } else { together.push(flight) }
        }
        // A suspect may wait for long; what is left of the room is for others.
        drop(room);
        let groups = std::iter::once(together).chain(suspects.into_iter().map(|flight| vec![flight]));
        for flights in groups.filter(|flights| !flights.is_empty()) {
            match self.gate_and_send(flights).await {
                Ok(true) => {}
                Ok(false) => trouble = Some(Round::Trouble(SENDER_PAUSE)),
                // The jobs after this one fail alike and give their leases back.
                Err(error) => trouble = Some(self.store_trouble("gating", &error)),
            }
        }
        // A probe that was not sent: its targets were all kept back.
        let unsent = std::mem::replace(&mut self.aim, Aim::Send);
        self.end_probe(unsent);
        trouble.unwrap_or(if idles { Round::Trouble(HELD_PAUSE) } else { Round::Busy })
    }

    /// A probe asks with what a look has put off, where there is nothing else.
    async fn claim_for(&self, request: ClaimRequest, aim: Aim, now: UnixMs) -> Result<Vec<Claimed>, StoreError> {
        let store = &self.shared.store;
        let claimed = store.claim(request, self.shared.owner, now).await?;
        let may_pull = claimed.is_empty() && aim == Aim::Probe;
        if !may_pull || store.pull_forward(self.route, self.lane, now, 1).await? == 0 {
            return Ok(claimed);
        }
        store.claim(request, self.shared.owner, now).await
    }

    fn end_probe(&self, aim: Aim) {
        if aim == Aim::Probe {
            self.lanes.end_probe();
        }
    }

    fn store_trouble(&self, doing: &str, error: &StoreError) -> Round {
        tracing::warn!(route_id = %self.route, %error, "the store failed while {doing}; trying again");
        Round::Trouble(STORE_PAUSE)
    }

    fn flight(&self, job: crate::domain::notification::Job, notification: Arc<Notification>, permit: Permit) -> Flight {
        Flight::new(job, notification, Arc::clone(&self.lanes.route), permit, self.shared.runtime.instant())
    }

    /// Whether the sender and the store went along.
    async fn take(&mut self, work: Work) -> bool {
        match work {
            Work::Regate(flight) => match self.gate_and_send(vec![*flight]).await {
                Ok(taken) => taken,
                Err(error) => {
                    tracing::warn!(route_id = %self.route, %error, "the store failed while gating again");
                    false
                }
            },
            Work::HandedOver(jobs) => {
                let (mut batches, mut taken) = (Vec::with_capacity(jobs.len()), true);
                let Some(guard) = self.beside_others().await else {
                    let flight = |handed: HandedOver| self.flight(handed.job, handed.notification, handed.permit);
                    self.put_back_all(jobs.into_iter().map(flight).collect());
                    return true;
                };
                self.refresh_link();
                for handed in jobs {
                    match self.prepare_handed(handed, Arc::clone(&guard)).await {
                        Ok(batch) => batches.extend(batch),
                        Err(error) => {
                            tracing::warn!(route_id = %self.route, %error, "an event type's version cannot be read");
                            taken = false;
                        }
                    }
                }
                self.submit(batches) && taken
            }
        }
    }

    /// To be called before the first of a group is prepared: all of a group goes out through one sender, for another
    /// cannot read what the one before encoded.
    fn refresh_link(&mut self) {
        let link = self.lanes.link();
        if !Arc::ptr_eq(&link, &self.link) {
            self.encoded.clear();
            self.link = link;
        }
    }

    async fn prepare_handed(
        &mut self,
        handed: HandedOver,
        guard: Arc<dyn Any + Send + Sync>,
    ) -> Result<Option<Batch>, StoreError> {
        let HandedOver { job, notification, facts, gated, gated_at, permit } = handed;
        let mut flight = self.flight(job, notification, permit);
        if self.hold(&mut flight) {
            self.settle(flight);
            return Ok(None);
        }
        flight.keep(guard);
        let templates = match self.templates(&flight.notification).await {
            Ok(templates) => templates,
            Err(error) => {
                let pending = flight.take_pending().len();
                flight.put_back(pending);
                self.settle(flight);
                return Err(error);
            }
        };
        let allowed: Vec<(u32, TargetFacts)> = flight.take_pending().into_iter().zip(facts).collect();
        Ok(self.prepare(flight, templates.as_deref(), allowed, gated, gated_at).await)
    }

    /// The gate before each send: asks the database about all of them at once, ends what is forbidden and sends the
    /// rest. `Ok(false)`: the sender did not take everything. Either way such a job goes back to the queue with what was
    /// already known written. A suspect job comes alone.
    async fn gate_and_send(&mut self, flights: Vec<Flight>) -> Result<bool, StoreError> {
        let shared = Arc::clone(&self.shared);
        let mut flights = flights;
        let suspect = flights.iter().any(Flight::is_suspect);
        if let [flight] = &mut flights[..]
            && suspect
            && self.aim == Aim::Look
            && self.hold(flight)
        {
            // Nobody else has to stop for what is not sent.
            self.settle_all(flights);
            return Ok(true);
        }
        if let [flight] = &mut flights[..]
            && suspect
            && !planted::is("crashes-not-counted")
            && self.isolate(flight)
        {
            self.settle_all(flights);
            return Ok(true);
        }
        let guard = if suspect { self.alone().await } else { self.beside_others().await };
        let Some(guard) = guard else {
            self.put_back_all(flights);
            return Ok(true);
        };
        // Before the look at the pauses and the query: whatever they miss has a higher position.
        let gated = shared.deny.position();
        let gated_at = shared.runtime.instant().into_std();
        let mut going = Vec::with_capacity(flights.len());
        for mut flight in flights {
            if self.hold(&mut flight) {
                self.settle(flight);
            } else {
                flight.keep(Arc::clone(&guard));
                going.push(flight);
            }
        }
        drop(guard);
        let mut flights = going;
        if flights.is_empty() {
            return Ok(true);
        }
        if let [flight] = &mut flights[..]
            && suspect
            && flight.count_alone()
        {
            let counted = shared.store.run_alone(flight.job.id, flight.job.fence).await;
            if !matches!(counted, Ok(true)) {
                self.put_back_all(flights);
                return counted;
            }
        }
        let pending: Vec<Vec<u32>> = flights.iter_mut().map(Flight::take_pending).collect();
        let question = |(flight, pending): (&Flight, &Vec<u32>)| GateQuestion {
            notification: flight.notification.id,
            event_type: flight.notification.event_type.clone(),
            targets: pending.iter().map(|index| flight.job.targets[*index as usize]).collect(),
        };
        let questions: Vec<GateQuestion> = flights.iter().zip(&pending).map(question).collect();
        let notifications = flights.iter().map(|flight| Arc::clone(&flight.notification)).collect();
        let read = self.ask_gates(questions, notifications).await;
        let (templates, read) = match read {
            Ok(read) => read,
            Err(error) => {
                for (mut flight, pending) in flights.into_iter().zip(pending) {
                    flight.put_back(pending.len());
                    self.settle(flight);
                }
                return Err(error);
            }
        };
        self.refresh_link();
        let mut batches = Vec::with_capacity(flights.len());
        for (((flight, pending), templates), facts) in flights.into_iter().zip(pending).zip(templates).zip(read) {
            let (flight, allowed) = self.gate(flight, pending, facts);
            batches.extend(self.prepare(flight, templates.as_deref(), allowed, gated, gated_at).await);
        }
        Ok(self.submit(batches))
    }

    /// The templates of the version that the notification was accepted with.
    async fn templates(&self, notification: &Notification) -> Result<Option<Arc<Templates>>, StoreError> {
        let Some(version) = notification.type_version else { return Ok(None) };
        match self.shared.types.get_or_load(version, self.shared.store.type_definition(version)).await {
            Ok(templates) => Ok(Some(templates)),
            // What was accepted is shown all the same.
            Err(error @ StoreError::Corrupt { .. }) => {
                tracing::error!(notification_id = %self.shared.public_id(notification.id), %error, "an event type's version is lost");
                let words = LocaleTemplate { title: Some(String::new()), ..LocaleTemplate::default() };
                let name = notification.event_type.to_string();
                let definition = Definition { name, templates: vec![words], ..Definition::default() };
                Ok(Some(Arc::new(Templates::standing_in(definition))))
            }
            Err(error) => Err(error),
        }
    }

    /// Renders and encodes; the flight is then known by the batch's ticket. `None`: there is nothing to send.
    async fn prepare(
        &mut self,
        mut flight: Flight,
        templates: Option<&Templates>,
        mut allowed: Vec<(u32, TargetFacts)>,
        gated: DenyPosition,
        gated_at: std::time::Instant,
    ) -> Option<Batch> {
        let shared = Arc::clone(&self.shared);
        let link = Arc::clone(&self.link);
        self.keep_back(&mut flight, &mut allowed);
        let notification = Arc::clone(&flight.notification);
        let (encoded, mut targets) = self.encode_for(&mut flight, &notification, templates, allowed, &link);
        if !targets.is_empty() {
            self.pace(&mut flight, &mut targets).await;
        }
        if targets.is_empty() {
            self.settle(flight);
            return None;
        }
        // A probe that is sent ends with its answer.
        self.aim = Aim::Send;
        let count = targets.len();
        let now = shared.runtime.instant();
        let read_at = shared.runtime.now().minus(now.into_std().saturating_duration_since(gated_at));
        flight.sending(count, read_at, now);
        if flight.probing().is_none() {
            self.lanes.share.asks(now);
        }
        let ticket = shared.ticket();
        let batch = Batch {
            route: Arc::clone(flight.probing().unwrap_or(&self.lanes.route)),
            lane: self.lane,
            notification: notification.id,
            encoded,
            targets,
            expires_at: notification.expires_at,
            gated,
            gated_at,
            sink: Sink { ticket, outcomes: shared.outcomes.clone() },
        };
        shared.flights.lock().expect("no panic while held").insert(ticket, Box::new(flight));
        Some(batch)
    }

    /// Whether the sender took all of them.
    fn submit(&self, batches: Vec<Batch>) -> bool {
        if batches.is_empty() {
            return true;
        }
        let left = self.link.sender.submit_all(batches);
        if left.is_empty() {
            return true;
        }
        for batch in left {
            let mut flights = self.shared.flights.lock().expect("no panic while held");
            if let Some(flight) = flights.get_mut(&batch.sink.ticket) {
                flight.not_taken(batch.targets.len());
                drop(flights);
                self.shared.settled.tell(batch.sink.ticket);
            }
        }
        false
    }

    /// What must not go out now: devices that are left alone, all but one where a fault is to be probed, and everything
    /// while the provider's complaint holds.
    fn keep_back(&self, flight: &mut Flight, allowed: &mut Vec<(u32, TargetFacts)>) {
        let shared = &self.shared;
        let (now, wall) = (shared.runtime.instant(), shared.runtime.now());
        allowed.retain(|(index, facts)| match shared.quiet.until(facts.target.device, wall) {
            None => true,
            Some(until) => {
                flight.defer(*index, until, now);
                false
            }
        });
        if allowed.is_empty() {
            return;
        }
        if let Some(until) = self.lanes.credential.slowed_until(now) {
            flight.put_off(allowed.len(), wall.plus(until - now));
            allowed.clear();
        } else if self.lanes.is_broken() {
            let kept = usize::from(self.aim == Aim::Probe).min(allowed.len());
            // Not always the same: it may be the one whose token is dead.
            #[expect(clippy::cast_possible_truncation, reason = "below the length of a job")]
            let chosen = (shared.runtime.random_u64() % (allowed.len().max(1) as u64)) as usize;
            if kept > 0 {
                allowed.swap(0, chosen);
            }
            flight.put_back(allowed.len() - kept);
            allowed.truncate(kept);
        }
    }

    /// Takes a permit of the credential's rate for each target; those without one wait for the next.
    async fn pace(&self, flight: &mut Flight, targets: &mut Vec<SendTarget>) {
        let shared = &self.shared;
        let taken = self.lanes.credential.pacer.take(&shared.runtime, &*shared.store, self.lane, targets.len()).await;
        let permits = usize::try_from(taken.permits).unwrap_or(usize::MAX);
        if permits < targets.len() {
            let rest = targets.len() - permits;
            targets.truncate(permits);
            flight.put_off(rest, shared.runtime.now().plus(taken.again));
        }
    }

    /// They go back to the queue as they are.
    fn put_back_all(&self, mut flights: Vec<Flight>) {
        for flight in &mut flights {
            flight.put_back_pending();
        }
        self.settle_all(flights);
    }

    fn settle_all(&self, flights: Vec<Flight>) {
        for flight in flights {
            self.settle(flight);
        }
    }

    /// Hands a flight without outstanding targets to the writer of outcomes.
    fn settle(&self, flight: Flight) {
        let ticket = self.shared.ticket();
        self.shared.flights.lock().expect("no panic while held").insert(ticket, Box::new(flight));
        self.shared.settled.tell(ticket);
    }

    /// What was handed over and not begun goes back, without an attempt.
    async fn give_back(&mut self) {
        self.work.close();
        let mut jobs = Vec::new();
        while let Ok(work) = self.work.try_recv() {
            match work {
                Work::HandedOver(handed) => {
                    jobs.extend(handed.into_iter().map(|handed| (handed.job.id, handed.job.fence)));
                }
                // Some of its targets have answers that must be written first.
                Work::Regate(flight) => self.put_back_all(vec![*flight]),
            }
        }
        if !jobs.is_empty()
            && let Err(error) = self.shared.store.release(jobs.clone(), self.shared.runtime.now()).await
        {
            tracing::warn!(%error, "leases could not be given back yet");
            self.shared.give_back_later(jobs, None);
        }
    }
}
