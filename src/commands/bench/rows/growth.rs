//! How costs grow: with the devices registered, with a topic's subscribers, with what waits in the queue.
//!
//! Every figure is of enough deliveries to be one; small installations are therefore broadcast to several times, which
//! is to their advantage: what they need is in every cache.

use std::time::Duration;

use prost_types::Timestamp;

use super::events::{EVENT_REFERENCE, stream_budget};
use super::{Bench, check_once};
use crate::commands::bench::args::{Plan, Table};
use crate::commands::bench::load::{self, Client};
use crate::commands::bench::people::{self, Topic};
use crate::commands::bench::report::{Budget, Report, Sample};
use crate::runtime::Runtime;

/// The smallest installation.
const LEAST_DEVICES: u32 = 10_000;
/// Subscribers of the largest topic at most: more would only take longer.
const MOST_SUBSCRIBERS: u32 = 1_000_000;
/// People named in an event of the backlog, as many as are not yet a fan-out.
const NAMED: u32 = 500;
/// Callers of events to small topics.
const CALLERS: usize = 16;
/// When the backlog would be due.
const LATER: Duration = Duration::from_secs(24 * 3600);

pub(super) async fn run(plan: Plan, runtime: &Runtime) -> anyhow::Result<Report> {
    let mut report = Report::default();
    let mut devices = LEAST_DEVICES.min(plan.devices);
    loop {
        let is_largest = devices >= plan.devices;
        let at = Plan {
            table: Table::Growth,
            devices,
            subscribers: devices.min(MOST_SUBSCRIBERS),
            dir: plan.dir.as_ref().map(|dir| dir.join(devices.to_string())),
            ..plan.clone()
        };
        let mut bench = Bench::start(at, runtime, std::mem::take(&mut report)).await?;
        bench.warm_up().await?;
        for _ in 0..plan.repeats {
            bench.of_devices().await?;
        }
        if devices == MOST_SUBSCRIBERS || (is_largest && devices < MOST_SUBSCRIBERS) {
            for _ in 0..plan.repeats {
                bench.of_subscribers().await?;
            }
            bench.of_backlog(plan.repeats).await?;
        }
        report = bench.end().await?;
        if is_largest {
            return Ok(report);
        }
        devices = devices.saturating_mul(10).min(plan.devices);
    }
}

/// 10 k, 1 M.
fn short(number: u32) -> String {
    match number {
        n if n.is_multiple_of(1_000_000) => format!("{} M", n / 1_000_000),
        n if n.is_multiple_of(1_000) => format!("{} k", n / 1_000),
        n => n.to_string(),
    }
}

impl Bench {
    /// A broadcast to everybody, and events for scattered people.
    async fn of_devices(&mut self) -> anyhow::Result<()> {
        let (devices, least) = (self.world.plan.devices, u64::from(self.world.plan.growth_pushes));
        let pushes = least.max(EVENT_REFERENCE);
        let mut reference = self.reference(pushes, None).await?;
        let mut sum = Sample::default();
        while sum.units < least {
            let one = self.broadcast().await?;
            sum.units += one.units;
            sum.cpu_us += one.cpu_us;
            sum.database_cpu_us += one.database_cpu_us;
            sum.wall_us += one.wall_us;
            sum.sandbox_cpu_us += one.sandbox_cpu_us;
            for (name, us) in one.threads_us {
                *sum.threads_us.entry(name).or_default() += us;
            }
            sum.rss_anon_kib = sum.rss_anon_kib.max(one.rss_anon_kib);
            sum.ages = one.ages;
        }
        sum.reference_us = Some(self.reference_around(&mut reference, pushes, None).await?);
        let name = format!("broadcast, {} devices", short(devices));
        self.report.sample(&name, super::broadcast_budget(self.world.plan.store), sum);
        let name = format!("events, stream, {} devices", short(devices));
        let budget = stream_budget(self.world.plan.store);
        self.event_row(&name, budget, self.world.plan.pushes, &mut reference, None).await
    }

    /// The largest topic is [`Self::of_devices`]' broadcast.
    async fn of_subscribers(&mut self) -> anyhow::Result<()> {
        for (topic, name) in [(Topic::One, "a topic of 1"), (Topic::Thousand, "a topic of 1 k")] {
            let plan = &self.world.plan;
            let (reached, _) = people::reached(topic, plan.devices.min(10_000), plan.subscribers);
            let wanted = if topic == Topic::One { u64::from(plan.pushes) } else { u64::from(plan.growth_pushes) };
            let events = u32::try_from(wanted.div_ceil(reached))?;
            self.topic_row(name, topic, events, u64::from(events) * reached).await?;
        }
        Ok(())
    }

    async fn topic_row(&mut self, name: &str, topic: Topic, events: u32, expected: u64) -> anyhow::Result<()> {
        let clients = self.clients(CALLERS).await?;
        self.world.sandbox.clear().await?;
        let prefix = self.key("topic");
        let (runtime, payload) = (self.world.runtime.clone(), self.world.plan.payload);
        let clock = runtime.clone();
        let recorded = self.recorded().await?;
        let mark = self.mark()?;
        let call = move |mut client: Client, at: u32| {
            let event = load::broadcast(&clock, topic, format!("{prefix}-{at}"), payload, true);
            async move { client.notify_event(event).await.map(drop) }
        };
        let latencies = load::calls(&runtime, &clients, CALLERS, events, call).await?;
        let stats = self.until_sent(expected).await?;
        self.until_recorded(recorded + expected).await?;
        let mut sample = self.since(&mark, expected)?.answered(&latencies);
        drop(mark);
        check_once(&stats, expected)?;
        sample.ages = Some(stats.tally.ages);
        self.report.sample(name, Budget::default(), sample);
        Ok(())
    }

    /// Events and a broadcast while as many targets as there are devices wait for tomorrow.
    async fn of_backlog(&mut self, repeats: u32) -> anyhow::Result<()> {
        let devices = self.world.plan.devices;
        let clients = self.clients(CALLERS).await?;
        let (runtime, payload, prefix) = (self.world.runtime.clone(), self.world.plan.payload, self.key("later"));
        let clock = runtime.clone();
        let due = (runtime.now().0 + i64::try_from(LATER.as_millis())?) / 1000;
        let call = move |mut client: Client, at: u32| {
            let mut event = load::event(&clock, &people::name(0), format!("{prefix}-{at}"), payload);
            event.user_ids = (at * NAMED..(at + 1) * NAMED).map(people::name).collect();
            event.not_before = Some(Timestamp { seconds: due, nanos: 0 });
            async move { client.notify_event(event).await.map(drop) }
        };
        load::calls(&runtime, &clients, CALLERS, devices / NAMED, call).await?;
        // A broadcast would wait for room in the queue (a million open deliveries); events do not.
        for _ in 0..repeats {
            let mut reference = self.reference(EVENT_REFERENCE, None).await?;
            let name = format!("events, stream, {} targets waiting", short(devices));
            let budget = stream_budget(self.world.plan.store);
            self.event_row(&name, budget, self.world.plan.pushes, &mut reference, None).await?;
            let (reached, _) = people::reached(Topic::Thousand, devices.min(10_000), devices);
            let events = u32::try_from(u64::from(self.world.plan.growth_pushes).div_ceil(reached))?;
            let name = format!("a topic of 1 k, {} targets waiting", short(devices));
            self.topic_row(&name, Topic::Thousand, events, u64::from(events) * reached).await?;
        }
        Ok(())
    }
}
