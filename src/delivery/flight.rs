//! A job in flight: what its targets' answers have come to since the last flush.
//!
//! Pure bookkeeping and decisions. `outcomes` feeds it and writes what it gives.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use crate::domain::device::Retirement;
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
    entries: Vec<Entry>,
    details: Vec<Attempt>,
    retries: Vec<Retry>,
    retirements: Vec<Retirement>,
    first_answer_at: Option<Instant>,
    /// A configuration fault was among the answers.
    broken: Option<ProviderAnswer>,
    succeeded: bool,
    sent_at: Instant,
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
            entries: Vec::new(),
            details: Vec::new(),
            retries: Vec::new(),
            retirements: Vec::new(),
            first_answer_at: None,
            broken: None,
            succeeded: false,
            sent_at: now,
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

    /// How many targets go to the sender now.
    pub fn sending(&mut self, targets: usize, now: Instant) {
        self.outstanding += targets;
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
            // The same identity goes out again: shown at most once, a notice still on the screen is replaced.
            SendOutcome::MaybeSent { answer } => self.retry(index, target, RetryCause::Transport, None, answer, at),
            SendOutcome::TokenGone { since, answer } => {
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
