//! The rows: what is done, measured and checked for each.

mod calls;
mod events;
mod growth;
mod moments;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::json;

use super::args::{Group, Plan, Store, Table};
use super::cluster;
use super::control::Stats;
use super::load::{self, Client};
use super::people::{self, Topic};
use super::reference::{self, Answer, Templates};
use super::report::{Budget, Report, Sample};
use super::world::World;
use crate::api::proto::{GetNotificationRequest, Notification};
use crate::domain::platform::Platform;
use crate::runtime::Runtime;

/// What was built, for the head of a table; `scripts/release.sh` says that it is profiled.
const BUILD: &str = match option_env!("NUDGED_BUILD") {
    _ if cfg!(debug_assertions) => "debug: figures mean nothing",
    Some(build) => build,
    None => "release",
};
/// How often progress is looked at; the look costs the server next to nothing.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// A row's pushes that do not come any more.
const SILENCE: Duration = Duration::from_secs(30);
/// In flight per connection; the server's own default for its BULK lane (three quarters of 400).
const REFERENCE_STREAMS: u32 = 300;

/// The run: the stage, and what was found so far.
pub struct Bench {
    world: World,
    client: Client,
    report: Report,
    /// Who a broadcast reaches, and the sum of their tokens' hashes; no sum once devices were retired.
    reached: u64,
    reached_sum: Option<u64>,
    /// Makes idempotency keys of different rows different.
    salt: u64,
}

pub async fn run(plan: Plan, runtime: &Runtime) -> anyhow::Result<Report> {
    if plan.table == Table::Growth {
        return growth::run(plan, runtime).await;
    }
    let mut bench = Bench::start(plan.clone(), runtime, Report::default()).await?;
    let idle = bench.world.rss_anon_kib();
    let budget = Budget::new(40.0, 20.0);
    bench.report.fact("memory (RssAnon), started, idle", "MiB", &[("", mib(idle))], "", budget);
    bench.warm_up().await?;
    for repeat in 0..plan.repeats {
        bench.repeat(repeat).await?;
    }
    if plan.has(Group::Failing) {
        let mut sound = bench.broadcast().await?.cost();
        for _ in 0..plan.repeats {
            bench.failing(&mut sound).await?;
        }
    }
    bench.end().await
}

#[expect(clippy::cast_precision_loss, reason = "memory in KiB fits 53 bits")]
fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

/// What the servers have used so far.
struct Mark {
    cpu_us: u64,
    database_cpu_us: u64,
    sandbox_cpu_us: u64,
    threads: BTreeMap<String, u64>,
    at: crate::runtime::Instant,
    peak: Peak,
}

/// Samples the memory of the largest server until it is dropped.
struct Peak {
    most: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Peak {
    fn watch(runtime: &Runtime, world: &World) -> Self {
        let most = Arc::new(AtomicU64::new(world.rss_anon_kib()));
        let servers: Vec<u32> = world.replicas.iter().map(|replica| replica.process.id()).collect();
        let (seen, clock) = (Arc::clone(&most), runtime.clone());
        let task = runtime.spawn(async move {
            loop {
                for server in &servers {
                    seen.fetch_max(super::process::rss_anon_kib(*server), Ordering::Relaxed);
                }
                clock.sleep(Duration::from_millis(50)).await;
            }
        });
        Self { most, task }
    }

    fn most_kib(&self) -> u64 {
        self.most.load(Ordering::Relaxed)
    }
}

impl Drop for Peak {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Bench {
    async fn start(plan: Plan, runtime: &Runtime, report: Report) -> anyhow::Result<Self> {
        let (reached, sum) = people::reached(Topic::All, plan.devices, plan.subscribers);
        let mut world = World::new(plan, runtime).await?;
        let client = world.client().await?;
        let salt = runtime.random_u64();
        let mut bench = Self { world, client, report, reached, reached_sum: Some(sum), salt };
        bench.about();
        Ok(bench)
    }

    async fn end(self) -> anyhow::Result<Report> {
        let Self { world, report, .. } = self;
        world.close().await?;
        Ok(report)
    }

