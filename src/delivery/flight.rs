//! A job in flight: what its targets' answers have come to since the last flush.
//!
//! Pure bookkeeping and decisions. `outcomes` feeds it and writes what it gives.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use crate::domain::device::Retirement;
use crate::domain::event_type::OnMaybe;
use crate::domain::notification::{Job, NewJob, Notification, Permit};
use crate::domain::outcome::{Entry, ResultCode};
use crate::domain::platform::Route;
use crate::domain::retry::RetryPolicy;
use crate::domain::sending::{ProviderAnswer, RetryCause, SendOutcome};
use crate::domain::targets::{MAX_TARGETS, Target};
use crate::domain::time::UnixMs;
use crate::runtime::Instant;
use crate::storage::{Attempt, JobUpdate};

/// Retries are due on this grid, so that those of one moment share a job.
const RETRY_GRID_MS: i64 = 250;

/// A claimed or handed-over job until its outcomes are durable.
pub struct Flight {
    pub job: Job,
    pub notification: Arc<Notification>,
    pub route: Arc<Route>,
    #[expect(dead_code, reason = "room in the engine, given back when this is dropped")]
    permit: Permit,
    /// Handed to the sender and not answered yet.
    outstanding: usize,
    /// To be gated again once nothing is outstanding.
    held: Vec<u32>,
    /// Some targets go back to the queue as they are.
    returned: usize,
    /// … and not before this.
    put_off: Option<UnixMs>,
    entries: Vec<Entry>,
    details: Vec<Attempt>,
    retries: Vec<Retry>,
    retirements: Vec<Retirement>,
    first_answer_at: Option<Instant>,
    /// A configuration fault was among the answers.
    broken: Option<ProviderAnswer>,
    succeeded: bool,
    sent_at: Instant,
    /// When the tokens at the sender were read: what a "gone" without a time is held to, so that a token registered
    /// since then survives.
    read_at: UnixMs,
    /// Keeps suspect jobs and the others apart.
    kept: Option<Box<dyn Any + Send>>,
    split: Vec<NewJob>,
}

struct Retry {
    target: Target,
    cause: RetryCause,
    hint: Option<Duration>,
    answer: ProviderAnswer,
    at: UnixMs,
}

/// What to do with a flight after answers came in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// More answers are to come.
    Wait,
    /// All answered, some must pass the gate again.
    Regate,
    /// All answered: write and end it.
    Finish,
    /// All answered, but some targets go back to the queue.
    Return,
}

/// Everything of a flush: the write, and what the engine learned for itself.
pub struct Flush {
    pub update: JobUpdate,
    /// The job must be released after the write.
    pub release: bool,
    /// … and not claimed again before this.
    pub put_off: Option<UnixMs>,
}

impl Flight {
    pub fn new(job: Job, notification: Arc<Notification>, route: Arc<Route>, permit: Permit, now: Instant) -> Self {
        Self {
            job,
            notification,
            route,
            permit,
            outstanding: 0,
            held: Vec::new(),
            returned: 0,
            put_off: None,
            entries: Vec::new(),
            details: Vec::new(),
            retries: Vec::new(),
            retirements: Vec::new(),
            first_answer_at: None,
            broken: None,
            succeeded: false,
            sent_at: now,
            read_at: UnixMs(0),
            kept: None,
            split: Vec::new(),
        }
    }

    /// Holds `guard` until the flight has ended.
    pub fn keep(&mut self, guard: impl Any + Send) {
        self.kept = Some(Box::new(guard));
    }

    pub fn is_kept(&self) -> bool {
        self.kept.is_some()
    }

    /// Targets that no run finished.
    pub fn pending(&self) -> Vec<u32> {
        let count = u32::try_from(self.job.targets.len()).expect("a job is small");
        (0..count).filter(|index| !self.job.progress.is_finished(*index as usize)).collect()
    }

    /// Targets to gate: those that no run finished, or those held.
    pub fn take_pending(&mut self) -> Vec<u32> {
        if self.held.is_empty() { self.pending() } else { std::mem::take(&mut self.held) }
    }

    /// Taken targets go back to the queue as they are.
    pub fn put_back(&mut self, targets: usize) {
        self.returned += targets;
    }

    /// All unfinished targets go back and are held until later.
    pub fn hold(&mut self, until: UnixMs) {
        let pending = self.take_pending().len();
        self.put_back(pending);
        self.put_off = Some(until);
    }

