//! This replica among the others: its heartbeat, the work of those whose heart stopped, and leases that got lost.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::query::RunQuery;
use diesel::sql_types::{Array, BigInt, Integer};
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection as _};

use super::Inner;
use super::fail::{Attempt, Fail};
use super::handed;
use super::statement::constant;
use super::tx::in_transaction;
use crate::planted;

const BEAT: Duration = Duration::from_secs(1);
const BEAT_LIMIT: Duration = Duration::from_secs(3);
/// Silent for longer than this, a replica's leases are free.
pub(super) const DEAD_AFTER_MS: i64 = 10_000;

/// The beating heart.
pub(super) struct Replica {
    pub slot: i32,
    pub conn: Option<AsyncPgConnection>,
}

impl Replica {
    pub async fn run(mut self, inner: Arc<Inner>) {
        let context = &inner.context;
        let runtime = context.runtime.clone();
        let mut beats = 0_u64;
        loop {
            match runtime.timeout(BEAT_LIMIT, self.beat(&inner, beats)).await {
                Some(Ok(true)) => {}
                Some(Ok(false)) => {
                    inner.die("another process has this replica's slot: it was silent for too long");
                    return;
                }
                failed => {
                    self.conn = None;
                    if let Some(Err(error)) = failed {
                        tracing::debug!(error, "the heartbeat did not reach the database");
                    }
                }
            }
            beats += 1;
            tokio::select! {
                biased;
                () = context.stopping.cancelled() => break,
                () = runtime.sleep(BEAT) => {}
            }
        }
        // Out of the way at once: what is left is free for the others.
        if !matches!(runtime.timeout(BEAT_LIMIT, self.leave(&inner)).await, Some(Ok(()))) {
            tracing::warn!("the replica's row could not be updated; its leases are free in ten seconds");
        }
    }

    /// Whether the slot is still ours.
    async fn beat(&mut self, inner: &Inner, beats: u64) -> Result<bool, String> {
        let context = &inner.context;
        if self.conn.is_none() {
            self.conn = Some(inner.target.connect().await.map_err(|error| error.to_string())?);
        }
        let conn = self.conn.as_mut().expect("connected above");
        let before = context.runtime.now().0;
        let lazy = planted::is("pg-lease-not-renewed");
        let now: Vec<i64> = if lazy {
            vec![before]
        } else {
            constant!(
                BigInt;
                "UPDATE replica SET heartbeat = (extract(epoch FROM clock_timestamp()) * 1000)::BIGINT \
                 WHERE slot = $1 AND boot_id = $2 RETURNING heartbeat",
                Integer => self.slot, BigInt => context.boot.0,
            )
            .load(conn)
            .await
            .map_err(|error| error.to_string())?
        };
        let Some(now) = now.first() else { return Ok(false) };
        // Half the way there and back.
        context.skew.store(now - i64::midpoint(before, context.runtime.now().0), Ordering::Relaxed);
        if beats % 2 == 1 {
            let released = in_transaction!(conn, release_dead(conn, context.boot.0));
            let (freed, alive) = released.map_err(|fail| told(&fail))?;
            context.others.store(alive > 0, Ordering::Relaxed);
            if freed > 0 {
                inner.forget_bounds();
                tracing::info!(jobs = freed, "took up the work of a replica that is gone");
            }
        }
        let words = |error: diesel::result::Error| error.to_string();
        if context.packing.agree(conn).await.map_err(words)? && beats.is_multiple_of(2) {
            let begun = context.runtime.instant();
            while context.packing.repack(conn).await.map_err(words)? && context.runtime.instant() - begun < BEAT {}
        }
        if let Some(due) = context.sweep.begin() {
            sweep(conn, inner).await.map_err(|fail| told(&fail))?;
            due.done();
        }
        Ok(true)
    }

