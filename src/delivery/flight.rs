//! A job in flight: what its targets' answers have come to since the last flush.
//!
//! Pure bookkeeping and decisions. `outcomes` feeds it and writes what it gives.

#[cfg(test)]
mod tests;
mod writing;

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use crate::domain::device::{GoneVerdict, Retirement};
use crate::domain::event_type::OnMaybe;
use crate::domain::ids::{DeviceId, RouteId};
use crate::domain::notification::{Job, NewJob, Notification, Permit};
use crate::domain::outcome::{Entry, ResultCode};
use crate::domain::platform::Route;
use crate::domain::retry::RetryPolicy;
use crate::domain::sending::{FaultScope, ProviderAnswer, RetryCause, SendOutcome};
use crate::domain::targets::Target;
use crate::domain::time::UnixMs;
use crate::planted;
use crate::runtime::Instant;
use crate::storage::{Attempt, DeviceChange, JobUpdate, SUSPECT_CLAIMS};

/// Retries are due on this grid, so that those of one moment share a job.
const RETRY_GRID_MS: i64 = 250;

/// A device that cannot be reached for a fault in its platform's configuration waits so long.
const TARGET_FAULT_PAUSE: Duration = Duration::from_secs(5 * 60);

fn on_grid(at: UnixMs) -> UnixMs {
    UnixMs(at.0.saturating_add(RETRY_GRID_MS - 1).div_euclid(RETRY_GRID_MS) * RETRY_GRID_MS)
}

/// What is known of a token that was asked about in the other environment.
fn elsewhere(answer: &ProviderAnswer) -> ProviderAnswer {
    ProviderAnswer::new(400, &format!("BadDeviceToken; elsewhere {answer}"))
}

/// A complaint about rates comes from behind the credential.
const fn proves_the_credential(cause: RetryCause) -> bool {
    match cause {
        RetryCause::DeviceThrottled | RetryCause::ProviderThrottled => true,
        RetryCause::Transport | RetryCause::Throttled | RetryCause::ServerError => false,
    }
}

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
    /// To be asked about in the platform's other environment, once nothing is outstanding; and the route there.
    elsewhere: Vec<u32>,
    elsewhere_by: Option<Arc<Route>>,
    /// The targets at the sender were sent through this route instead, to learn whether their tokens belong there.
    probing: Option<Arc<Route>>,
    /// Tokens that a platform called gone since a time: whether that retires them depends on their registration.
    gone: Vec<Gone>,
    /// Targets that wait in other jobs without having failed.
    aside: Vec<Aside>,
    entries: Vec<Entry>,
    details: Vec<Attempt>,
    retries: Vec<Retry>,
    retirements: Vec<Retirement>,
    device_changes: Vec<DeviceChange>,
    first_answer_at: Option<Instant>,
    succeeded: bool,
    sent_at: Instant,
    /// When the tokens at the sender were read: what a "gone" without a time is held to, so that a token registered
    /// since then survives.
    read_at: UnixMs,
    /// Keeps suspect jobs and the others apart.
    kept: Option<Arc<dyn Any + Send + Sync>>,
    alone: bool,
    split: Vec<NewJob>,
}

