//! Single moments: how soon, how much memory, how fast after a crash.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::json;

use super::{Bench, LOOK_EVERY, SILENCE, mib};
use crate::api::proto::{CancelNotificationRequest, SetOptInRequest};
use crate::commands::bench::load::{self, Latencies};
use crate::commands::bench::people;
use crate::commands::bench::world::APP;

/// Idle events, and comments during a broadcast at most.
const EVENTS: u32 = 300;
/// Between two of them.
const GAP: Duration = Duration::from_millis(10);
/// People who say no while a broadcast runs.
const NOES: u32 = 200;

fn ms(us: u64) -> String {
    format!("{}.{:01} ms", us / 1000, us % 1000 / 100)
}

fn show(latencies: &Latencies) -> String {
    let [p50, p99] = [500, 990].map(|per_mille| ms(latencies.at(per_mille)));
    format!("p50 {p50}, p99 {p99}, most {} ({} calls)", ms(latencies.max()), latencies.len())
}

impl Bench {
    /// One caller, nothing else to do.
    pub(super) async fn latency(&mut self) -> anyhow::Result<()> {
        let fsync = fsyncs(&self.world.dir, &self.world.runtime)?;
        self.report.fact("fsync of 4 KiB in the database's directory", show(&fsync), "");
        let runtime = self.world.runtime.clone();
        self.world.sandbox.clear().await?;
        let (mut answers, mut answered_at) = (Vec::new(), HashMap::new());
        for number in 0..EVENTS {
            let key = self.key("idle");
            let event = load::event(&runtime, &people::name(number), key, self.world.plan.payload);
            let began = runtime.instant();
            self.client.notify_event(event).await?;
            answers.push(load::micros(runtime.instant() - began));
            answered_at.insert(people::token(number), runtime.now_us());
            runtime.sleep(GAP).await;
        }
        self.until_sent(u64::from(EVENTS)).await?;
        self.report.fact(
            "accept latency, 1 caller, idle",
            show(&Latencies::new(answers)),
            "goal: fsync + round trip + 0.3 ms (p50)",
        );
        let mut waits = Vec::new();
        for push in self.world.sandbox.record().await? {
            let at = answered_at.get(&push.token).context("a push to somebody else")?;
            waits.push(u64::try_from(push.at_us - at).unwrap_or(0));
        }
        self.report.fact("OK → the provider has the push, idle", show(&Latencies::new(waits)), "goal 5 ms p99");
        let stats = self.world.sandbox.stats().await?;
        self.check(&stats, u64::from(EVENTS))
    }

    /// Comments for single people while a broadcast goes out.
    pub(super) async fn comment(&mut self) -> anyhow::Result<()> {
        let runtime = self.world.runtime.clone();
        self.world.sandbox.clear().await?;
        let idle = self.comments(EVENTS, u64::MAX).await?;
        self.until_sent(u64::from(idle)).await?;
        let ages = self.world.sandbox.stats().await?.tally.ages;
        self.report.fact(
            "a comment, idle: call → provider",
            format!("p50 {}, p99 {}", ms(ages.p50_us), ms(ages.p99_us)),
            "",
        );
        self.world.sandbox.clear().await?;
        let recorded = self.recorded().await?;
        let key = self.key("fan-out");
        let event = load::broadcast(&runtime, key, self.world.plan.payload, false);
        let mark = self.mark()?;
        let began = runtime.instant();
        self.client.notify_event(event).await?;
        let accepted = load::micros(runtime.instant() - began);
        self.report.fact("NotifyEvent to the whole topic: call → OK", ms(accepted), "goal: a small event's time");
        let comments = self.comments(100 * EVENTS, self.reached).await?;
        let expected = self.reached + u64::from(comments);
        let stats = self.until_sent(expected).await?;
        self.until_recorded(recorded + expected).await?;
        let busy = stats.tally.ages;
        self.report.fact(
            "a comment during a broadcast: call → provider",
            format!("p50 {}, p99 {} ({comments} comments)", ms(busy.p50_us), ms(busy.p99_us)),
            &format!("goal p99 ≤ 2 × idle + 20 ms = {}", ms(2 * ages.p99_us + 20_000)),
        );
        self.report.fact("memory (RssAnon) during a broadcast", mib(mark.peak.most_kib()), "must 120, goal 80 MiB");
        self.check(&stats, expected)
    }

