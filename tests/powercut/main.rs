//! Power cuts. The real store runs on a disk that forgets what was not synced; the power goes at any of its writes and
//! syncs, and the store is opened again on what is left. What was answered must be there, what was under way must be there
//! whole or not at all, and everything must go on.
//!
//! A life of the store is run once and recorded, with every row of the database after each answer; a cut anywhere in the
//! record then costs one start of the store. A killed process proves nothing here: the system keeps what it wrote.
//!
//! `make powercut CUTS=10000 SEED_FROM=1` runs so many random cuts; a seed is replayed alone by `CUTS=1 SEED_FROM=seed`.
#![expect(clippy::unwrap_used, reason = "a test, whose set-up must work")]

mod check;
mod disk;
mod eye;
mod life;
mod random;
mod readonly;
mod room;
mod vfs;

use std::collections::BTreeSet;
use std::sync::Arc;

use nudged::storage::sqlite::Synchronous;

use check::{Advance, Cut, check};
use disk::Loss;
use life::{Life, Script, Start, live};
use random::Random;

/// Random cuts of a test run; more by `NUDGED_TEST_CUTS`.
const CUTS: u64 = 300;
/// Cuts of one life: to live it costs as much as several of them.
const CUTS_A_LIFE: u64 = 50;
/// Deeds of a random life.
const DEEDS: usize = 40;
/// Findings told before a run gives up.
const TOLD: usize = 5;

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// A database that was made and closed in peace.
fn made(directory: &std::path::Path, synchronous: Synchronous) -> Start {
    live(directory, Start::empty(), synchronous, 0, Script::Nothing).next()
}

/// Cuts a life at each of its writes and syncs, once. What went wrong.
fn cut_everywhere(directory: &std::path::Path, life: &Life, lies: bool, most: usize) -> (usize, Vec<String>) {
    let mut replay = Advance::new(life, lies);
    let mut findings = Vec::new();
    for at in 0..=life.events.len() {
        let cut = Cut { at, loss: Loss::ALL[at % Loss::ALL.len()], seed: at as u64 };
        let image = life.cut(&mut replay, cut);
        if let Err(wrong) = check(directory, life, cut, &image) {
            findings.push(wrong);
            if findings.len() >= most {
                return (at + 1, findings);
            }
        }
    }
    (life.events.len() + 1, findings)
}

/// Every kind of transaction, cut at every write and every sync.
#[test]
fn nothing_answered_is_lost_at_any_write_or_sync() {
    let directory = directory();
    let start = made(directory.path(), Synchronous::Full);
    let life = live(directory.path(), start, Synchronous::Full, 1, Script::Each);
    let syncs = life.events.iter().filter(|event| matches!(event, disk::Event::Sync { .. })).count();
    let (cuts, findings) = cut_everywhere(directory.path(), &life, false, TOLD);
    println!("powercut: {cuts} cuts, at {syncs} syncs and every write, of {} steps", life.marks.len());
    assert!(findings.is_empty(), "{}", findings.join("\n\n"));
    let did: BTreeSet<&str> = life.marks.iter().map(|mark| mark.what).collect();
    let done = did.iter().filter(|what| !what.starts_with("no")).count();
    assert!(done >= 29 && syncs > 40, "{done} kinds of steps of 29, {syncs} syncs: {did:?}");
}

/// The first start makes the schema: a cut in it leaves something that the next start finishes.
#[test]
fn a_first_start_that_was_cut_off_is_finished_by_the_next() {
    let directory = directory();
    let life = live(directory.path(), Start::empty(), Synchronous::Full, 2, Script::Nothing);
    let mut replay = Advance::new(&life, false);
    for at in (0..=life.events.len()).step_by(7) {
        let cut = Cut { at, loss: Loss::ALL[at % Loss::ALL.len()], seed: at as u64 };
        let image = life.cut(&mut replay, cut);
        check(directory.path(), &life, cut, &image).unwrap_or_else(|wrong| panic!("{wrong}"));
    }
}

/// The harness can fail: at a disk that does not sync, and at a database that does not ask it to.
#[test]
fn a_loss_is_found_where_nothing_is_synced() {
    let directory = directory();
    let start = made(directory.path(), Synchronous::Full);
    let life = live(directory.path(), start, Synchronous::Full, 3, Script::Each);
    let (_, findings) = cut_everywhere(directory.path(), &life, true, 1);
    assert!(!findings.is_empty(), "a disk that answers syncs and does nothing loses nothing?");

    let start = made(directory.path(), Synchronous::Normal);
    let life = live(directory.path(), start, Synchronous::Normal, 3, Script::Each);
    let (_, findings) = cut_everywhere(directory.path(), &life, false, 1);
    assert!(!findings.is_empty(), "synchronous = NORMAL loses nothing?");
}

/// Random lives, cut anywhere, and some of what came after cut again.
#[test]
fn nothing_answered_is_lost_at_random_cuts() {
    let number = |name: &str, default: u64| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let (cuts, from) = (number("NUDGED_TEST_CUTS", CUTS), number("NUDGED_TEST_CUTS_FROM", 1_000));
    let directory = directory();
    let (mut findings, mut lives, mut done) = (Vec::new(), 0, 0);
    let seeds: Vec<u64> = (from..from.saturating_add(cuts)).collect();
    for seeds in seeds.chunk_by(|one, other| one / CUTS_A_LIFE == other / CUTS_A_LIFE) {
        let number = seeds[0] / CUTS_A_LIFE;
        let start = if number.is_multiple_of(8) { Start::empty() } else { made(directory.path(), Synchronous::Full) };
        let life = Arc::new(live(directory.path(), start, Synchronous::Full, number, Script::Some(DEEDS)));
        lives += 1;
        for seed in seeds {
            let (more, ended) = cut_at_random(directory.path(), &life, *seed);
            lives += more;
            done += more + 1;
            if let Err(wrong) = ended {
                findings.push(format!("replay: make powercut CUTS=1 SEED_FROM={seed}\n{wrong}"));
            }
            if findings.len() >= TOLD {
                break;
            }
        }
        if findings.len() >= TOLD {
            break;
        }
    }
    println!("powercut: {done} cuts in {lives} lives, seeds {from} to {}", from.saturating_add(cuts) - 1);
    assert!(findings.is_empty(), "{}", findings.join("\n\n"));
}

/// One cut, and in every third case another one in the life after it, and so on. How many more there were.
fn cut_at_random(directory: &std::path::Path, life: &Arc<Life>, seed: u64) -> (u64, Result<(), String>) {
    let mut random = Random::new(seed.wrapping_mul(0x2545_f491_4f6c_dd1d));
    let (mut life, mut more) = (Arc::clone(life), 0);
    loop {
        let at = random.below(life.events.len() + 1);
        let cut = Cut { at, loss: Loss::ALL[random.below(Loss::ALL.len())], seed: random.next() };
        let image = life.cut(&mut Advance::new(&life, false), cut);
        let next = match check(directory, &life, cut, &image) {
            Ok(next) => next,
            Err(wrong) => return (more, Err(wrong)),
        };
        if !random.one_in(3) {
            return (more, Ok(()));
        }
        more += 1;
        life = Arc::new(live(directory, next, Synchronous::Full, random.next(), Script::Some(6)));
    }
}