    fn about(&mut self) {
        let plan = &self.world.plan;
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
        let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
        let store = match (&self.world.cluster, plan.store) {
            (Some(cluster), _) => format!(
                "Postgres {}, fsync and synchronous_commit on, {}; {} replica(s)",
                cluster.version(),
                cluster::SETTINGS.join(", "),
                plan.replicas
            ),
            (None, Store::Sqlite | Store::Postgres) => "SQLite, synchronous FULL".to_owned(),
        };
        for (name, value) in [
            ("devices", json!(plan.devices)),
            ("subscribers", json!(plan.subscribers)),
            ("pushes", json!(plan.pushes)),
            ("repeats", json!(plan.repeats)),
            ("keys", json!(plan.keys.name())),
            ("provider latency ms", json!(plan.provider_latency.as_millis())),
            ("store", json!(store)),
            ("settings", json!(plan.settings.join(" "))),
            ("version", json!(env!("CARGO_PKG_VERSION"))),
            ("at", json!(self.world.runtime.now().to_string())),
            ("machine", json!(format!("{cores} cores, {}", model.trim_start_matches([' ', '\t', ':'])))),
            ("build", json!(BUILD)),
        ] {
            self.report.about.insert(name.to_owned(), value);
        }
    }

    fn key(&mut self, what: &str) -> String {
        self.salt = self.salt.wrapping_add(1);
        format!("{what}-{:016x}", self.salt)
    }

    async fn clients(&mut self, callers: usize) -> anyhow::Result<Vec<Client>> {
        let mut clients = Vec::new();
        for _ in 0..callers.div_ceil(load::CALLERS_PER_CONNECTION) {
            clients.push(self.world.client().await?);
        }
        Ok(clients)
    }

    /// Opens the connections, and takes the template of the reference.
    async fn warm_up(&mut self) -> anyhow::Result<()> {
        self.world.sandbox.clear().await?;
        for number in 0..200 {
            let key = self.key("warm");
            let event = load::event(&self.world.runtime, &people::name(number), key, self.world.plan.payload);
            self.client.notify_event(event).await?;
        }
        let stats = self.until_sent(200).await?;
        if stats.tally.distinct != 200 {
            bail!("{} pushes arrived, 200 were asked for", stats.tally.distinct);
        }
        self.until_recorded(200).await?;
        let Some(templates) = Templates::of(&self.world.sandbox.record().await?) else {
            bail!("the fake providers recorded no push of one platform");
        };
        let (apns, fcm) = templates.body_bytes();
        self.report.about.insert("payload bytes APNs, FCM".to_owned(), json!(format!("{apns}, {fcm}")));
        std::fs::write(self.world.dir.join(reference::FILE), serde_json::to_string(&templates)?)?;
        Ok(())
    }

    async fn repeat(&mut self, repeat: u32) -> anyhow::Result<()> {
        let plan = self.world.plan.clone();
        if plan.has(Group::Broadcast) {
            let mut reference = self.reference(self.reached, None).await?;
            let mut sample = self.broadcast().await?;
            sample.reference_us = Some(self.reference_around(&mut reference, self.reached, None).await?);
            self.report.sample("broadcast", broadcast_budget(plan.store), sample);
        }
        if plan.has(Group::Apart) {
            for platform in [Platform::Apns, Platform::Fcm] {
                self.apart(platform).await?;
            }
        }
        if plan.has(Group::Unary) || plan.has(Group::Stream) {
            let reference = self.reference(events::EVENT_REFERENCE.max(u64::from(plan.pushes)), None).await?;
            self.events(reference).await?;
        }
        if plan.has(Group::Calls) {
            self.calls(repeat).await?;
        }
        // One does not disturb the next in this order.
        if plan.has(Group::Latency) {
            self.latency().await?;
        }
        if plan.has(Group::Comment) {
            self.comment().await?;
        }
        if plan.has(Group::No) {
            self.no().await?;
        }
        if plan.has(Group::Restart) {
            self.restart().await?;
        }
        Ok(())
    }

    fn mark(&self) -> anyhow::Result<Mark> {
        Ok(Mark {
            cpu_us: self.world.servers_cpu_us()?,
            database_cpu_us: self.world.database_cpu_us()?,
            sandbox_cpu_us: self.world.sandbox_process.cpu_us()?,
            threads: self.world.threads_us(),
            at: self.world.runtime.instant(),
            peak: Peak::watch(&self.world.runtime, &self.world),
        })
    }