    /// Ends the job in favour of two halves of its unfinished targets.
    pub fn split(&mut self, pending: &[u32], claims: u32, now: UnixMs, instant: Instant) {
        for half in pending.chunks(pending.len().div_ceil(2).max(1)) {
            self.split.push(NewJob {
                notification: self.notification.id,
                route: self.route.id,
                lane: self.job.lane,
                targets: half.iter().map(|index| self.job.targets[*index as usize]).collect(),
                attempt: self.job.attempt,
                claims,
                ready_at: now,
                due_at: now,
                first_attempt_at: self.job.first_attempt_at,
            });
        }
        for index in pending {
            self.job.progress.finish(*index as usize);
        }
        self.first_answer_at.get_or_insert(instant);
    }

    /// How many targets go to the sender now, with tokens read at `read_at`.
    pub fn sending(&mut self, targets: usize, read_at: UnixMs, now: Instant) {
        self.outstanding += targets;
        self.read_at = read_at;
        self.sent_at = now;
    }

    /// The sender did not take them; nothing was sent.
    pub fn not_taken(&mut self, targets: usize) {
        self.outstanding -= targets;
        self.returned += targets;
    }

    /// Ends a target without an attempt (a gate's verdict, an impossible payload).
    pub fn conclude(&mut self, index: u32, code: ResultCode, now: Instant) {
        self.end(index, code);
        self.first_answer_at.get_or_insert(now);
    }

    /// Takes one answer.
    pub fn answer(&mut self, index: u32, outcome: SendOutcome, at: UnixMs, now: Instant) {
        debug_assert!(self.outstanding > 0, "an answer belongs to a request");
        self.outstanding = self.outstanding.saturating_sub(1);
        let target = self.job.targets[index as usize];
        if outcome.is_attempt() {
            self.first_answer_at.get_or_insert(now);
        }
        match outcome {
            SendOutcome::Sent { provider_id: _ } => {
                self.succeeded = true;
                self.end(index, ResultCode::Sent);
            }
            SendOutcome::RetryLater { cause, after, answer } => self.retry(index, target, cause, after, answer, at),
            SendOutcome::MaybeSent { answer } => match self.notification.on_maybe {
                // The same identity goes out again: shown at most once, a notice still on the screen is replaced.
                OnMaybe::Retry => self.retry(index, target, RetryCause::Transport, None, answer, at),
                OnMaybe::Drop => {
                    self.detail(target, ResultCode::DeadMaybeSent, answer, at, None);
                    self.end(index, ResultCode::DeadMaybeSent);
                }
            },
            SendOutcome::TokenGone { since, answer } => {
                let since = Some(since.unwrap_or(self.read_at));
                self.retirements.push(Retirement { device: target.device, since, reason: answer.to_string() });
                self.detail(target, ResultCode::DeadToken, answer, at, None);
                self.end(index, ResultCode::DeadToken);
            }
            SendOutcome::Rejected { answer } => {
                self.detail(target, ResultCode::DeadRejected, answer, at, None);
                self.end(index, ResultCode::DeadRejected);
            }
            SendOutcome::SenderBroken { answer } => {
                self.broken.get_or_insert(answer);
                self.returned += 1;
            }
            SendOutcome::Held => self.held.push(index),
            SendOutcome::NotAttempted => self.returned += 1,
        }
    }

    pub fn next(&self) -> Next {
        if self.outstanding > 0 {
            Next::Wait
        } else if !self.held.is_empty() {
            Next::Regate
        } else if self.returned > 0 {
            Next::Return
        } else {
            Next::Finish
        }
    }

    /// Since when answers wait to be written.
    pub fn unwritten_since(&self) -> Option<Instant> {
        self.first_answer_at
    }

    /// The configuration fault among the answers, once.
    pub fn take_broken(&mut self) -> Option<ProviderAnswer> {
        self.broken.take()
    }

    /// Whether the platform took anything.
    pub fn succeeded(&self) -> bool {
        self.succeeded
    }

    /// When the last targets were handed to the sender.
    pub fn sent_at(&self) -> Instant {
        self.sent_at
    }

