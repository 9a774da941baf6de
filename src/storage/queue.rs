//! The port of open work: jobs, fan-outs, gates and outcomes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use crate::domain::deny::DenyPosition;
use crate::domain::device::{Labels, Retirement};
use crate::domain::ids::{AppKey, DeviceId, EventType, JobId, NotificationId, RouteId, UserId, UserKey};
use crate::domain::notification::{Job, NewJob, Notification, TargetFacts};
use crate::domain::outcome::Entry;
use crate::domain::plan::Person;
use crate::domain::platform::Lane;
use crate::domain::targets::{Progress, Target};
use crate::domain::time::UnixMs;

use super::{Attempt, BootId, Result};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClaimRequest {
    pub route: RouteId,
    pub lane: Lane,
    /// Stop before exceeding this many targets, but claim at least one job.
    pub max_targets: usize,
    pub max_jobs: usize,
}

/// A claimed job with its notification (shared between jobs of one).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Claimed {
    pub job: Job,
    pub notification: Arc<Notification>,
}

/// Results of one job since its last flush.
#[derive(Clone, PartialEq, Debug)]
pub struct JobUpdate {
    pub job: JobId,
    pub fence: i64,
    pub app: AppKey,
    pub notification: NotificationId,
    pub route: RouteId,
    /// Finished targets; `None`: the job is finished and deleted.
    pub progress: Option<Progress>,
    /// Sorted by (user, device); may be empty.
    pub entries: Vec<Entry>,
    pub details: Vec<Attempt>,
    /// Retries and deferrals, inserted unowned.
    pub followers: Vec<NewJob>,
    pub retirements: Vec<Retirement>,
    /// What else platforms said of devices.
    pub device_changes: Vec<DeviceChange>,
}

/// What a platform's answer changes of a device, beside retiring it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceChange {
    /// Left alone until then. `doubted`: its token was called gone, and is asked once more.
    Hold { device: DeviceId, until: UnixMs, doubted: bool },
    /// It was reached through `to`, where it is from now on unless it moved meanwhile.
    Reroute { device: DeviceId, from: RouteId, to: RouteId },
}

/// An open expansion under a lease.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fanout {
    pub notification: Arc<Notification>,
    /// The last user expanded.
    pub cursor: UserKey,
    pub fence: i64,
    /// Opaque to everybody but the store.
    pub audience: Arc<[u8]>,
}

/// How much of the deny feed a read has surely seen, and when it began: held against the feed at every hand-over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gate {
    pub position: DenyPosition,
    pub at: Instant,
}

/// The next distinct people of a fan-out, with what the gates need. Shows at least what was answered before the fan-out
/// was claimed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FanoutPage {
    /// Ascending by user.
    pub people: Vec<Person>,
    pub gate: Gate,
    /// What a hand-over needs of each of their devices, ascending by target; see [`FanoutPage::take_facts`].
    pub facts: Vec<(Target, Option<TargetFacts>)>,
    /// The notification was cancelled, or is gone.
    pub cancelled: bool,
    /// The last user of the page; people after it come next.
    pub cursor: UserKey,
    pub done: bool,
}

impl FanoutPage {
    /// Once each.
    pub fn take_facts(&mut self, target: Target) -> Option<TargetFacts> {
        let at = self.facts.binary_search_by_key(&target, |(known, _)| *known).ok()?;
        self.facts.get_mut(at)?.1.take()
    }
}

/// What the expander decided for a page, written in one transaction with the cursor.
#[derive(Clone, PartialEq, Debug)]
pub struct PageWrite {
    pub app: AppKey,
    pub notification: NotificationId,
    pub fence: i64,
    pub cursor: UserKey,
    /// Deletes the fan-out.
    pub done: bool,
    pub jobs: Vec<NewJob>,
    /// The first so many jobs are leased to this process from birth, with fence 1: the expander hands them over.
    pub leased: usize,
    pub suppressed: Vec<Entry>,
}

/// How much waits, for metrics and limits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Backlog {
    pub jobs: u64,
    pub targets: u64,
    pub fanouts: u64,
    /// `ready_at` of the oldest due job of each lane.
    pub oldest_ready: [Option<UnixMs>; 2],
}

impl Backlog {
    /// Rows of open work.
    #[must_use]
    pub const fn rows(&self) -> u64 {
        self.jobs + self.fanouts
    }
}

/// Open work.
#[async_trait::async_trait]
pub trait Queue: Send + Sync {
    /// Leases due, free jobs of one route and lane, earliest due first, bumping their fence, and `claims` up to
    /// [`SUSPECT_CLAIMS`]: beyond that only [`Queue::run_alone`] counts.
    async fn claim(&self, request: ClaimRequest, owner: BootId, now: UnixMs) -> Result<Vec<Claimed>>;