    fn since(&self, mark: &Mark, units: u64) -> anyhow::Result<Sample> {
        let threads = self.world.threads_us();
        Ok(Sample {
            units,
            cpu_us: self.world.servers_cpu_us()? - mark.cpu_us,
            database_cpu_us: self.world.database_cpu_us()?.saturating_sub(mark.database_cpu_us),
            wall_us: load::micros(self.world.runtime.instant() - mark.at),
            sandbox_cpu_us: self.world.sandbox_process.cpu_us()? - mark.sandbox_cpu_us,
            threads_us: threads
                .into_iter()
                .map(|(name, us)| {
                    let before = mark.threads.get(&name).copied().unwrap_or(0);
                    (name, us.saturating_sub(before))
                })
                .collect(),
            rss_anon_kib: mark.peak.most_kib(),
            ..Sample::default()
        })
    }

    /// A broadcast to all subscribers, until its last outcome is recorded.
    async fn broadcast(&mut self) -> anyhow::Result<Sample> {
        let (sample, stats) = self.broadcast_to(Topic::All, self.reached).await?;
        Self::check_people(&stats, self.reached_sum)?;
        Ok(sample)
    }

    /// One to the people of one platform.
    async fn apart(&mut self, platform: Platform) -> anyhow::Result<()> {
        let topic = Topic::Of(platform);
        let (reached, sum) = people::reached(topic, self.world.plan.devices, self.world.plan.subscribers);
        let mut reference = self.reference(reached, Some(platform)).await?;
        let (mut sample, stats) = self.broadcast_to(topic, reached).await?;
        Self::check_people(&stats, self.reached_sum.and(Some(sum)))?;
        sample.reference_us = Some(self.reference_around(&mut reference, reached, Some(platform)).await?);
        let name = match platform {
            Platform::Apns => "broadcast, APNs alone",
            Platform::Fcm => "broadcast, FCM alone",
        };
        self.report.sample(name, broadcast_budget(self.world.plan.store), sample);
        Ok(())
    }

    async fn broadcast_to(&mut self, topic: Topic, reached: u64) -> anyhow::Result<(Sample, Stats)> {
        self.world.sandbox.clear().await?;
        let sent_before = self.recorded().await?;
        let key = self.key("broadcast");
        let event = load::broadcast(&self.world.runtime, topic, key, self.world.plan.payload, true);
        let mark = self.mark()?;
        let id = self.client.notify_event(event).await?.into_inner().notification_id;
        let stats = self.until_sent(reached).await?;
        self.until_recorded(sent_before + reached - stats.tally.refused).await?;
        let mut sample = self.since(&mark, reached)?;
        drop(mark);
        sample.ages = Some(stats.tally.ages);
        check_once(&stats, reached)?;
        let counts = self.notification(&id).await?.counts.context("a notification has counts")?;
        let (sent, dead, open) = (counts.sent(), counts.dead(), counts.open());
        if open != 0 || sent != stats.tally.distinct || dead != stats.tally.refused {
            bail!("the server counts {sent} sent, {dead} dead, {open} open; the providers {:?}", stats.tally);
        }
        Ok((sample, stats))
    }

    /// The right people, where that can be known.
    fn check_people(stats: &Stats, sum: Option<u64>) -> anyhow::Result<()> {
        if let Some(sum) = sum.filter(|_| stats.tally.refused == 0)
            && stats.tally.token_sum != sum.to_string()
        {
            bail!("the right number of people was reached, but not the right ones");
        }
        Ok(())
    }

    /// What to compare a row with: the mean of the reference `before` it and now, for a machine that others share changes its
    /// pace meanwhile. `before` becomes that of the next row.
    async fn reference_around(&mut self, before: &mut f64, pushes: u64, only: Option<Platform>) -> anyhow::Result<f64> {
        let after = self.reference(pushes, only).await?;
        Ok(f64::midpoint(std::mem::replace(before, after), after))
    }

