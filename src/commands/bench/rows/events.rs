//! Events for one person each.

use tonic::Status;

use super::{Bench, check_once};
use crate::commands::bench::args::{Group, Keys, Store};
use crate::commands::bench::load;
use crate::commands::bench::people;
use crate::commands::bench::report::Budget;
use crate::sandbox::token_hash;

/// Pushes of the reference of events at least. Its clock ticks in hundredths of a second: fewer would measure the tick.
pub(super) const EVENT_REFERENCE: u64 = 100_000;

/// Callers at once.
const UNARY: [usize; 3] = [1, 16, 256];

fn unary_budget(store: Store, callers: usize) -> Budget {
    if store == Store::Sqlite && callers == 256 { Budget::new(9.0, 7.0) } else { Budget::default() }
}

pub(super) fn stream_budget(store: Store) -> Budget {
    match store {
        Store::Sqlite => Budget::new(7.0, 5.0),
        Store::Postgres => Budget::new(12.0, 9.0),
    }
}

impl Bench {
    /// Unary calls and the stream, for scattered people who said yes.
    pub(super) async fn events(&mut self, mut reference: f64) -> anyhow::Result<()> {
        let plan = self.world.plan.clone();
        if plan.has(Group::Unary) {
            for callers in UNARY {
                // One caller waits for the disk each time.
                let count = if callers == 1 { (plan.pushes / 20).max(256) } else { plan.pushes };
                let name = format!("events, unary, {callers} callers");
                self.event_row(&name, unary_budget(plan.store, callers), count, &mut reference, Some(callers)).await?;
            }
        }
        if plan.has(Group::Stream) {
            self.event_row("events, stream", stream_budget(plan.store), plan.pushes, &mut reference, None).await?;
        }
        Ok(())
    }

    /// `reference`: measured just before; what it was just after is left there for the row that follows.
    pub(super) async fn event_row(
        &mut self,
        name: &str,
        budget: Budget,
        count: u32,
        reference: &mut f64,
        callers: Option<usize>,
    ) -> anyhow::Result<()> {
        let mut clients = self.clients(callers.unwrap_or(1)).await?;
        if callers.is_none() && clients.len() < self.world.replicas.len() {
            // A stream for each replica.
            for _ in clients.len()..self.world.replicas.len() {
                clients.push(self.world.client().await?);
            }
        }
        self.world.sandbox.clear().await?;
        let prefix = self.key("event");
        let salt = self.salt;
        let (devices, payload, keys) = (self.world.plan.devices, self.world.plan.payload, self.world.plan.keys);
        let runtime = self.world.runtime.clone();
        let clock = runtime.clone();
        let make = move |at: u32| {
            let user = people::name(people::someone(devices, salt, at));
            let key = match keys {
                Keys::Ascending => format!("{prefix}-{at}"),
                Keys::Scattered => people::scattered_key(salt, at),
            };
            load::event(&clock, &user, key, payload)
        };
        let recorded = self.recorded().await?;
        let mark = self.mark()?;
        let latencies = match callers {
            None => load::streams(&runtime, &clients, count, make).await?,
            Some(callers) => {
                let call = move |mut client: load::Client, at: u32| {
                    let event = make(at);
                    async move { client.notify_event(event).await.map(drop) as Result<(), Status> }
                };
                load::calls(&runtime, &clients, callers, count, call).await?
            }
        };
        let stats = self.until_sent(u64::from(count)).await?;
        self.until_recorded(recorded + u64::from(count)).await?;
        let mut sample = self.since(&mark, u64::from(count))?.answered(&latencies);
        drop(mark);
        check_once(&stats, u64::from(count))?;
        let sum = (0..count)
            .fold(0_u64, |sum, at| sum.wrapping_add(token_hash(&people::token(people::someone(devices, salt, at)))));
        if self.reached_sum.is_some() && stats.tally.token_sum != sum.to_string() {
            anyhow::bail!("{name}: the right number of pushes came, but not to the right people");
        }
        sample.ages = Some(stats.tally.ages);
        sample.reference_us =
            Some(self.reference_around(reference, EVENT_REFERENCE.max(u64::from(count)), None).await?);
        self.report.sample(name, budget, sample);
        Ok(())
    }
}
