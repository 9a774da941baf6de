//! The store on SQLite: one process, one file, one writer.
//!
//! All writes go through one thread that commits them in groups ([`group`]), by importance ([`writer`]); reads have
//! connections and threads of their own ([`readers`]). In simulation both run inline on one connection, so that a
//! history is the same for the same seed. A lock beside the file keeps a second process out, which is why a start may
//! release every lease it finds.

mod accept;
mod devices;
mod disturb;
mod event_types;
mod explain;
mod fanout;
mod group;
mod imports;
mod jobs;
mod leaving;
mod notifications;
mod open;
mod opt_in;
mod pauses;
mod people;
mod providers;
mod readers;
mod restorations;
mod retain;
mod scanner;
mod seed;
mod setup;
pub mod shared;
mod subscriptions;
#[cfg(test)]
mod tests;
mod watching;
mod writer;

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use diesel::RunQueryDsl;
use diesel::sql_types::Integer;
use diesel::sqlite::SqliteConnection;

pub use disturb::{Disturb, Disturbance, Fate};
pub use leaving::Source;
pub use open::{MEMORY, OpenError, Settings, Synchronous};
pub use seed::seed;
pub use writer::QueueLimits;

use self::accept::Prepared;
use self::disturb::disturbed;
use self::fail::{Attempt, unavailable};
use self::group::{Context, Core, Tx};
use self::readers::{Asker, Readers, snapshot};
use self::scanner::Scanner;
use self::statement::constant;
use self::writer::{Class, Writer};
use super::paging::{page, page_limit};
use super::{cache, effects, fail, redrive, rows, statement, watching as watch_rows};
use crate::domain::deny::DenyFeed;
use crate::domain::device::{Device, DeviceRef, Labels, Registered, Registration};
use crate::domain::event_type::{Definition, TypeVersion};
use crate::domain::identity::IdentityKey;
use crate::domain::ids::{
    AppId, AppKey, DeviceId, EventType, JobId, NotificationId, RouteId, Topic, TypeVersionId, UserId, UserKey,
};
use crate::domain::notification::{Accepted, Audience, HandOff, NewEvent, Notification};
use crate::domain::pause::{Pause, PauseScope};
use crate::domain::platform::{Lane, Route, RouteSpec};
use crate::domain::targets::Target;
use crate::domain::time::UnixMs;
use crate::domain::watch::WatchPosition;
use crate::runtime::Runtime;
use crate::storage::{
    AudiencePage, Backlog, BootId, ClaimRequest, Claimed, DeclaredType, Delivery, DeliveryFilter, DeliveryKey, Fanout,
    FanoutPage, GateFacts, GateQuestion, ImportBatch, ImportItem, Imported, JobUpdate, NewOptIn, NewSubscription,
    NotificationView, OptIn, Page, PageWrite, PersonHistory, Queue, Registry, ResolvedAudience, Restoration, Result,
    Subscription, TroubleRow, WatchFilter, WatchPage,
};

/// See the module. Dropping the last handle writes what is queued and closes the database.
pub struct SqliteStore {
    // Before the lock, so that the file is free only when nothing uses it any more.
    writer: Writer,
    readers: Readers,
    /// None in simulation.
    scanner: Option<Scanner>,
    context: Arc<Context>,
    /// In simulation, at most.
    disturb: Option<Arc<dyn Disturb>>,
    paces: providers::Paces,
    lock: std::sync::Mutex<Option<File>>,
    /// How far retention has come.
    sweep: std::sync::Mutex<retain::Sweep>,
}

impl SqliteStore {
    /// Opens or makes the database and starts its threads. Every "no" is published to `deny` before it is answered.
    pub fn open(runtime: Runtime, settings: &Settings, deny: Arc<DenyFeed>) -> Result<Self, OpenError> {
        let opened = open::open(&runtime, settings)?;
        let boot = AtomicI64::new(open::boot_id(&runtime));
        let horizon = watching::Horizon::new(opened.epoch, opened.ids.newest());
        let context = Arc::new(Context {
            runtime,
            ids: opened.ids,
            boot,
            deny,
            identity: opened.identity,
            horizon,
            disk_full: AtomicBool::new(false),
        });
        let core = Core::new(opened.writer, Arc::clone(&context));
        let writer = Writer::start(&context.runtime, settings, core)?;
        let readers = Readers::start(&context.runtime, opened.readers)?;
        let scanner = opened.scanner.map(|conn| Scanner::start(&context, conn, &settings.path)).transpose()?;
        let (paces, lock) = (providers::Paces::default(), std::sync::Mutex::new(opened.lock));
        Ok(Self { writer, readers, scanner, context, disturb: None, paces, lock, sweep: std::sync::Mutex::default() })
    }

