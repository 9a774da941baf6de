//! How much room the database has: looked at every two seconds, told to whoever accepts events, and shown as metrics.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use metrics::gauge;
use tokio_util::sync::CancellationToken;

use super::database::OpenStore;
use crate::config::Database;
use crate::domain::notification::HandOff;
use crate::domain::room::{Full, Room};
use crate::runtime::{Instant, Runtime};
use crate::telemetry::names;

/// Between two looks. What a disk of ordinary speed can take meanwhile is far less than `database.min_free_mib`.
const LOOK: Duration = Duration::from_secs(2);
/// Postgres adds up its files for it: at most this part of the time.
const MEASURING_SHARE: u32 = 20;

pub struct DiskWatch {
    runtime: Runtime,
    store: OpenStore,
    hand_off: Arc<dyn HandOff>,
    /// Of the database's file system, where that is this machine's.
    directory: Option<PathBuf>,
    /// The size is wanted.
    measures: bool,
    next_measure: Instant,
    was: Option<Full>,
}

impl DiskWatch {
    pub fn new(runtime: &Runtime, store: &OpenStore, hand_off: Arc<dyn HandOff>, database: &Database) -> Self {
        let is_sqlite = matches!(store, OpenStore::Sqlite(_));
        let parent = database.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        Self {
            runtime: runtime.clone(),
            store: store.clone(),
            hand_off,
            directory: is_sqlite.then(|| parent.unwrap_or(Path::new(".")).to_owned()),
            measures: is_sqlite || database.max_mib > 0,
            next_measure: runtime.instant(),
            was: None,
        }
    }

    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = self.runtime.sleep(LOOK) => self.look().await,
            }
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "gauges are floating point")]
    pub async fn look(&mut self) {
        let hand_off = Arc::clone(&self.hand_off);
        let Some(room) = hand_off.room() else { return };
        if let Some(directory) = self.directory.clone() {
            match self.runtime.blocking(move || free_bytes(&directory)).await {
                Ok(free) => {
                    room.set_free_bytes(free);
                    gauge!(names::DISK_FREE_BYTES).set(free as f64);
                }
                Err(error) => tracing::debug!(%error, "the file system of the database cannot be asked"),
            }
        }
        room.set_disk_full(self.store.is_disk_full().await);
        let begun = self.runtime.instant();
        if self.measures && begun >= self.next_measure {
            match self.store.size_bytes().await {
                Ok(bytes) => {
                    room.set_bytes(bytes);
                    gauge!(names::DATABASE_BYTES).set(bytes as f64);
                }
                Err(error) => tracing::debug!(%error, "the database cannot be measured"),
            }
            let now = self.runtime.instant();
            self.next_measure = now + (now - begun) * MEASURING_SHARE;
        }
        gauge!(names::STORE_WAITING).set(self.store.waiting() as f64);
        self.tell(room);
    }

    fn tell(&mut self, room: &Room) {
        for full in Full::ALL {
            gauge!(names::FULL, "reason" => full.name()).set(f64::from(u8::from(room.is(full))));
        }
        let is = room.full();
        if is != self.was {
            if let Some(full) = is {
                tracing::warn!(reason = full.name(), "no event is taken while {}", full.words());
            } else {
                tracing::info!("there is room for events again");
            }
            self.was = is;
        }
    }
}

/// What an ordinary user may still take.
fn free_bytes(directory: &Path) -> std::io::Result<u64> {
    let stat = rustix::fs::statvfs(directory)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_says_what_it_has_free() {
        assert!(free_bytes(Path::new("/")).expect("it can be asked") > 0);
        assert!(free_bytes(Path::new("/no such directory")).is_err());
    }
}
