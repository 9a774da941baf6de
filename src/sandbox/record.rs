//! What the fake providers received: a bounded ring, newest kept.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::domain::time::UnixMs;

/// Which fake a push came to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Platform {
    Apns,
    Fcm,
}

/// How the sender of a push proved who it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AuthKind {
    /// A provider token (JWT) to APNs.
    Jwt,
    /// A client certificate to APNs.
    Certificate,
    /// An OAuth access token to FCM.
    Bearer,
    None,
}

/// One push request, accepted or not.
#[derive(Clone)]
pub struct Received {
    /// Counts up from 1 over both platforms; never reused, not even after [`super::Sandbox::clear`].
    pub seq: u64,
    /// When its body was complete.
    pub at: UnixMs,
    /// The same in microseconds; 0 unless the sandbox tallies.
    pub at_us: i64,
    /// When it was asked for, by its payload; only while the sandbox tallies.
    pub sent_us: Option<i64>,
    pub platform: Platform,
    /// Numbers the connections over both platforms, from 1.
    pub connection: u64,
    /// Counts the streams of the connection, from 1.
    pub stream_ordinal: u64,
    /// Device token, or FCM's fid, topic or condition; empty when the request named none.
    pub token: String,
    /// The `apns-id` header.
    pub apns_id: Option<String>,
    /// The payload's (APNs) or the data's (FCM) `nudged_id`, else the `apns-id` header.
    pub nudged_id: Option<String>,
    pub apns_topic: Option<String>,
    pub push_type: Option<String>,
    /// `apns-priority`, or FCM's `android.priority`.
    pub priority: Option<String>,
    /// `apns-expiration` (Unix seconds), or FCM's `android.ttl`.
    pub expiration: Option<String>,
    /// `apns-collapse-id`, or FCM's `android.notification.tag`, else `android.collapse_key`.
    pub collapse_id: Option<String>,
    pub auth: AuthKind,
    /// The first 16 hex digits of the SHA-256 of the provider or access token: equal for equal tokens.
    pub auth_hash: Option<Arc<str>>,
    /// FCM's `validate_only`.
    pub validate_only: bool,
    /// As it came; empty when the sandbox keeps no bodies.
    pub body: Bytes,
    /// HTTP status answered; 0 when there was no answer (reset, stall, cut connection).
    pub status: u16,
    /// The reason answered (APNs' reason, FCM's errorCode or status), or the fault that was played.
    pub reason: Option<String>,
    /// The platform would deliver it, whatever the sender was told.
    pub accepted: bool,
}

impl Received {
    /// An accepted push of which nothing else is known yet.
    pub(super) fn new(platform: Platform, at: UnixMs, connection: u64, stream_ordinal: u64) -> Self {
        Self {
            seq: 0,
            at,
            at_us: 0,
            sent_us: None,
            platform,
            connection,
            stream_ordinal,
            token: String::new(),
            apns_id: None,
            nudged_id: None,
            apns_topic: None,
            push_type: None,
            priority: None,
            expiration: None,
            collapse_id: None,
            auth: AuthKind::None,
            auth_hash: None,
            validate_only: false,
            body: Bytes::new(),
            status: 200,
            reason: None,
            accepted: true,
        }
    }

    /// The body as JSON; null when it is none or was not kept.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// The token shortened for people to read.
    #[must_use]
    pub fn masked_token(&self) -> String {
        mask(&self.token)
    }

    pub(super) fn to_value(&self) -> Value {
        json!({
            "seq": self.seq,
            "at": self.at.0,
            "at_us": self.at_us,
            "platform": self.platform,
            "connection": self.connection,
            "stream_ordinal": self.stream_ordinal,
            "token": self.token,
            "apns_id": self.apns_id,
            "nudged_id": self.nudged_id,
            "apns_topic": self.apns_topic,
            "push_type": self.push_type,
            "priority": self.priority,
            "expiration": self.expiration,
            "collapse_id": self.collapse_id,
            "auth": self.auth,
            "auth_hash": self.auth_hash.as_deref(),
            "validate_only": self.validate_only,
            "body": self.json(),
            "status": self.status,
            "reason": self.reason,
            "accepted": self.accepted,
        })
    }
}

/// Without body and with a masked token: test failures and logs must not spread either.
impl fmt::Debug for Received {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Received")
            .field("seq", &self.seq)
            .field("platform", &self.platform)
            .field("connection", &self.connection)
            .field("stream_ordinal", &self.stream_ordinal)
            .field("token", &self.masked_token())
            .field("nudged_id", &self.nudged_id)
            .field("status", &self.status)
            .field("reason", &self.reason)
            .field("accepted", &self.accepted)
            .finish_non_exhaustive()
    }
}

/// The first six characters and an ellipsis.
pub(super) fn mask(token: &str) -> String {
    let shown: String = token.chars().take(6).collect();
    if shown.len() == token.len() { shown } else { shown + "…" }
}

/// Totals since the start or the last clear.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Totals {
    /// Push requests, accepted or not, whether still in the ring or not.
    pub received: u64,
    pub accepted: u64,
    /// Pushed out of the ring by newer ones.
    pub dropped: u64,
}

#[derive(Default)]
struct Ring {
    items: VecDeque<Arc<Received>>,
    last_seq: u64,
    totals: Totals,
}

pub(super) struct Record {
    limit: usize,
    ring: Mutex<Ring>,
    changed: Notify,
}

impl Record {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, ring: Mutex::default(), changed: Notify::new() }
    }

    /// Stores it under the next sequence number.
    pub(super) fn push(&self, mut received: Received) {
        let dropped = {
            let mut ring = self.ring();
            ring.last_seq += 1;
            received.seq = ring.last_seq;
            ring.totals.received += 1;
            ring.totals.accepted += u64::from(received.accepted);
            let dropped = if ring.items.len() >= self.limit { ring.items.pop_front() } else { None };
            ring.totals.dropped += u64::from(dropped.is_some());
            ring.items.push_back(Arc::new(received));
            dropped
        };
        drop(dropped);
        self.changed.notify_waiters();
    }

    /// Counts it under the next sequence number and forgets it.
    pub(super) fn count(&self, received: &Received) {
        let mut ring = self.ring();
        ring.last_seq += 1;
        ring.totals.received += 1;
        ring.totals.accepted += u64::from(received.accepted);
        ring.totals.dropped += 1;
        drop(ring);
        self.changed.notify_waiters();
    }

    pub(super) fn all(&self) -> Vec<Arc<Received>> {
        self.ring().items.iter().cloned().collect()
    }

    /// The oldest `limit` of those numbered above `seq`.
    pub(super) fn since(&self, seq: u64, limit: usize) -> Vec<Arc<Received>> {
        let ring = self.ring();
        let start = ring.items.partition_point(|item| item.seq <= seq);
        ring.items.range(start..).take(limit).cloned().collect()
    }

    pub(super) fn totals(&self) -> Totals {
        self.ring().totals
    }

    pub(super) fn last_seq(&self) -> u64 {
        self.ring().last_seq
    }

    pub(super) fn clear(&self) {
        let old = {
            let mut ring = self.ring();
            ring.totals = Totals::default();
            std::mem::take(&mut ring.items)
        };
        drop(old);
    }

    /// Waits until `done` says so. Cancel safe.
    pub(super) async fn until(&self, done: impl Fn(&Self) -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Registered before looking, so that nothing recorded in between is missed.
            changed.as_mut().enable();
            if done(self) {
                return;
            }
            changed.await;
        }
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().expect("no panic while held")
    }
}