    /// In a simulation: every call is disturbed as `by` says.
    #[must_use]
    pub fn disturbed_by(mut self, by: Arc<dyn Disturb>) -> Self {
        self.disturb = self.context.runtime.is_simulated().then_some(by);
        self
    }

    /// What owns the leases of this start.
    pub fn boot_id(&self) -> BootId {
        self.context.boot()
    }

    /// Answers, with the reason, when the outcome of a COMMIT is unknown: everything is answered `Unavailable` from
    /// then on, and the process must exit; the next start reads what the database really holds.
    pub async fn fatal(&self) -> Arc<str> {
        self.writer.fatal().await
    }

    /// Whether the reason of [`SqliteStore::fatal`] is a damaged file: a restart does not help.
    pub fn is_damaged(&self) -> bool {
        self.writer.is_damaged()
    }

    /// Whether the last write found the disk full. Then one is tried, so that the end of it is noticed.
    pub async fn is_disk_full(&self) -> bool {
        if self.context.disk_full.load(Ordering::Relaxed) {
            // The schema cookie's neighbour, which nobody reads: it is written whatever it was.
            let probe = |tx: &mut Tx<'_>| tx.execute(constant!((); "PRAGMA user_version = 0"));
            let _ = self.write(Class::Outcome, 0, "trying to write", probe).await;
        }
        self.context.disk_full.load(Ordering::Relaxed)
    }

    /// Requests that wait to be written.
    pub fn waiting(&self) -> usize {
        self.writer.waiting()
    }

    /// What the database holds, without pages that it has free and without the log.
    pub async fn size_bytes(&self) -> Result<u64> {
        self.read(Asker::Caller, "measuring the database", retain::size_bytes).await
    }

    /// Whether the schema is this version's, for `/readyz`.
    pub async fn migrations_fit(&self) -> Result<bool> {
        self.read(Asker::Caller, "looking at the migrations", |conn| Ok(open::migrations_fit(conn))).await
    }

    /// Writes what is queued, refuses what comes later, and lets the database go. Blocks for as long as that takes.
    pub fn close(&self) {
        self.writer.stop();
        self.readers.stop();
        if let Some(scanner) = &self.scanner {
            scanner.stop();
        }
        self.lock.lock().expect("no panic while held").take();
    }

    async fn write<T, W>(&self, class: Class, bytes: usize, doing: &'static str, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnMut(&mut Tx<'_>) -> Attempt<T> + Send + 'static,
    {
        let call = self.writer.submit(class, bytes, doing, work);
        disturbed(&self.context.runtime, self.disturb.as_ref(), doing, call).await
    }

    async fn read<T, W>(&self, asker: Asker, doing: &'static str, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnOnce(&mut SqliteConnection) -> Attempt<T> + Send + 'static,
    {
        if self.writer.is_dead() {
            return Err(unavailable(doing));
        }
        let alarm = self.writer.alarm();
        let work = move |conn: &mut SqliteConnection| {
            let result = work(conn);
            alarm.hear(&result);
            result
        };
        if self.context.runtime.is_simulated() {
            let call = async {
                let answer = self.writer.read_inline(work).unwrap_or_else(|| Err(unavailable(doing).into()));
                answer.map_err(|fail| fail.into_store(doing))
            };
            return disturbed(&self.context.runtime, self.disturb.as_ref(), doing, call).await;
        }
        self.readers.read(asker, doing, work).await
    }

    /// See [`Readers::read_quickly`].
    async fn read_quickly<T, W>(&self, doing: &'static str, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnOnce(&mut SqliteConnection) -> Attempt<T> + Send + 'static,
    {
        if self.writer.is_dead() || self.context.runtime.is_simulated() {
            return self.read(Asker::Caller, doing, work).await;
        }
        self.readers.read_quickly(doing, work).await
    }
}

/// What stops providers by a database that a running server may be using, for `nudged check`.
///
/// # Errors
/// In words, when it cannot be read.
pub fn troubles(path: &std::path::Path, now: UnixMs) -> Result<Vec<TroubleRow>, String> {
    providers::inspect(path, now)
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        self.close();
    }
}

/// What a small request holds, roughly, for the queue's bound.
const SMALL: usize = 512;

#[async_trait::async_trait]
impl Registry for SqliteStore {
    fn identity(&self) -> &IdentityKey {
        &self.context.identity
    }

