//! `make soak MINUTES=…`: a steady mixed load on the real binary, with one push in a hundred going wrong, while its memory,
//! files, threads, tasks, log and latency are sampled. After a warm-up nothing may rise: the slope of each series is tested for
//! being above zero.

use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nudged::api::proto::push_service_client::PushServiceClient;
use nudged::api::proto::{NotifyEventRequest, NotifyEventsRequest, SubscribeRequest, WatchDeliveriesRequest, device};
use nudged::sandbox::{Action, Fault};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use tonic::transport::Channel;

use super::server::{APP, World, event, opt_in, register};

const PEOPLE: u64 = 500;
const CALLERS: u64 = 6;
/// Between two calls of a caller: a load that a small machine carries for days.
const PAUSE: Duration = Duration::from_millis(10);
/// A broadcast to everyone, so often.
const BROADCAST_EVERY: Duration = Duration::from_secs(5);
/// Shorter runs end without a verdict on memory: it settles for minutes.
const VERDICT_AFTER: Duration = Duration::from_secs(300);
/// The share of a run that is warm-up.
const WARM_UP: f64 = 0.4;

struct Parameters {
    run: Duration,
    every: Duration,
    seed: u64,
    leak: Option<Leak>,
}

/// What leaks on purpose, another one with each sample.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Leak {
    /// Connections that are opened and kept: files, and their tasks.
    Connections,
    /// Requests on one connection that never end: tasks alone. A server takes 64 of these.
    Requests,
}

impl FromStr for Leak {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "true" | "connections" => Ok(Self::Connections),
            "requests" => Ok(Self::Requests),
            _ => Err(format!("NUDGED_SOAK_LEAK is connections or requests, not {text:?}")),
        }
    }
}

/// `NUDGED_SOAK_…`.
fn parameter<T: FromStr<Err: std::fmt::Debug>>(name: &str) -> Option<T> {
    let text = std::env::var(format!("NUDGED_SOAK_{name}")).ok()?;
    (!text.is_empty()).then(|| text.parse().expect(name))
}

impl Parameters {
    fn read() -> Self {
        let run = Duration::from_secs(parameter("SECS").unwrap_or(20));
        Self {
            run,
            every: (run / 60).clamp(Duration::from_millis(500), Duration::from_secs(10)),
            seed: parameter("SEED").unwrap_or_else(rand::random),
            leak: parameter("LEAK"),
        }
    }
}

/// One look at the process.
#[derive(Clone, Copy, Debug)]
struct Sample {
    at: f64,
    /// The process' own: anonymous and shared pages.
    memory_kib: f64,
    /// Pages of files in its memory: the program, and the database, which the writer maps and which keeps every result.
    mapped_kib: f64,
    database_kib: f64,
    files: f64,
    threads: f64,
    /// Of all its runtimes.
    tasks: f64,
    wal_kib: f64,
    p99_ms: f64,
}

#[derive(Default)]
struct Calls {
    made: AtomicU64,
    /// Of the calls since the last sample, in microseconds.
    took: Mutex<Vec<u64>>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_grows_under_a_steady_load() {
    let Parameters { run, every, seed, leak } = Parameters::read();
    println!("soak: {run:.0?}, a sample every {every:.1?}, seed {seed}");
    let world = World::recording(10_000).await;
    // A small page cache is full after the warm-up; a large one grows for an hour.
    let server = world.start_with(&[("NUDGED_DATABASE__SQLITE__CACHE_MIB", "2".to_owned())]);
    let client = world.client().await;
    people(&client).await;
    let fault = |action, chance: f64| Fault::new(action).times(u32::MAX).probability(chance, seed);
    world.sandbox.add_fault(fault(Action::Reset { code: 8 }, 0.004)).unwrap();
    world.sandbox.add_fault(fault(Action::RefuseStream {}, 0.004)).unwrap();
    world.sandbox.add_fault(fault(Action::Garbage { status: 400 }, 0.002)).unwrap();

    let (stop, calls) = (Arc::new(AtomicBool::new(false)), Arc::new(Calls::default()));
    let mut tasks: Vec<_> = (0..CALLERS)
        .map(|number| {
            let random = SmallRng::seed_from_u64(seed ^ number);
            tokio::spawn(call(client.clone(), number, random, Arc::clone(&calls), Arc::clone(&stop)))
        })
        .collect();
    tasks.push(tokio::spawn(broadcast(client.clone(), Arc::clone(&stop))));
    tasks.push(tokio::spawn(watch(client.clone(), Arc::clone(&stop))));

    let (began, mut samples) = (Instant::now(), Vec::new());
    let (mut connections, mut requests) = (Vec::new(), Vec::new());
    while began.elapsed() < run {
        tokio::time::sleep(every).await;
        match leak {
            None => {}
            Some(Leak::Connections) => {
                let address = world.address.trim_start_matches("http://");
                connections.push(tokio::net::TcpStream::connect(address).await.unwrap());
            }
            Some(Leak::Requests) => {
                let mut client = client.clone();
                let never_ends = tokio_stream::pending::<NotifyEventsRequest>();
                requests.push(tokio::spawn(async move {
                    let answers = client.notify_events(never_ends).await;
                    std::future::pending::<()>().await;
                    drop(answers);
                }));
            }
        }
        let sample = sample(&world, server.id(), &calls, began).await;
        let Sample { at, memory_kib, mapped_kib, database_kib, files, threads, tasks, wal_kib, p99_ms } = sample;
        println!(
            "{at:6.0} s  memory {memory_kib:7.0} KiB  mapped {mapped_kib:7.0} KiB of database {database_kib:7.0} KiB  {files:3.0} files  {threads:3.0} threads  {tasks:3.0} tasks  WAL {wal_kib:6.0} KiB  p99 {p99_ms:7.1} ms"
        );
        samples.push(sample);
    }
    stop.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.unwrap();
    }
    drop(connections);
    for request in requests {
        request.abort();
    }
    let (made, pushes) = (calls.made.load(Ordering::Relaxed), world.sandbox.totals().received);
    assert!(made > 100 && pushes > 100, "the load was real: {made} calls, {pushes} pushes");
    let rising = verdict(&samples, run);
    println!("ledger:{} seconds, {made} calls, {pushes} pushes", run.as_secs());
    assert!(rising.is_empty(), "seed {seed}: rising: {}", rising.join(", "));
    assert!(server.terminate().success());
}

