//! [`Queue`]: each method is a step or a read of the modules beside this one.

use std::collections::BTreeMap;

use diesel::sqlite::SqliteConnection;

use super::group::Tx;
use super::readers::{Asker, snapshot};
use super::writer::Class;
use crate::domain::device::Labels;
use crate::domain::ids::{AppKey, JobId, NotificationId, RouteId, UserId};
use crate::domain::platform::Lane;
use crate::domain::targets::Target;
use crate::domain::time::UnixMs;
use crate::storage::{
    Backlog, BootId, ClaimRequest, Claimed, Fanout, FanoutPage, GateFacts, GateQuestion, JobUpdate, PageWrite, Queue,
    RETAIN_BATCH, Result,
};

use super::{SMALL, SqliteStore, fanout, jobs, notifications, people, retain, scanner};

#[async_trait::async_trait]
impl Queue for SqliteStore {
    async fn claim(&self, request: ClaimRequest, owner: BootId, now: UnixMs) -> Result<Vec<Claimed>> {
        self.write(Class::Outcome, SMALL, "claiming jobs", move |tx| jobs::claim(tx, request, owner, now)).await
    }

    async fn next_due(&self, route: RouteId, lane: Lane) -> Result<Option<UnixMs>> {
        self.read(Asker::Engine, "looking for due jobs", move |conn| jobs::next_due(conn, route, lane)).await
    }

    async fn gates(&self, questions: Vec<GateQuestion>) -> Result<Vec<GateFacts>> {
        self.read(Asker::Engine, "asking the gates", move |conn| {
            // One transaction: each begins by dropping the reader's cache when anything was written since its last.
            snapshot(conn, |conn| {
                questions
                    .iter()
                    .map(|asked| {
                        let facts = people::facts_of_targets(conn, &asked.event_type, &asked.targets)?;
                        // A notification that is gone must not be sent.
                        let cancelled = !notifications::is_wanted(conn, asked.notification)?;
                        Ok(GateFacts { cancelled, facts })
                    })
                    .collect()
            })
        })
        .await
    }

    async fn record(&self, updates: Vec<JobUpdate>, now: UnixMs) -> Result<Vec<bool>> {
        let bytes = updates.iter().map(update_bytes).sum();
        self.write(Class::Outcome, bytes, "recording results", move |tx| jobs::record(tx, &updates, now)).await
    }

    async fn run_alone(&self, job: JobId, fence: i64) -> Result<bool> {
        self.write(Class::Outcome, SMALL, "counting a suspect job", move |tx| jobs::run_alone(tx, job, fence)).await
    }

    async fn release(&self, jobs: Vec<(JobId, i64)>, now: UnixMs) -> Result<()> {
        let bytes = SMALL + 16 * jobs.len();
        self.write(Class::Outcome, bytes, "releasing jobs", move |tx| jobs::release(tx, &jobs, now)).await
    }

    async fn put_off(&self, jobs: Vec<(JobId, i64)>, until: UnixMs) -> Result<()> {
        let bytes = SMALL + 16 * jobs.len();
        self.write(Class::Outcome, bytes, "putting jobs off", move |tx| jobs::put_off(tx, &jobs, until)).await
    }

    async fn pull_forward(&self, route: RouteId, lane: Lane, now: UnixMs, limit: usize) -> Result<u64> {
        self.write(Class::Page, SMALL, "taking up jobs that were put off", move |tx| {
            jobs::pull_forward(tx, route, lane, now, limit)
        })
        .await
    }

    async fn names_and_labels(&self, targets: &[Target]) -> Result<Vec<Option<(UserId, Labels)>>> {
        let targets = targets.to_vec();
        self.read(Asker::Engine, "reading names and labels", move |conn| people::names_and_labels(conn, &targets)).await
    }

