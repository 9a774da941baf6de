//! After a restore from a backup: what was open then is cancelled, and nothing is sent before the operator has confirmed
//! that the choices made since the backup were told again. See docs/scaling.md, "Backup and restore".

use crate::domain::ids::NotificationId;
use crate::domain::time::UnixMs;
use crate::runtime::Runtime;
use crate::storage::{Registry, Restoration, StoreError};

use super::{Result, Service};

/// Notifications cancelled in one write.
const BATCH: usize = 500;

/// What a start after a restore came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AfterRestore {
    /// Everything is held; so many notifications were cancelled now.
    Held { since: UnixMs, cancelled: u64 },
    /// The restore of this name was confirmed before: whether this is another one only the operator knows.
    Confirmed { at: UnixMs },
}

/// Holds everything on every replica and cancels what was open when the restore of this name was first told of. May be
/// told again and again.
pub async fn begin(store: &dyn Registry, runtime: &Runtime, name: &str) -> Result<AfterRestore, StoreError> {
    let restoration = store.begin_restoration(name, runtime.now()).await?;
    if let Some(at) = restoration.confirmed_at {
        return Ok(AfterRestore::Confirmed { at });
    }
    let cancelled = cancel_open(store, runtime, &restoration).await?;
    Ok(AfterRestore::Held { since: restoration.since, cancelled })
}

async fn cancel_open(store: &dyn Registry, runtime: &Runtime, restoration: &Restoration) -> Result<u64, StoreError> {
    let (mut after, mut sum) = (NotificationId(0), 0);
    loop {
        let (last, cancelled) = store.cancel_open(restoration.since, after, BATCH, runtime.now()).await?;
        sum += cancelled;
        match last {
            Some(last) => after = last,
            None => return Ok(sum),
        }
    }
}

impl Service {
    /// Ends the hold. Since when it stood; `None`: nothing was held. The caller has been checked to act for every app.
    pub async fn confirm_restore(&self) -> Result<Option<UnixMs>> {
        let held = self.store.restorations().await.map_err(|error| self.refused(error))?;
        let Some(first) = held.first() else { return Ok(None) };
        for restoration in &held {
            // The start that began to cancel may not have come to the end.
            cancel_open(&*self.store, &self.runtime, restoration).await.map_err(|error| self.refused(error))?;
        }
        let confirmed = self.store.confirm_restorations(self.runtime.now()).await;
        let confirmed = confirmed.map_err(|error| self.refused(error))?;
        self.hand_off.pauses_changed();
        Ok(confirmed.then_some(first.since))
    }
}
