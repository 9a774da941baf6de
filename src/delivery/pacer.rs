//! The rate of one credential, as this process uses it.
//!
//! Permits are leased from the store in small blocks, which every process on it shares, and used from a reserve by
//! lane. A lone push leases one permit; under load the blocks grow to a tenth of a second's worth, so that there are a
//! few dozen round trips a second at most, however many pushes. What is not used within a second is lost.

use std::sync::Mutex;
use std::time::Duration;

use crate::domain::pacing::{PERMIT_GOOD_FOR, PermitRequest, Rate};
use crate::domain::platform::Lane;
use crate::runtime::{Instant, Runtime};
use crate::storage::Store;

/// A block is followed so closely by the next that larger ones pay.
const CLOSE: Duration = Duration::from_millis(200);
/// Nobody comes back for permits sooner.
const SHORTEST_WAIT: Duration = Duration::from_millis(50);
/// After the store failed.
const STORE_PAUSE: Duration = Duration::from_millis(500);

pub struct Pacer {
    /// The store's name for it.
    credential: String,
    rate: Mutex<Option<Rate>>,
    reserves: [Mutex<Reserve>; 2],
    /// One lease at a time and lane; whoever waited finds what the one before left.
    leasing: [tokio::sync::Mutex<()>; 2],
}

#[derive(Default)]
struct Reserve {
    permits: u32,
    good_until: Option<Instant>,
    dry_until: Option<Instant>,
    /// The last lease, and how much it asked for.
    leased_at: Option<Instant>,
    block: u32,
}

impl Reserve {
    fn take(&mut self, wanted: u32, now: Instant) -> u32 {
        if self.good_until.is_none_or(|until| until <= now) {
            self.permits = 0;
        }
        let taken = wanted.min(self.permits);
        self.permits -= taken;
        taken
    }
}

/// An answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Taken {
    pub permits: u32,
    /// When the rest may be asked for, where there is one.
    pub again: Duration,
}

impl Pacer {
    pub fn new(credential: String, rate: Option<Rate>) -> Self {
        Self { credential, rate: Mutex::new(rate), reserves: Default::default(), leasing: Default::default() }
    }

    pub fn rate(&self) -> Option<Rate> {
        *self.rate.lock().expect("no panic while held")
    }

    pub fn set_rate(&self, rate: Option<Rate>) {
        *self.rate.lock().expect("no panic while held") = rate;
    }

    /// Targets worth claiming at once; more would only wait here.
    pub fn claimable(&self, most: usize) -> usize {
        self.rate().map_or(most, |rate| most.min(usize::try_from(rate.block()).unwrap_or(usize::MAX)))
    }

    /// Until when there is nothing to be had for a lane.
    pub fn dry_until(&self, lane: Lane, now: Instant) -> Option<Instant> {
        self.rate()?;
        let reserve = self.reserves[lane.index()].lock().expect("no panic while held");
        reserve.dry_until.filter(|until| *until > now)
    }

    /// Up to `wanted` permits, without waiting for the rate. Cancel safe: what was leased stays in the reserve.
    pub async fn take(&self, runtime: &Runtime, store: &dyn Store, lane: Lane, wanted: usize) -> Taken {
        let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
        let Some(rate) = self.rate() else { return Taken { permits: wanted, again: Duration::ZERO } };
        let reserve = &self.reserves[lane.index()];
        let from_reserve = |wanted| reserve.lock().expect("no panic while held").take(wanted, runtime.instant());
        let mut permits = from_reserve(wanted);
        if permits == wanted {
            return Taken { permits, again: Duration::ZERO };
        }
        let _leasing = self.leasing[lane.index()].lock().await;
        permits += from_reserve(wanted - permits);
        if permits == wanted {
            return Taken { permits, again: Duration::ZERO };
        }
        if let Some(dry_until) = self.dry_until(lane, runtime.instant()) {
            return Taken { permits, again: dry_until - runtime.instant() };
        }
        let block = self.block(rate, lane, wanted - permits, runtime.instant());
        let request = PermitRequest { rate, lane, wanted: block, slow_down: false };
        let again = match store.lease_permits(&self.credential, request, runtime.now()).await {
            Ok(leased) => {
                let now = runtime.instant();
                let mut reserve = reserve.lock().expect("no panic while held");
                reserve.permits = leased.granted;
                reserve.good_until = Some(now + PERMIT_GOOD_FOR);
                permits += reserve.take(wanted - permits, now);
                let again = leased.wait.max(SHORTEST_WAIT);
                if permits < wanted {
                    reserve.dry_until = Some(now + again);
                }
                again
            }
            Err(error) => {
                tracing::debug!(%error, credential = self.credential, "permits cannot be leased");
                STORE_PAUSE
            }
        };
        Taken { permits, again: if permits == wanted { Duration::ZERO } else { again } }
    }

    /// The provider says that everything is too fast: what is in reserve is given up, and the ramp begins again.
    pub async fn slow_down(&self, runtime: &Runtime, store: &dyn Store) {
        let Some(rate) = self.rate() else { return };
        for reserve in &self.reserves {
            reserve.lock().expect("no panic while held").permits = 0;
        }
        let request = PermitRequest { rate, lane: Lane::Bulk, wanted: 0, slow_down: true };
        if let Err(error) = store.lease_permits(&self.credential, request, runtime.now()).await {
            tracing::debug!(%error, credential = self.credential, "the rate cannot be lowered");
        }
    }

    fn block(&self, rate: Rate, lane: Lane, wanted: u32, now: Instant) -> u32 {
        let mut reserve = self.reserves[lane.index()].lock().expect("no panic while held");
        let close = reserve.leased_at.is_some_and(|at| now < at + CLOSE);
        let grown = if close { reserve.block.saturating_mul(2).min(rate.block()) } else { 1 };
        reserve.leased_at = Some(now);
        reserve.block = wanted.max(grown);
        reserve.block
    }
}
