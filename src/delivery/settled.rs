//! Flights that changed without an answer: all their targets were concluded, or the sender refused them.
//!
//! Told by ticket, for to look for them among thousands in flight, a hundred times a second, costs more than their writes.

use std::sync::{Mutex, MutexGuard};

use tokio::sync::Notify;

#[derive(Default)]
pub struct Settled {
    /// Bounded by the flights.
    tickets: Mutex<Vec<u64>>,
    told: Notify,
}

impl Settled {
    pub fn tell(&self, ticket: u64) {
        self.tickets().push(ticket);
        self.told.notify_one();
    }

    /// Those told of since the last time.
    pub fn take(&self) -> Vec<u64> {
        std::mem::take(&mut *self.tickets())
    }

    /// Cancel safe: what was told meanwhile is told at once.
    pub async fn told(&self) {
        self.told.notified().await;
    }

    fn tickets(&self) -> MutexGuard<'_, Vec<u64>> {
        self.tickets.lock().expect("no panic while held")
    }
}