    async fn ensure_app(&self, app: &AppId, now: UnixMs) -> Result<AppKey> {
        let doing = "making an app's row";
        let (name, theirs) = (app.clone(), app.clone());
        if let Some(key) = self.read(Asker::Caller, doing, move |conn| setup::app_key(conn, &theirs)).await? {
            return Ok(key);
        }
        self.write(Class::Consent, SMALL, doing, move |tx| setup::ensure_app(tx, &name, now)).await
    }

    async fn ensure_routes(&self, specs: &[RouteSpec], now: UnixMs) -> Result<Vec<Route>> {
        let specs = specs.to_vec();
        self.write(Class::Consent, SMALL, "making routes' rows", move |tx| setup::ensure_routes(tx, &specs, now)).await
    }

    async fn register_device(&self, registration: Registration, now: UnixMs) -> Result<Registered> {
        let doing = "registering a device";
        let registration = Arc::new(registration);
        let theirs = Arc::clone(&registration);
        let standing = self.read_quickly(doing, move |conn| devices::unchanged(conn, &theirs, now)).await?;
        if let Some(standing) = standing {
            return Ok(standing);
        }
        let bytes = SMALL + 2 * registration.token.expose().len();
        self.write(Class::Consent, bytes, doing, move |tx| devices::register(tx, &registration, now)).await
    }

    async fn unregister_device(
        &self,
        app: AppKey,
        user: Option<UserId>,
        device: DeviceRef,
        observed_at: UnixMs,
        now: UnixMs,
    ) -> Result<bool> {
        self.write(Class::Consent, SMALL, "unregistering a device", move |tx| {
            devices::unregister(tx, app, user.as_ref(), &device, observed_at, now)
        })
        .await
    }