    /// Takes what is to be written. `random` is even in 0..1, one per chunk of retries.
    pub fn flush(&mut self, policy: &RetryPolicy, now: UnixMs, random: impl FnMut() -> f64) -> Flush {
        let mut followers = self.plan_retries(policy, now, random);
        followers.append(&mut self.split);
        let next = self.next();
        let mut entries = std::mem::take(&mut self.entries);
        entries.sort_unstable_by_key(|entry| (entry.user, entry.device));
        self.first_answer_at = None;
        let finished = matches!(next, Next::Finish);
        Flush {
            update: JobUpdate {
                job: self.job.id,
                fence: self.job.fence,
                app: self.notification.app,
                notification: self.notification.id,
                route: self.route.id,
                progress: (!finished).then(|| self.job.progress.clone()),
                entries,
                details: std::mem::take(&mut self.details),
                followers,
                retirements: std::mem::take(&mut self.retirements),
            },
            release: matches!(next, Next::Return),
            put_off: self.put_off,
        }
    }

    fn end(&mut self, index: u32, code: ResultCode) {
        let target = self.job.targets[index as usize];
        self.job.progress.finish(index as usize);
        self.entries.push(Entry { user: target.user, device: target.device, code });
    }

    fn retry(
        &mut self,
        index: u32,
        target: Target,
        cause: RetryCause,
        hint: Option<Duration>,
        answer: ProviderAnswer,
        at: UnixMs,
    ) {
        self.job.progress.finish(index as usize);
        self.retries.push(Retry { target, cause, hint, answer, at });
    }

    fn detail(
        &mut self,
        target: Target,
        code: ResultCode,
        answer: ProviderAnswer,
        at: UnixMs,
        next_at: Option<UnixMs>,
    ) {
        self.details.push(Attempt {
            user: target.user,
            device: target.device,
            attempt: self.job.attempt + 1,
            at,
            result: code.name(),
            answer,
            next_at,
        });
    }

