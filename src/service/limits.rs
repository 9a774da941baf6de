//! What keeps one app from taking the whole server: a rate of events, and a bound on open deliveries.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;
use std::time::Duration;

use crate::domain::ids::AppKey;
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

/// Apps without limits take no room here and no time.
#[derive(Default)]
pub(super) struct Limits {
    /// By app: when the bucket is full again. Never longer than the configured apps.
    full_at: Mutex<HashMap<AppKey, Instant>>,
    /// One count at a time; who comes meanwhile waits for it.
    open: tokio::sync::Mutex<Option<Counted>>,
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
    /// Whether the app's limits leave room for one more event.
    pub(super) async fn limit(&self, app: &App) -> Result<()> {
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