    /// When the next free job of a route and lane is due by the caller's clock, `None` without any.
    async fn next_due(&self, route: RouteId, lane: Lane) -> Result<Option<UnixMs>>;

    /// What the gate needs of each target, and whether the notification was cancelled: everything asked at once, for a
    /// read costs a round trip or a fresh snapshot. Answers in the order of the questions and their targets.
    async fn gates(&self, questions: Vec<GateQuestion>) -> Result<Vec<GateFacts>>;

    /// [`Queue::gates`] for one notification.
    async fn gate_facts(
        &self,
        notification: NotificationId,
        event_type: &EventType,
        targets: &[Target],
    ) -> Result<GateFacts> {
        let question = GateQuestion { notification, event_type: event_type.clone(), targets: targets.to_vec() };
        Ok(self.gates(vec![question]).await?.pop().unwrap_or_default())
    }

    /// Writes blocks, details, followers and retirements and advances or deletes the jobs, all under their fences, in
    /// one transaction. For each update: whether its fence still held (otherwise nothing of it was written).
    async fn record(&self, updates: Vec<JobUpdate>, now: UnixMs) -> Result<Vec<bool>>;

    /// A suspect job is about to be alone in flight in its process: `claims` goes up by one, to come down again when the
    /// job is given back. Only this tells a job that brings its process down from one that was there when it happened.
    /// `false`: the fence is lost.
    async fn run_alone(&self, job: JobId, fence: i64) -> Result<bool>;

    /// Gives jobs back, due now, without spending anything. Lost fences are ignored.
    async fn release(&self, jobs: Vec<(JobId, i64)>, now: UnixMs) -> Result<()>;

    /// Gives jobs back until later, without spending anything. Lost fences are ignored.
    async fn put_off(&self, jobs: Vec<(JobId, i64)>, until: UnixMs) -> Result<()>;

    /// Makes free jobs of a route and lane that were put off, `limit` at most, due when they truly were. How many.
    async fn pull_forward(&self, route: RouteId, lane: Lane, now: UnixMs, limit: usize) -> Result<u64>;

    /// Who owns each device and how it is labelled, in the order of `targets`; `None` where the row is gone or erased.
    /// For the staging allow-list.
    async fn names_and_labels(&self, targets: &[Target]) -> Result<Vec<Option<(UserId, Labels)>>>;

    /// Open targets of each app that has any. Looks at every open job: not for every call.
    async fn open_targets(&self) -> Result<BTreeMap<AppKey, u64>>;

    /// Frees every lease of other owners (a single process at its start, or dead replicas). How many jobs.
    async fn release_others(&self, owner: BootId, now: UnixMs) -> Result<u64>;

    /// Leases the next due fan-out that this process may expand, fairly between apps: at most one per call.
    async fn claim_fanout(&self, owner: BootId, now: UnixMs, skip: &[NotificationId]) -> Result<Option<Fanout>>;

    /// Whether other processes may be at this queue, and claim what this one leaves free.
    fn is_shared(&self) -> bool;

    /// Reads the next page; `limit` people at most.
    async fn fanout_page(&self, fanout: &Fanout, limit: usize) -> Result<FanoutPage>;

    /// The ids of the jobs, in their order; `None`: the fence was lost and nothing was written.
    async fn write_page(&self, page: PageWrite, now: UnixMs) -> Result<Option<Vec<JobId>>>;

    /// Gives a fan-out back.
    async fn release_fanout(&self, notification: NotificationId, fence: i64) -> Result<()>;

    async fn backlog(&self, now: UnixMs) -> Result<Backlog>;

    /// Deletes expired idempotency keys and history older than `history_before`, [`RETAIN_BATCH`](super::RETAIN_BATCH) rows of a table at most or
    /// whole partitions, and makes partitions ahead. How many rows; as many as a batch, and
    /// there may be more, as there may be in ranges that were not looked at yet.
    async fn retain(&self, history_before: UnixMs, now: UnixMs) -> Result<u64>;
}

/// Claimed this often without progress, a job is suspect of bringing its process down.
pub const SUSPECT_CLAIMS: u32 = 5;

/// A free job that is due this much later than it was ready has been put off.
pub(super) const PUT_OFF_MS: i64 = 1_000;

/// See [`Queue::gates`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GateQuestion {
    pub notification: NotificationId,
    pub event_type: EventType,
    pub targets: Vec<Target>,
}

/// See [`Queue::gates`].
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GateFacts {
    /// Or gone.
    pub cancelled: bool,
    /// A missing device row is `None`.
    pub facts: Vec<Option<TargetFacts>>,
}