    /// The reference's cost of a push, in microseconds.
    async fn reference(&mut self, pushes: u64, only: Option<Platform>) -> anyhow::Result<f64> {
        let stats = self.world.sandbox.stats().await?;
        let connections = self.world.per_replica(stats.apns.open.max(stats.fcm.open).max(1));
        self.world.sandbox.clear().await?;
        let program = std::env::current_exe()?;
        let mut arguments = vec![
            "bench-reference".to_owned(),
            format!("--dir={}", self.world.dir.display()),
            format!("--pushes={pushes}"),
            format!("--devices={}", self.world.plan.devices),
            format!("--connections={connections}"),
            format!("--streams={REFERENCE_STREAMS}"),
        ];
        arguments.extend(only.map(|platform| match platform {
            Platform::Apns => "--only=apns".to_owned(),
            Platform::Fcm => "--only=fcm".to_owned(),
        }));
        let output = self
            .world
            .runtime
            .blocking(move || std::process::Command::new(program).args(arguments).output())
            .await
            .context("running the reference")?;
        if !output.status.success() {
            bail!("the reference failed: {}", String::from_utf8_lossy(&output.stderr));
        }
        let answer: Answer = serde_json::from_slice(&output.stdout).context("reading the reference's answer")?;
        let tally = self.world.sandbox.stats().await?.tally;
        if tally.distinct != pushes || tally.repeated > 0 || tally.refused > 0 {
            bail!("the reference was to send {pushes} pushes; the providers took {tally:?}");
        }
        #[expect(clippy::cast_precision_loss, reason = "microseconds of minutes fit 53 bits")]
        let cost = answer.cpu_us as f64 / answer.pushes.max(1) as f64;
        let list = self.report.about.entry("reference us".to_owned()).or_insert_with(|| json!([]));
        if let Some(list) = list.as_array_mut() {
            list.push(json!((cost * 100.0).round() / 100.0));
        }
        eprintln!("reference: {cost:.2} us over {connections} connections to each platform");
        Ok(cost)
    }

    /// Waits until the providers took or refused so many pushes.
    async fn until_sent(&mut self, count: u64) -> anyhow::Result<Stats> {
        let runtime = self.world.runtime.clone();
        let deadline = runtime.instant() + self.world.plan.patience;
        let (mut last, mut moved_at) = (0, runtime.instant());
        loop {
            let stats = self.world.sandbox.stats().await?;
            let come = stats.tally.distinct + stats.tally.refused;
            if come >= count {
                return Ok(stats);
            }
            self.world.check()?;
            if come > last {
                (last, moved_at) = (come, runtime.instant());
            }
            if runtime.instant() > deadline || runtime.instant() > moved_at + SILENCE {
                bail!("{come} of {count} pushes arrived, and then none: {:?}", stats.tally);
            }
            runtime.sleep(LOOK_EVERY).await;
        }
    }

    /// Deliveries whose outcome is durable.
    async fn recorded(&self) -> anyhow::Result<u64> {
        let sent = self.world.metric("nudged_sent_total").await?;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
        Ok(sent as u64)
    }

    async fn until_recorded(&mut self, count: u64) -> anyhow::Result<()> {
        let runtime = self.world.runtime.clone();
        let deadline = runtime.instant() + SILENCE;
        loop {
            let recorded = self.recorded().await?;
            if recorded >= count {
                return Ok(());
            }
            if runtime.instant() > deadline {
                bail!("{recorded} of {count} outcomes were recorded");
            }
            runtime.sleep(LOOK_EVERY).await;
        }
    }

    async fn notification(&mut self, id: &str) -> anyhow::Result<Notification> {
        let request = GetNotificationRequest { app_id: super::world::APP.to_owned(), notification_id: id.to_owned() };
        let answer = self.client.get_notification(request).await?.into_inner();
        answer.notification.context("a notification that was accepted is found")
    }
}

fn broadcast_budget(store: Store) -> Budget {
    match store {
        Store::Sqlite => Budget::new(2.0, 1.5),
        Store::Postgres => Budget::new(3.0, 2.5),
    }
}

/// Each person once.
fn check_once(stats: &Stats, expected: u64) -> anyhow::Result<()> {
    let tally = &stats.tally;
    if tally.repeated > 0 || tally.overflowed || tally.distinct + tally.refused != expected {
        bail!("{expected} deliveries were to be made once each; the providers took {tally:?}");
    }
    Ok(())
}