/// One figure of a sample.
type Of = fn(&Sample) -> f64;

/// When a series rises.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Rule {
    /// By more than this share of itself in the whole run, beyond its noise; it settles for minutes, so a short run says
    /// nothing.
    ByShare(f64),
    /// What comes one at a time: by a tenth of itself and by this many, in a short run by [`LEAST_IN_SHORT`], and in both
    /// halves of the time. What is made late once (a thread of the runtime's pool, a connection, a reader's files) is a step:
    /// it fits a line that rises by half as much again, but only in one half.
    ByCount(f64),
}

/// A run of seconds sees every late start on a machine that others keep busy: only a leak of one in a second or so counts.
const LEAST_IN_SHORT: f64 = 8.0;
/// Of the whole rise, that each half must have: of a leak it is half, less what noise takes away.
const SHARE_OF_A_HALF: f64 = 0.1;

/// Prints every trend; the names of those that rise.
fn verdict(samples: &[Sample], run: Duration) -> Vec<String> {
    let settled: Vec<Sample> =
        samples.iter().copied().filter(|sample| sample.at > WARM_UP * run.as_secs_f64()).collect();
    let series: [(&str, Of, Rule); 7] = [
        ("memory in KiB", |sample| sample.memory_kib, Rule::ByShare(0.05)),
        ("mapped beyond the database in KiB", |sample| sample.mapped_kib - sample.database_kib, Rule::ByShare(0.05)),
        ("files", |sample| sample.files, Rule::ByCount(4.0)),
        ("threads", |sample| sample.threads, Rule::ByCount(4.0)),
        ("tasks", |sample| sample.tasks, Rule::ByCount(4.0)),
        ("WAL in KiB", |sample| sample.wal_kib, Rule::ByShare(0.2)),
        ("p99 in ms", |sample| sample.p99_ms, Rule::ByShare(0.5)),
    ];
    let is_short = run < VERDICT_AFTER;
    let mut rising = Vec::new();
    for (name, of, rule) in series {
        let points: Vec<(f64, f64)> = settled.iter().map(|sample| (sample.at, of(sample))).collect();
        let trend = Trend::of(&points);
        let (rises, judged) = match rule {
            Rule::ByShare(share) => (trend.low > 0.0 && rise(&points) > share * trend.mean, !is_short),
            Rule::ByCount(least) => {
                let least = if is_short { LEAST_IN_SHORT } else { least };
                let (first, second) = points.split_at(points.len() / 2);
                let of_each = SHARE_OF_A_HALF * rise(&points);
                let goes_on = rise(first) >= of_each && rise(second) >= of_each;
                (trend.low > 0.0 && rise(&points) > (0.1 * trend.mean).max(least) && goes_on, true)
            }
        };
        println!(
            "{name}: mean {:.1}, slope {:+.2} an hour (95 %: {:+.2} to {:+.2}){}",
            trend.mean,
            trend.slope * 3600.0,
            trend.low * 3600.0,
            trend.high * 3600.0,
            if !judged {
                ": too short for a verdict"
            } else if rises {
                ": RISES"
            } else {
                ""
            },
        );
        if judged && rises {
            rising.push(name.to_owned());
        }
    }
    rising
}

