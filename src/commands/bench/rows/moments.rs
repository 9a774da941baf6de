//! Single moments: how soon, how much memory, how fast after a crash.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::json;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use super::{Bench, LOOK_EVERY, SILENCE, check_once, mib};
use crate::api::proto::{CancelNotificationRequest, SetOptInRequest};
use crate::commands::bench::load::{self, Latencies};
use crate::commands::bench::people::{self, Topic};
use crate::commands::bench::report::Budget;
use crate::commands::bench::world::APP;

/// A fan-out that grew for so long by nothing is at the limit of open targets. It waits a second for providers that answer
/// nothing, page by page, until they are known to.
const STANDSTILL: Duration = Duration::from_secs(5);
/// Idle events, and comments during a broadcast at most.
const EVENTS: u32 = 300;
/// Between two of them.
const GAP: Duration = Duration::from_millis(10);
/// People who say no while a broadcast runs.
const NOES: u32 = 200;

#[expect(clippy::cast_precision_loss, reason = "microseconds of minutes fit 53 bits")]
fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}

fn ms_between(from_us: i64, to_us: i64) -> f64 {
    ms(u64::try_from(to_us - from_us).unwrap_or(0))
}

fn parts(latencies: &Latencies) -> [(&'static str, f64); 3] {
    [("p50", ms(latencies.at(500))), ("p99", ms(latencies.at(990))), ("most", ms(latencies.max()))]
}

impl Bench {
    /// One caller, nothing else to do.
    pub(super) async fn latency(&mut self) -> anyhow::Result<()> {
        let fsync = fsyncs(&self.world.dir, &self.world.runtime)?;
        self.report.fact("fsync of 4 KiB in the database's directory", "ms", &parts(&fsync), "", Budget::default());
        let runtime = self.world.runtime.clone();
        let mut health = HealthClient::new(self.world.channel().await?);
        let mut trips = Vec::new();
        for _ in 0..EVENTS {
            let began = runtime.instant();
            health.check(HealthCheckRequest::default()).await?;
            trips.push(load::micros(runtime.instant() - began));
            runtime.sleep(GAP).await;
        }
        let trips = Latencies::new(trips);
        self.report.fact("round trip of an empty call, 1 caller, idle", "ms", &parts(&trips), "", Budget::default());
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
        let goal = ms(fsync.at(500)) + ms(trips.at(500)) + 0.3;
        let answers = Latencies::new(answers);
        self.report.fact("accept latency, 1 caller, idle", "ms", &parts(&answers), "p50", Budget::goal(goal));
        let mut waits = Vec::new();
        for push in self.world.sandbox.record().await? {
            let at = answered_at.get(&push.token).context("a push to somebody else")?;
            waits.push(u64::try_from(push.at_us - at).unwrap_or(0));
        }
        let waits = Latencies::new(waits);
        self.report.fact("OK → the provider has the push, idle", "ms", &parts(&waits), "p99", Budget::goal(5.0));
        let stats = self.world.sandbox.stats().await?;
        check_once(&stats, u64::from(EVENTS))
    }

    /// Comments for single people while a broadcast goes out.
    pub(super) async fn comment(&mut self) -> anyhow::Result<()> {
        let runtime = self.world.runtime.clone();
        self.world.sandbox.clear().await?;
        let (idle, calls) = self.comments(EVENTS, u64::MAX).await?;
        self.until_sent(u64::from(idle)).await?;
        let ages = self.world.sandbox.stats().await?.tally.ages;
        let shown = [("p50", ms(ages.p50_us)), ("p99", ms(ages.p99_us))];
        self.report.fact("a comment, idle: call → provider", "ms", &shown, "", Budget::default());
        self.world.sandbox.clear().await?;
        let recorded = self.recorded().await?;
        let key = self.key("fan-out");
        let event = load::broadcast(&runtime, Topic::All, key, self.world.plan.payload, false);
        let mark = self.mark()?;
        let began = runtime.instant();
        self.client.notify_event(event).await?;
        let accepted = load::micros(runtime.instant() - began);
        let small = ms(calls.at(990));
        let name = "NotifyEvent to the whole topic: call → OK (goal: the p99 of a small event's)";
        self.report.fact(name, "ms", &[("", ms(accepted))], "", Budget::goal(small));
        let (comments, _) = self.comments(100 * EVENTS, self.reached).await?;
        let expected = self.reached + u64::from(comments);
        let stats = self.until_sent(expected).await?;
        self.until_recorded(recorded + expected).await?;
        let busy = stats.tally.ages;
        let goal = 2.0 * ms(ages.p99_us) + 20.0;
        let shown = [
            ("p50", ms(busy.p50_us)),
            ("p99", ms(busy.p99_us)),
            ("most", ms(busy.max_us)),
            ("comments", f64::from(comments)),
        ];
        self.report.fact("a comment during a broadcast: call → provider", "ms", &shown, "p99", Budget::goal(goal));
        let peak = mib(mark.peak.most_kib());
        let budget = Budget::new(120.0, 80.0);
        self.report.fact("memory (RssAnon) during a broadcast", "MiB", &[("", peak)], "", budget);
        check_once(&stats, expected)
    }

    /// Until `most` were called, or the providers have `until` pushes. How many, and how long the calls took.
    async fn comments(&mut self, most: u32, until: u64) -> anyhow::Result<(u32, Latencies)> {
        let runtime = self.world.runtime.clone();
        let (mut called, mut took) = (0, Vec::new());
        while called < most {
            let key = self.key("comment");
            let name = people::name(called % people::WATCHED);
            let event = load::event(&runtime, &name, key, self.world.plan.payload);
            let began = runtime.instant();
            self.client.notify_event(event).await?;
            took.push(load::micros(runtime.instant() - began));
            called += 1;
            if called.is_multiple_of(16) && self.world.sandbox.stats().await?.tally.distinct >= until {
                break;
            }
            runtime.sleep(GAP).await;
        }
        Ok((called, Latencies::new(took)))
    }

    /// People say no while a broadcast goes out; then it is cancelled. Both must hold at once.
    pub(super) async fn no(&mut self) -> anyhow::Result<()> {
        let runtime = self.world.runtime.clone();
        self.world.sandbox.clear().await?;
        let key = self.key("no");
        let event = load::broadcast(&runtime, Topic::All, key, self.world.plan.payload, false);
        let id = self.client.notify_event(event).await?.into_inner().notification_id;
        runtime.sleep(Duration::from_millis(200)).await;
        let mut said_at = HashMap::new();
        for number in 0..NOES {
            self.choose(number, false).await?;
            said_at.insert(people::token(number), runtime.now_us());
        }
        let open = self.notification(&id).await?.counts.map_or(0, |counts| counts.open());
        let gone = self.world.sandbox.stats().await?.tally.distinct;
        let request = CancelNotificationRequest { app_id: APP.to_owned(), notification_id: id };
        self.client.cancel_notification(request).await?;
        let cancelled_at = runtime.now_us();
        // Nothing comes after a second; that is what is claimed.
        runtime.sleep(Duration::from_secs(2)).await;
        let last = self.world.sandbox.stats().await?.tally.last_us.unwrap_or(0);
        let (mut late, mut before) = (Vec::new(), 0);
        for push in self.world.sandbox.record().await? {
            match said_at.get(&push.token) {
                Some(at) if push.at_us > *at => late.push(u64::try_from(push.at_us - at).unwrap_or(0)),
                Some(_) => before += 1,
                None => {}
            }
        }
        let late = Latencies::new(late);
        let goal = match self.world.plan.store {
            crate::commands::bench::args::Store::Sqlite => Budget::new(1000.0, 300.0),
            crate::commands::bench::args::Store::Postgres => Budget::must(1000.0),
        };
        let shown = [
            ("most", ms(late.max())),
            ("p99", ms(late.at(990))),
            ("p50", ms(late.at(500))),
            ("came after their no", count(late.len() as u64)),
            ("before it", f64::from(before)),
            ("said no", f64::from(NOES)),
        ];
        let name = "\"no\" → the last push that should not have gone, a broadcast under way";
        self.report.fact(name, "ms", &shown, "most", goal);
        let after_cancel = ms_between(cancelled_at, last);
        let shown = [("", after_cancel), ("open then", count(open)), ("gone by then", count(gone))];
        self.report.fact("cancel → the last push", "ms", &shown, "", Budget::must(1000.0));
        for number in 0..NOES {
            self.choose(number, true).await?;
        }
        if late.max() > 1_000_000 || after_cancel > 1000.0 {
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

    /// All targets open, because the providers do not answer; then the server is killed and started.
    pub(super) async fn restart(&mut self) -> anyhow::Result<()> {
        let runtime = self.world.runtime.clone();
        self.world.sandbox.clear().await?;
        for target in ["apns", "fcm"] {
            let fault = json!({ "target": target, "times": u32::MAX, "action": { "type": "stall" } });
            self.world.sandbox.add_fault(&fault).await?;
        }
        let key = self.key("restart");
        let event = load::broadcast(&runtime, Topic::All, key, self.world.plan.payload, false);
        let id = self.client.notify_event(event).await?.into_inner().notification_id;
        let deadline = runtime.instant() + self.world.plan.patience;
        // Gauges of open work are refreshed every ten seconds; a cheap look at what was planned is not.
        let (mut open, mut changed_at) = (0, runtime.instant());
        let planned = loop {
            runtime.sleep(Duration::from_millis(250)).await;
            let counts = self.notification(&id).await?.counts.context("a notification has counts")?;
            if counts.open() >= self.reached || runtime.instant() > deadline {
                break counts.open();
            }
            if counts.open() != open || open == 0 {
                (open, changed_at) = (counts.open(), runtime.instant());
            } else if runtime.instant() - changed_at > STANDSTILL {
                // The limit of open targets.
                break open;
            }
        };
        let shown = [("", mib(self.world.rss_anon_kib())), ("open", count(planned))];
        self.report.fact("memory (RssAnon), all deliveries open", "MiB", &shown, "", Budget::new(150.0, 100.0));
        self.world.kill_servers()?;
        self.world.sandbox.clear_faults().await?;
        self.world.sandbox.clear().await?;
        let started = runtime.now_us();
        self.world.start_servers()?;
        self.client = self.world.client().await?;
        let answering = runtime.now_us();
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
        let shown = [("first push", ms_between(started, first)), ("answers gRPC", ms_between(started, answering))];
        let name = "start after SIGKILL with all deliveries open";
        self.report.fact(name, "ms", &shown, "first push", Budget::goal(1000.0));
        let stats = self.until_sent(self.reached).await?;
        check_once(&stats, self.reached)?;
        Self::check_people(&stats, self.reached_sum)?;
        self.until_recorded(self.reached).await
    }

    /// A broadcast in which one token of twenty is dead, between two in which none is. `sound`: the cost of the first, which was
    /// just before; it becomes that of the second.
    pub(super) async fn failing(&mut self, sound: &mut f64) -> anyhow::Result<()> {
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
        let after = self.broadcast().await?.cost();
        sample.reference_us = Some(f64::midpoint(std::mem::replace(sound, after), after));
        let name = "broadcast, 5 % dead tokens (reference: the same without)";
        self.report.sample(name, Budget::new(1.25, 1.1), sample);
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

#[expect(clippy::cast_precision_loss, reason = "counts of deliveries fit 53 bits")]
fn count(count: u64) -> f64 {
    count as f64
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
