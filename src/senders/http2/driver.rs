//! One turn of a driver: what came in, what was answered, what goes out.

mod endings;

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::connect::Connect;
use super::exchange::{End, Exchange, Failure, Stage};
use super::lanes::{LaneQueue, Past, Pick, Work};
use super::link::Link;
use super::pool::Pool;
use super::slots::Slots;
use super::wake::Wakes;
use super::wire::{Answer, AuthState, Then, Wire, maybe_sent, not_sent, unsendable};
use super::{MAX_RESENDS, Settings};
use crate::domain::deny::DenyFeed;
use crate::domain::platform::Lane;
use crate::domain::sending::SendOutcome;
use crate::domain::time::UnixMs;
use crate::planted;
use crate::runtime::Runtime;
use crate::senders::Batch;

/// How often deadlines, stalls and growth are looked at while there is something to look at.
const TICK: Duration = Duration::from_millis(50);
/// The same while nothing is queued or in flight.
const IDLE_TICK: Duration = Duration::from_secs(5);
/// Rounds of one turn, then the thread's other drivers have theirs.
const MAX_ROUNDS: usize = 8;
/// While both lanes wait, every so many hand-overs one goes to BULK, so that it is slow and not stopped.
const BULK_TURN: u32 = 8;

/// What a driver is made of, kept to make it anew after a panic.
#[derive(Clone)]
pub(in crate::senders) struct Parts {
    /// For logs, e.g. `apns production`.
    pub(in crate::senders) name: Arc<str>,
    pub(in crate::senders) runtime: Runtime,
    pub(in crate::senders) settings: Settings,
    pub(in crate::senders) deny: Arc<DenyFeed>,
    pub(in crate::senders) connector: Arc<dyn Connect>,
}

pub(super) enum Command {
    Batches(Vec<Batch>),
    Drain { deadline: Duration, done: oneshot::Sender<()> },
}

/// What the outside sees of a driver.
#[derive(Default)]
pub(super) struct Shared {
    /// Targets accepted and not handed over; the bound of the queue.
    pub(super) queued: AtomicUsize,
    pub(super) in_flight: AtomicU32,
    pub(super) connections: AtomicU32,
    pub(super) is_stopped: AtomicBool,
}

type Timer = Pin<Box<dyn Future<Output = ()> + Send>>;

struct Stopping {
    hand_over_until: Instant,
    until: Instant,
    done: Vec<oneshot::Sender<()>>,
}

#[derive(Default)]
struct Effort {
    worked: Duration,
    since: Option<Instant>,
    is_busy: bool,
}

/// Where a target is that is in neither queue nor list just now: a panic must not lose it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hand {
    Ours,
    Theirs,
}

enum Handed {
    Over,
    /// It got its outcome without a request.
    Answered,
    /// The connection takes nothing; the target is back in the queue.
    NotTaken,
}

pub(super) struct Core<W: Wire> {
    parts: Parts,
    shared: Arc<Shared>,
    pub(super) inbox: mpsc::UnboundedReceiver<Command>,
    wire: W,
    pool: Pool,
    wakes: Wakes,
    works: Slots<Work>,
    /// Batches with results to be flushed at the end of the turn.
    touched: VecDeque<usize>,
    lanes: [LaneQueue; 2],
    lane_in_flight: [usize; 2],
    since_bulk: u32,
    exchanges: Slots<Exchange>,
    woken: Vec<usize>,
    current: Option<(Pick, Hand)>,
    stopping: Option<Stopping>,
    is_inbox_closed: bool,
    timer: Option<(Instant, Timer)>,
    effort: Effort,
    unusable_since: Option<Instant>,
}

impl<W: Wire> Core<W> {
    pub(super) fn new(parts: Parts, shared: Arc<Shared>, inbox: mpsc::UnboundedReceiver<Command>, wire: W) -> Self {
        let pool =
            Pool::new(Arc::clone(&parts.name), parts.runtime.clone(), parts.settings, Arc::clone(&parts.connector));
        Self {
            parts,
            shared,
            inbox,
            wire,
            pool,
            wakes: Wakes::default(),
            works: Slots::default(),
            touched: VecDeque::new(),
            lanes: [LaneQueue::default(), LaneQueue::default()],
            lane_in_flight: [0; 2],
            since_bulk: 0,
            exchanges: Slots::default(),
            woken: Vec::new(),
            current: None,
            stopping: None,
            is_inbox_closed: false,
            timer: None,
            effort: Effort::default(),
            unusable_since: None,
        }
    }

