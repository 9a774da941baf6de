//! [`Queue`] and [`Providers`] over the link.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use super::SharedStore;
use super::registry::at_hub;
use crate::domain::device::Labels;
use crate::domain::ids::{AppKey, DeviceId, JobId, NotificationId, RouteId, UserId};
use crate::domain::pacing::{PermitBlock, PermitRequest};
use crate::domain::platform::Lane;
use crate::domain::targets::Target;
use crate::domain::time::UnixMs;
use crate::storage::{
    Backlog, BootId, ClaimRequest, Claimed, DeviceTimes, Fanout, FanoutPage, Gate, GateFacts, GateQuestion, JobUpdate,
    PageWrite, Providers, Queue, RedriveBatch, Redriven, Result, Trouble,
};

#[async_trait::async_trait]
impl Queue for SharedStore {
    async fn claim(&self, request: ClaimRequest, owner: BootId, now: UnixMs) -> Result<Vec<Claimed>> {
        let now = self.replica.clock(now);
        let leasing = self.replica.leasing().await;
        let claimed = at_hub!(self, "claiming jobs", |store| store.claim(request, owner, now))?;
        leasing.took(claimed.iter().map(|claimed| claimed.job.id.0));
        Ok(claimed)
    }

    async fn next_due(&self, route: RouteId, lane: Lane) -> Result<Option<UnixMs>> {
        let due = at_hub!(self, "looking for due jobs", |store| store.next_due(route, lane))?;
        Ok(due.map(|due| self.replica.told(due)))
    }

    async fn gates(&self, questions: Vec<GateQuestion>) -> Result<Vec<GateFacts>> {
        at_hub!(self, "asking the gates", |store| store.gates(questions))
    }

    async fn record(&self, updates: Vec<JobUpdate>, now: UnixMs) -> Result<Vec<bool>> {
        let now = self.replica.clock(now);
        let jobs: Vec<(i64, bool)> = updates.iter().map(|update| (update.job.0, update.progress.is_none())).collect();
        let held = at_hub!(self, "recording results", |store| store.record(updates, now))?;
        let ended = jobs.iter().zip(&held).filter(|((_, finished), held)| *finished || !**held);
        self.replica.let_go(ended.map(|((job, _), _)| *job));
        Ok(held)
    }

    async fn run_alone(&self, job: JobId, fence: i64) -> Result<bool> {
        at_hub!(self, "counting a suspect job", |store| store.run_alone(job, fence))
    }

    async fn release(&self, jobs: Vec<(JobId, i64)>, now: UnixMs) -> Result<()> {
        let ids: Vec<i64> = jobs.iter().map(|(job, _)| job.0).collect();
        let released = at_hub!(self, "releasing jobs", |store| store.release(jobs, now));
        self.given_back(ids, &released);
        released
    }

    async fn put_off(&self, jobs: Vec<(JobId, i64)>, until: UnixMs) -> Result<()> {
        let until = self.replica.clock(until);
        let ids: Vec<i64> = jobs.iter().map(|(job, _)| job.0).collect();
        let put_off = at_hub!(self, "putting jobs off", |store| store.put_off(jobs, until));
        self.given_back(ids, &put_off);
        put_off
    }

    async fn pull_forward(&self, route: RouteId, lane: Lane, now: UnixMs, limit: usize) -> Result<u64> {
        let now = self.replica.clock(now);
        at_hub!(self, "taking up jobs that were put off", |store| store.pull_forward(route, lane, now, limit))
    }

    async fn names_and_labels(&self, targets: &[Target]) -> Result<Vec<Option<(UserId, Labels)>>> {
        at_hub!(self, "reading names and labels", |store| store.names_and_labels(targets))
    }

    async fn open_targets(&self) -> Result<BTreeMap<AppKey, u64>> {
        at_hub!(self, "counting open targets", |store| store.open_targets())
    }

    /// Only those of replicas that are dead: the others are at work.
    async fn release_others(&self, _owner: BootId, _now: UnixMs) -> Result<u64> {
        self.replica.release_dead().await
    }

