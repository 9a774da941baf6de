//! Events as accepted, their audience, and the jobs they become.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::allow::AllowList;
use super::consent::{DeviceChoice, DeviceState, EventRules, UserChoice};
use super::content::{Content, Data};
use super::deny::DenyPosition;
use super::device::Labels;
use super::event_type::OnMaybe;
use super::ids::{
    AppKey, CollapseKey, DeviceId, EventType, IdempotencyKey, JobId, Locale, NotificationId, RouteId, Topic,
    TypeVersionId, UserId, UserKey,
};
use super::outcome::Entry;
use super::platform::{DeviceToken, Lane};
use super::provider::RouteStatus;
use super::room::Room;
use super::sending::Priority;
use super::targets::{Progress, Target};
use super::time::UnixMs;

/// Limits of one NotifyEvent.
pub const MAX_USER_IDS: usize = 1_000;
pub const MAX_TOPICS: usize = 20;
pub const MAX_DEVICE_IDS: usize = 1_000;
/// More people than this: BULK, a fan-out instead of jobs at once, and scope `broadcast`.
pub const SMALL_AUDIENCE: usize = 500;
/// How long an idempotency key is remembered.
pub const IDEMPOTENCY_KEPT_MS: i64 = 7 * 24 * 3_600_000;
/// Without a TTL.
pub const DEFAULT_TTL_MS: i64 = 24 * 3_600_000;
/// The longest TTL: FCM's 28 days.
pub const MAX_TTL_MS: i64 = 28 * 24 * 3_600_000;
/// The farthest `not_before` and `event_at` may lie from now.
pub const MAX_AHEAD_MS: i64 = 365 * 24 * 3_600_000;

/// The people one event is for. A person in several is one person; one named by device only is reached on that device.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Audience {
    pub user_ids: Vec<UserId>,
    pub topics: Vec<Topic>,
    pub device_ids: Vec<DeviceId>,
    pub everyone: bool,
}

/// What is stored of an event's words, as JSON.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Body {
    pub content: Content,
    #[serde(default, skip_serializing_if = "Data::is_empty")]
    pub data: Data,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// The caller's id of the actor, kept only where the type's templates read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actor: Option<String>,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
}

/// A checked event on its way into the store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewEvent {
    pub app: AppKey,
    pub event_type: EventType,
    /// `None`: the type was not declared.
    pub type_version: Option<TypeVersionId>,
    pub default_opt_in: bool,
    /// `None`: by the size of the audience.
    pub lane: Option<Lane>,
    pub on_maybe: OnMaybe,
    /// With the hash of the canonical request.
    pub idempotency: Option<(IdempotencyKey, [u8; 32])>,
    pub audience: Audience,
    pub actor: Option<UserId>,
    pub body: Arc<Body>,
    pub priority: Priority,
    pub collapse_key: Option<CollapseKey>,
    pub event_at: UnixMs,
    pub not_before: Option<UnixMs>,
    pub expires_at: UnixMs,
    /// Refuse rather than reach more people than this.
    pub max_audience: Option<u32>,
    /// Whether the caller has scope `broadcast`.
    pub may_broadcast: bool,
}

/// What became of an event that the store took.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Accepted {
    pub notification: NotificationId,
    /// The first answer again: this idempotency key was used before, with the same request.
    pub duplicate: bool,
}

/// A stored notification: written once; a cancel sets `cancelled_at`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Notification {
    pub id: NotificationId,
    pub app: AppKey,
    pub event_type: EventType,
    /// The version it was accepted with, and whose templates it is shown by; `None`: the type was not declared.
    pub type_version: Option<TypeVersionId>,
    pub default_opt_in: bool,
    pub lane: Lane,
    pub priority: Priority,
    /// What follows when a platform took a push and did not answer.
    pub on_maybe: OnMaybe,
    pub collapse_key: Option<CollapseKey>,
    pub actor: Option<UserKey>,
    pub body: Arc<Body>,
    pub event_at: UnixMs,
    pub accepted_at: UnixMs,
    pub not_before: Option<UnixMs>,
    pub expires_at: UnixMs,
    pub cancelled_at: Option<UnixMs>,
}

impl Notification {
    /// As the gates see it.
    #[must_use]
    pub fn rules(&self) -> EventRules {
        EventRules {
            default_opt_in: self.default_opt_in,
            actor: self.actor,
            expires_at: self.expires_at,
            cancelled: self.cancelled_at.is_some(),
        }
    }
}