    /// Ready once it has drained and its connections are closed.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.wakes.begin(cx.waker());
        let began = self.parts.runtime.instant();
        self.take_commands(cx, began);
        if let Some((_, timer)) = &mut self.timer
            && timer.as_mut().poll(cx).is_ready()
        {
            self.timer = None;
            self.look_around(began);
        }
        for _ in 0..MAX_ROUNDS {
            let now = self.parts.runtime.instant();
            let mut progressed = self.poll_connections(cx, now);
            progressed |= self.settle(now);
            progressed |= self.hand_over(cx, now);
            if !progressed && !self.wakes.is_pending() {
                break;
            }
        }
        self.flush();
        let is_over = self.stop_if_done();
        let now = self.parts.runtime.instant();
        self.effort.worked += now - began;
        self.publish();
        if is_over {
            return Poll::Ready(());
        }
        self.arm_timer(cx, now);
        if self.wakes.end() {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    fn take_commands(&mut self, cx: &mut Context<'_>, now: Instant) {
        while !self.is_inbox_closed {
            match self.inbox.poll_recv(cx) {
                Poll::Ready(Some(Command::Batches(batches))) => {
                    for batch in batches {
                        self.accept(batch, now);
                    }
                }
                Poll::Ready(Some(Command::Drain { deadline, done })) => self.stop(now, deadline, Some(done)),
                Poll::Ready(None) => {
                    // The sender was dropped without a drain: what it took is still answered.
                    self.is_inbox_closed = true;
                    self.stop(now, self.parts.settings.request_timeout, None);
                }
                Poll::Pending => break,
            }
        }
    }

    fn accept(&mut self, batch: Batch, now: Instant) {
        let lane = batch.lane;
        let work = Work::new(batch, now);
        let key = self.works.next_key();
        self.lanes[lane.index()].push(key, &work);
        self.works.insert(work);
    }

    fn poll_connections(&mut self, cx: &mut Context<'_>, now: Instant) -> bool {
        let generation = self.wire.credential_generation();
        let is_proven = !self.wire.first_request_alone() || planted::is("first-request-in-company");
        self.pool.poll(cx, &mut self.wakes, |opened| Link::new(opened, generation, is_proven, now))
    }

    /// Takes the ends of the requests that were woken.
    fn settle(&mut self, now: Instant) -> bool {
        let mut woken = std::mem::take(&mut self.woken);
        self.wakes.take_exchanges(&mut woken);
        let mut progressed = false;
        for key in woken.drain(..) {
            progressed |= self.poll_exchange(key, now);
        }
        self.woken = woken;
        progressed
    }

    fn poll_exchange(&mut self, key: usize, now: Instant) -> bool {
        // A wake-up may be meant for the slot's former occupant, or come twice.
        let Some(exchange) = self.exchanges.get_mut(key) else { return false };
        let mut cx = Context::from_waker(self.wakes.exchange(key));
        let Poll::Ready(end) = exchange.poll(&mut cx) else { return false };
        if let Some(exchange) = self.exchanges.remove(key) {
            self.conclude(&exchange, end, now);
        }
        true
    }

    fn conclude(&mut self, exchange: &Exchange, end: End, now: Instant) {
        self.lane_in_flight[exchange.lane.index()] -= 1;
        let Pick { work, at, past } = exchange.pick;
        self.current = Some((exchange.pick, Hand::Theirs));
        match end {
            End::Answer(head, body) => {
                let answer = Answer { status: head.status, headers: &head.headers, body: body.bytes() };
                let wall = self.parts.runtime.now();
                let verdict = self.wire.classify(&answer, wall);
                self.pool.answered(exchange.link);
                if verdict.credential_accepted
                    && let Some(link) = self.pool.link(exchange.link)
                {
                    link.is_proven = true;
                }
                match verdict.then {
                    Then::Keep => {}
                    Then::Retire => self.pool.retire(exchange.link, &self.wakes),
                    Then::Reauth | Then::ReauthOnNewConnection => {
                        self.wire.credential_rejected(exchange.generation, wall);
                        if verdict.then == Then::ReauthOnNewConnection
                            && !planted::is("stale-token-keeps-its-connection")
                        {
                            self.pool.retire_up_to(exchange.generation, &self.wakes);
                        }
                        if !past.reauthed {
                            self.pool.finished_one(exchange.link, exchange.body_len, exchange.body_end);
                            self.send_again(exchange, Past { reauthed: true, ..past });
                            return;
                        }
                    }
                }
                self.answer(work, at, verdict.outcome);
            }
            End::Failed(error) => match Failure::of(&error) {
                Failure::Unknown(why) if planted::is("in-doubt-counts-as-unsent") => {
                    self.answer(work, at, not_sent(&why));
                }
                Failure::Refused if planted::is("refused-stream-in-doubt") => {
                    self.answer(work, at, maybe_sent("stream refused"));
                }
                Failure::Unknown(why) => self.answer(work, at, maybe_sent(&why)),
                failure @ (Failure::Refused | Failure::GoneAway) => {
                    if failure == Failure::Refused
                        && let Some(link) = self.pool.link(exchange.link)
                    {
                        link.refused_a_stream(now);
                    }
                    if past.resends < MAX_RESENDS {
                        self.send_again(exchange, Past { resends: past.resends + 1, ..past });
                    } else {
                        let why = if failure == Failure::Refused { "stream refused" } else { "connection went away" };
                        self.answer(work, at, not_sent(why));
                    }
                }
            },
        }
        self.pool.finished_one(exchange.link, exchange.body_len, exchange.body_end);
    }

    fn send_again(&mut self, exchange: &Exchange, past: Past) {
        self.current = None;
        self.shared.queued.fetch_add(1, Ordering::Relaxed);
        self.lanes[exchange.lane.index()].push_again(Pick { past, ..exchange.pick });
    }

    fn waiting(&self) -> usize {
        self.lanes.iter().map(LaneQueue::waiting).sum()
    }

    /// Fills the free streams. True when anything changed.
    fn hand_over(&mut self, cx: &mut Context<'_>, now: Instant) -> bool {
        if self.waiting() == 0 {
            return false;
        }
        let wall = self.parts.runtime.now();
        let mut progressed = self.pool.connect_if_needed(now);
        match self.wire.poll_auth(wall, cx) {
            AuthState::Ready => {}
            AuthState::Waiting => return progressed,
            AuthState::Failed(outcome) => {
                self.answer_queued(|_| true, &outcome);
                return true;
            }
        }
        let capacity = self.pool.capacity();
        let kept = if planted::is("bulk-takes-every-stream") { 0 } else { capacity.div_ceil(4) };
        let bulk_limit = (capacity - kept).max(1);
        while let Some(lane) = self.choose_lane(bulk_limit) {
            let Some(link) = self.pool.free_link(now, &mut self.wakes) else { break };
            let Some(pick) = self.lanes[lane.index()].pick(&mut self.works) else { break };
            self.shared.queued.fetch_sub(1, Ordering::Relaxed);
            match self.hand_over_one(pick, lane, link, wall, now) {
                Handed::Over => self.since_bulk = if lane == Lane::Bulk { 0 } else { self.since_bulk + 1 },
                Handed::Answered => {}
                Handed::NotTaken => {
                    self.current = None;
                    self.shared.queued.fetch_add(1, Ordering::Relaxed);
                    self.lanes[lane.index()].put_back(pick);
                }
            }
            progressed = true;
        }
        progressed
    }

    /// INTERACTIVE first, but for every eighth; BULK within its share.
    fn choose_lane(&self, bulk_limit: usize) -> Option<Lane> {
        let waits = |lane: Lane| self.lanes[lane.index()].waiting() > 0;
        let bulk = waits(Lane::Bulk) && self.lane_in_flight[Lane::Bulk.index()] < bulk_limit;
        match (waits(Lane::Interactive), bulk) {
            (true, true) if self.since_bulk + 1 >= BULK_TURN => Some(Lane::Bulk),
            (true, _) => Some(Lane::Interactive),
            (false, true) => Some(Lane::Bulk),
            (false, false) => None,
        }
    }

    /// The last look before a push is out of our hands, and the hand-over, with nothing between them.
    fn hand_over_one(&mut self, pick: Pick, lane: Lane, link_at: usize, wall: UnixMs, now: Instant) -> Handed {
        self.current = Some((pick, Hand::Ours));
        let work = self.works.get(pick.work).expect("a batch stays until its last target is answered");
        let batch = &work.batch;
        let target = &batch.targets[pick.at];
        let gate_age = now.into_std().saturating_duration_since(batch.gated_at);
        if wall >= batch.expires_at
            || (gate_age > DenyFeed::GATE_GOOD_FOR && !planted::is("old-gate-trusted"))
            || !self.parts.deny.is_complete(now.into_std())
            || (self.parts.deny.hit(batch.gated, target.user, target.device, batch.notification)
                && !planted::is("deny-feed-not-asked")
                && !(planted::is("gate-cached-for-two-seconds") && gate_age < Duration::from_secs(2)))
        {
            self.answer(pick.work, pick.at, SendOutcome::Held);
            return Handed::Answered;
        }
        let (request, body) = match self.wire.request(batch, target, wall) {
            Ok(request) => request,
            Err(outcome) => {
                self.answer(pick.work, pick.at, outcome);
                return Handed::Answered;
            }
        };
        let Some(sender) = self.pool.link(link_at).and_then(|link| link.sender(now)) else {
            return Handed::NotTaken;
        };
        self.current = Some((pick, Hand::Theirs));
        let (response, mut stream) = match sender.send_request(request, body.is_empty()) {
            Ok(sent) => sent,
            Err(error) if error.is_io() || error.is_go_away() => {
                self.pool.retire(link_at, &self.wakes);
                return Handed::NotTaken;
            }
            Err(_) => {
                // h2 refuses the request itself; it would do so every time.
                self.answer(pick.work, pick.at, unsendable("not a valid HTTP/2 request"));
                return Handed::Answered;
            }
        };
        let body_len = body.len();
        let body_end = self.pool.link(link_at).map_or(0, |link| link.took(body_len));
        if !body.is_empty() {
            // An error here ends the stream, and the response tells it.
            let _ = stream.send_data(body, true);
        }
        drop(stream);
        self.lane_in_flight[lane.index()] += 1;
        let key = self.exchanges.insert(Exchange {
            pick,
            lane,
            link: link_at,
            generation: self.wire.credential_generation(),
            deadline: now + self.parts.settings.request_timeout,
            body_len,
            body_end,
            stage: Stage::Head(response),
        });
        self.current = None;
        // The first poll leaves the slot's waker with the stream.
        self.poll_exchange(key, now);
        Handed::Over
    }

    fn answer(&mut self, work: usize, at: usize, outcome: SendOutcome) {
        self.current = None;
        let entry = self.works.get_mut(work).expect("a batch stays until its last target is answered");
        if entry.results.is_empty() {
            self.touched.push_back(work);
        }
        entry.answer(at, outcome);
    }

    /// Answers what waits, of the batches chosen, with one and the same outcome.
    fn answer_queued(&mut self, is_chosen: impl Fn(&Work) -> bool, outcome: &SendOutcome) {
        for lane in 0..self.lanes.len() {
            let picks = self.lanes[lane].take(&mut self.works, &is_chosen);
            self.shared.queued.fetch_sub(picks.len(), Ordering::Relaxed);
            for pick in picks {
                self.answer(pick.work, pick.at, outcome.clone());
            }
        }
    }

    /// Sends the turn's results and forgets the batches that are through.
    fn flush(&mut self) {
        while let Some(key) = self.touched.pop_front() {
            // The same batch may be listed twice, and its slot may have been given away meanwhile.
            let Some(work) = self.works.get_mut(key) else { continue };
            work.flush();
            if work.unanswered == 0 {
                self.works.remove(key);
            }
        }
    }

    fn publish(&self) {
        self.shared.in_flight.store(count(self.exchanges.len()), Ordering::Relaxed);
        self.shared.connections.store(count(self.pool.open_count()), Ordering::Relaxed);
    }

    fn arm_timer(&mut self, cx: &mut Context<'_>, now: Instant) {
        let is_active = self.works.len() > 0 || self.stopping.is_some() || self.pool.needs_close_look();
        if !is_active && self.pool.is_empty() {
            self.timer = None;
            return;
        }
        let wanted = now + if is_active { TICK } else { IDLE_TICK };
        if self.timer.as_ref().is_some_and(|(at, _)| *at <= wanted) {
            return;
        }
        let runtime = self.parts.runtime.clone();
        let mut timer: Timer = Box::pin(async move { runtime.sleep_until(wanted).await });
        if timer.as_mut().poll(cx).is_ready() {
            // The next turn finds it ready, too.
            timer = Box::pin(std::future::ready(()));
            cx.waker().wake_by_ref();
        }
        self.timer = Some((wanted, timer));
    }
}

fn count(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