    async fn claim_fanout(&self, owner: BootId, now: UnixMs, skip: &[NotificationId]) -> Result<Option<Fanout>> {
        let now = self.replica.clock(now);
        let leasing = self.replica.leasing().await;
        let claimed = at_hub!(self, "claiming a fan-out", |store| store.claim_fanout(owner, now, skip))?;
        leasing.took(claimed.iter().map(|fanout| fanout.notification.id.0));
        Ok(claimed)
    }

    fn is_shared(&self) -> bool {
        self.replica.others.load(Ordering::Relaxed)
    }

    async fn fanout_page(&self, fanout: &Fanout, limit: usize) -> Result<FanoutPage> {
        let replica = &self.replica;
        let gate = Gate { position: replica.deny.position(), at: replica.runtime.instant().into_std() };
        let page = at_hub!(self, "reading a page of a fan-out", |store| store.fanout_page(fanout, limit))?;
        Ok(FanoutPage { gate, ..page })
    }

    async fn write_page(&self, page: PageWrite, now: UnixMs) -> Result<Option<Vec<JobId>>> {
        let now = self.replica.clock(now);
        let (notification, done, leased) = (page.notification, page.done, page.leased);
        let leasing = self.replica.leasing().await;
        let ids = at_hub!(self, "writing a page of a fan-out", |store| store.write_page(page, now))?;
        leasing.took(ids.iter().flatten().take(leased).map(|job| job.0));
        if ids.is_none() || done {
            self.replica.let_go([notification.0]);
        }
        Ok(ids)
    }

    async fn release_fanout(&self, notification: NotificationId, fence: i64) -> Result<()> {
        let released = at_hub!(self, "releasing a fan-out", |store| store.release_fanout(notification, fence));
        self.given_back(vec![notification.0], &released);
        released
    }

    async fn backlog(&self, now: UnixMs) -> Result<Backlog> {
        at_hub!(self, "counting what waits", |store| store.backlog(now))
    }

    async fn retain(&self, history_before: UnixMs, now: UnixMs) -> Result<u64> {
        let now = self.replica.clock(now);
        at_hub!(self, "deleting what is old", |store| store.retain(history_before, now))
    }
}

#[async_trait::async_trait]
impl Providers for SharedStore {
    async fn lease_permits(&self, credential: &str, request: PermitRequest, now: UnixMs) -> Result<PermitBlock> {
        let now = self.replica.clock(now);
        at_hub!(self, "leasing a provider's permits", |store| store.lease_permits(credential, request, now))
    }

    async fn troubles(&self, now: UnixMs) -> Result<Vec<Trouble>> {
        at_hub!(self, "reading what stops providers", |store| store.troubles(now))
    }

    async fn report_trouble(&self, trouble: Trouble) -> Result<()> {
        at_hub!(self, "recording what stops a provider", |store| store.report_trouble(trouble))
    }

    async fn end_trouble(&self, name: &str, now: UnixMs) -> Result<()> {
        at_hub!(self, "recording that a provider works", |store| store.end_trouble(name, now))
    }

    async fn confirm_trouble(&self, name: &str, until: UnixMs) -> Result<bool> {
        at_hub!(self, "confirming that tokens are gone", |store| store.confirm_trouble(name, until))
    }

    async fn held_devices(&self, now: UnixMs, limit: usize) -> Result<Vec<(DeviceId, UnixMs)>> {
        at_hub!(self, "reading which devices are left alone", |store| store.held_devices(now, limit))
    }

    async fn device_times(&self, devices: &[DeviceId]) -> Result<Vec<Option<DeviceTimes>>> {
        at_hub!(self, "reading when devices registered", |store| store.device_times(devices))
    }

    async fn redrive(&self, batch: RedriveBatch, now: UnixMs) -> Result<Redriven> {
        let now = self.replica.clock(now);
        at_hub!(self, "opening dead deliveries again", |store| store.redrive(batch, now))
    }
}

impl SharedStore {
    /// Nobody here holds these any more. Where the hub was not told, the heartbeat frees them.
    fn given_back(&self, ids: Vec<i64>, told: &Result<()>) {
        self.replica.let_go(ids);
        if told.is_err() {
            self.replica.sweep.ask();
        }
    }
}