/// See [`Flight::gone`].
pub struct Gone {
    pub index: u32,
    pub device: DeviceId,
    pub since: UnixMs,
    answer: ProviderAnswer,
    at: UnixMs,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Aside {
    route: RouteId,
    due_at: UnixMs,
    attempt: u32,
    target: Target,
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
            elsewhere: Vec::new(),
            elsewhere_by: None,
            probing: None,
            gone: Vec::new(),
            aside: Vec::new(),
            entries: Vec::new(),
            details: Vec::new(),
            retries: Vec::new(),
            retirements: Vec::new(),
            device_changes: Vec::new(),
            first_answer_at: None,
            succeeded: false,
            sent_at: now,
            read_at: UnixMs(0),
            kept: None,
            alone: false,
            split: Vec::new(),
        }
    }

    /// Holds `guard` until the flight has ended.
    pub fn keep(&mut self, guard: Arc<dyn Any + Send + Sync>) {
        self.kept = Some(guard);
    }

    /// It is at no sender now, and whoever waits for those that are must not wait for this.
    pub fn let_go(&mut self) {
        self.kept = None;
    }

    /// What is pending goes back to the queue as it is.
    pub fn put_back_pending(&mut self) {
        let pending = self.take_pending().len();
        self.put_back(pending);
    }

    /// Claimed so often without progress that it must be alone in flight.
    pub fn is_suspect(&self) -> bool {
        self.job.claims >= SUSPECT_CLAIMS
    }

    /// It is counted as alone in flight, once in a claim.
    pub fn count_alone(&mut self) -> bool {
        !std::mem::replace(&mut self.alone, true)
    }

    /// Targets that no run finished.
    pub fn pending(&self) -> Vec<u32> {
        let count = u32::try_from(self.job.targets.len()).expect("a job is small");
        (0..count).filter(|index| !self.job.progress.is_finished(*index as usize)).collect()
    }

    /// Some of its targets are to be tried through another route.
    pub fn looks_elsewhere(&self) -> bool {
        !self.elsewhere.is_empty()
    }

    /// Targets to gate: those held, those to be asked about elsewhere, or else those that no run finished.
    pub fn take_pending(&mut self) -> Vec<u32> {
        if !self.held.is_empty() {
            self.probing = None;
            return std::mem::take(&mut self.held);
        }
        if !self.elsewhere.is_empty() {
            self.probing = self.elsewhere_by.take();
            return std::mem::take(&mut self.elsewhere);
        }
        self.pending()
    }

    /// The route that the next targets are to be tried through, where it is not the job's own.
    pub fn probing(&self) -> Option<&Arc<Route>> {
        self.probing.as_ref()
    }

    /// A target whose token is bad here is asked about in the platform's other environment, in this flight.
    pub fn look_elsewhere(&mut self, index: u32, elsewhere: Arc<Route>) {
        self.answered();
        self.elsewhere.push(index);
        self.elsewhere_by = Some(elsewhere);
    }

    /// … or later, in a job of its own: the turns for that are few.
    pub fn look_elsewhere_later(
        &mut self,
        index: u32,
        due_at: UnixMs,
        answer: ProviderAnswer,
        at: UnixMs,
        now: Instant,
    ) {
        self.answered();
        self.first_answer_at.get_or_insert(now);
        self.wait(index, due_at, ResultCode::MovedToRetry, Some((answer, at)), self.job.attempt + 1);
    }

    /// The platform asked to leave a device alone.
    pub fn leave_alone(&mut self, index: u32, until: UnixMs) -> DeviceId {
        let device = self.job.targets[index as usize].device;
        self.device_changes.push(DeviceChange::Hold { device, until, doubted: false });
        device
    }

    fn answered(&mut self) {
        debug_assert!(self.outstanding > 0, "an answer belongs to a request");
        self.outstanding = self.outstanding.saturating_sub(1);
    }

    /// The rest waits, and is not due before this.
    pub fn put_off(&mut self, targets: usize, until: UnixMs) {
        self.put_back(targets);
        self.put_off = Some(self.put_off.map_or(until, |known| known.max(until)));
    }

    /// A target without an attempt waits in another job until then; past its TTL it has expired.
    pub fn defer(&mut self, index: u32, until: UnixMs, now: Instant) {
        self.first_answer_at.get_or_insert(now);
        self.wait(index, until, ResultCode::Deferred, None, self.job.attempt);
    }

    /// A target whose device is reached by another route by now.
    pub fn forward(&mut self, index: u32, route: RouteId, at: UnixMs, now: Instant) {
        self.first_answer_at.get_or_insert(now);
        let target = self.job.targets[index as usize];
        self.aside.push(Aside { route, due_at: at, attempt: self.job.attempt, target });
        self.end(index, ResultCode::Deferred);
    }

    /// `failed`: the attempt before, for the record.
    fn wait(
        &mut self,
        index: u32,
        until: UnixMs,
        code: ResultCode,
        failed: Option<(ProviderAnswer, UnixMs)>,
        attempt: u32,
    ) {
        let due_at = on_grid(until);
        let target = self.job.targets[index as usize];
        let expires = due_at >= self.notification.expires_at;
        let code = if expires { ResultCode::Expired } else { code };
        if let Some((answer, at)) = failed {
            self.detail(target, code, answer, at, (!expires).then_some(due_at));
        }
        if !expires {
            self.aside.push(Aside { route: self.route.id, due_at, attempt, target });
        }
        self.end(index, code);
    }

    /// Tokens whose end is to be decided before a flush.
    pub fn gone(&self) -> &[Gone] {
        &self.gone
    }

    /// Decides about every gone token, in the order of [`Flight::gone`]. The devices that are left alone meanwhile.
    pub fn judge_gone(
        &mut self,
        verdicts: &[GoneVerdict],
        random: f64,
        policy: &RetryPolicy,
    ) -> Vec<(DeviceId, UnixMs)> {
        let mut doubted = Vec::new();
        for (gone, verdict) in std::mem::take(&mut self.gone).into_iter().zip(verdicts) {
            let Gone { index, device, since, answer, at } = gone;
            match *verdict {
                GoneVerdict::Retire => self.retire(index, since, answer, at),
                GoneVerdict::Doubt(until) => {
                    self.device_changes.push(DeviceChange::Hold { device, until, doubted: true });
                    self.wait(index, until, ResultCode::MovedToRetry, Some((answer, at)), self.job.attempt + 1);
                    doubted.push((device, until));
                }
                GoneVerdict::Keep => {
                    let until = at.plus(policy.delay(RetryCause::Throttled, None, self.job.attempt + 1, random));
                    self.wait(index, until, ResultCode::MovedToRetry, Some((answer, at)), self.job.attempt + 1);
                }
            }
        }
        doubted
    }

    fn retire(&mut self, index: u32, since: UnixMs, answer: ProviderAnswer, at: UnixMs) {
        let target = self.job.targets[index as usize];
        let reason = answer.to_string();
        self.retirements.push(Retirement { device: target.device, since: Some(since), reason });
        self.detail(target, ResultCode::DeadToken, answer, at, None);
        self.end(index, ResultCode::DeadToken);
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
        self.answered();
        let target = self.job.targets[index as usize];
        if outcome.is_attempt() {
            self.first_answer_at.get_or_insert(now);
        }
        match outcome {
            SendOutcome::Sent { provider_id: _ } => {
                if let Some(elsewhere) = &self.probing {
                    let (from, to) = (self.route.id, elsewhere.id);
                    self.device_changes.push(DeviceChange::Reroute { device: target.device, from, to });
                } else {
                    self.succeeded = true;
                }
                self.end(index, ResultCode::Sent);
            }
            // Could not be asked about elsewhere: that the credential is refused there says nothing about the token.
            SendOutcome::SenderBroken { scope: FaultScope::Credential | FaultScope::Target, answer }
                if self.probing.is_some() && !planted::is("fault-elsewhere-retires") =>
            {
                self.first_answer_at.get_or_insert(now);
                let until = at.plus(TARGET_FAULT_PAUSE);
                self.wait(index, until, ResultCode::MovedToRetry, Some((elsewhere(&answer), at)), self.job.attempt);
            }
            // Asked elsewhere, and not welcome there either; or the credential is not for that environment, as a key that
            // Apple limited to one: then no token is ours there.
            SendOutcome::TokenGone { answer, .. }
            | SendOutcome::Rejected { answer }
            | SendOutcome::SenderBroken { answer, .. }
                if self.probing.is_some() =>
            {
                self.retire(index, self.read_at, elsewhere(&answer), at);
            }
            SendOutcome::RetryLater { cause, after, answer } => {
                self.succeeded |= proves_the_credential(cause);
                self.retry(index, target, cause, after, answer, at);
            }
            SendOutcome::MaybeSent { answer } => match self.notification.on_maybe {
                OnMaybe::Drop if planted::is("maybe-always-retried") => {
                    self.retry(index, target, RetryCause::Transport, None, answer, at);
                }
                // The same identity goes out again: shown at most once, a notice still on the screen is replaced.
                OnMaybe::Retry => self.retry(index, target, RetryCause::Transport, None, answer, at),
                OnMaybe::Drop => {
                    self.detail(target, ResultCode::DeadMaybeSent, answer, at, None);
                    self.end(index, ResultCode::DeadMaybeSent);
                }
            },
            SendOutcome::TokenGone { since: Some(since), answer, .. } => {
                self.gone.push(Gone { index, device: target.device, since, answer, at });
            }
            SendOutcome::TokenGone { since: None, answer, .. } => self.retire(index, self.read_at, answer, at),
            SendOutcome::Rejected { answer } => {
                self.detail(target, ResultCode::DeadRejected, answer, at, None);
                self.end(index, ResultCode::DeadRejected);
            }
            SendOutcome::SenderBroken { scope: FaultScope::Target, answer } => {
                let until = at.plus(TARGET_FAULT_PAUSE);
                self.first_answer_at.get_or_insert(now);
                self.wait(index, until, ResultCode::MovedToRetry, Some((answer, at)), self.job.attempt);
            }
            SendOutcome::Held if planted::is("held-target-lost") => {}
            SendOutcome::Held => self.held.push(index),
            SendOutcome::SenderBroken { scope: FaultScope::Credential | FaultScope::Route, .. }
            | SendOutcome::NotAttempted => self.returned += 1,
        }
    }

    pub fn next(&self) -> Next {
        if self.outstanding > 0 {
            Next::Wait
        } else if !self.held.is_empty() || !self.elsewhere.is_empty() {
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

    /// Whether the platform took anything, or refused it for reasons that lie behind the credential.
    pub fn take_success(&mut self) -> bool {
        std::mem::take(&mut self.succeeded)
    }

    /// When the last targets were handed to the sender.
    pub fn sent_at(&self) -> Instant {
        self.sent_at
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
}
