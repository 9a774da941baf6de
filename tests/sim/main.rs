//! Simulated histories: the real engine, senders and store on a paused clock, against scripted providers, with one seed
//! that decides everything, and a checker that knows only the contract. `docs/reliability.md` says what is shown.
//!
//! `make sim` runs many, or one: `make sim SEED=7` prints it.
#![expect(clippy::unwrap_used, reason = "a test, whose set-up must work")]

mod app;
mod callers;
mod canary;
mod checker;
mod clock;
mod cluster;
mod credentials;
mod database;
mod facts;
mod faults;
mod history;
mod lies;
mod life;
mod minimise;
mod provider;
mod rules;
mod run;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use database::Place;
use history::History;
use nudged::runtime::Runtime;
use rules::Rule;
use run::Outcome;

/// As in the program.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Histories of an ordinary run of the tests; `make test` adds an optimised run of 20 000.
const HISTORIES: u64 = 1_000;
/// … and on files.
const ON_FILES: u64 = 100;
/// Green histories that the canary looks at before it counts as silent.
const CANARIES: u64 = 200;
/// Red ones that are told of in full.
const MAX_TOLD: usize = 5;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text:?}")))
}

fn place() -> Place {
    if number("NUDGED_SIM_FILES") == Some(1) { Place::File } else { Place::Memory }
}

/// A panic anywhere in it is a finding, and not the end of the run.
fn run(history: &History, place: Place) -> Outcome {
    catch_unwind(AssertUnwindSafe(|| run::run(history, place))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked");
        let violations = vec![checker::Violation { rule: "panic", what: text.to_owned() }];
        Outcome { facts: Vec::new(), violations }
    })
}

#[derive(Default)]
struct Campaign {
    done: AtomicU64,
    told: AtomicUsize,
    /// By rule, with the seeds.
    red: Mutex<BTreeMap<&'static str, Vec<u64>>>,
}

impl Campaign {
    /// Seeds `from..from + count` on all cores.
    fn run(&self, from: u64, count: u64, place: Place) {
        database::prepare();
        let next = AtomicU64::new(from);
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let cores = number("NUDGED_SIM_THREADS").and_then(|n| usize::try_from(n).ok()).unwrap_or(cores);
        std::thread::scope(|scope| {
            for _ in 0..cores.max(1) {
                scope.spawn(|| {
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed >= from + count || self.has_told_enough() {
                            break;
                        }
                        self.one(seed, place);
                        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
                        if done.is_multiple_of(10_000) {
                            println!("{done} of {count} histories");
                        }
                    }
                });
            }
        });
    }

    /// A run of the tests ends then; a campaign counts what is red.
    fn has_told_enough(&self) -> bool {
        number("NUDGED_SIM_HISTORIES").is_none() && self.told.load(Ordering::Relaxed) >= MAX_TOLD
    }

    fn one(&self, seed: u64, place: Place) {
        let outcome = run(&History::drawn(seed), place);
        if !outcome.is_red() {
            return;
        }
        if self.told.fetch_add(1, Ordering::Relaxed) < MAX_TOLD {
            println!("seed {seed} is red ({} facts); make sim SEED={seed} prints it:", outcome.facts.len());
            for violation in outcome.violations.iter().take(4) {
                println!("    {}: {}", violation.rule, violation.what);
            }
        }
        let mut red = self.red.lock().unwrap();
        for violation in &outcome.violations {
            let seeds = red.entry(violation.rule).or_default();
            if seeds.last() != Some(&seed) {
                seeds.push(seed);
            }
        }
    }

    /// For the ledger.
    fn findings(&self) -> String {
        let red = self.red.lock().unwrap();
        if red.is_empty() {
            return "none".to_owned();
        }
        let words = red.iter().map(|(rule, seeds)| {
            let some: Vec<String> = seeds.iter().take(5).map(u64::to_string).collect();
            format!("{rule}: {} red (seeds {})", seeds.len(), some.join(" "))
        });
        words.collect::<Vec<_>>().join("; ")
    }
}

/// One green history after another until each rule was shown to find what is forged for it.
fn assert_the_canary_dies(from: u64) {
    let mut silent: Vec<Rule> = Rule::ALL.to_vec();
    for seed in from..from + CANARIES {
        let history = History::drawn(seed);
        let outcome = run(&history, Place::Memory);
        if outcome.is_red() {
            continue;
        }
        let bounds = run::bounds(&history);
        for rule in Rule::ALL {
            let Some(is_found) = canary::finds(*rule, &outcome.facts, &bounds) else { continue };
            assert!(is_found, "the checker does not see what is forged for {rule:?} (seed {seed})");
            silent.retain(|other| other != rule);
        }
        if silent.is_empty() {
            return;
        }
    }
    panic!("no history could be forged for {silent:?}");
}

