//! The store as the rest of the crate sees it: three ports in domain types, so that a distributed queue can one day take
//! the place of [`Queue`] alone. `sqlite` and `postgres` implement all and know nothing of each other.
//!
//! Every method is one atomic step: it happened whole, and durably, when it answers `Ok`; it left nothing when it
//! answers a refusal ([`StoreError::is_refusal`]). After `Unavailable` the caller cannot know; every method is safe to
//! repeat. Dropping the future does not undo the step.
//!
//! `now` is an argument, so that tests and simulation own time; a store with a clock shared by replicas may prefer its
//! own.

mod cache;
#[cfg(test)]
pub mod conformance;
mod effects;
pub mod error;
mod fail;
pub mod moving;
mod paging;
mod people;
pub mod postgres;
mod providers;
mod queue;
pub(crate) mod reach;
mod redrive;
mod rows;
pub mod seed;
pub mod sqlite;
mod statement;
mod sweep;
mod watching;

use std::sync::Arc;

use crate::domain::device::{Device, DeviceRef, Registered, Registration};
use crate::domain::event_type::{Definition, TypeVersion};
use crate::domain::identity::IdentityKey;
use crate::domain::ids::{
    AppId, AppKey, DeviceId, EventType, NotificationId, RouteId, Topic, TypeVersionId, UserId, UserKey,
};
use crate::domain::notification::{Accepted, Audience, HandOff, NewEvent, Notification};
use crate::domain::outcome::{OutcomeBlock, State};
use crate::domain::pause::{Pause, PauseScope};
use crate::domain::plan::Person;
use crate::domain::platform::{Route, RouteSpec};
use crate::domain::sending::ProviderAnswer;
use crate::domain::targets::Target;
use crate::domain::time::UnixMs;
use crate::domain::watch::WatchPosition;

pub use error::StoreError;
pub use providers::{
    DeviceTimes, Providers, RedriveBatch, RedriveFilter, Redriven, TROUBLE_KEPT_MS, Trouble, TroubleCause, TroubleRow,
};
use queue::PUT_OFF_MS;
pub use queue::{
    Backlog, ClaimRequest, Claimed, DeviceChange, Fanout, FanoutPage, Gate, GateFacts, GateQuestion, JobUpdate,
    PageWrite, Queue, SUSPECT_CLAIMS,
};
pub use watching::{WatchEvent, WatchFilter, WatchPage, Watched};

pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// One process of nudged: what owns leases. Positive and unique per start.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BootId(pub i64);

/// A choice somebody made, on its way in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewOptIn {
    pub app: AppKey,
    pub user: UserId,
    /// `None`: the master switch.
    pub event_type: Option<EventType>,
    /// `None`: the user's own choice.
    pub device: Option<DeviceId>,
    pub opted_in: bool,
    pub observed_at: UnixMs,
    /// The API key's name.
    pub caller: Option<String>,
    pub source: Option<String>,
    pub policy_version: Option<String>,
    pub evidence: Option<String>,
}

/// A stored choice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OptIn {
    pub event_type: Option<EventType>,
    pub device: Option<DeviceId>,
    pub opted_in: bool,
    pub observed_at: UnixMs,
    pub recorded_at: UnixMs,
    pub source: Option<String>,
    pub policy_version: Option<String>,
    pub evidence: Option<String>,
}

/// One line of the consent history, oldest first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OptInChange {
    pub choice: OptIn,
    /// Whether it took effect; a late retry of an older choice does not.
    pub applied: bool,
    pub caller: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Subscription {
    pub topic: Topic,
    pub observed_at: UnixMs,
}

/// A person's tie to a topic, or its end, on its way in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewSubscription {
    pub app: AppKey,
    pub user: UserId,
    pub topic: Topic,
    pub active: bool,
    pub observed_at: UnixMs,
}

/// Counts of one notification. A delivery that waits for a retry is open.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    pub open: u64,
    pub sent: u64,
    pub suppressed: u64,
    pub expired: u64,
    pub cancelled: u64,
    pub dead: u64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NotificationView {
    pub notification: Notification,
    /// `None` for a notification that was counted only as far as a fan-out needs.
    pub people: Option<u64>,
    /// The audience is still being expanded.
    pub expanding: bool,
    pub counts: Counts,
}