    async fn open_targets(&self) -> Result<BTreeMap<AppKey, u64>> {
        // Before the rows: what gets one meanwhile is counted twice rather than not at all.
        let handed = self.context.handed.summary();
        let mut open = self.read(Asker::Caller, "counting open targets", retain::open_targets).await?;
        for (app, targets) in handed.by_app {
            *open.entry(app).or_default() += targets;
        }
        Ok(open)
    }

    async fn release_others(&self, owner: BootId, _now: UnixMs) -> Result<u64> {
        self.write(Class::Outcome, SMALL, "releasing other owners' jobs", move |tx| jobs::release_others(tx, owner))
            .await
    }

    async fn claim_fanout(&self, owner: BootId, now: UnixMs, skip: &[NotificationId]) -> Result<Option<Fanout>> {
        let skip = skip.to_vec();
        let doing = "claiming a fan-out";
        let claimed = self.write(Class::Outcome, SMALL, doing, move |tx| fanout::claim(tx, owner, now, &skip)).await?;
        if let (Some(_), Some(scanner)) = (&claimed, &self.scanner) {
            scanner.renew();
        }
        Ok(claimed)
    }

    fn is_shared(&self) -> bool {
        false
    }

    async fn fanout_page(&self, fanout: &Fanout, limit: usize) -> Result<FanoutPage> {
        let fanout = fanout.clone();
        let doing = "reading a page of a fan-out";
        let Some(scanner) = &self.scanner else {
            let gate = scanner::gate_now(&self.context);
            return self.read(Asker::Engine, doing, move |conn| fanout::page(conn, &fanout, limit, gate)).await;
        };
        let alarm = self.writer.alarm();
        let page = move |conn: &mut SqliteConnection, gate| {
            let page = fanout::page(conn, &fanout, limit, gate);
            alarm.hear(&page);
            page
        };
        scanner.read(doing, page).await
    }

    async fn write_page(&self, page: PageWrite, now: UnixMs) -> Result<Option<Vec<JobId>>> {
        let targets: usize = page.jobs.iter().map(|job| job.targets.len()).sum();
        let bytes = SMALL + 16 * (targets + page.suppressed.len());
        self.write(Class::Page, bytes, "writing a page of a fan-out", move |tx| fanout::write_page(tx, &page, now))
            .await
    }

    async fn release_fanout(&self, notification: NotificationId, fence: i64) -> Result<()> {
        self.write(Class::Outcome, SMALL, "releasing a fan-out", move |tx| fanout::release(tx, notification, fence))
            .await
    }

    async fn backlog(&self, now: UnixMs) -> Result<Backlog> {
        let handed = self.context.handed.summary();
        let backlog = self.read(Asker::Caller, "counting what waits", move |conn| retain::backlog(conn, now)).await?;
        Ok(handed.add_to(backlog))
    }

    async fn retain(&self, history_before: UnixMs, now: UnixMs) -> Result<u64> {
        let mut keys = 0;
        for _ in 0..retain::KEY_STEPS {
            let from = self.sweep.lock().expect("no panic while held").keys.clone();
            let sweep = move |tx: &mut Tx<'_>| retain::retain_keys(tx, from.clone(), now);
            let (deleted, next) = self.write(Class::Retention, SMALL, "deleting expired keys", sweep).await?;
            let is_round_over = next.is_none();
            self.sweep.lock().expect("no panic while held").keys = next;
            keys += deleted.count();
            if is_round_over || keys >= RETAIN_BATCH {
                break;
            }
        }
        let from = self.sweep.lock().expect("no panic while held").history;
        let sweep = move |tx: &mut Tx<'_>| retain::retain(tx, from, history_before, now);
        let (deleted, next) = self.write(Class::Retention, SMALL, "deleting what is old", sweep).await?;
        self.sweep.lock().expect("no panic while held").history = next;
        Ok(keys + deleted.count())
    }
}

fn update_bytes(update: &JobUpdate) -> usize {
    let followers: usize = update.followers.iter().map(|job| SMALL + 16 * job.targets.len()).sum();
    SMALL + 24 * update.entries.len() + 256 * update.details.len() + 128 * update.retirements.len() + followers
}
