//! A store that several simulated replicas share: what a Postgres server is to real ones, in one process and in
//! simulated time, where no real server can live.
//!
//! A [`Hub`] keeps one database in memory, with the SQL that serves production and passes the conformance suite. Each
//! replica reaches it through a [`SharedStore`], over a [`Link`] that delays, and loses requests and answers. What a shared
//! store has beyond that of a single process is here, held to the same rules as on Postgres:
//!
//! - Leases belong to boot ids with a heartbeat ([`heart`]); whoever lives frees those whose heart stopped, by the hub's
//!   clock, and frees its own that it took without hearing of it.
//! - Other replicas' "no"s are polled; the feed is proven complete only by a poll that succeeded.
//! - What follows a step outside the database (a "no" in the replica's own feed, jobs handed over, wake-ups) happens where
//!   and when its answer arrives ([`answered`]), or not at all.
//! - A step whose answer was lost is asked about again, for as long as its caller may be expected to wait, and then gets
//!   its first answer: it never runs twice. After that its outcome is unknown.
//! - Due times are the hub's, as far as the replica knows its clock.
//!
//! What it is not: concurrent. A step runs whole, between two others.

mod answered;
mod heart;
mod leases;
mod queue;
mod registry;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::RwLock;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::fail::unavailable;
use super::{OpenError, Settings, SqliteStore};
use crate::domain::deny::{DenyFeed, DenyKey};
use crate::domain::identity::IdentityKey;
use crate::domain::time::UnixMs;
use crate::runtime::Runtime;
use crate::storage::sweep::Sweep;
use crate::storage::{BootId, Result};

/// How long a step is tried before its caller is told to come again.
const PATIENCE: Duration = Duration::from_secs(4);
/// Between two tries to reach the hub.
const AGAIN: Duration = Duration::from_millis(100);

/// What lies between a replica and the hub.
pub trait Link: Send + Sync {
    /// How long a request takes that leaves now; `None`: it never arrives.
    fn there(&self) -> Option<Duration>;
    /// How long its answer takes; `None`: it is lost.
    fn back(&self) -> Option<Duration>;
}

/// Nothing lies between.
pub struct Direct;

impl Link for Direct {
    fn there(&self) -> Option<Duration> {
        Some(Duration::ZERO)
    }

    fn back(&self) -> Option<Duration> {
        Some(Duration::ZERO)
    }
}

/// The database that replicas share. It outlives them.
pub struct Hub {
    store: SqliteStore,
    identity: IdentityKey,
    /// Every "no", in the order of its commit.
    log: Arc<DenyFeed>,
    /// When each replica's heart beat last.
    hearts: Mutex<BTreeMap<i64, UnixMs>>,
    runtime: Runtime,
}

impl Hub {
    /// `runtime` is the hub's own: its clock is the one that leases and due times go by. In simulation only.
    pub fn open(runtime: Runtime) -> Result<Arc<Self>, OpenError> {
        let log = Arc::new(DenyFeed::default());
        let store = SqliteStore::open(runtime.clone(), &Settings::memory(), Arc::clone(&log))?;
        let identity = store.context.identity.clone();
        Ok(Arc::new(Self { store, identity, log, hearts: Mutex::default(), runtime }))
    }

    /// Runs a replica's step, and the "no"s that it logged.
    fn act<T>(&self, boot: BootId, step: impl FnOnce(&SqliteStore) -> T) -> (T, Vec<DenyKey>) {
        let seen = self.log.position();
        self.store.context.boot.store(boot.0, Ordering::Relaxed);
        let answer = step(&self.store);
        (answer, self.log.since(seen).0)
    }
}

/// The answer of a method of the store, which runs inline in simulation; tokio must not think that it has had its turn.
fn inline<T>(answer: impl Future<Output = T>) -> T {
    tokio::task::unconstrained(answer).now_or_never().expect("a simulated store answers at once")
}

