//! The second layer: the whole service, gRPC and all, with two to four replicas on one shared store, in one simulated time.
//! Callers, providers and the checker are those of the first; what differs is what breaks.

pub mod callers;
mod replica;
mod run;
mod story;
pub mod wire;

use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use run::Outcome;
use story::Story;

use crate::facts::Fact;
use crate::number;

/// Histories of an ordinary run of the tests.
const HISTORIES: u64 = 200;

/// What a red history has to say.
fn report(seed: u64, outcome: &Outcome) -> String {
    let mut text = format!("seed {seed} is red: make sim-cluster HISTORIES=1 SEED_FROM={seed}\n");
    for violation in &outcome.violations {
        let _ = writeln!(text, "  {}: {}", violation.rule, violation.what);
    }
    if number("NUDGED_SIM_CLUSTER_SHOW").is_some() {
        for fact in &outcome.facts {
            let _ = writeln!(text, "  {fact:?}");
        }
    }
    text
}

/// What was looked at.
#[derive(Default)]
struct Sum {
    calls: AtomicU64,
    pushes: AtomicU64,
    disturbances: AtomicU64,
    red: Mutex<Vec<u64>>,
}

impl Sum {
    fn add(&self, seed: u64) {
        // A panic anywhere in it is a finding, and not the end of the run.
        let outcome = catch_unwind(AssertUnwindSafe(|| run::run(&Story::drawn(seed), false)));
        let Ok(outcome) = outcome else {
            println!("seed {seed} panics: make sim-cluster HISTORIES=1 SEED_FROM={seed}");
            self.red.lock().unwrap().push(seed);
            return;
        };
        for fact in &outcome.facts {
            let counted = match fact {
                Fact::Asked { .. } => &self.calls,
                Fact::Pushed(_) => &self.pushes,
                Fact::Apart { .. } | Fact::Crashed { .. } | Fact::Restarted { .. } => &self.disturbances,
                _ => continue,
            };
            counted.fetch_add(1, Ordering::Relaxed);
        }
        if !outcome.violations.is_empty() {
            println!("{}", report(seed, &outcome));
            self.red.lock().unwrap().push(seed);
        }
    }
}

/// As many as `NUDGED_SIM_CLUSTER_HISTORIES` says, from the seed `NUDGED_SIM_CLUSTER_FROM` on.
#[test]
fn histories_hold() {
    let from = number("NUDGED_SIM_CLUSTER_FROM").unwrap_or(1);
    let count = number("NUDGED_SIM_CLUSTER_HISTORIES").unwrap_or(HISTORIES);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (next, sum) = (AtomicU64::new(from), Sum::default());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= from + count {
                        break;
                    }
                    sum.add(seed);
                }
            });
        }
    });
    let Sum { calls, pushes, disturbances, red } = sum;
    let (calls, pushes, disturbances) = (calls.into_inner(), pushes.into_inner(), disturbances.into_inner());
    let mut red = red.into_inner().unwrap();
    red.sort_unstable();
    println!(
        "{count} histories of a cluster from seed {from} on: {calls} calls, {pushes} pushes, {disturbances} crashes, restarts \
         and cuts; red: {red:?}"
    );
    assert!(red.is_empty(), "red seeds: {red:?}");
}

#[test]
fn one_seed_gives_one_history() {
    for seed in 1..=5 {
        let story = Story::drawn(seed);
        assert_eq!(run::run(&story, false).fingerprint(), run::run(&story, false).fingerprint(), "seed {seed}");
    }
}

/// The canary: a replica that takes its feed of "no"s for complete whatever it knows must be found out, every time.
#[test]
fn a_feed_that_lies_is_found_out() {
    let story = Story::canary();
    let honest = run::run(&story, false);
    assert!(honest.violations.is_empty(), "{}", report(story.seed, &honest));
    let lying = run::run(&story, true);
    assert!(
        lying.violations.iter().any(|violation| violation.rule == "no"),
        "nobody noticed: {}",
        report(story.seed, &lying)
    );
}