/// One delivery as its last block tells.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Delivery {
    pub entry: DeliveryKey,
    pub user: UserId,
    /// The result's stable name; `QUEUED` while no block names it.
    pub reason: &'static str,
    pub state: State,
    pub route: Option<RouteId>,
    pub at: UnixMs,
    /// The last failed attempt, when there is one.
    pub last_attempt: Option<Attempt>,
}

/// Orders the deliveries of a notification; `device` 0 stands for a person suppressed as a whole.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct DeliveryKey {
    pub user: UserKey,
    pub device: DeviceId,
}

/// A failed or repeated attempt.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attempt {
    pub user: UserKey,
    pub device: DeviceId,
    pub attempt: u32,
    pub at: UnixMs,
    /// A `ResultCode`'s name.
    pub result: &'static str,
    pub answer: ProviderAnswer,
    pub next_at: Option<UnixMs>,
}

/// Everything the store knows of one person and one notification.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PersonHistory {
    pub notification: Notification,
    /// `None`: nobody by that name was ever seen.
    pub user: Option<UserKey>,
    pub user_id: UserId,
    /// Blocks that name the person, oldest first, with only their entries.
    pub blocks: Vec<OutcomeBlock>,
    /// Open targets of the person, with the job's attempt count and due time.
    pub open: Vec<(Target, RouteId, u32, UnixMs)>,
    pub attempts: Vec<Attempt>,
    pub devices: Vec<Device>,
    /// The whole consent history, oldest first.
    pub choices: Vec<OptInChange>,
    /// An expansion has not reached this person yet.
    pub expansion_pending: bool,
}

/// A page of rows and where the next begins; `None` at the end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Page<T, C> {
    pub items: Vec<T>,
    pub next: Option<C>,
}

/// Which deliveries to list.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DeliveryFilter {
    pub user: Option<UserId>,
    /// Empty: every state.
    pub states: Vec<State>,
}

/// Rows that retention looks at in each table at once.
pub const RETAIN_BATCH: u64 = 500;

/// How long the progress of an import is remembered after its last item.
pub const IMPORT_KEPT_MS: i64 = 90 * 24 * 3_600_000;

/// Something moved in from elsewhere.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ImportItem {
    /// Its row is made at `created_at` and was last confirmed when it was observed.
    Device {
        registration: Registration,
        created_at: UnixMs,
    },
    OptIn(NewOptIn),
    Subscription(NewSubscription),
}

/// Items to be written together, and how far the import has come with them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImportBatch {
    pub app: AppKey,
    /// The import's own row of progress; begins with `import/`.
    pub name: String,
    /// Progress never goes back.
    pub position: i64,
    pub items: Vec<ImportItem>,
}

/// What became of an [`ImportItem`]; or a refusal, which leaves nothing of it.
pub type Imported = Result<ImportEffect, StoreError>;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ImportEffect {
    /// It changed what stands.
    Applied,
    /// The same, or something observed later, stands already.
    Unchanged,
}

/// A database that came from a backup.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Restoration {
    /// The operator's name of it.
    pub name: String,
    pub since: UnixMs,
    /// What was said since the backup has been told again.
    pub confirmed_at: Option<UnixMs>,
}

/// What a restoration's hold says of itself among the pauses.
macro_rules! restoration_reason {
    () => {
        "restored from a backup; waits for nudged confirm-restore"
    };
}
use restoration_reason;

/// Who an event would be for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ResolvedAudience {
    /// Opaque to everybody but the store.
    pub audience: Arc<[u8]>,
    /// Named users that have no row yet; sorted and distinct.
    pub unknown: Vec<UserId>,
    /// `None` also for one without a row, who is in no audience.
    pub actor: Option<UserKey>,
}

/// The next people of an audience.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct AudiencePage {
    /// Ascending by user.
    pub people: Vec<Person>,
    /// The last of them; people after it come next.
    pub cursor: UserKey,
    pub done: bool,
}

/// Devices, people, choices, subscriptions, and the notifications callers ask about.
#[async_trait::async_trait]
pub trait Registry: Send + Sync {
    /// The installation's key, made at the first start.
    fn identity(&self) -> &IdentityKey;

    /// The app's key, made when first asked for.
    async fn ensure_app(&self, app: &AppId, now: UnixMs) -> Result<AppKey>;