/// A replica's handle on the [`Hub`]. Closed by [`SharedStore::close`]; dropping it leaves its leases to the others, ten
/// seconds later.
pub struct SharedStore {
    replica: Arc<Replica>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

/// What the handle and its tasks share.
struct Replica {
    hub: Arc<Hub>,
    link: Arc<dyn Link>,
    runtime: Runtime,
    boot: BootId,
    deny: Arc<DenyFeed>,
    /// Due times are the hub's rather than the callers'. A test that owns time goes without.
    hub_clock: bool,
    /// The hub's clock less ours, in milliseconds.
    skew: AtomicI64,
    /// Jobs and fan-outs that the engine has.
    held: Mutex<BTreeSet<i64>>,
    sweep: Sweep,
    /// Shared by whoever takes leases.
    leasing: RwLock<()>,
    /// Other replicas live.
    others: AtomicBool,
    stopping: CancellationToken,
}

impl SharedStore {
    /// A replica that starts: `runtime` has its clock, and `deny`, which must be a [`DenyFeed::shared`], gets every "no".
    /// Proven complete by the first poll that succeeds.
    pub async fn open(
        hub: &Arc<Hub>,
        runtime: Runtime,
        link: Arc<dyn Link>,
        deny: Arc<DenyFeed>,
        hub_clock: bool,
    ) -> Result<Self> {
        let replica = Arc::new(Replica {
            hub: Arc::clone(hub),
            link,
            boot: BootId(super::open::boot_id(&runtime)),
            deny,
            hub_clock,
            skew: AtomicI64::new(0),
            held: Mutex::default(),
            sweep: Sweep::default(),
            leasing: RwLock::new(()),
            others: AtomicBool::new(false),
            stopping: CancellationToken::new(),
            runtime: runtime.clone(),
        });
        replica.beat(0).await?;
        let tasks =
            vec![runtime.spawn(heart::poll(Arc::clone(&replica))), runtime.spawn(heart::beat(Arc::clone(&replica)))];
        Ok(Self { replica, tasks: Mutex::new(tasks) })
    }

    /// What owns the leases of this start.
    pub fn boot_id(&self) -> BootId {
        self.replica.boot
    }

    /// Gives back what is leased and lets the hub go.
    pub async fn close(&self) {
        self.replica.stopping.cancel();
        let tasks = std::mem::take(&mut *self.tasks.lock().expect("no panic while held"));
        for task in tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "a task of the store ended badly");
            }
        }
    }
}

impl Drop for SharedStore {
    fn drop(&mut self) {
        for task in &*self.tasks.lock().expect("no panic while held") {
            task.abort();
        }
    }
}

impl Replica {
    /// A step at the hub: run there once at most, answered here, or `Unavailable` with its outcome unknown.
    async fn ask<T>(&self, doing: &'static str, step: impl FnOnce(&SqliteStore) -> Result<T>) -> Result<T> {
        let deadline = self.runtime.instant() + PATIENCE;
        let mut step = Some(step);
        let mut done = None;
        loop {
            if let Some(there) = self.link.there() {
                self.pass(there).await;
                if let Some(step) = step.take() {
                    done = Some(self.hub.act(self.boot, step));
                }
                if let Some(back) = self.link.back() {
                    self.pass(back).await;
                    let (answer, denied) = done.expect("it was run when the request arrived");
                    self.deny.publish(&denied, self.runtime.instant().into_std());
                    return answer;
                }
            }
            if self.runtime.instant() + AGAIN >= deadline || self.stopping.is_cancelled() {
                // Better a "no" too many.
                let denied = done.map(|(_, denied)| denied).unwrap_or_default();
                self.deny.publish(&denied, self.runtime.instant().into_std());
                return Err(unavailable(doing));
            }
            self.runtime.sleep(AGAIN).await;
        }
    }

    async fn pass(&self, time: Duration) {
        if !time.is_zero() {
            self.runtime.sleep(time).await;
        }
    }

    /// Due times are the hub's.
    fn clock(&self, now: UnixMs) -> UnixMs {
        if self.hub_clock { UnixMs(now.0 + self.skew.load(Ordering::Relaxed)) } else { now }
    }

    /// A due time as the callers' clock has it.
    fn told(&self, due: UnixMs) -> UnixMs {
        if self.hub_clock { UnixMs(due.0 - self.skew.load(Ordering::Relaxed)) } else { due }
    }
}