    /// Until `most` were called, or the providers have `until` pushes.
    async fn comments(&mut self, most: u32, until: u64) -> anyhow::Result<u32> {
        let runtime = self.world.runtime.clone();
        for number in 0..most {
            let key = self.key("comment");
            let name = people::name(number % people::WATCHED);
            let event = load::event(&runtime, &name, key, self.world.plan.payload);
            self.client.notify_event(event).await?;
            if number % 16 == 15 && self.world.sandbox.stats().await?.tally.distinct >= until {
                return Ok(number + 1);
            }
            runtime.sleep(GAP).await;
        }
        Ok(most)
    }

    /// People say no while a broadcast goes out; then it is cancelled. Both must hold at once.
    pub(super) async fn no(&mut self) -> anyhow::Result<()> {
        let runtime = self.world.runtime.clone();
        self.world.sandbox.clear().await?;
        let key = self.key("no");
        let event = load::broadcast(&runtime, key, self.world.plan.payload, false);
        let id = self.client.notify_event(event).await?.into_inner().notification_id;
        runtime.sleep(Duration::from_millis(200)).await;
        let mut said_at = HashMap::new();
        for number in 0..NOES {
            self.choose(number, false).await?;
            said_at.insert(people::token(number), runtime.now_us());
        }
        let open = self.notification(&id).await?.counts.map_or(0, |counts| counts.open());
        let reached = self.world.sandbox.stats().await?.tally.distinct;
        let request = CancelNotificationRequest { app_id: APP.to_owned(), notification_id: id };
        self.client.cancel_notification(request).await?;
        let cancelled_at = runtime.now_us();
        // Nothing comes after a second; that is what is claimed.
        runtime.sleep(Duration::from_secs(2)).await;
        let last = self.world.sandbox.stats().await?.tally.last_us.unwrap_or(0);
        let (mut worst, mut late, mut before) = (0, 0, 0);
        for push in self.world.sandbox.record().await? {
            match said_at.get(&push.token) {
                Some(at) if push.at_us > *at => {
                    late += 1;
                    worst = worst.max(push.at_us - at);
                }
                Some(_) => before += 1,
                None => {}
            }
        }
        self.report.fact(
            &format!("\"no\" → the last push that should not have gone ({NOES} people, {open} open deliveries)"),
            format!("{} ({late} came after their no, {before} before)", ms(u64::try_from(worst).unwrap_or(0))),
            "must 1 s, goal 0.3 s",
        );
        self.report.fact(
            &format!("cancel → the last push ({reached} of {} had gone)", self.reached),
            ms(u64::try_from(last - cancelled_at).unwrap_or(0)),
            "must 1 s",
        );
        for number in 0..NOES {
            self.choose(number, true).await?;
        }
        if worst > 1_000_000 || last - cancelled_at > 1_000_000 {
            bail!("a \"no\" did not hold within a second");
        }
        self.until_quiet().await
    }

    async fn choose(&mut self, number: u32, opted_in: bool) -> anyhow::Result<()> {
        let request = SetOptInRequest {
            app_id: APP.to_owned(),
            user_id: people::name(number),
            opted_in: Some(opted_in),
            ..SetOptInRequest::default()
        };
        self.client.set_opt_in(request).await?;
        Ok(())
    }