/// Open work: up to [`super::targets::MAX_TARGETS`] targets of one notification on one route, under a lease.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Job {
    pub id: JobId,
    pub notification: NotificationId,
    pub route: RouteId,
    pub lane: Lane,
    pub targets: Vec<Target>,
    pub progress: Progress,
    /// Attempts the providers saw before this job.
    pub attempt: u32,
    /// How often it was claimed without progress: guards against poison.
    pub claims: u32,
    /// Guards every write of the lease's holder.
    pub fence: i64,
    /// When it was truly due.
    pub ready_at: UnixMs,
    /// When the first attempt of these targets was made; `None` before it.
    pub first_attempt_at: Option<UnixMs>,
}

/// A job about to be inserted; the store gives the id.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewJob {
    pub notification: NotificationId,
    pub route: RouteId,
    pub lane: Lane,
    /// Sorted and distinct, 1 to `MAX_TARGETS`.
    pub targets: Vec<Target>,
    pub attempt: u32,
    pub claims: u32,
    pub ready_at: UnixMs,
    pub due_at: UnixMs,
    pub first_attempt_at: Option<UnixMs>,
}

/// What the gate before a send needs to know of one target, read in one query.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TargetFacts {
    pub target: Target,
    pub state: DeviceState,
    pub route: RouteId,
    pub token: DeviceToken,
    pub locale: Option<Locale>,
    pub user_choice: UserChoice,
    pub device_choice: DeviceChoice,
}

/// Room for a number of targets in the engine, from claim (or hand-off) until their outcomes are durable. Dropping it
/// gives the room back.
pub struct Permit(#[expect(dead_code, reason = "held for its Drop")] Box<dyn Any + Send>);

impl Permit {
    #[must_use]
    pub fn new(guard: Box<dyn Any + Send>) -> Self {
        Self(guard)
    }
}

/// A job that the accepting transaction leased to this process: sent at once, without a claim and a second query.
pub struct HandedOver {
    pub job: Job,
    pub notification: Arc<Notification>,
    /// In the order of the job's targets.
    pub facts: Vec<TargetFacts>,
    /// What the transaction's reads had surely seen of the deny feed.
    pub gated: DenyPosition,
    pub gated_at: Instant,
    pub permit: Permit,
}

/// How the store reaches the engine: it must neither block nor fail.
pub trait HandOff: Send + Sync {
    /// Room for a job's targets now, or `None`: then the job is inserted unowned and claimed later.
    fn try_permit(&self, route: RouteId, lane: Lane, targets: usize) -> Option<Permit>;
    /// Whether some live replica can send through this route: gate 1 at planning. Without an engine, every one.
    fn knows_route(&self, _route: RouteId) -> bool {
        true
    }
    /// The app's staging allow-list, where it has one: gate 1 at planning.
    fn allow_list(&self, _app: AppKey) -> Option<Arc<AllowList>> {
        None
    }
    /// A pause was stored or ended.
    fn pauses_changed(&self) {}
    /// How this process does with the providers of an app.
    fn provider_status(&self, _app: AppKey) -> Vec<RouteStatus> {
        Vec::new()
    }
    /// An operator confirmed something of a trouble.
    fn troubles_changed(&self) {}
    /// After the commit of an event that was planned at once: how many deliveries, and who was suppressed. For counting.
    fn planned(&self, _targets: usize, _suppressed: &[Entry]) {}
    /// Whether there is room for more; without an engine there always is.
    fn room(&self) -> Option<&Room> {
        None
    }
    /// After the commit. The store must not drop a leased job on any path after this.
    fn deliver(&self, job: HandedOver);
    /// Several at once, of one commit: so much cheaper than one by one as they share wake-ups and writes.
    fn deliver_all(&self, jobs: Vec<HandedOver>) {
        for job in jobs {
            self.deliver(job);
        }
    }
    /// Unowned jobs became due on this route.
    fn wake_jobs(&self, route: RouteId, lane: Lane);
    /// A fan-out was begun.
    fn wake_fanout(&self);
}

/// Takes nothing: every job is inserted unowned. For tools and tests without an engine.
pub struct NoHandOff;

impl HandOff for NoHandOff {
    fn try_permit(&self, _: RouteId, _: Lane, _: usize) -> Option<Permit> {
        None
    }
    fn deliver(&self, _: HandedOver) {}
    fn wake_jobs(&self, _: RouteId, _: Lane) {}
    fn wake_fanout(&self) {}
}
