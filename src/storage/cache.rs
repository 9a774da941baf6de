//! Notifications that were read lately, for the claims of their many jobs. Belongs to the writer, which also makes
//! every change, so it is never stale; the gate reads `cancelled_at` again all the same.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use crate::domain::ids::NotificationId;
use crate::domain::notification::Notification;

/// The most notifications kept.
const MAX_ENTRIES: usize = 512;
/// The most bytes of stored content kept.
const MAX_BYTES: usize = 8 * 1024 * 1024;

#[derive(Default)]
pub(super) struct NotificationCache {
    entries: HashMap<NotificationId, (Arc<Notification>, usize)>,
    order: VecDeque<NotificationId>,
    bytes: usize,
}

impl NotificationCache {
    pub fn get(&self, id: NotificationId) -> Option<&Arc<Notification>> {
        self.entries.get(&id).map(|(notification, _)| notification)
    }

    /// `bytes`: of the stored content.
    pub fn insert(&mut self, notification: Arc<Notification>, bytes: usize) {
        if bytes > MAX_BYTES / 8 {
            return;
        }
        let id = notification.id;
        if let Some((_, old)) = self.entries.insert(id, (notification, bytes)) {
            self.bytes -= old;
        } else {
            self.order.push_back(id);
        }
        self.bytes += bytes;
        while self.order.len() > MAX_ENTRIES || self.bytes > MAX_BYTES {
            let Some(oldest) = self.order.pop_front() else { break };
            if let Some((_, old)) = self.entries.remove(&oldest) {
                self.bytes -= old;
            }
        }
    }

    /// After a change to its row.
    pub fn forget(&mut self, id: NotificationId) {
        if let Some((_, old)) = self.entries.remove(&id) {
            self.bytes -= old;
            self.order.retain(|other| *other != id);
        }
    }

    /// After a rollback: entries may tell of changes that did not happen.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}
