//! [`Queue`]: each method is a step or a read of the modules beside this one.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use super::read::read;
use super::tx::step;
use crate::domain::device::Labels;
use crate::domain::ids::{AppKey, JobId, NotificationId, RouteId, UserId};
use crate::domain::platform::Lane;
use crate::domain::targets::Target;
use crate::domain::time::UnixMs;
use crate::storage::{
    Backlog, BootId, ClaimRequest, Claimed, Fanout, FanoutPage, Gate, GateFacts, GateQuestion, JobUpdate, PageWrite,
    Queue, Result,
};

use super::{PostgresStore, fanout, handed, jobs, partitions, people, record, replica, retain};

#[async_trait::async_trait]
impl Queue for PostgresStore {
    async fn claim(&self, request: ClaimRequest, owner: BootId, now: UnixMs) -> Result<Vec<Claimed>> {
        let doing = "claiming jobs";
        let now = self.inner.clock(now);
        // An old snapshot anywhere keeps the entries of finished jobs at the head of the index; most claims need not
        // wade through them.
        let from = self.inner.bound(request.route, request.lane);
        let mut claimed = step!(leasing; &self.inner, doing, |tx| jobs::claim(tx, request, owner, from, now))?;
        if claimed.is_empty() && from > 0 {
            claimed = step!(leasing; &self.inner, doing, |tx| jobs::claim(tx, request, owner, 0, now))?;
        }
        let last = claimed.last().map_or(0, |claimed| claimed.job.ready_at.0.min(now.0));
        self.inner.set_bound(request.route, request.lane, from, last);
        Ok(claimed)
    }

    async fn next_due(&self, route: RouteId, lane: Lane) -> Result<Option<UnixMs>> {
        let due = read!(&self.inner, "looking for due jobs", |conn| jobs::next_due(conn, route, lane))?;
        Ok(due.map(|due| self.inner.told(due)))
    }

    async fn gates(&self, questions: Vec<GateQuestion>) -> Result<Vec<GateFacts>> {
        read!(&self.inner, "asking the gates", |conn| people::gates(conn, &questions))
    }

    async fn record(&self, updates: Vec<JobUpdate>, now: UnixMs) -> Result<Vec<bool>> {
        let now = self.inner.clock(now);
        let doing = "recording results";
        handed::prepare(&self.inner, &updates).await?;
        let handed = &self.inner.context.handed;
        let groups = handed.of(&updates);
        let doubt = handed.doubt(&groups);
        let is_plain = record::is_one_statement(&updates);
        let (held, gone) = if is_plain && groups.iter().all(Option::is_none) {
            (step!(as Bare; &self.inner, doing, |tx| record::record(tx, &updates, &groups, now))?, Vec::new())
        } else if is_plain && groups.iter().all(Option::is_some) {
            let ended = step!(as Bare; &self.inner, doing, |tx| record::end_handed(tx, &updates, &groups, now))?;
            let record::Ended { mut held, gone } = ended;
            if held.contains(&false) {
                // They have rows by now, or another holds them.
                let others = updates.iter().zip(&held).filter(|(_, held)| !**held).map(|(update, _)| update.clone());
                let others: Vec<JobUpdate> = others.collect();
                let groups = vec![None; others.len()];
                let answers = step!(as Bare; &self.inner, doing, |tx| record::record(tx, &others, &groups, now))?;
                for (held, answer) in held.iter_mut().filter(|held| !**held).zip(answers) {
                    *held = answer;
                }
            }
            (held, gone)
        } else {
            (step!(&self.inner, doing, |tx| record::record(tx, &updates, &groups, now))?, Vec::new())
        };
        doubt.settled();
        let ended = |(update, held): (&JobUpdate, &bool)| (!held || update.progress.is_none()).then_some(update.job);
        let ended = || updates.iter().zip(&held).filter_map(ended);
        handed.ended(ended(), &gone);
        self.inner.let_go(ended().map(|job| job.0));
        Ok(held)
    }

    async fn run_alone(&self, job: JobId, fence: i64) -> Result<bool> {
        handed::rows_for(&self.inner, [(job, fence)].into_iter()).await?;
        step!(&self.inner, "counting a suspect job", |tx| jobs::run_alone(tx, job, fence))
    }

    async fn release(&self, jobs: Vec<(JobId, i64)>, now: UnixMs) -> Result<()> {
        let released = match handed::rows_for(&self.inner, jobs.iter().copied()).await {
            Ok(()) => step!(&self.inner, "releasing jobs", |tx| jobs::release(tx, &jobs, now)),
            Err(error) => Err(error),
        };
        self.inner.let_go(jobs.iter().map(|(job, _)| job.0));
        self.inner.forget_bounds();
        if released.is_err() {
            // Nobody holds them any more: the heartbeat frees them once the database is back.
            self.inner.context.sweep.ask();
        }
        released
    }

