//! What a flight has to write: its outcomes, and jobs for what is still to be tried.

use crate::domain::notification::NewJob;
use crate::domain::outcome::{Entry, ResultCode};
use crate::domain::retry::RetryPolicy;
use crate::domain::sending::ProviderAnswer;
use crate::domain::targets::{MAX_TARGETS, Target};
use crate::domain::time::UnixMs;
use crate::planted;
use crate::storage::{Attempt, JobUpdate};

use super::{Aside, Flight, Flush, Next, on_grid};

impl Flight {
    /// Takes what is to be written. `random` is even in 0..1, one per chunk of retries.
    pub fn flush(&mut self, policy: &RetryPolicy, now: UnixMs, random: impl FnMut() -> f64) -> Flush {
        let mut followers = self.plan_retries(policy, now, random);
        followers.append(&mut self.split);
        followers.append(&mut self.wait_aside());
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
                device_changes: std::mem::take(&mut self.device_changes),
            },
            release: matches!(next, Next::Return),
            put_off: self.put_off,
        }
    }

    fn wait_aside(&mut self) -> Vec<NewJob> {
        let mut aside = std::mem::take(&mut self.aside);
        aside.sort_unstable();
        let mut jobs = Vec::new();
        for alike in aside.chunk_by(|a, b| (a.route, a.due_at, a.attempt) == (b.route, b.due_at, b.attempt)) {
            for part in alike.chunks(MAX_TARGETS) {
                let Aside { route, due_at, attempt, .. } = part[0];
                let made_one = attempt > self.job.attempt;
                jobs.push(NewJob {
                    notification: self.notification.id,
                    route,
                    lane: self.job.lane,
                    targets: part.iter().map(|aside| aside.target).collect(),
                    attempt,
                    claims: 0,
                    ready_at: due_at,
                    due_at,
                    first_attempt_at: self.job.first_attempt_at.or(made_one.then_some(self.read_at)),
                });
            }
        }
        jobs
    }

    pub(super) fn detail(
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
        let lost = usize::from(planted::is("follower-loses-a-target"));
        for chunk in retries.chunk_by(|a, b| a.cause == b.cause && a.hint == b.hint) {
            let delay = policy.delay(chunk[0].cause, chunk[0].hint, made, random());
            let ready_at = now.plus(delay);
            let due_at = on_grid(ready_at);
            let over = if due_at >= self.notification.expires_at && !planted::is("deadline-ignored-on-retry") {
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
                    targets: part.iter().skip(lost).map(|retry| retry.target).collect(),
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
