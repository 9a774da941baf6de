//! What keeps one app from taking the whole server: a rate of events, and a bound on open deliveries; and what keeps all
//! of them from filling the disk.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;
use std::time::Duration;

use crate::domain::ids::AppKey;
use crate::domain::room::Room;
use crate::runtime::{Instant, Runtime};

use super::apps::App;
use super::{Result, Service, ServiceError};

/// How much of the rate may come at once.
const BURST: Duration = Duration::from_secs(1);
/// How long a count of open deliveries is good; counting looks at every open job.
const COUNTED_FOR: Duration = Duration::from_secs(1);
/// A count is taken at most this part of the time, however long it takes.
const COUNTING_SHARE: u32 = 10;
/// When to try again while too much is open: what is sent meanwhile makes room.
const OPEN_RETRY: Duration = Duration::from_secs(5);
/// When to try again while the disk is full, or nearly so: somebody has to make room.
pub(super) const DISK_RETRY: Duration = Duration::from_secs(30);
/// How long an event waits for a count that another one began.
const COUNT_PATIENCE: Duration = Duration::from_millis(250);

/// Apps without limits take no room here and no time.
#[derive(Default)]
pub(super) struct Limits {
    /// By app: when the bucket is full again. Never longer than the configured apps.
    full_at: Mutex<HashMap<AppKey, Instant>>,
    /// One count at a time; who comes meanwhile waits for it.
    open: tokio::sync::Mutex<Option<Counted>>,
    /// Until when the last count of all open work is good.
    room: tokio::sync::Mutex<Option<Instant>>,
}

struct Counted {
    targets: BTreeMap<AppKey, u64>,
    good_until: Instant,
}

impl Limits {
    /// Takes one event's worth from the app's bucket, which holds `per_second` and fills up within a second. `Err`: how
    /// long until there is room.
    fn take(&self, app: AppKey, per_second: u32, runtime: &Runtime) -> Result<(), Duration> {
        let now = runtime.instant();
        let cost = Duration::from_secs(1) / per_second.max(1);
        let mut buckets = self.full_at.lock().expect("no panic while held");
        let full_at = buckets.get(&app).copied().unwrap_or(now).max(now);
        let after = full_at + cost;
        let over = after.saturating_duration_since(now + BURST);
        // The rounding of `cost` never costs the last event of a burst.
        if over > Duration::from_micros(1) {
            return Err(over);
        }
        buckets.insert(app, after);
        Ok(())
    }
}

impl Service {
    /// Whether the server's and the app's limits leave room for one more event.
    pub(super) async fn limit(&self, app: &App) -> Result<()> {
        if let Some(room) = self.hand_off.room() {
            self.make_sure_of_room(room).await?;
        }
        if let Some(limit) = app.limits.max_open_targets {
            let open = self.open_targets(app.key).await?;
            if open > limit {
                return Err(ServiceError::TooManyOpen { open, limit, retry_after: OPEN_RETRY });
            }
        }
        if let Some(per_second) = app.limits.max_events_per_second {
            let taken = self.limits.take(app.key, per_second, &self.runtime);
            taken.map_err(|retry_after| ServiceError::TooManyEvents { per_second, retry_after })?;
        }
        Ok(())
    }

    /// What is known of the open work is at most so much: before an event is refused for it, it is counted again, unless
    /// that was just done. Of those who come meanwhile none waits longer than [`COUNT_PATIENCE`].
    async fn make_sure_of_room(&self, room: &Room) -> Result<()> {
        let Some(full) = room.full() else { return Ok(()) };
        if !full.is_open_work() {
            return Err(ServiceError::Full { full, retry_after: DISK_RETRY });
        }
        if let Some(mut good_until) = self.runtime.timeout(COUNT_PATIENCE, self.limits.room.lock()).await {
            let begun = self.runtime.instant();
            if good_until.is_none_or(|until| begun >= until) {
                let mark = room.mark();
                let backlog = self.store.backlog(self.runtime.now()).await.map_err(|error| self.refused(error))?;
                room.counted(mark, backlog.targets, backlog.rows());
                let now = self.runtime.instant();
                *good_until = Some(now + COUNTED_FOR.max((now - begun) * COUNTING_SHARE));
            }
        }
        match room.full() {
            None => Ok(()),
            Some(full) => {
                let retry_after = if full.is_open_work() { OPEN_RETRY } else { DISK_RETRY };
                Err(ServiceError::Full { full, retry_after })
            }
        }
    }

    async fn open_targets(&self, app: AppKey) -> Result<u64> {
        let mut counted = self.limits.open.lock().await;
        let begun = self.runtime.instant();
        if let Some(counted) = &*counted
            && begun < counted.good_until
        {
            return Ok(counted.targets.get(&app).copied().unwrap_or(0));
        }
        let targets = self.store.open_targets().await.map_err(|error| self.refused(error))?;
        let now = self.runtime.instant();
        let good_for = COUNTED_FOR.max((now - begun) * COUNTING_SHARE);
        let open = targets.get(&app).copied().unwrap_or(0);
        *counted = Some(Counted { targets, good_until: now + good_for });
        Ok(open)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::time::UnixMs;

    #[tokio::test(start_paused = true)]
    async fn a_bucket_gives_a_second_s_worth_at_once_and_then_the_rate() {
        let runtime = Runtime::simulated(1, UnixMs(0));
        let limits = Limits::default();
        for per_second in [1, 3, 7] {
            let app = AppKey(i64::from(per_second));
            let take = || limits.take(app, per_second, &runtime);
            for _ in 0..per_second {
                assert_eq!(take(), Ok(()));
            }
            let wait = take().expect_err("empty");
            assert!(wait <= Duration::from_secs(1) / per_second, "{wait:?}");
            runtime.sleep(wait + Duration::from_millis(1)).await;
            assert_eq!(take(), Ok(()), "one more after the time it said");
            assert!(take().is_err());
        }
        assert_eq!(limits.take(AppKey(99), 1, &runtime), Ok(()), "apps have buckets of their own");
    }
}