/// By how much the line through a series rises over its length.
fn rise(points: &[(f64, f64)]) -> f64 {
    let length = points.last().map_or(0.0, |last| last.0) - points.first().map_or(0.0, |first| first.0);
    Trend::of(points).slope * length
}

/// A straight line through a series.
#[derive(Clone, Copy, Debug)]
struct Trend {
    mean: f64,
    /// Per second, with its 95 % interval.
    slope: f64,
    low: f64,
    high: f64,
}

impl Trend {
    /// Least squares; neighbouring samples resemble each other, so the interval is widened by their correlation.
    #[expect(clippy::cast_precision_loss, reason = "a few thousand samples")]
    fn of(points: &[(f64, f64)]) -> Self {
        let count = points.len() as f64;
        let mean_of = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count.max(1.0);
        let (at, mean) = (mean_of(|point| point.0), mean_of(|point| point.1));
        let spread: f64 = points.iter().map(|point| (point.0 - at).powi(2)).sum();
        if points.len() < 4 || spread == 0.0 {
            return Self { mean, slope: 0.0, low: f64::NEG_INFINITY, high: f64::INFINITY };
        }
        let slope = points.iter().map(|point| (point.0 - at) * (point.1 - mean)).sum::<f64>() / spread;
        let left: Vec<f64> = points.iter().map(|point| point.1 - mean - slope * (point.0 - at)).collect();
        let square: f64 = left.iter().map(|rest| rest * rest).sum();
        let neighbours: f64 = left.windows(2).map(|pair| pair[0] * pair[1]).sum();
        let alike = if square > 0.0 { (neighbours / square).clamp(0.0, 0.9) } else { 0.0 };
        let error = (square / (count - 2.0) / spread * (1.0 + alike) / (1.0 - alike)).sqrt();
        Self { mean, slope, low: slope - 2.0 * error, high: slope + 2.0 * error }
    }
}

async fn sample(world: &World, pid: u32, calls: &Calls, began: Instant) -> Sample {
    let page = reqwest::get(format!("http://{}/metrics", world.admin)).await.unwrap().text().await.unwrap();
    let of_runtimes = page.lines().filter_map(|line| line.strip_prefix("nudged_tasks{")?.split_once("} "));
    let tasks: f64 = of_runtimes.map(|(_, value)| value.parse::<f64>().unwrap()).sum();
    assert!(tasks > 0.0, "tasks are counted");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| -> f64 {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name}"));
        line.trim_start_matches(':').split_whitespace().next().unwrap().parse().unwrap()
    };
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let size = |path| std::fs::metadata(path).map_or(0, |metadata| metadata.len() / 1024);
    let mut took = std::mem::take(&mut *calls.took.lock().unwrap());
    took.sort_unstable();
    let p99 = took.get(took.len() * 99 / 100).copied().unwrap_or(0);
    #[expect(clippy::cast_precision_loss, reason = "small figures")]
    Sample {
        at: began.elapsed().as_secs_f64(),
        memory_kib: field("RssAnon") + field("RssShmem"),
        mapped_kib: field("RssFile"),
        database_kib: size(world.database()) as f64,
        files: files as f64,
        threads: field("Threads"),
        tasks,
        wal_kib: size(world.database().with_file_name("nudged.db-wal")) as f64,
        p99_ms: p99 as f64 / 1000.0,
    }
}

fn name(person: u64) -> String {
    format!("person-{person}")
}

async fn people(client: &PushServiceClient<Channel>) {
    let mut client = client.clone();
    for person in 0..PEOPLE {
        register(&mut client, &name(person), device::Platform::Apns, &format!("{person:064x}")).await;
        register(&mut client, &name(person), device::Platform::Fcm, &format!("fcm-{person}:APA91b")).await;
        opt_in(&mut client, &name(person), true).await;
    }
}

/// Mostly events, some of each other call that writes.
async fn call(
    mut client: PushServiceClient<Channel>,
    caller: u64,
    mut random: SmallRng,
    calls: Arc<Calls>,
    stop: Arc<AtomicBool>,
) {
    let mut number = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let person = random.random_range(0..PEOPLE);
        let begun = Instant::now();
        match random.random_range(0..10) {
            0 => {
                let token = format!("{:064x}", person + PEOPLE * random.random_range(1..3));
                register(&mut client, &name(person), device::Platform::Apns, &token).await;
            }
            1 => opt_in(&mut client, &name(person), random.random_ratio(9, 10)).await,
            2 => {
                let topic = format!("post:{}", random.random_range(0..100));
                let request = SubscribeRequest {
                    app_id: APP.into(),
                    user_id: name(person),
                    topic,
                    ..SubscribeRequest::default()
                };
                client.subscribe(request).await.unwrap();
            }
            _ => {
                client.notify_event(event(&format!("event-{caller}-{number}"), &[&name(person)])).await.unwrap();
                number += 1;
            }
        }
        calls.made.fetch_add(1, Ordering::Relaxed);
        calls.took.lock().unwrap().push(u64::try_from(begun.elapsed().as_micros()).unwrap());
        tokio::time::sleep(PAUSE).await;
    }
}

