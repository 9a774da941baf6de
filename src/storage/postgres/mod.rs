//! The store on Postgres: any number of processes on one database.
//!
//! Events to named people are committed in groups ([`group`]), and so are changes of devices, choices and subscriptions
//! ([`gather`]). Every other write is a transaction of its own ([`tx`]) and every read a statement or a snapshot
//! ([`mod@read`]), on pooled connections. People are read by what is packed of them ([`mod@reach`]), which each step keeps
//! true ([`repack`]). Replicas know each other by rows: a slot with a heartbeat ([`replica`]), from
//! which ids take their node number, and the log of "no"s ([`deny`]). Leases are guarded by the job's fence alone; a
//! heartbeat only says when it is worth taking a lease away.

mod accept;
mod arriving;
mod batch;
mod connect;
mod dead;
mod deny;
mod device_reads;
mod devices;
mod event_columns;
mod event_types;
mod explain;
mod fanout;
mod gather;
mod group;
mod handed;
mod imports;
mod inbox;
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
mod queue;
mod reach;
mod read;
mod record;
mod registering;
mod registrar;
mod registry;
mod repack;
mod replica;
mod restorations;
mod retain;
mod seed;
mod setup;
mod subscribers;
mod subscriptions;
#[cfg(test)]
mod tests;
mod tx;
mod users;
mod watching;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use diesel_async::AsyncPgConnection;
use diesel_async::pooled_connection::deadpool::{Object, Pool};
use diesel_async::pooled_connection::{AsyncDieselConnectionManager, ManagerConfig, RecyclingMethod};
use futures_util::FutureExt;
use tokio::sync::{RwLock, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub use arriving::Destination;
pub use connect::{Target as Server, TargetError};
pub use open::{OpenError, Settings};
pub use seed::seed;

use self::fail::unavailable;
use self::read::read;
use super::paging::{page, page_limit};
use super::sweep::Sweep;
use super::{cache, effects, fail, redrive, rows, statement, watching as watch_rows};
use crate::domain::deny::DenyFeed;
use crate::domain::identity::IdentityKey;
use crate::domain::ids::{IdMaker, RouteId};
use crate::domain::platform::Lane;
use crate::domain::time::UnixMs;
use crate::runtime::{Instant, Runtime};
use crate::storage::{BootId, Result, StoreError, TroubleRow};

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
    sweep: Sweep,
    /// The last fan-out that was found thin: see [`fanout::meet`].
    thin_fanout: AtomicI64,
    /// Other replicas live.
    others: AtomicBool,
    packing: packing::Packing,
    /// Jobs without rows.
    handed: handed::Open,
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
    registrar: registrar::Registrar,
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
            sweep: Sweep::default(),
            thin_fanout: AtomicI64::new(0),
            others: AtomicBool::new(false),
            packing: opened.packing,
            handed: handed::Open::default(),
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
        let (registrar, mut tasks) = registrar::Registrar::start(&inner);
        tasks.extend([
            runtime.spawn(poller.run(Arc::clone(&inner))),
            runtime.spawn(replica.run(Arc::clone(&inner))),
            runtime.spawn(committer.run(Arc::clone(&inner))),
            runtime.spawn(handed::age(Arc::clone(&inner))),
        ]);
        if settings.pack_people {
            tasks.push(runtime.spawn(repack::sweep(Arc::clone(&inner))));
        }
        Ok(Self { inner, acceptor, registrar, tasks: Mutex::new(tasks) })
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

    /// Events and changes that wait for a transaction.
    pub fn waiting(&self) -> usize {
        self.acceptor.waiting() + self.registrar.waiting()
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