    /// Retries of one cause and hint share a moment: a chunk's worth of jitter, not one timer each.
    fn plan_retries(&mut self, policy: &RetryPolicy, now: UnixMs, mut random: impl FnMut() -> f64) -> Vec<NewJob> {
        let mut retries = std::mem::take(&mut self.retries);
        if retries.is_empty() {
            return Vec::new();
        }
        let made = self.job.attempt + 1;
        let first_attempt_at = self.job.first_attempt_at.unwrap_or(now);
        let gives_up_at = first_attempt_at.plus(policy.give_up_after);
        retries.sort_by_key(|retry| (retry.cause as u8, retry.hint, retry.target));
        let mut followers = Vec::new();
        for chunk in retries.chunk_by(|a, b| a.cause == b.cause && a.hint == b.hint) {
            let delay = policy.delay(chunk[0].cause, chunk[0].hint, made, random());
            let ready_at = now.plus(delay);
            let due_at = UnixMs((ready_at.0 + RETRY_GRID_MS - 1).div_euclid(RETRY_GRID_MS) * RETRY_GRID_MS);
            let over = if due_at >= self.notification.expires_at {
                Some(ResultCode::Expired)
            } else if due_at >= gives_up_at {
                Some(ResultCode::DeadRetriesOver)
            } else {
                None
            };
            let code = over.unwrap_or(ResultCode::MovedToRetry);
            for retry in chunk {
                let next_at = over.is_none().then_some(due_at);
                self.detail(retry.target, code, retry.answer.clone(), retry.at, next_at);
                self.entries.push(Entry { user: retry.target.user, device: retry.target.device, code });
            }
            if over.is_some() {
                continue;
            }
            for part in chunk.chunks(MAX_TARGETS) {
                followers.push(NewJob {
                    notification: self.notification.id,
                    route: self.route.id,
                    lane: self.job.lane,
                    targets: part.iter().map(|retry| retry.target).collect(),
                    attempt: made,
                    claims: 0,
                    ready_at,
                    due_at,
                    first_attempt_at: Some(first_attempt_at),
                });
            }
        }
        followers
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::{AppKey, DeviceId, EventType, JobId, NotificationId, RouteId, UserKey};
    use crate::domain::notification::Body;
    use crate::domain::platform::{Environment, Lane, Platform, RouteSpec};
    use crate::domain::sending::Priority;
    use crate::domain::targets::Progress;
    use crate::runtime::Runtime;

    const POLICY: RetryPolicy = RetryPolicy {
        transport_floor: Duration::from_secs(1),
        throttled_floor: Duration::from_secs(60),
        server_error_floor: Duration::from_secs(10),
        base: Duration::from_secs(4),
        cap: Duration::from_secs(600),
        give_up_after: Duration::from_secs(3600),
    };
    const HOUR: i64 = 3_600_000;

    fn flight(targets: i64, expires_at: i64) -> (Flight, Instant) {
        let instant = Runtime::simulated(1, UnixMs(0)).instant();
        let targets: Vec<Target> =
            (1..=targets).map(|n| Target { user: UserKey(n), device: DeviceId(n * 10) }).collect();
        let job = Job {
            id: JobId(1),
            notification: NotificationId(2),
            route: RouteId(3),
            lane: Lane::Interactive,
            progress: Progress::none(targets.len()),
            targets,
            attempt: 0,
            claims: 1,
            fence: 4,
            ready_at: UnixMs(0),
            first_attempt_at: None,
        };
        let notification = Notification {
            id: NotificationId(2),
            app: AppKey(1),
            event_type: EventType::trusted("comment.created"),
            type_version: None,
            default_opt_in: true,
            lane: Lane::Interactive,
            priority: Priority::High,
            on_maybe: OnMaybe::Retry,
            collapse_key: None,
            actor: None,
            body: Arc::new(Body::default()),
            event_at: UnixMs(0),
            accepted_at: UnixMs(0),
            not_before: None,
            expires_at: UnixMs(expires_at),
            cancelled_at: None,
        };
        let spec = RouteSpec {
            app: AppKey(1),
            platform: Platform::Fcm,
            credential: "default".into(),
            environment: Environment::None,
            bundle: "".into(),
        };
        let route = Arc::new(Route { id: RouteId(3), spec });
        let permit = Permit::new(Box::new(()));
        (Flight::new(job, Arc::new(notification), route, permit, instant), instant)
    }

    fn later(cause: RetryCause, after: Option<u64>) -> SendOutcome {
        let answer = ProviderAnswer::new(503, "UNAVAILABLE");
        SendOutcome::RetryLater { cause, after: after.map(Duration::from_secs), answer }
    }

    fn codes(flush: &Flush) -> Vec<ResultCode> {
        flush.update.entries.iter().map(|entry| entry.code).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn every_answer_becomes_one_entry_and_the_job_ends() {
        let (mut flight, instant) = flight(4, HOUR);
        flight.sending(4, UnixMs(5), instant);
        let gone = SendOutcome::TokenGone { since: Some(UnixMs(7)), answer: ProviderAnswer::new(410, "Unregistered") };
        flight.answer(3, SendOutcome::Rejected { answer: ProviderAnswer::new(400, "BadTopic") }, UnixMs(9), instant);
        flight.answer(0, SendOutcome::Sent { provider_id: None }, UnixMs(9), instant);
        assert_eq!(flight.next(), Next::Wait);
        flight.answer(1, gone, UnixMs(9), instant);
        flight.answer(2, later(RetryCause::ServerError, Some(30)), UnixMs(9), instant);
        assert_eq!(flight.next(), Next::Finish);
        let flush = flight.flush(&POLICY, UnixMs(1_000), || 0.5);
        let expected = [ResultCode::Sent, ResultCode::DeadToken, ResultCode::MovedToRetry, ResultCode::DeadRejected];
        assert_eq!(codes(&flush), expected);
        assert!(flush.update.progress.is_none() && !flush.release);
        assert_eq!(flush.update.retirements[0].since, Some(UnixMs(7)));
        assert_eq!(flush.update.details.len(), 3, "only failures have details");
        let [follower] = &flush.update.followers[..] else { panic!("one follower") };
        assert_eq!(follower.attempt, 1);
        assert!(follower.ready_at >= UnixMs(31_000) && follower.due_at.0 % RETRY_GRID_MS == 0);
        assert!(follower.due_at >= follower.ready_at);
    }

    #[tokio::test(start_paused = true)]
    async fn a_gone_token_without_a_time_is_held_to_when_it_was_read() {
        let (mut flight, instant) = flight(1, HOUR);
        flight.sending(1, UnixMs(5), instant);
        let answer = ProviderAnswer::new(404, "UNREGISTERED");
        flight.answer(0, SendOutcome::TokenGone { since: None, answer }, UnixMs(9), instant);
        let flush = flight.flush(&POLICY, UnixMs(9), || 0.5);
        assert_eq!(flush.update.retirements[0].since, Some(UnixMs(5)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_retry_past_the_ttl_expires_and_past_the_end_of_retries_dies() {
        let (mut flight, instant) = flight(1, 5_000);
        flight.sending(1, UnixMs(5), instant);
        flight.answer(0, later(RetryCause::ServerError, None), UnixMs(0), instant);
        assert_eq!(codes(&flight.flush(&POLICY, UnixMs(0), || 0.0)), [ResultCode::Expired]);

        let (mut flight, instant) = self::flight(1, 100 * HOUR);
        flight.job.first_attempt_at = Some(UnixMs(0));
        flight.sending(1, UnixMs(5), instant);
        flight.answer(0, later(RetryCause::ServerError, None), UnixMs(0), instant);
        assert_eq!(codes(&flight.flush(&POLICY, UnixMs(HOUR), || 0.0)), [ResultCode::DeadRetriesOver]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_event_type_says_what_follows_a_lost_answer() {
        let maybe = || SendOutcome::MaybeSent { answer: ProviderAnswer::new(0, "timeout") };
        for (on_maybe, code) in [(OnMaybe::Retry, ResultCode::MovedToRetry), (OnMaybe::Drop, ResultCode::DeadMaybeSent)]
        {
            let (mut flight, instant) = flight(1, HOUR);
            Arc::get_mut(&mut flight.notification).expect("not shared").on_maybe = on_maybe;
            flight.sending(1, UnixMs(5), instant);
            flight.answer(0, maybe(), UnixMs(9), instant);
            let flush = flight.flush(&POLICY, UnixMs(9), || 0.5);
            assert_eq!(codes(&flush), [code]);
            assert_eq!(flush.update.details[0].result, code.name());
            assert_eq!(flush.update.followers.len(), usize::from(on_maybe == OnMaybe::Retry));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_credential_burns_nothing() {
        let (mut flight, instant) = flight(2, HOUR);
        flight.sending(2, UnixMs(5), instant);
        flight.answer(0, SendOutcome::Sent { provider_id: None }, UnixMs(0), instant);
        let broken = SendOutcome::SenderBroken { answer: ProviderAnswer::new(403, "InvalidProviderToken") };
        flight.answer(1, broken, UnixMs(0), instant);
        assert_eq!(flight.next(), Next::Return);
        assert!(flight.take_broken().is_some());
        let flush = flight.flush(&POLICY, UnixMs(0), || 0.0);
        assert!(flush.release && flush.update.followers.is_empty());
        assert_eq!(codes(&flush), [ResultCode::Sent]);
        assert_eq!(flush.update.progress.expect("the job goes on").count(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn held_targets_return_to_their_gate_and_only_they() {
        let (mut flight, instant) = flight(3, HOUR);
        assert_eq!(flight.take_pending(), [0, 1, 2]);
        flight.sending(3, UnixMs(5), instant);
        flight.answer(0, SendOutcome::Sent { provider_id: None }, UnixMs(0), instant);
        flight.answer(1, SendOutcome::Held, UnixMs(0), instant);
        flight.answer(2, SendOutcome::Sent { provider_id: None }, UnixMs(0), instant);
        assert_eq!(flight.next(), Next::Regate);
        assert_eq!(flight.take_pending(), [1]);
        flight.conclude(1, ResultCode::OptedOut, instant);
        assert_eq!(flight.next(), Next::Finish);
        let flush = flight.flush(&POLICY, UnixMs(0), || 0.0);
        assert_eq!(codes(&flush), [ResultCode::Sent, ResultCode::OptedOut, ResultCode::Sent]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_suspect_job_is_halved_without_a_result() {
        let (mut flight, instant) = flight(5, HOUR);
        let pending = flight.pending();
        flight.split(&pending, 4, UnixMs(7), instant);
        assert_eq!(flight.next(), Next::Finish);
        let flush = flight.flush(&POLICY, UnixMs(7), || 0.0);
        assert!(flush.update.entries.is_empty());
        let sizes: Vec<usize> = flush.update.followers.iter().map(|job| job.targets.len()).collect();
        assert_eq!(sizes, [3, 2]);
        assert!(flush.update.followers.iter().all(|job| job.attempt == 0 && job.claims == 4));
    }
}