async fn broadcast(mut client: PushServiceClient<Channel>, stop: Arc<AtomicBool>) {
    let mut at = Instant::now();
    for number in 0.. {
        while at.elapsed() < BROADCAST_EVERY {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        at = Instant::now();
        let everyone =
            NotifyEventRequest { user_ids: Vec::new(), everyone: true, ..event(&format!("all-{number}"), &[]) };
        client.notify_event(everyone).await.unwrap();
    }
}

/// Somebody who follows everything.
async fn watch(mut client: PushServiceClient<Channel>, stop: Arc<AtomicBool>) {
    let request = WatchDeliveriesRequest { app_id: APP.into(), ..WatchDeliveriesRequest::default() };
    let mut results = client.watch_deliveries(request).await.unwrap().into_inner();
    while !stop.load(Ordering::Relaxed) {
        tokio::select! {
            result = results.message() => assert!(result.unwrap().is_some(), "a watcher is served"),
            () = tokio::time::sleep(Duration::from_millis(50)) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(of: impl Fn(u32) -> f64) -> Vec<(f64, f64)> {
        (0..100).map(|at| (f64::from(at), of(at))).collect()
    }

    #[test]
    fn a_leak_is_seen_in_noise_and_noise_is_none() {
        let noise = |at: u32| f64::from((at.wrapping_mul(2_654_435_761) >> 16) % 100);
        let flat = Trend::of(&series(|at| 10_000.0 + noise(at)));
        assert!(flat.low < 0.0 && flat.high > 0.0, "{flat:?}");
        let leak = Trend::of(&series(|at| 10_000.0 + noise(at) + 5.0 * f64::from(at)));
        assert!(leak.low > 0.0 && (4.0..6.0).contains(&leak.slope), "{leak:?}");
    }

    /// What is said of a run with this many threads at each sample.
    fn said(secs: u64, threads: impl Fn(u32) -> f64) -> Vec<String> {
        let run = Duration::from_secs(secs);
        let samples: Vec<Sample> = (0..60)
            .map(|at| Sample {
                at: f64::from(at) / 60.0 * run.as_secs_f64(),
                memory_kib: 50_000.0,
                mapped_kib: 40_000.0,
                database_kib: 1_000.0,
                files: 35.0,
                threads: threads(at),
                tasks: 60.0,
                wal_kib: 10_000.0,
                p99_ms: 10.0,
            })
            .collect();
        verdict(&samples, run)
    }

    #[test]
    fn what_starts_late_is_no_leak() {
        for secs in [20, 600] {
            for first in 0..60 {
                for late in [1, 2, 4] {
                    let step = |at| 11.0 + f64::from(late * u32::from(at >= first));
                    assert!(said(secs, step).is_empty(), "{late} threads at sample {first} of {secs} s");
                }
                let two = |at| 11.0 + f64::from(u32::from(at >= first) + u32::from(at >= first + 8));
                assert!(said(secs, two).is_empty(), "two threads from sample {first} of {secs} s on");
            }
        }
        // A pool that a busy machine made, and a while later lets go.
        for first in 20..60 {
            let burst = |at| if (first..first + 20).contains(&at) { 17.0 } else { 11.0 };
            assert!(said(20, burst).is_empty(), "a burst at {first}");
        }
    }

    #[test]
    fn a_thread_at_every_sample_is_a_leak_and_one_at_every_fifth_in_a_long_run() {
        assert_eq!(said(20, |at| 11.0 + f64::from(at)), ["threads"]);
        assert_eq!(said(600, |at| 11.0 + f64::from(at / 5)), ["threads"]);
        // As tasks come and go under the load.
        for seed in 0..100_u32 {
            let noise = |at: u32| f64::from(((at + 97 * seed).wrapping_mul(2_654_435_761) >> 16) % 8);
            assert_eq!(said(20, |at| 11.0 + f64::from(at) / 1.5 + noise(at)), ["threads"], "seed {seed}");
            assert!(said(20, |at| 11.0 + noise(at)).is_empty(), "seed {seed}");
        }
    }
}