    async fn put_off(&self, jobs: Vec<(JobId, i64)>, until: UnixMs) -> Result<()> {
        let until = self.inner.clock(until);
        let put_off = match handed::rows_for(&self.inner, jobs.iter().copied()).await {
            Ok(()) => step!(&self.inner, "putting jobs off", |tx| jobs::put_off(tx, &jobs, until)),
            Err(error) => Err(error),
        };
        self.inner.let_go(jobs.iter().map(|(job, _)| job.0));
        self.inner.forget_bounds();
        if put_off.is_err() {
            // As in `release`.
            self.inner.context.sweep.ask();
        }
        put_off
    }

    async fn pull_forward(&self, route: RouteId, lane: Lane, now: UnixMs, limit: usize) -> Result<u64> {
        let now = self.inner.clock(now);
        let pulled = step!(&self.inner, "taking up jobs that were put off", |tx| jobs::pull_forward(
            tx, route, lane, now, limit
        ));
        self.inner.forget_bounds();
        pulled
    }

    async fn names_and_labels(&self, targets: &[Target]) -> Result<Vec<Option<(UserId, Labels)>>> {
        read!(&self.inner, "reading names and labels", |conn| people::names_and_labels(conn, targets))
    }

    async fn open_targets(&self) -> Result<BTreeMap<AppKey, u64>> {
        read!(&self.inner, "counting open targets", |conn| retain::open_targets(conn))
    }

    async fn release_others(&self, owner: BootId, _now: UnixMs) -> Result<u64> {
        self.inner.forget_bounds();
        step!(&self.inner, "releasing other owners' jobs", |tx| async {
            handed::see_the_latest(tx.conn()).await?;
            replica::release_dead(tx.conn(), owner.0).await.map(|(freed, _)| freed)
        })
    }

    async fn claim_fanout(&self, owner: BootId, now: UnixMs, skip: &[NotificationId]) -> Result<Option<Fanout>> {
        let now = self.inner.clock(now);
        let doing = "claiming a fan-out";
        let fanout = step!(leasing; &self.inner, doing, |tx| fanout::claim(tx, owner, now, skip))?;
        if let Some(fanout) = &fanout {
            self.inner.context.held.lock().expect("no panic while held").insert(fanout.notification.id.0);
        }
        Ok(fanout)
    }

    async fn fanout_page(&self, fanout: &Fanout, limit: usize) -> Result<FanoutPage> {
        let context = &self.inner.context;
        let gate = Gate { position: context.deny.position(), at: context.runtime.instant().into_std() };
        // No snapshot: nothing is read twice, and what changes after `gate` is met at the hand-over.
        let id = fanout.notification.id.0;
        let was_thin = context.thin_fanout.load(Ordering::Relaxed) == id;
        let mut is_thin = was_thin;
        let doing = "reading a page of a fan-out";
        let page = read!(&self.inner, doing, |conn| fanout::page(conn, fanout, limit, gate, &mut is_thin))?;
        if is_thin != was_thin {
            context.thin_fanout.store(id, Ordering::Relaxed);
        }
        Ok(page)
    }

    fn is_shared(&self) -> bool {
        self.inner.context.others.load(Ordering::Relaxed)
    }

    async fn write_page(&self, page: PageWrite, now: UnixMs) -> Result<Option<Vec<JobId>>> {
        let now = self.inner.clock(now);
        let ids = step!(leasing; &self.inner, "writing a page of a fan-out", |tx| fanout::write_page(tx, &page, now))?;
        if ids.is_none() || page.done {
            self.inner.let_go([page.notification.0]);
        }
        Ok(ids)
    }

    async fn release_fanout(&self, notification: NotificationId, fence: i64) -> Result<()> {
        let doing = "releasing a fan-out";
        let released = step!(&self.inner, doing, |tx| fanout::release(tx, notification, fence));
        self.inner.let_go([notification.0]);
        if released.is_err() {
            self.inner.context.sweep.ask();
        }
        released
    }

    async fn backlog(&self, now: UnixMs) -> Result<Backlog> {
        read!(&self.inner, "counting what waits", |conn| retain::backlog(conn, now))
    }

    async fn retain(&self, history_before: UnixMs, now: UnixMs) -> Result<u64> {
        let now = self.inner.clock(now);
        let dropped = partitions::keep(&self.inner, self.inner.partitions, history_before, now).await?;
        let deleted = step!(&self.inner, "deleting what is old", |tx| retain::retain(tx, history_before, now))?;
        Ok(dropped + deleted.count())
    }
}