    /// The routes' rows in the order given, made when first asked for.
    async fn ensure_routes(&self, specs: &[RouteSpec], now: UnixMs) -> Result<Vec<Route>>;

    /// The same token under another user retires the old row (MOVED) and makes a new one; a retired token that
    /// registers again comes back to life; an older `observed_at` loses; unchanged within the hour writes nothing.
    /// Publishes moved and replaced devices to the deny feed before it answers.
    async fn register_device(&self, registration: Registration, now: UnixMs) -> Result<Registered>;

    /// `Ok(false)`: no such active device, or a registration newer than `observed_at` stands. `user`: only if it is
    /// theirs, else `DeviceNotFound`.
    async fn unregister_device(
        &self,
        app: AppKey,
        user: Option<UserId>,
        device: DeviceRef,
        observed_at: UnixMs,
        now: UnixMs,
    ) -> Result<bool>;

    /// Active and retired devices, oldest first, after `after`.
    async fn list_devices(
        &self,
        app: AppKey,
        user: &UserId,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<Device, DeviceId>>;

    /// The choice that stands afterwards, and whether it is this one.
    async fn set_opt_in(&self, choice: NewOptIn, now: UnixMs) -> Result<(OptIn, bool)>;

    /// At most 1 000 choices of a person: user's and devices'.
    async fn list_opt_ins(&self, app: AppKey, user: &UserId) -> Result<Vec<OptIn>>;

    /// Subscribes or unsubscribes; whether anything changed.
    async fn set_subscription(
        &self,
        app: AppKey,
        user: UserId,
        topic: Topic,
        active: bool,
        observed_at: UnixMs,
        now: UnixMs,
    ) -> Result<bool>;

    /// By topic row, after `after`.
    async fn list_subscriptions(
        &self,
        app: AppKey,
        user: &UserId,
        after: Option<i64>,
        limit: usize,
    ) -> Result<Page<Subscription, i64>>;

    /// How far an import has come; 0 for one that is not known.
    async fn import_position(&self, app: AppKey, name: &str) -> Result<i64>;

    /// Every item that is not refused, in order, held to what the calls for one are, and letting live traffic go first. The
    /// progress is never ahead of what is durable. May answer `Unavailable` with a part of it done; all of it is harmless
    /// to repeat.
    async fn import(&self, batch: ImportBatch, now: UnixMs) -> Result<Vec<Imported>>;

    /// What [`Registry::import`] would make of each item by itself, without writing anything.
    async fn assess_import(&self, items: Vec<ImportItem>) -> Result<Vec<Imported>>;

    /// Whether the app has any declared event type, and the version of `event_type` that stands.
    async fn event_type(&self, app: AppKey, event_type: &EventType) -> Result<DeclaredType>;

    /// Makes it the version that stands, unless the one that stands says the same. Whether a version was made.
    /// `TooManyEventTypes` when the app has [`MAX_EVENT_TYPES`](crate::domain::event_type::MAX_EVENT_TYPES) others.
    async fn put_event_type(
        &self,
        app: AppKey,
        definition: Arc<Definition>,
        now: UnixMs,
    ) -> Result<(TypeVersion, bool)>;

    /// `version` `None`: the one that stands. Another may also be one of a deleted type.
    async fn get_event_type(&self, app: AppKey, name: &EventType, version: Option<u32>) -> Result<TypeVersion>;

    /// The versions that stand, by name, after `after`.
    async fn list_event_types(
        &self,
        app: AppKey,
        after: Option<EventType>,
        limit: usize,
    ) -> Result<Page<TypeVersion, EventType>>;

    /// From now on the type counts as never declared; notifications keep their versions. Whether it was declared.
    async fn delete_event_type(&self, app: AppKey, name: &EventType, now: UnixMs) -> Result<bool>;

    /// What a notification's version says. For us: it asks no app.
    async fn type_definition(&self, version: TypeVersionId) -> Result<Definition>;

    /// The notification and its jobs or fan-out in one transaction. Small jobs are leased and handed over with a
    /// permit where `hand_off` gives one.
    async fn accept(&self, event: NewEvent, hand_off: Arc<dyn HandOff>, now: UnixMs) -> Result<Accepted>;

    /// Who an event would be for, without writing anything. `DeviceNotFound` as for [`Registry::accept`].
    async fn resolve_audience(
        &self,
        app: AppKey,
        audience: &Audience,
        actor: Option<&UserId>,
    ) -> Result<ResolvedAudience>;

    /// The next distinct people of an audience after `after`, `limit` at most, as a fan-out would meet them; those without
    /// a row are not among them.
    async fn audience_page(
        &self,
        app: AppKey,
        event_type: &EventType,
        audience: &Arc<[u8]>,
        after: UserKey,
        limit: usize,
    ) -> Result<AudiencePage>;

    /// The names of users, in the order asked; `None` for one who was erased.
    async fn user_names(&self, users: &[UserKey]) -> Result<Vec<Option<UserId>>>;

    /// Sets `cancelled_at` unless it is set; publishes to the deny feed before it answers. Whether it was open.
    async fn cancel_notification(&self, app: AppKey, id: NotificationId, now: UnixMs) -> Result<bool>;

    async fn get_notification(&self, app: AppKey, id: NotificationId) -> Result<NotificationView>;

    /// Newest first, before `before`.
    async fn list_notifications(
        &self,
        app: AppKey,
        event_type: Option<EventType>,
        before: Option<NotificationId>,
        limit: usize,
    ) -> Result<Page<Notification, NotificationId>>;

    /// In the order of `DeliveryKey`, after `after`. May answer fewer than `limit` before the end.
    async fn list_deliveries(
        &self,
        app: AppKey,
        id: NotificationId,
        filter: DeliveryFilter,
        after: Option<DeliveryKey>,
        limit: usize,
    ) -> Result<Page<Delivery, DeliveryKey>>;

    async fn person_history(&self, app: AppKey, id: NotificationId, user: &UserId) -> Result<PersonHistory>;

    /// The owner of a device row of this app, for ids read from a `nudged_id`.
    async fn device_owner(&self, app: AppKey, device: DeviceId) -> Result<UserId>;

    /// What came to be durable after `after`, in the order of transactions, `limit` events at most; with `None` only
    /// where that is now. Everything is told exactly once to whoever goes on from the position answered, in whatever
    /// process. `CursorExpired` when something after it may have been deleted, `CursorForeign` for a position of another
    /// database.
    async fn watch(
        &self,
        app: AppKey,
        after: Option<WatchPosition>,
        filter: &WatchFilter,
        limit: usize,
    ) -> Result<WatchPage>;

    /// Holds what fits its scope, unless that is held already. Whether it is new. `Overloaded` beyond
    /// [`MAX_PAUSES`](crate::domain::pause::MAX_PAUSES).
    async fn pause(&self, pause: Pause) -> Result<bool>;

    /// Ends a pause. Whether there was one.
    async fn resume(&self, scope: &PauseScope) -> Result<bool>;

    /// All pauses, in the order of their stored names.
    async fn pauses(&self) -> Result<Vec<Pause>>;

    /// The database was restored from a backup: until it is confirmed, [`Registry::pauses`] holds everything. One of that
    /// name that is there already stands as it is.
    async fn begin_restoration(&self, name: &str, now: UnixMs) -> Result<Restoration>;

    /// Cancels up to `limit` notifications with open work, accepted before `before`, after `after` in the order of their
    /// ids. The last one looked at, `None` at the end, and how many were not cancelled before.
    async fn cancel_open(
        &self,
        before: UnixMs,
        after: NotificationId,
        limit: usize,
        now: UnixMs,
    ) -> Result<(Option<NotificationId>, u64)>;

    /// Restorations that hold everything, oldest first.
    async fn restorations(&self) -> Result<Vec<Restoration>>;

    /// Confirms all there are. Whether there was one.
    async fn confirm_restorations(&self, now: UnixMs) -> Result<bool>;

    /// Answers when the database does; for `/readyz`.
    async fn ping(&self) -> Result<()>;
}

/// See [`Registry::event_type`].
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DeclaredType {
    pub any_declared: bool,
    /// The version that stands; `None`: it is not declared.
    pub current: Option<TypeVersionId>,
    /// Names nearest to an undeclared one, at most three.
    pub nearest: Vec<String>,
}

/// All ports in one.
pub trait Store: Registry + Queue + Providers {}
impl<T: Registry + Queue + Providers> Store for T {}
