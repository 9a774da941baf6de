//! Sending: prepared messages and batches of targets in, one outcome per target out.
//!
//! The interface is batch-shaped so that a hop between threads costs per batch, not per push, and no boxed future per
//! push is needed. A sender owns its threads and connections. It never touches storage and never decides about retries:
//! it says what the platform answered ([`SendOutcome`]), and `delivery` acts on it.

pub mod apns;
pub mod fcm;
pub mod http2;
mod secret;
#[cfg(test)]
mod suite;

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use uuid::Uuid;

pub use crate::domain::content::Message;
use crate::domain::deny::DenyPosition;
use crate::domain::ids::{DeviceId, NotificationId, RouteId, UserKey};
use crate::domain::platform::{DeviceToken, Lane, Platform, Route};
use crate::domain::sending::{SendOptions, SendOutcome};
use crate::domain::time::UnixMs;

pub use secret::Secret;

/// What [`Sender::encode`] made: everything of a push that does not depend on the target. Only the sender that made it
/// can read it. Cheap to clone.
#[derive(Clone)]
pub struct Encoded(Arc<dyn Any + Send + Sync>);

impl Encoded {
    pub fn new<T: Any + Send + Sync>(value: T) -> Self {
        Self(Arc::new(value))
    }

    /// `None` when another kind of sender made it.
    #[must_use]
    pub fn get<T: Any>(&self) -> Option<&T> {
        self.0.downcast_ref()
    }
}

impl fmt::Debug for Encoded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Encoded")
    }
}

/// Stands where a device's token goes in an [`Inspection`].
pub const EXAMPLE_TOKEN: &str = "DEVICE_TOKEN";
/// Stands where a delivery's `nudged_id` goes.
pub const EXAMPLE_ID: Uuid = Uuid::from_u128(0x8000_8000_0000_0000_0000);

/// A push as a person reads it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Inspection {
    /// What matters of the request beside the body, without credentials.
    pub headers: Vec<(String, String)>,
    /// JSON.
    pub body: String,
    /// In bytes, as the platform counts towards its limit.
    pub size: usize,
}

/// Why a message cannot be sent on a platform at all.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EncodeError {
    #[error("the payload is {size} bytes, the platform takes {limit}")]
    TooLarge { size: usize, limit: usize },
    #[error("cannot be encoded: {0}")]
    Invalid(String),
}

/// One device of a batch.
#[derive(Clone, Debug)]
pub struct SendTarget {
    /// Comes back with the outcome: the target's place in its job.
    pub index: u32,
    pub user: UserKey,
    pub device: DeviceId,
    pub token: DeviceToken,
    /// Identity of this delivery in every attempt.
    pub nudged_id: Uuid,
    /// Which of the batch's `encoded`.
    pub variant: u16,
}

/// Targets of one job on one route, with all they need. Every target gets exactly one outcome, even when the batch or
/// the sender is dropped (see [`Sink`]).
pub struct Batch {
    pub route: Arc<Route>,
    pub lane: Lane,
    pub notification: NotificationId,
    pub encoded: Vec<Encoded>,
    pub targets: Vec<SendTarget>,
    /// Nothing is handed over from here on; the platform is told the same.
    pub expires_at: UnixMs,
    /// What the gate had seen of the deny feed, and when: held against the feed at every hand-over.
    pub gated: DenyPosition,
    pub gated_at: Instant,
    pub sink: Sink,
}

/// Where a batch's outcomes go. Several are sent at once where they arrive at once.
#[derive(Clone)]
pub struct Sink {
    /// The engine's own number for the batch.
    pub ticket: u64,
    /// Unbounded, but never longer than the targets in flight, which permits bound.
    pub outcomes: mpsc::UnboundedSender<Outcomes>,
}

impl Sink {
    /// `results`: (index, outcome). Nobody listening means the engine is gone; its leases are released elsewhere.
    pub fn send(&self, results: Vec<(u32, SendOutcome)>) {
        if !results.is_empty() {
            let _ = self.outcomes.send(Outcomes { ticket: self.ticket, results });
        }
    }
}

#[derive(Debug)]
pub struct Outcomes {
    pub ticket: u64,
    pub results: Vec<(u32, SendOutcome)>,
}

/// One credential on one platform. Implementations: `apns`, `fcm`.
#[async_trait::async_trait]
pub trait Sender: Send + Sync {
    fn platform(&self) -> Platform;

    /// Builds the part of the push that all targets share. Pure: no I/O.
    fn encode(&self, route: &Route, message: &Message, options: &SendOptions) -> Result<Encoded, EncodeError>;

    /// What [`Sender::encode`] made, as a person reads it, for previews: as it would go to the device of
    /// [`EXAMPLE_TOKEN`], worth delivering for `ttl` more. `None` when another kind of sender made it.
    fn inspect(&self, _encoded: &Encoded, _ttl: Duration) -> Option<Inspection> {
        None
    }

    /// Queues a batch without waiting. When the sender cannot take it (draining, queue full) it comes back and nothing
    /// of it was sent.
    fn submit(&self, batch: Batch) -> Result<(), Batch>;

    /// Several batches of one route, with one wake-up; those that the sender cannot take come back.
    fn submit_all(&self, batches: Vec<Batch>) -> Vec<Batch> {
        batches.into_iter().filter_map(|batch| self.submit(batch).err()).collect()
    }

    /// Stops taking batches, waits for answers up to `deadline`, answers the rest with `NotAttempted` (never handed
    /// over) or `MaybeSent` (handed over, no answer), closes connections and joins the threads.
    async fn drain(&self, deadline: Duration);

    /// For metrics and `nudged check`.
    fn status(&self) -> SenderStatus;
}

/// A look at a sender, cheap enough for every scrape.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SenderStatus {
    /// Established connections.
    pub connections: u32,
    /// Requests without an answer yet.
    pub in_flight: u32,
    /// Targets queued and not handed over yet.
    pub queued: u32,
}

/// Which sender serves which route.
#[derive(Clone, Default)]
pub struct Registry {
    /// In order, so that nothing that is done for each depends on chance.
    by_route: BTreeMap<RouteId, (Arc<Route>, Arc<dyn Sender>)>,
}

impl Registry {
    pub fn insert(&mut self, route: Route, sender: Arc<dyn Sender>) {
        self.by_route.insert(route.id, (Arc::new(route), sender));
    }

    #[must_use]
    pub fn get(&self, route: RouteId) -> Option<(&Arc<Route>, &Arc<dyn Sender>)> {
        self.by_route.get(&route).map(|(route, sender)| (route, sender))
    }

    pub fn routes(&self) -> impl Iterator<Item = &Arc<Route>> {
        self.by_route.values().map(|(route, _)| route)
    }

    pub fn knows(&self, route: RouteId) -> bool {
        self.by_route.contains_key(&route)
    }
}