    async fn list_devices(
        &self,
        app: AppKey,
        user: &UserId,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<Device, DeviceId>> {
        let user = user.clone();
        self.read(Asker::Caller, "listing devices", move |conn| devices::list(conn, app, &user, after, limit)).await
    }

    async fn set_opt_in(&self, choice: NewOptIn, now: UnixMs) -> Result<(OptIn, bool)> {
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let bytes = SMALL + text(&choice.source) + text(&choice.policy_version) + text(&choice.evidence);
        self.write(Class::Consent, bytes, "recording a choice", move |tx| opt_in::set(tx, &choice, now)).await
    }

    async fn list_opt_ins(&self, app: AppKey, user: &UserId) -> Result<Vec<OptIn>> {
        let user = user.clone();
        self.read(Asker::Caller, "listing choices", move |conn| opt_in::list(conn, app, &user)).await
    }

    async fn set_subscription(
        &self,
        app: AppKey,
        user: UserId,
        topic: Topic,
        active: bool,
        observed_at: UnixMs,
        now: UnixMs,
    ) -> Result<bool> {
        let new = NewSubscription { app, user, topic, active, observed_at };
        self.write(Class::Consent, SMALL, "recording a subscription", move |tx| subscriptions::set(tx, &new, now)).await
    }

    async fn list_subscriptions(
        &self,
        app: AppKey,
        user: &UserId,
        after: Option<i64>,
        limit: usize,
    ) -> Result<Page<Subscription, i64>> {
        let user = user.clone();
        self.read(Asker::Caller, "listing subscriptions", move |conn| {
            subscriptions::list(conn, app, &user, after, limit)
        })
        .await
    }

    async fn import_position(&self, app: AppKey, name: &str) -> Result<i64> {
        let name = name.to_owned();
        self.read(Asker::Caller, "looking up an import", move |conn| imports::position(conn, app, &name)).await
    }

    async fn import(&self, batch: ImportBatch, now: UnixMs) -> Result<Vec<Imported>> {
        let ImportBatch { app, name, position, mut items } = batch;
        let mut imported = Vec::with_capacity(items.len());
        loop {
            let rest = items.split_off(items.len().min(imports::CHUNK));
            let last = rest.is_empty();
            let bytes = SMALL + SMALL * items.len();
            // The progress comes with the last of them.
            let progress = last.then(|| (app, name.clone(), position));
            let apply = move |tx: &mut Tx<'_>| imports::apply(tx, &items, progress.as_ref(), now);
            imported.append(&mut self.write(Class::Import, bytes, "importing", apply).await?);
            if last {
                return Ok(imported);
            }
            items = rest;
        }
    }

    async fn assess_import(&self, items: Vec<ImportItem>) -> Result<Vec<Imported>> {
        self.read(Asker::Caller, "checking an import", move |conn| snapshot(conn, |conn| imports::assess(conn, &items)))
            .await
    }

    async fn event_type(&self, app: AppKey, event_type: &EventType) -> Result<DeclaredType> {
        let name = event_type.clone();
        self.read(Asker::Caller, "looking up an event type", move |conn| event_types::declared(conn, app, &name)).await
    }

    async fn put_event_type(
        &self,
        app: AppKey,
        definition: Arc<Definition>,
        now: UnixMs,
    ) -> Result<(TypeVersion, bool)> {
        let doing = "storing an event type";
        let new = event_types::Declaration::new(app, definition).map_err(|fail| fail.into_store(doing))?;
        self.write(Class::Consent, SMALL + new.bytes(), doing, move |tx| event_types::put(tx, &new, now)).await
    }

    async fn get_event_type(&self, app: AppKey, name: &EventType, version: Option<u32>) -> Result<TypeVersion> {
        let name = name.clone();
        self.read(Asker::Caller, "reading an event type", move |conn| event_types::get(conn, app, &name, version)).await
    }

    async fn list_event_types(
        &self,
        app: AppKey,
        after: Option<EventType>,
        limit: usize,
    ) -> Result<Page<TypeVersion, EventType>> {
        self.read(Asker::Caller, "listing event types", move |conn| event_types::list(conn, app, after.as_ref(), limit))
            .await
    }

    async fn delete_event_type(&self, app: AppKey, name: &EventType, now: UnixMs) -> Result<bool> {
        let name = name.clone();
        self.write(Class::Consent, SMALL, "deleting an event type", move |tx| event_types::delete(tx, app, &name, now))
            .await
    }

    async fn type_definition(&self, version: TypeVersionId) -> Result<Definition> {
        self.read(Asker::Engine, "reading an event type's version", move |conn| event_types::definition(conn, version))
            .await
    }

    async fn accept(&self, event: NewEvent, hand_off: Arc<dyn HandOff>, now: UnixMs) -> Result<Accepted> {
        let doing = "accepting an event";
        let mut prepared = Prepared::new(event, hand_off).map_err(|fail| fail.into_store(doing))?;
        if let Some(limit) = prepared.wide_limit() {
            let (answer, too_many) = self
                .read(Asker::Caller, doing, move |conn| {
                    let too_many = snapshot(conn, |conn| prepared.exceeds(conn, limit))?;
                    Ok((prepared, too_many))
                })
                .await?;
            prepared = answer;
            prepared.set_too_many(too_many);
        }
        let bytes = prepared.bytes();
        self.write(Class::Accept, bytes, doing, move |tx| accept::accept(tx, &prepared, now)).await
    }

    async fn resolve_audience(
        &self,
        app: AppKey,
        audience: &Audience,
        actor: Option<&UserId>,
    ) -> Result<ResolvedAudience> {
        let (audience, actor) = (audience.clone(), actor.cloned());
        self.read(Asker::Caller, "resolving an audience", move |conn| {
            snapshot(conn, |conn| accept::rehearse(conn, app, &audience, actor.as_ref()))
        })
        .await
    }

    async fn audience_page(
        &self,
        app: AppKey,
        event_type: &EventType,
        audience: &Arc<[u8]>,
        after: UserKey,
        limit: usize,
    ) -> Result<AudiencePage> {
        let (event_type, audience) = (event_type.clone(), Arc::clone(audience));
        self.read(Asker::Caller, "reading a page of an audience", move |conn| {
            snapshot(conn, |conn| {
                let met = fanout::meet(conn, app, &event_type, &audience, after, limit)?;
                Ok(AudiencePage { people: met.found.people, cursor: met.cursor, done: met.done })
            })
        })
        .await
    }

    async fn user_names(&self, users: &[UserKey]) -> Result<Vec<Option<UserId>>> {
        let users = users.to_vec();
        self.read(Asker::Caller, "reading names", move |conn| Ok(people::user_names(conn, &users)?)).await
    }

    async fn cancel_notification(&self, app: AppKey, id: NotificationId, now: UnixMs) -> Result<bool> {
        self.write(Class::Consent, SMALL, "cancelling a notification", move |tx| {
            notifications::cancel(tx, app, id, now)
        })
        .await
    }

    async fn get_notification(&self, app: AppKey, id: NotificationId) -> Result<NotificationView> {
        self.read(Asker::Caller, "reading a notification", move |conn| {
            snapshot(conn, |conn| notifications::view(conn, app, id))
        })
        .await
    }

    async fn list_notifications(
        &self,
        app: AppKey,
        event_type: Option<EventType>,
        before: Option<NotificationId>,
        limit: usize,
    ) -> Result<Page<Notification, NotificationId>> {
        self.read(Asker::Caller, "listing notifications", move |conn| {
            notifications::list(conn, app, event_type.as_ref(), before, limit)
        })
        .await
    }

    async fn list_deliveries(
        &self,
        app: AppKey,
        id: NotificationId,
        filter: DeliveryFilter,
        after: Option<DeliveryKey>,
        limit: usize,
    ) -> Result<Page<Delivery, DeliveryKey>> {
        self.read(Asker::Caller, "listing deliveries", move |conn| {
            snapshot(conn, |conn| explain::deliveries(conn, app, id, &filter, after, limit))
        })
        .await
    }

    async fn person_history(&self, app: AppKey, id: NotificationId, user: &UserId) -> Result<PersonHistory> {
        let user = user.clone();
        self.read(Asker::Caller, "reading a person's history", move |conn| {
            snapshot(conn, |conn| explain::person(conn, app, id, &user))
        })
        .await
    }

    async fn device_owner(&self, app: AppKey, device: DeviceId) -> Result<UserId> {
        self.read(Asker::Caller, "looking up a device's owner", move |conn| devices::owner(conn, app, device)).await
    }

    async fn watch(
        &self,
        app: AppKey,
        after: Option<WatchPosition>,
        filter: &WatchFilter,
        limit: usize,
    ) -> Result<WatchPage> {
        let (filter, context) = (filter.clone(), Arc::clone(&self.context));
        self.read(Asker::Caller, "reading for a watcher", move |conn| {
            watching::page(conn, &context.horizon, app, after, &filter, limit, context.runtime.now())
        })
        .await
    }

    async fn pause(&self, pause: Pause) -> Result<bool> {
        let bytes = SMALL + pause.reason.len();
        self.write(Class::Consent, bytes, "storing a pause", move |tx| pauses::pause(tx, &pause)).await
    }

    async fn resume(&self, scope: &PauseScope) -> Result<bool> {
        let scope = scope.clone();
        self.write(Class::Consent, SMALL, "ending a pause", move |tx| pauses::resume(tx, &scope)).await
    }

    async fn pauses(&self) -> Result<Vec<Pause>> {
        self.read(Asker::Engine, "reading the pauses", pauses::all).await
    }

    async fn begin_restoration(&self, name: &str, now: UnixMs) -> Result<Restoration> {
        let name = name.to_owned();
        let doing = "holding everything after a restore";
        self.write(Class::Consent, SMALL, doing, move |tx| restorations::begin(tx, &name, now)).await
    }

    async fn cancel_open(
        &self,
        before: UnixMs,
        after: NotificationId,
        limit: usize,
        now: UnixMs,
    ) -> Result<(Option<NotificationId>, u64)> {
        self.write(Class::Consent, SMALL, "cancelling open work", move |tx| {
            restorations::cancel_open(tx, before, after, limit, now)
        })
        .await
    }

    async fn restorations(&self) -> Result<Vec<Restoration>> {
        self.read(Asker::Caller, "looking for a restore", restorations::open).await
    }

    async fn confirm_restorations(&self, now: UnixMs) -> Result<bool> {
        self.write(Class::Consent, SMALL, "confirming a restore", move |tx| restorations::confirm(tx, now)).await
    }

    async fn ping(&self) -> Result<()> {
        let doing = "answering a ping";
        self.read(Asker::Caller, doing, |conn| Ok(constant!(Integer; "SELECT 1").get_result::<i32>(conn)?)).await?;
        self.write(Class::Consent, 0, doing, |_| Ok(())).await
    }
}

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
        self.read(Asker::Caller, "counting open targets", retain::open_targets).await
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
        self.read(Asker::Caller, "counting what waits", move |conn| retain::backlog(conn, now)).await
    }

    async fn retain(&self, history_before: UnixMs, now: UnixMs) -> Result<u64> {
        let from = *self.sweep.lock().expect("no panic while held");
        let sweep = move |tx: &mut Tx<'_>| retain::retain(tx, from, history_before, now);
        let (deleted, next) = self.write(Class::Retention, SMALL, "deleting what is old", sweep).await?;
        *self.sweep.lock().expect("no panic while held") = next;
        Ok(deleted.count())
    }
}

fn update_bytes(update: &JobUpdate) -> usize {
    let followers: usize = update.followers.iter().map(|job| SMALL + 16 * job.targets.len()).sum();
    SMALL + 24 * update.entries.len() + 256 * update.details.len() + 128 * update.retirements.len() + followers
}