    async fn leave(&mut self, inner: &Inner) -> Result<(), String> {
        let conn = match self.conn.take() {
            Some(conn) => conn,
            None => inner.target.connect().await.map_err(|error| error.to_string())?,
        };
        let mut conn = conn;
        let context = &inner.context;
        let boot = context.boot.0;
        let text = |error: diesel::result::Error| error.to_string();
        // The heartbeat keeps the time of the last ids; a boot id of 0 owns nothing.
        constant!(
            (); "UPDATE replica SET boot_id = 0 WHERE slot = $1 AND boot_id = $2",
            Integer => self.slot, BigInt => boot,
        )
        .execute(&mut conn)
        .await
        .map_err(text)?;
        in_transaction!(conn, handed::free_own(&mut conn, context.boot)).map_err(|fail| told(&fail))?;
        constant!(
            (); "UPDATE job SET owner = 0, fence = fence + 1 WHERE owner <> 0 AND owner = $1", BigInt => boot,
        )
        .execute(&mut conn)
        .await
        .map_err(text)?;
        constant!(
            (); "UPDATE fanout SET owner = 0, fence = fence + 1 WHERE owner <> 0 AND owner = $1", BigInt => boot,
        )
        .execute(&mut conn)
        .await
        .map_err(text)?;
        // Nobody who stays may be able to read what this replica gives back.
        if context.packing.agree(&mut conn).await.map_err(text)? {
            while context.packing.repack(&mut conn).await.map_err(text)? {}
        }
        Ok(())
    }
}

fn told(fail: &Fail) -> String {
    format!("{fail:?}")
}

/// In a transaction whose statements see the latest: frees what is leased to nobody alive. `boot` is alive. How many jobs that
/// were, and how many others live.
pub(super) async fn release_dead(conn: &mut AsyncPgConnection, boot: i64) -> Attempt<(u64, usize)> {
    let alive: Vec<i64> = constant!(
        BigInt;
        "SELECT boot_id FROM replica WHERE boot_id <> 0 \
         AND heartbeat > (extract(epoch FROM clock_timestamp()) * 1000)::BIGINT - $1",
        BigInt => DEAD_AFTER_MS,
    )
    .load(conn)
    .await?;
    let others = alive.iter().filter(|other| **other != boot).count();
    let alive: Vec<i64> = alive.into_iter().chain([boot, 0]).collect();
    let without_rows = handed::free_others(conn, &alive).await?;
    // job_by_owner. Without an order, which would be the primary key's and lead through the whole queue; who skips what
    // is locked needs none.
    let jobs = constant!(
        ();
        "UPDATE job SET owner = 0, fence = fence + 1 WHERE id = ANY (ARRAY( \
         SELECT id FROM job WHERE owner <> 0 AND owner <> ALL ($1) FOR UPDATE SKIP LOCKED))",
        Array<BigInt> => &alive,
    )
    .execute(conn)
    .await?;
    constant!(
        (); "UPDATE fanout SET owner = 0, fence = fence + 1 WHERE owner <> 0 AND owner <> ALL ($1)",
        Array<BigInt> => &alive,
    )
    .execute(conn)
    .await?;
    Ok((without_rows + jobs as u64, others))
}

/// Frees what is leased to us by transactions whose answer was lost. While it looks, nobody takes new leases.
async fn sweep(conn: &mut AsyncPgConnection, inner: &Inner) -> Attempt<()> {
    let context = &inner.context;
    let _alone = context.leasing.write().await;
    let held: Vec<i64> = context.held.lock().expect("no panic while held").iter().copied().collect();
    let freed = constant!(
        (); "UPDATE job SET owner = 0, fence = fence + 1 WHERE owner <> 0 AND owner = $1 AND id <> ALL ($2)",
        BigInt => context.boot.0, Array<BigInt> => &held,
    )
    .execute(conn)
    .await?;
    let freed = freed as u64 + in_transaction!(conn, handed::free_unknown(conn, context, None))?;
    constant!(
        (); "UPDATE fanout SET owner = 0, fence = fence + 1 WHERE owner <> 0 AND owner = $1 AND notification_id <> ALL ($2)",
        BigInt => context.boot.0, Array<BigInt> => &held,
    )
    .execute(conn)
    .await?;
    if freed > 0 {
        tracing::info!(jobs = freed, "freed leases whose claim was answered to nobody");
    }
    inner.forget_bounds();
    Ok(())
}
