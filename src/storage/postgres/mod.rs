//! The store on Postgres: any number of processes on one database.
//!
//! Events to named people are committed in groups ([`group`]). Every other write is a transaction of its own ([`tx`]) and
//! every read a statement or a snapshot ([`mod@read`]), on pooled connections. Replicas know each other by rows: a slot with a heartbeat ([`replica`]), from which ids take their node
//! number, and the log of "no"s ([`deny`]). Leases are guarded by the job's fence alone; a heartbeat only says when it
//! is worth taking a lease away.

mod accept;
mod arriving;
mod batch;
mod connect;
mod deny;
mod devices;
mod event_types;
mod explain;
mod fanout;
mod group;
mod imports;
mod jobs;
mod notifications;
mod open;
mod opt_in;
mod packing;
mod partitions;
mod pauses;
mod people;
mod providers;
mod query;
mod read;
mod replica;
mod restorations;
mod retain;
mod seed;
mod setup;
mod subscriptions;
#[cfg(test)]
mod tests;
mod tx;
mod watching;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use diesel::sql_types::Bool;
use diesel_async::pooled_connection::deadpool::{Object, Pool};
use diesel_async::pooled_connection::{AsyncDieselConnectionManager, ManagerConfig, RecyclingMethod};
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection};
use futures_util::FutureExt;
use tokio::sync::{RwLock, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub use arriving::Destination;
pub use connect::{Target as Server, TargetError};
pub use open::{OpenError, Settings};
pub use seed::seed;

use self::accept::Prepared;
use self::fail::unavailable;
use self::query::RunQuery;
use self::read::read;
use self::statement::constant;
use self::tx::step;
use super::paging::{page, page_limit};
use super::{cache, effects, fail, redrive, rows, statement, watching as watch_rows};
use crate::domain::deny::DenyFeed;
use crate::domain::device::{Device, DeviceRef, Labels, Registered, Registration};
use crate::domain::event_type::{Definition, TypeVersion};
use crate::domain::identity::IdentityKey;
use crate::domain::ids::{
    AppId, AppKey, DeviceId, EventType, IdMaker, JobId, NotificationId, RouteId, Topic, TypeVersionId, UserId, UserKey,
};
use crate::domain::notification::{Accepted, Audience, HandOff, NewEvent, Notification};
use crate::domain::pause::{Pause, PauseScope};
use crate::domain::platform::{Lane, Route, RouteSpec};
use crate::domain::targets::Target;
use crate::domain::time::UnixMs;
use crate::domain::watch::WatchPosition;
use crate::runtime::{Instant, Runtime};
use crate::storage::{
    AudiencePage, Backlog, BootId, ClaimRequest, Claimed, DeclaredType, Delivery, DeliveryFilter, DeliveryKey, Fanout,
    FanoutPage, Gate, GateFacts, GateQuestion, ImportBatch, ImportItem, Imported, JobUpdate, NewOptIn, NewSubscription,
    NotificationView, OptIn, Page, PageWrite, PersonHistory, Queue, Registry, ResolvedAudience, Restoration, Result,
    StoreError, Subscription, TroubleRow, WatchFilter, WatchPage,
};

/// How long a step or read waits for a connection of the pool.
const POOL_WAIT: Duration = Duration::from_secs(2);
/// How long claims may skip what is due before the last one's end.
const FULL_LOOK: Duration = Duration::from_secs(2);
/// Steps and reads that may wait for a connection at the same time, per connection.
const WAITING_PER_CONNECTION: usize = 64;

/// What every step may use beside its connection.
struct Context {
    runtime: Runtime,
    ids: IdMaker,
    boot: BootId,
    deny: Arc<DenyFeed>,
    identity: IdentityKey,
    cache: Mutex<cache::NotificationCache>,
    /// The app whose fan-out was leased last.
    last_fanout_app: AtomicI64,
    /// Jobs and fan-outs that the engine has.
    held: tx::Held,
    /// Leases may have been taken that nobody knows of.
    sweep: AtomicBool,
    /// The last fan-out that was found thin: see [`fanout::meet`].
    thin_fanout: AtomicI64,
    /// Other replicas live.
    others: AtomicBool,
    packing: packing::Packing,
    /// Shared by whoever takes leases.
    leasing: RwLock<()>,
    /// The server's clock less ours, in milliseconds.
    skew: AtomicI64,
    stopping: CancellationToken,
}

impl Context {
    fn is_stopping(&self) -> bool {
        self.stopping.is_cancelled()
    }
}

struct Inner {
    context: Arc<Context>,
    target: Arc<connect::Target>,
    pool: Pool<AsyncPgConnection>,
    max_waiting: usize,
    server_clock: bool,
    watched_from: watching::Origin,
    partitions: partitions::Plan,
    /// By route and lane: nothing free was due before this at the last claim, and when a full look is due.
    bounds: Mutex<HashMap<(RouteId, Lane), (i64, Instant)>>,
    fatal: watch::Sender<Option<Arc<str>>>,
}

impl Inner {
    async fn connection(&self, doing: &'static str) -> Result<Object<AsyncPgConnection>> {
        if self.fatal.borrow().is_some() {
            return Err(unavailable(doing));
        }
        if self.pool.status().waiting >= self.max_waiting {
            return Err(StoreError::Overloaded { what: "every connection to the database is busy" });
        }
        match self.context.runtime.timeout(POOL_WAIT, self.pool.get()).await {
            Some(Ok(object)) => Ok(object),
            Some(Err(error)) => Err(StoreError::Unavailable { doing, source: Some(Box::new(error)) }),
            None => Err(unavailable(doing)),
        }
    }

    /// Nothing is read or written any more; the process must exit.
    fn die(&self, why: &str) {
        tracing::error!(why, "the store stops");
        self.fatal.send_replace(Some(Arc::from(why)));
    }

    /// Due times are the server's.
    fn clock(&self, now: UnixMs) -> UnixMs {
        if self.server_clock { UnixMs(now.0 + self.context.skew.load(Ordering::Relaxed)) } else { now }
    }

    /// A due time as the callers' clock has it.
    fn told(&self, due: UnixMs) -> UnixMs {
        if self.server_clock { UnixMs(due.0 - self.context.skew.load(Ordering::Relaxed)) } else { due }
    }

    fn bound(&self, route: RouteId, lane: Lane) -> i64 {
        let now = self.context.runtime.instant();
        let bounds = self.bounds.lock().expect("no panic while held");
        bounds.get(&(route, lane)).filter(|(_, full_look)| *full_look > now).map_or(0, |(from, _)| *from)
    }

    /// After a claim from `from` on, the last of which was due at `last` (0: none).
    fn set_bound(&self, route: RouteId, lane: Lane, from: i64, last: i64) {
        let now = self.context.runtime.instant();
        let mut bounds = self.bounds.lock().expect("no panic while held");
        let entry = bounds.entry((route, lane)).or_insert((0, now));
        if from == 0 {
            entry.1 = now + FULL_LOOK;
        }
        entry.0 = last;
    }

    /// Something may be due earlier than was thought.
    fn forget_bounds(&self) {
        self.bounds.lock().expect("no panic while held").clear();
    }

    fn let_go(&self, ids: impl IntoIterator<Item = i64>) {
        let mut held = self.context.held.lock().expect("no panic while held");
        for id in ids {
            held.remove(&id);
        }
    }
}

/// See the module. Closed by [`PostgresStore::close`]; dropping it leaves its leases to the others, ten seconds later.
pub struct PostgresStore {
    inner: Arc<Inner>,
    acceptor: group::Acceptor,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl PostgresStore {
    /// Connects, migrates, takes a replica slot and starts the heartbeat and the reader of the deny table. `deny` must
    /// be a [`DenyFeed::shared`]; it is proven complete once before this answers.
    pub async fn open(runtime: Runtime, settings: &Settings, deny: Arc<DenyFeed>) -> Result<Self, OpenError> {
        let target = Arc::new(connect::Target::parse(&settings.url, settings.password_file.clone())?);
        let boot = (u64::from_le_bytes(runtime.secret_bytes()) >> 2).cast_signed() + 1;
        let opened = open::open(&runtime, &target, settings, boot).await?;
        let mut config = ManagerConfig::default();
        let theirs = Arc::clone(&target);
        config.custom_setup = Box::new(move |_| {
            let target = Arc::clone(&theirs);
            async move { target.connect().await }.boxed()
        });
        config.recycling_method = RecyclingMethod::Fast;
        let manager = AsyncDieselConnectionManager::<AsyncPgConnection>::new_with_config(String::new(), config);
        let pool = Pool::builder(manager)
            .max_size(settings.pool.max(2))
            .build()
            .map_err(|error| OpenError::Read { reason: error.to_string() })?;
        let context = Arc::new(Context {
            runtime: runtime.clone(),
            ids: opened.ids,
            boot: BootId(boot),
            deny,
            identity: opened.identity,
            cache: Mutex::default(),
            last_fanout_app: AtomicI64::new(0),
            held: Mutex::default(),
            sweep: AtomicBool::new(false),
            thin_fanout: AtomicI64::new(0),
            others: AtomicBool::new(false),
            packing: opened.packing,
            leasing: RwLock::new(()),
            skew: AtomicI64::new(0),
            stopping: CancellationToken::new(),
        });
        let inner = Arc::new(Inner {
            context,
            target,
            pool,
            max_waiting: settings.pool * WAITING_PER_CONNECTION,
            server_clock: settings.server_clock,
            watched_from: opened.watched_from,
            partitions: partitions::Plan::of(settings),
            bounds: Mutex::default(),
            fatal: watch::channel(None).0,
        });
        let mut poller = deny::Poller::default();
        poller.poll(&inner).await.map_err(|reason| OpenError::Read { reason })?;
        let (acceptor, committer) = group::Acceptor::new();
        let replica = replica::Replica { slot: opened.slot, conn: None };
        let tasks = vec![
            runtime.spawn(poller.run(Arc::clone(&inner))),
            runtime.spawn(replica.run(Arc::clone(&inner))),
            runtime.spawn(committer.run(Arc::clone(&inner))),
        ];
        Ok(Self { inner, acceptor, tasks: Mutex::new(tasks) })
    }

    /// What owns the leases of this start.
    pub fn boot_id(&self) -> BootId {
        self.inner.context.boot
    }

    /// Answers, with the reason, when this process may not go on: its slot is another's by now.
    pub async fn fatal(&self) -> Arc<str> {
        let mut fatal = self.inner.fatal.subscribe();
        loop {
            if let Some(why) = fatal.borrow_and_update().clone() {
                return why;
            }
            if fatal.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Whether the schema is this version's, for `/readyz`.
    pub async fn migrations_fit(&self) -> Result<bool> {
        read!(&self.inner, "looking at the migrations", |conn| async { Ok(open::missing_migrations(conn).await? == 0) })
    }

    /// Events that wait to be committed.
    pub fn waiting(&self) -> usize {
        self.acceptor.waiting()
    }

    /// What the database takes on its server's disk, without the log.
    pub async fn size_bytes(&self) -> Result<u64> {
        read!(&self.inner, "measuring the database", |conn| retain::size_bytes(conn))
    }

    /// Takes nothing more, gives back what is leased, and lets the database go.
    pub async fn close(&self) {
        self.inner.context.stopping.cancel();
        let tasks = std::mem::take(&mut *self.tasks.lock().expect("no panic while held"));
        for task in tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "a task of the store ended badly");
            }
        }
        self.inner.pool.close();
    }
}

impl Drop for PostgresStore {
    fn drop(&mut self) {
        for task in &*self.tasks.lock().expect("no panic while held") {
            task.abort();
        }
    }
}

/// What [`inspect`] saw.
pub struct Inspection {
    pub missing_migrations: usize,
    /// Settings that weaken what nudged promises, each with its consequence.
    pub warnings: Vec<String>,
    /// What stops credentials and routes.
    pub troubles: Vec<TroubleRow>,
}

/// Looks at a server without changing anything, for `nudged check`.
pub async fn inspect(settings: &Settings, now: UnixMs) -> Result<Inspection, OpenError> {
    let target = connect::Target::parse(&settings.url, settings.password_file.clone())?;
    let mut conn = target.connect().await.map_err(|error| OpenError::Connect { reason: error.to_string() })?;
    let missing_migrations = open::missing_migrations(&mut conn).await?;
    let troubles = if missing_migrations == 0 {
        let read = providers::describe(&mut conn, now).await;
        read.map_err(|fail| OpenError::Read { reason: format!("{fail:?}") })?
    } else {
        Vec::new()
    };
    Ok(Inspection { missing_migrations, warnings: setup::warnings(&mut conn).await?, troubles })
}

/// Numbers as one parameter.
fn ids(ids: impl Iterator<Item = i64>) -> Vec<i64> {
    ids.collect()
}

#[async_trait::async_trait]
impl Registry for PostgresStore {
    fn identity(&self) -> &IdentityKey {
        &self.inner.context.identity
    }

    async fn ensure_app(&self, app: &AppId, now: UnixMs) -> Result<AppKey> {
        let doing = "making an app's row";
        if let Some(key) = read!(&self.inner, doing, |conn| setup::app_key(conn, app))? {
            return Ok(key);
        }
        step!(&self.inner, doing, |tx| setup::ensure_app(tx, app, now))
    }

    async fn ensure_routes(&self, specs: &[RouteSpec], now: UnixMs) -> Result<Vec<Route>> {
        step!(&self.inner, "making routes' rows", |tx| setup::ensure_routes(tx, specs, now))
    }

    async fn register_device(&self, registration: Registration, now: UnixMs) -> Result<Registered> {
        let doing = "registering a device";
        let standing = read!(&self.inner, doing, |conn| devices::unchanged(conn, &registration, now))?;
        if let Some(standing) = standing {
            return Ok(standing);
        }
        step!(&self.inner, doing, |tx| devices::register(tx, &registration, now))
    }

    async fn unregister_device(
        &self,
        app: AppKey,
        user: Option<UserId>,
        device: DeviceRef,
        observed_at: UnixMs,
        now: UnixMs,
    ) -> Result<bool> {
        step!(&self.inner, "unregistering a device", |tx| devices::unregister(
            tx,
            app,
            user.as_ref(),
            &device,
            observed_at,
            now
        ))
    }

    async fn list_devices(
        &self,
        app: AppKey,
        user: &UserId,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<Device, DeviceId>> {
        read!(&self.inner, "listing devices", |conn| devices::list(conn, app, user, after, limit))
    }

    async fn set_opt_in(&self, choice: NewOptIn, now: UnixMs) -> Result<(OptIn, bool)> {
        step!(&self.inner, "recording a choice", |tx| opt_in::set(tx, &choice, now))
    }

    async fn list_opt_ins(&self, app: AppKey, user: &UserId) -> Result<Vec<OptIn>> {
        read!(&self.inner, "listing choices", |conn| opt_in::list(conn, app, user))
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
        step!(&self.inner, "recording a subscription", |tx| subscriptions::set(tx, &new, now))
    }

    async fn list_subscriptions(
        &self,
        app: AppKey,
        user: &UserId,
        after: Option<i64>,
        limit: usize,
    ) -> Result<Page<Subscription, i64>> {
        read!(&self.inner, "listing subscriptions", |conn| subscriptions::list(conn, app, user, after, limit))
    }

    async fn import_position(&self, app: AppKey, name: &str) -> Result<i64> {
        read!(&self.inner, "looking up an import", |conn| imports::position(conn, app, name))
    }

    async fn import(&self, batch: ImportBatch, now: UnixMs) -> Result<Vec<Imported>> {
        let doing = "importing";
        let mut imported = Vec::with_capacity(batch.items.len());
        for items in batch.items.chunks(imports::CHUNK) {
            imported.append(&mut step!(&self.inner, doing, |tx| imports::apply(tx, items, now))?);
        }
        step!(&self.inner, doing, |tx| imports::advance(tx, batch.app, &batch.name, batch.position, now))?;
        Ok(imported)
    }

    async fn assess_import(&self, items: Vec<ImportItem>) -> Result<Vec<Imported>> {
        read!(snapshot; &self.inner, "checking an import", |conn| imports::assess(conn, &items))
    }

    async fn event_type(&self, app: AppKey, event_type: &EventType) -> Result<DeclaredType> {
        read!(&self.inner, "looking up an event type", |conn| event_types::declared(conn, app, event_type))
    }

    async fn put_event_type(
        &self,
        app: AppKey,
        definition: Arc<Definition>,
        now: UnixMs,
    ) -> Result<(TypeVersion, bool)> {
        let doing = "storing an event type";
        let new = event_types::Declaration::new(app, definition).map_err(|fail| fail.into_store(doing))?;
        step!(&self.inner, doing, |tx| event_types::put(tx, &new, now))
    }

    async fn get_event_type(&self, app: AppKey, name: &EventType, version: Option<u32>) -> Result<TypeVersion> {
        read!(&self.inner, "reading an event type", |conn| event_types::get(conn, app, name, version))
    }

    async fn list_event_types(
        &self,
        app: AppKey,
        after: Option<EventType>,
        limit: usize,
    ) -> Result<Page<TypeVersion, EventType>> {
        read!(&self.inner, "listing event types", |conn| event_types::list(conn, app, after.as_ref(), limit))
    }

    async fn delete_event_type(&self, app: AppKey, name: &EventType, now: UnixMs) -> Result<bool> {
        step!(&self.inner, "deleting an event type", |tx| event_types::delete(tx, app, name, now))
    }

    async fn type_definition(&self, version: TypeVersionId) -> Result<Definition> {
        read!(&self.inner, "reading an event type's version", |conn| event_types::definition(conn, version))
    }

    async fn accept(&self, event: NewEvent, hand_off: Arc<dyn HandOff>, now: UnixMs) -> Result<Accepted> {
        let doing = "accepting an event";
        let now = self.inner.clock(now);
        let mut prepared = Prepared::new(event, hand_off).map_err(|fail| fail.into_store(doing))?;
        if prepared.is_simple() {
            return self.acceptor.accept(prepared, now).await;
        }
        if let Some(limit) = prepared.wide_limit() {
            let too_many = read!(snapshot; &self.inner, doing, |conn| prepared.exceeds(conn, limit))?;
            prepared.set_too_many(too_many);
        }
        step!(leasing; &self.inner, doing, |tx| accept::accept(tx, &prepared, now))
    }

    async fn resolve_audience(
        &self,
        app: AppKey,
        audience: &Audience,
        actor: Option<&UserId>,
    ) -> Result<ResolvedAudience> {
        read!(snapshot; &self.inner, "resolving an audience", |conn| accept::rehearse(conn, app, audience, actor))
    }

    async fn audience_page(
        &self,
        app: AppKey,
        event_type: &EventType,
        audience: &Arc<[u8]>,
        after: UserKey,
        limit: usize,
    ) -> Result<AudiencePage> {
        let met = read!(snapshot; &self.inner, "reading a page of an audience", |conn| fanout::meet(
            conn,
            app,
            event_type,
            audience,
            after,
            limit,
            &mut false
        ))?;
        Ok(AudiencePage { people: met.found.people, cursor: met.cursor, done: met.done })
    }

    async fn user_names(&self, users: &[UserKey]) -> Result<Vec<Option<UserId>>> {
        read!(&self.inner, "reading names", |conn| async { Ok(people::user_names(conn, users).await?) })
    }

    async fn cancel_notification(&self, app: AppKey, id: NotificationId, now: UnixMs) -> Result<bool> {
        step!(&self.inner, "cancelling a notification", |tx| notifications::cancel(tx, app, id, now))
    }

    async fn get_notification(&self, app: AppKey, id: NotificationId) -> Result<NotificationView> {
        read!(snapshot; &self.inner, "reading a notification", |conn| notifications::view(conn, app, id))
    }

    async fn list_notifications(
        &self,
        app: AppKey,
        event_type: Option<EventType>,
        before: Option<NotificationId>,
        limit: usize,
    ) -> Result<Page<Notification, NotificationId>> {
        read!(&self.inner, "listing notifications", |conn| notifications::list(
            conn,
            app,
            event_type.as_ref(),
            before,
            limit
        ))
    }

    async fn list_deliveries(
        &self,
        app: AppKey,
        id: NotificationId,
        filter: DeliveryFilter,
        after: Option<DeliveryKey>,
        limit: usize,
    ) -> Result<Page<Delivery, DeliveryKey>> {
        read!(snapshot; &self.inner, "listing deliveries", |conn| explain::deliveries(conn, app, id, &filter, after, limit))
    }

    async fn person_history(&self, app: AppKey, id: NotificationId, user: &UserId) -> Result<PersonHistory> {
        read!(snapshot; &self.inner, "reading a person's history", |conn| explain::person(conn, app, id, user))
    }

    async fn device_owner(&self, app: AppKey, device: DeviceId) -> Result<UserId> {
        read!(&self.inner, "looking up a device's owner", |conn| devices::owner(conn, app, device))
    }

    async fn watch(
        &self,
        app: AppKey,
        after: Option<WatchPosition>,
        filter: &WatchFilter,
        limit: usize,
    ) -> Result<WatchPage> {
        let (origin, server_clock) = (self.inner.watched_from, self.inner.server_clock);
        read!(&self.inner, "reading for a watcher", |conn| watching::page(
            conn,
            origin,
            server_clock,
            app,
            after,
            filter,
            limit
        ))
    }

    async fn pause(&self, pause: Pause) -> Result<bool> {
        step!(&self.inner, "storing a pause", |tx| pauses::pause(tx, &pause))
    }

    async fn resume(&self, scope: &PauseScope) -> Result<bool> {
        step!(&self.inner, "ending a pause", |tx| pauses::resume(tx, scope))
    }

    async fn pauses(&self) -> Result<Vec<Pause>> {
        read!(&self.inner, "reading the pauses", |conn| pauses::all(conn))
    }

    async fn begin_restoration(&self, name: &str, now: UnixMs) -> Result<Restoration> {
        step!(&self.inner, "holding everything after a restore", |tx| restorations::begin(tx, name, now))
    }

    async fn cancel_open(
        &self,
        before: UnixMs,
        after: NotificationId,
        limit: usize,
        now: UnixMs,
    ) -> Result<(Option<NotificationId>, u64)> {
        step!(&self.inner, "cancelling open work", |tx| restorations::cancel_open(tx, before, after, limit, now))
    }

    async fn restorations(&self) -> Result<Vec<Restoration>> {
        read!(&self.inner, "looking for a restore", |conn| restorations::open(conn))
    }

    async fn confirm_restorations(&self, now: UnixMs) -> Result<bool> {
        step!(&self.inner, "confirming a restore", |tx| restorations::confirm(tx, now))
    }

    async fn ping(&self) -> Result<()> {
        let doing = "answering a ping";
        let standby = read!(&self.inner, doing, |conn| async {
            Ok(constant!(Bool; "SELECT pg_is_in_recovery()").get_result::<bool>(conn).await?)
        })?;
        if standby { Err(unavailable(doing)) } else { Ok(()) }
    }
}

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
        let held = step!(&self.inner, "recording results", |tx| jobs::record(tx, &updates, now))?;
        let ended = |(update, held): (&JobUpdate, &bool)| (!held || update.progress.is_none()).then_some(update.job.0);
        self.inner.let_go(updates.iter().zip(&held).filter_map(ended));
        Ok(held)
    }

    async fn run_alone(&self, job: JobId, fence: i64) -> Result<bool> {
        step!(&self.inner, "counting a suspect job", |tx| jobs::run_alone(tx, job, fence))
    }

    async fn release(&self, jobs: Vec<(JobId, i64)>, now: UnixMs) -> Result<()> {
        let released = step!(&self.inner, "releasing jobs", |tx| jobs::release(tx, &jobs, now));
        self.inner.let_go(jobs.iter().map(|(job, _)| job.0));
        self.inner.forget_bounds();
        if released.is_err() {
            // Nobody holds them any more: the heartbeat frees them once the database is back.
            self.inner.context.sweep.store(true, Ordering::Release);
        }
        released
    }

    async fn put_off(&self, jobs: Vec<(JobId, i64)>, until: UnixMs) -> Result<()> {
        let until = self.inner.clock(until);
        let put_off = step!(&self.inner, "putting jobs off", |tx| jobs::put_off(tx, &jobs, until));
        self.inner.let_go(jobs.iter().map(|(job, _)| job.0));
        self.inner.forget_bounds();
        if put_off.is_err() {
            // As in `release`.
            self.inner.context.sweep.store(true, Ordering::Release);
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
            Ok(replica::release_dead(tx.conn(), owner.0).await?.0)
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
            self.inner.context.sweep.store(true, Ordering::Release);
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
