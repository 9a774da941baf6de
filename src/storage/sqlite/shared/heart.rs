//! A replica among the others: its heartbeat, the work of those whose heart stopped, leases that got lost, and the others'
//! "no"s.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Replica, leases};
use crate::domain::deny::DenyPosition;
use crate::domain::time::UnixMs;
use crate::storage::Result;

// As on Postgres.
const BEAT: Duration = Duration::from_secs(1);
const BEAT_LIMIT: Duration = Duration::from_secs(3);
const DEAD_AFTER_MS: i64 = 10_000;
const POLL: Duration = Duration::from_millis(200);
const POLL_LIMIT: Duration = Duration::from_millis(1_500);

/// Until the store is closed; then out of the way at once: what is left is free for the others.
pub(super) async fn beat(replica: Arc<Replica>) {
    let runtime = replica.runtime.clone();
    for beats in 1_u64.. {
        tokio::select! {
            biased;
            () = replica.stopping.cancelled() => break,
            () = runtime.sleep(BEAT) => {}
        }
        if !matches!(runtime.timeout(BEAT_LIMIT, replica.beat(beats)).await, Some(Ok(()))) {
            tracing::debug!("the heartbeat did not reach the hub");
        }
    }
    let boot = replica.boot.0;
    let left = replica.ask("leaving", |store| {
        replica.hub.hearts.lock().expect("no panic while held").remove(&boot);
        leases::release_unknown(store, boot, Vec::new())
    });
    if !matches!(runtime.timeout(BEAT_LIMIT, left).await, Some(Ok(_))) {
        tracing::warn!("the replica could not take its leave; its leases are free in ten seconds");
    }
}

/// A poll proves the feed complete up to the moment it was sent. One that fails proves nothing.
pub(super) async fn poll(replica: Arc<Replica>) {
    let runtime = replica.runtime.clone();
    let mut seen = DenyPosition::default();
    loop {
        let begun = runtime.instant();
        if runtime.timeout(POLL_LIMIT, replica.poll(&mut seen)).await != Some(true) {
            tracing::debug!("the others' \"no\"s cannot be read; nothing is sent meanwhile");
        }
        tokio::select! {
            biased;
            () = replica.stopping.cancelled() => return,
            () = runtime.sleep_until(begun + POLL) => {}
        }
    }
}

impl Replica {
    pub(super) async fn beat(&self, beats: u64) -> Result<()> {
        let before = self.runtime.now().0;
        let hub = &self.hub;
        let hub_now = self
            .ask("beating", |_| {
                let now = hub.runtime.now();
                hub.hearts.lock().expect("no panic while held").insert(self.boot.0, now);
                Ok(now.0)
            })
            .await?;
        // Half the way there and back.
        self.skew.store(hub_now - i64::midpoint(before, self.runtime.now().0), Ordering::Relaxed);
        if beats % 2 == 1 {
            let freed = self.release_dead().await?;
            if freed > 0 {
                tracing::info!(jobs = freed, "took up the work of a replica that is gone");
            }
        }
        if let Some(due) = self.sweep.begin() {
            self.sweep().await?;
            due.done();
        }
        Ok(())
    }

    /// Frees what is leased to nobody alive. How many jobs that were.
    pub(super) async fn release_dead(&self) -> Result<u64> {
        let hub = &self.hub;
        let (freed, others) = self
            .ask("releasing other owners' jobs", |store| {
                let now = hub.runtime.now();
                let alive = |(boot, at): (&i64, &UnixMs)| (now.0 - at.0 < DEAD_AFTER_MS).then_some(*boot);
                let hearts = hub.hearts.lock().expect("no panic while held");
                let mut alive: Vec<i64> = hearts.iter().filter_map(alive).filter(|boot| *boot != self.boot.0).collect();
                let others = !alive.is_empty();
                alive.push(self.boot.0);
                Ok((leases::release_all_but(store, alive)?, others))
            })
            .await?;
        self.others.store(others, Ordering::Relaxed);
        Ok(freed)
    }

    /// Frees what is leased to us by steps whose answer was lost. While it looks, nobody takes new leases.
    async fn sweep(&self) -> Result<()> {
        let _alone = self.leasing.write().await;
        let held: Vec<i64> = self.held.lock().expect("no panic while held").iter().copied().collect();
        let boot = self.boot.0;
        let freed = self.ask("sweeping", |store| leases::release_unknown(store, boot, held)).await?;
        if freed > 0 {
            tracing::info!(jobs = freed, "freed leases whose claim was answered to nobody");
        }
        Ok(())
    }

    /// Whether the hub answered.
    async fn poll(&self, seen: &mut DenyPosition) -> bool {
        let sent_at = self.runtime.instant();
        let Some(there) = self.link.there() else { return false };
        self.pass(there).await;
        let (keys, position) = self.hub.log.since(*seen);
        let Some(back) = self.link.back() else { return false };
        self.pass(back).await;
        self.deny.publish(&keys, self.runtime.instant().into_std());
        self.deny.prove(sent_at.into_std());
        *seen = position;
        true
    }
}