    /// A provider that does not answer, a broadcast that piles up, SIGKILL, a start.
    pub(super) async fn restart(&mut self) -> anyhow::Result<()> {
        let runtime = self.world.runtime.clone();
        self.world.sandbox.clear().await?;
        for target in ["apns", "fcm"] {
            let fault = json!({ "target": target, "times": u32::MAX, "action": { "type": "stall" } });
            self.world.sandbox.add_fault(&fault).await?;
        }
        let key = self.key("restart");
        let event = load::broadcast(&runtime, key, self.world.plan.payload, false);
        let id = self.client.notify_event(event).await?.into_inner().notification_id;
        let deadline = runtime.instant() + self.world.plan.patience;
        // Gauges of open work are refreshed every ten seconds; a cheap look at what was planned is not.
        let mut open = 0;
        let planned = loop {
            runtime.sleep(Duration::from_millis(250)).await;
            let counts = self.notification(&id).await?.counts.context("a notification has counts")?;
            if counts.open() >= self.reached || runtime.instant() > deadline {
                break counts.open();
            }
            if counts.open() == open && open > 0 && open < self.reached {
                // The limit of open targets.
                break open;
            }
            open = counts.open();
        };
        self.report.fact(
            &format!("memory (RssAnon), {planned} open deliveries"),
            mib(self.world.server.rss_anon_kib()),
            "must 150, goal 100 MiB",
        );
        self.world.kill_server()?;
        self.world.sandbox.clear_faults().await?;
        self.world.sandbox.clear().await?;
        let started = runtime.now_us();
        self.world.start_server()?;
        self.client = self.world.client().await?;
        let answering = runtime.now_us() - started;
        let deadline = runtime.instant() + SILENCE;
        let first = loop {
            if let Some(first) = self.world.sandbox.stats().await?.tally.first_us {
                break first;
            }
            if runtime.instant() > deadline {
                bail!("no push after the start");
            }
            runtime.sleep(LOOK_EVERY).await;
        };
        self.report.fact(
            &format!("start after SIGKILL with {planned} open deliveries → first push"),
            format!(
                "{} (answers gRPC after {})",
                ms(u64::try_from(first - started).unwrap_or(0)),
                ms(u64::try_from(answering).unwrap_or(0))
            ),
            "goal 1 s",
        );
        let stats = self.until_sent(self.reached).await?;
        self.check(&stats, self.reached)?;
        self.until_recorded(self.reached).await
    }

    /// A broadcast in which one token of twenty is dead.
    pub(super) async fn failing(&mut self) -> anyhow::Result<()> {
        let reference = self.reference(u32::try_from(self.reached)?).await?;
        let faults = [
            json!({ "target": "apns", "times": u32::MAX, "probability": 0.05, "seed": self.salt,
                "action": { "type": "status", "status": 410, "reason": "Unregistered",
                    // Later than any repeated registration could have gone unwritten.
                    "timestamp": self.world.runtime.now().0 + 2 * 3_600_000 } }),
            json!({ "target": "fcm", "times": u32::MAX, "probability": 0.05, "seed": self.salt ^ 1,
                "action": { "type": "status", "status": 404, "reason": "UNREGISTERED" } }),
        ];
        for fault in &faults {
            self.world.sandbox.add_fault(fault).await?;
        }
        self.reached_sum = None;
        let mut sample = self.broadcast().await?;
        let refused = self.world.sandbox.stats().await?.tally.refused;
        self.world.sandbox.clear_faults().await?;
        self.reached -= refused;
        sample.reference_us = Some(reference);
        self.report.sample("broadcast, 5 % dead tokens", None, sample);
        Ok(())
    }

    /// Until the providers hear nothing for a while.
    async fn until_quiet(&mut self) -> anyhow::Result<()> {
        let runtime = self.world.runtime.clone();
        let mut last = None;
        for _ in 0..120 {
            let received = self.world.sandbox.stats().await?.received;
            if last == Some(received) {
                return Ok(());
            }
            last = Some(received);
            runtime.sleep(Duration::from_secs(1)).await;
        }
        bail!("pushes do not end");
    }
}

/// What a commit costs here: 4 KiB written and forced to the disk, again and again.
fn fsyncs(dir: &std::path::Path, runtime: &crate::runtime::Runtime) -> anyhow::Result<Latencies> {
    use std::io::Write as _;
    let path = dir.join("fsync.tmp");
    let mut file = std::fs::File::create(&path)?;
    let mut took = Vec::new();
    for _ in 0..EVENTS {
        let began = runtime.instant();
        file.write_all(&[7; 4096])?;
        file.sync_data()?;
        took.push(load::micros(runtime.instant() - began));
    }
    drop(file);
    std::fs::remove_file(&path)?;
    Ok(Latencies::new(took))
}