/// `NUDGED_SIM_HISTORIES` and `NUDGED_SIM_SEED_FROM` make a campaign of it, `NUDGED_SIM_FILES=1` on WAL files.
#[test]
fn histories_keep_the_contract() {
    if number("NUDGED_SIM_SEED").is_some() {
        return;
    }
    database::prepare();
    let from = number("NUDGED_SIM_SEED_FROM").unwrap_or(1);
    let clock = Runtime::production();
    let began = clock.now_us();
    let campaign = Campaign::default();
    let given = number("NUDGED_SIM_HISTORIES");
    campaign.run(from, given.unwrap_or(HISTORIES), place());
    if given.is_none() && !campaign.has_told_enough() {
        campaign.run(from, ON_FILES, Place::File);
    }
    let done = campaign.done.load(Ordering::Relaxed);
    let secs = (clock.now_us() - began) / 1_000_000;
    let findings = campaign.findings();
    println!("{done} histories from seed {from} in {secs} s; findings: {findings}");
    let on = if place() == Place::File { "WAL files" } else { "memory" };
    println!("scripts/ledger.sh sim 'seeds {from}.. in {on}' '{done} histories' '{findings}'");
    assert_eq!(findings, "none");
    assert_the_canary_dies(from);
    lies::assert_they_are_found_out();
}

/// Each rule stands in the document by its name, too.
#[test]
fn every_rule_is_documented() {
    let page = include_str!("../../docs/reliability.md");
    let (_, section) = page.split_once("## Simulated histories").expect("the section");
    let section = section.split("\n## ").next().unwrap_or_default();
    for rule in Rule::ALL {
        assert!(section.contains(&format!("`{}`", rule.name())), "docs/reliability.md has no row for {rule:?}");
    }
}

/// The same seed, the same facts: what is red stays red.
#[test]
fn a_seed_decides_everything() {
    database::prepare();
    for seed in (0..60).chain(1_000_000..1_000_040) {
        let history = History::drawn(seed);
        let (first, second) = (run(&history, Place::Memory), run(&history, Place::Memory));
        if first.fingerprint() != second.fingerprint() {
            let at = first.facts.iter().zip(&second.facts).position(|(a, b)| a != b);
            let facts = at.map(|at| (&first.facts[at], &second.facts[at]));
            panic!("seed {seed} gives other facts from {at:?} on: {facts:?}");
        }
    }
    let history = History::drawn(3);
    assert_eq!(run(&history, Place::Memory).fingerprint(), run(&history, Place::File).fingerprint());
}

/// What was red once.
#[test]
fn the_corpus_stays_green() {
    database::prepare();
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sim/corpus");
    let mut files: Vec<_> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let history: History =
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        for place in [Place::Memory, Place::File] {
            let outcome = run(&history, place);
            assert!(!outcome.is_red(), "{} on {place:?}: {:#?}", file.display(), outcome.violations);
        }
    }
}

/// `NUDGED_SIM_SEED=7`: prints the history, what the engine logs and every fact, and then, when it is red, the shortest
/// history that is red alike.
#[test]
fn one_seed_is_told_in_full() {
    let Some(seed) = number("NUDGED_SIM_SEED") else { return };
    database::prepare();
    let history = History::drawn(seed);
    println!("{:#?}", history.setup);
    for step in &history.steps {
        println!("{step:?}");
    }
    let filter = std::env::var("NUDGED_SIM_LOG").unwrap_or_else(|_| "nudged=debug".to_owned());
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).without_time().with_ansi(false).finish();
    let outcome = tracing::subscriber::with_default(subscriber, || run(&history, place()));
    for fact in &outcome.facts {
        println!("{fact:?}");
    }
    println!("fingerprint {:016x}", outcome.fingerprint());
    let Some(first) = outcome.violations.first() else { return };
    for violation in &outcome.violations {
        println!("    {}: {}", violation.rule, violation.what);
    }
    let least = minimise::minimise(&history, first.rule, place());
    println!("the least that is red alike, for tests/sim/corpus:");
    println!("{}", serde_json::to_string(&least).unwrap());
    let shown = run(&least, place());
    for fact in &shown.facts {
        println!("{fact:?}");
    }
    panic!("seed {seed} is red: {:#?}", shown.violations);
}
