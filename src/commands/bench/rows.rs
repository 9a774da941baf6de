//! The rows: what is done, measured and checked for each.

mod calls;
mod events;
mod moments;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::json;

use super::args::{Group, Plan};
use super::control::Stats;
use super::load::{self, Client};
use super::people;
use super::process::Process;
use super::reference::{self, Answer, Templates};
use super::report::{Report, Sample};
use super::world::World;
use crate::api::proto::{GetNotificationRequest, Notification};
use crate::runtime::Runtime;

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
    let mut world = World::new(plan.clone(), runtime).await?;
    let client = world.client().await?;
    let (reached, sum) = people::reached(plan.subscribers);
    let salt = runtime.random_u64();
    let mut bench = Bench { world, client, report: Report::default(), reached, reached_sum: Some(sum), salt };
    bench.about();
    let idle = bench.world.server.rss_anon_kib();
    bench.report.fact("memory (RssAnon), started, idle", mib(idle), "must 40, goal 20 MiB");
    bench.warm_up().await?;
    for repeat in 0..plan.repeats {
        bench.repeat(repeat).await?;
    }
    bench.once().await?;
    let Bench { world, report, .. } = bench;
    world.close().await?;
    Ok(report)
}

fn mib(kib: u64) -> String {
    format!("{:.1} MiB", f64::from(u32::try_from(kib).unwrap_or(u32::MAX)) / 1024.0)
}

/// What the server has used so far.
struct Mark {
    cpu_us: u64,
    sandbox_cpu_us: u64,
    threads: BTreeMap<String, u64>,
    at: crate::runtime::Instant,
    peak: Peak,
}

/// Samples memory until it is dropped.
struct Peak {
    most: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Peak {
    fn watch(runtime: &Runtime, server: &Process) -> Self {
        let most = Arc::new(AtomicU64::new(server.rss_anon_kib()));
        let (seen, clock, pid) = (Arc::clone(&most), runtime.clone(), server.id());
        let task = runtime.spawn(async move {
            loop {
                seen.fetch_max(super::process::rss_anon_kib(pid), Ordering::Relaxed);
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
    fn about(&mut self) {
        let plan = &self.world.plan;
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
        let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
        self.report.about = BTreeMap::from([
            ("devices".to_owned(), json!(plan.devices)),
            ("subscribers".to_owned(), json!(plan.subscribers)),
            ("pushes".to_owned(), json!(plan.pushes)),
            ("repeats".to_owned(), json!(plan.repeats)),
            ("provider latency ms".to_owned(), json!(plan.provider_latency.as_millis())),
            ("store".to_owned(), json!("SQLite, synchronous FULL")),
            ("settings".to_owned(), json!(plan.settings.join(" "))),
            ("version".to_owned(), json!(env!("CARGO_PKG_VERSION"))),
            ("at".to_owned(), json!(self.world.runtime.now().to_string())),
            ("machine".to_owned(), json!(format!("{cores} cores, {}", model.trim_start_matches([' ', '\t', ':'])))),
            ("build".to_owned(), json!(if cfg!(debug_assertions) { "debug: figures mean nothing" } else { "release" })),
        ]);
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
            let reference = self.reference(u32::try_from(self.reached)?).await?;
            let mut sample = self.broadcast().await?;
            sample.reference_us = Some(reference);
            self.report.sample("broadcast", Some((2.0, 1.5)), sample);
        }
        if plan.has(Group::Unary) || plan.has(Group::Stream) {
            // Its clock ticks in hundredths of a second: fewer would measure the tick.
            let reference = self.reference(plan.pushes.max(100_000)).await?;
            self.events(reference).await?;
        }
        if plan.has(Group::Calls) {
            self.calls(repeat).await?;
        }
        Ok(())
    }

    /// What is measured once, in an order in which one does not disturb the next.
    async fn once(&mut self) -> anyhow::Result<()> {
        let plan = self.world.plan.clone();
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
        if plan.has(Group::Failing) {
            for _ in 0..plan.repeats {
                self.failing().await?;
            }
        }
        Ok(())
    }

    fn mark(&self) -> anyhow::Result<Mark> {
        Ok(Mark {
            cpu_us: self.world.server.cpu_us()?,
            sandbox_cpu_us: self.world.sandbox_process.cpu_us()?,
            threads: self.world.server.threads_us(),
            at: self.world.runtime.instant(),
            peak: Peak::watch(&self.world.runtime, &self.world.server),
        })
    }

    fn since(&self, mark: &Mark, units: u64) -> anyhow::Result<Sample> {
        let threads = self.world.server.threads_us();
        Ok(Sample {
            units,
            cpu_us: self.world.server.cpu_us()? - mark.cpu_us,
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

    /// A broadcast to the topic, until its last outcome is recorded.
    async fn broadcast(&mut self) -> anyhow::Result<Sample> {
        self.world.sandbox.clear().await?;
        let sent_before = self.recorded().await?;
        let key = self.key("broadcast");
        let event = load::broadcast(&self.world.runtime, key, self.world.plan.payload, true);
        let mark = self.mark()?;
        let id = self.client.notify_event(event).await?.into_inner().notification_id;
        let stats = self.until_sent(self.reached).await?;
        self.until_recorded(sent_before + self.reached - stats.tally.refused).await?;
        let mut sample = self.since(&mark, self.reached)?;
        drop(mark);
        sample.ages = Some(stats.tally.ages);
        self.check(&stats, self.reached)?;
        let counts = self.notification(&id).await?.counts.context("a notification has counts")?;
        let (sent, dead, open) = (counts.sent(), counts.dead(), counts.open());
        if open != 0 || sent != stats.tally.distinct || dead != stats.tally.refused {
            bail!("the server counts {sent} sent, {dead} dead, {open} open; the providers {:?}", stats.tally);
        }
        Ok(sample)
    }

    /// Each person once, and the right ones.
    fn check(&self, stats: &Stats, expected: u64) -> anyhow::Result<()> {
        let tally = &stats.tally;
        if tally.repeated > 0 || tally.overflowed || tally.distinct + tally.refused != expected {
            bail!("{expected} deliveries were to be made once each; the providers took {tally:?}");
        }
        if let Some(sum) = self.reached_sum.filter(|_| expected == self.reached && tally.refused == 0)
            && tally.token_sum != sum.to_string()
        {
            bail!("the right number of people was reached, but not the right ones");
        }
        Ok(())
    }

    /// The reference's cost of a push, in microseconds.
    async fn reference(&mut self, pushes: u32) -> anyhow::Result<f64> {
        let stats = self.world.sandbox.stats().await?;
        let connections = stats.apns.open.max(stats.fcm.open).max(1);
        self.world.sandbox.clear().await?;
        let program = std::env::current_exe()?;
        let arguments = [
            "bench-reference".to_owned(),
            format!("--dir={}", self.world.dir.display()),
            format!("--pushes={pushes}"),
            format!("--devices={}", self.world.plan.devices),
            format!("--connections={connections}"),
            format!("--streams={REFERENCE_STREAMS}"),
        ];
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
        if tally.distinct != u64::from(pushes) || tally.repeated > 0 || tally.refused > 0 {
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
            self.world.server.check()?;
            self.world.sandbox_process.check()?;
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
        let sent = self.world.admin.metric("nudged_sent_total").await?;
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
