//! The engine that needs stable Rust only: everything it does follows from a seed.
//!
//! It keeps a pool of inputs, first the corpus, takes one, changes it a little and runs the target. An input that comes to
//! something new joins the pool. The first input that panics, or holds more than [`TOO_MUCH`] memory, is cut down as long as
//! it still does, written out, and told with the command that runs it again. An input that runs longer than [`TOO_LONG`] is
//! written out and ends the process, for nothing can stop it; so does one that asks for more than the system gives, and
//! target and seed, which are told first, make it again.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::memory::{self, TOO_MUCH};
use super::{MAX_INPUT_BYTES, Target};
use crate::runtime::Runtime;

/// What one input may take, on the slowest machine with the slowest build.
pub const TOO_LONG: Duration = Duration::from_secs(60);
/// Inputs in the pool.
const MAX_POOL: usize = 4_096;

/// When a run ends: whichever comes first.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    pub inputs: u64,
    pub time: Duration,
}

/// What a run came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ran {
    pub inputs: u64,
    /// Different things that inputs came to.
    pub shapes: usize,
    /// The most that one of them held, in bytes.
    pub held: usize,
}

/// An input that broke a promise.
#[derive(Debug)]
pub struct Red {
    pub target: &'static str,
    pub seed: u64,
    pub input: Vec<u8>,
    pub file: PathBuf,
    pub why: String,
}

impl fmt::Display for Red {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { target, seed, input, file, why } = self;
        writeln!(f, "fuzz target {target}, seed {seed}: {why}")?;
        writeln!(f, "  input: {}", super::corpus::escape(input))?;
        write!(f, "  again: make fuzz TARGET={target} INPUT={}", file.display())
    }
}

/// Runs one input. `Err`: what the panic said, or that it held too much memory.
pub fn run(target: &Target, input: &[u8]) -> Result<u64, String> {
    measured(target, input).0
}

/// … and the most bytes that it held.
fn measured(target: &Target, input: &[u8]) -> (Result<u64, String>, usize) {
    let (shape, held) = memory::most_held(|| catch_unwind(AssertUnwindSafe(|| (target.run)(input))));
    let shape = match shape {
        Ok(_) if held > TOO_MUCH => {
            Err(format!("it held {} MiB at one time, and may hold {}", held >> 20, TOO_MUCH >> 20))
        }
        Ok(shape) => Ok(shape),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            Err(text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default())
        }
    };
    (shape, held)
}

/// Replays the corpus, then mutates it until the bound. `artifacts`: where a red input is written.
pub fn fuzz(
    target: &'static Target,
    corpus: &[Vec<u8>],
    seed: u64,
    bound: Bound,
    artifacts: &Path,
) -> Result<Ran, Box<Red>> {
    println!("fuzz\t{}\tbegins with seed {seed}", target.name);
    let runtime = Runtime::production();
    let end = runtime.instant() + bound.time;
    let watch = Watch::new(target.name, artifacts);
    let mut random = Random(seed);
    let mut seen = HashSet::new();
    let mut pool: Vec<Vec<u8>> = Vec::new();
    let mut ran = Ran::default();
    let red = |input: Vec<u8>, why: String| {
        let input = cut_down(target, input);
        let file = artifact(target.name, artifacts, &input);
        Box::new(Red { target: target.name, seed, input, file, why })
    };
    for input in corpus {
        watch.begins(input);
        ran.inputs += 1;
        let (shape, held) = measured(target, input);
        ran.held = ran.held.max(held);
        seen.insert(shape.map_err(|why| red(input.clone(), why))?);
        pool.push(input.clone());
    }
    if pool.is_empty() {
        pool.push(Vec::new());
    }
    let mut mutated = 0;
    while mutated < bound.inputs && runtime.instant() < end {
        let input = random.mutate(&pool, target.words);
        watch.begins(&input);
        mutated += 1;
        let (shape, held) = measured(target, &input);
        ran.held = ran.held.max(held);
        let shape = shape.map_err(|why| red(input.clone(), why))?;
        if seen.insert(shape) && pool.len() < MAX_POOL {
            pool.push(input);
        }
    }
    ran.inputs += mutated;
    ran.shapes = seen.len();
    Ok(ran)
}

fn artifact(target: &str, directory: &Path, input: &[u8]) -> PathBuf {
    let file = directory.join(format!("{target}-{:016x}", super::shape(&input)));
    let written = fs::create_dir_all(directory).and_then(|()| fs::write(&file, input));
    if let Err(error) = written {
        eprintln!("the red input could not be written to {}: {error}", file.display());
    }
    file
}

/// Leaves out what the panic does not need: halves, then quarters, then single bytes.
fn cut_down(target: &Target, mut input: Vec<u8>) -> Vec<u8> {
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let mut size = input.len() / 2;
    let mut tries = 0;
    while size > 0 && tries < 2_000 {
        let mut at = 0;
        while at + size <= input.len() && tries < 2_000 {
            let mut shorter = input.clone();
            shorter.drain(at..at + size);
            tries += 1;
            if run(target, &shorter).is_err() { input = shorter } else { at += size }
        }
        size /= 2;
    }
    std::panic::set_hook(quiet);
    input
}

/// Ends the process when an input takes too long.
struct Watch {
    begun: mpsc::Sender<()>,
    input: Arc<Mutex<Vec<u8>>>,
}

impl Watch {
    #[expect(
        clippy::disallowed_methods,
        reason = "it watches what runs on the test's own thread; ends with its sender"
    )]
    fn new(target: &'static str, artifacts: &Path) -> Self {
        let (begun, begins) = mpsc::channel::<()>();
        let input = Arc::new(Mutex::new(Vec::new()));
        let (watched, artifacts) = (Arc::clone(&input), artifacts.to_owned());
        std::thread::spawn(move || {
            loop {
                match begins.recv_timeout(TOO_LONG) {
                    Ok(()) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                    Err(RecvTimeoutError::Timeout) => {
                        let input = watched.lock().map(|input| input.clone()).unwrap_or_default();
                        let file = artifact(target, &artifacts, &input);
                        eprintln!("fuzz target {target}: an input runs for more than {TOO_LONG:?}: {}", file.display());
                        std::process::exit(101);
                    }
                }
            }
        });
        Self { begun, input }
    }

    fn begins(&self, input: &[u8]) {
        if let Ok(mut watched) = self.input.lock() {
            watched.clear();
            watched.extend_from_slice(input);
        }
        let _ = self.begun.send(());
    }
}

/// SplitMix64: a seed is a run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// Below `end`; 0 for 0.
    fn below(&mut self, end: usize) -> usize {
        if end == 0 { 0 } else { usize::try_from(self.next() % end as u64).unwrap_or(0) }
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    /// One of the pool with one to four changes.
    fn mutate(&mut self, pool: &[Vec<u8>], words: &[&str]) -> Vec<u8> {
        let mut input = pool[self.below(pool.len())].clone();
        for _ in 0..=self.below(4) {
            self.change(&mut input, pool, words);
        }
        input.truncate(MAX_INPUT_BYTES);
        input
    }

    fn change(&mut self, input: &mut Vec<u8>, pool: &[Vec<u8>], words: &[&str]) {
        let at = self.below(input.len() + 1);
        let len = self.below(input.len() - at + 1);
        match self.below(10) {
            0 if at < input.len() => input[at] ^= 1 << self.below(8),
            1 if at < input.len() => input[at] = self.byte(),
            2 => input.insert(at, self.byte()),
            3 => drop(input.drain(at..at + len.min(16))),
            4 => {
                let copy = input[at..at + len.min(64)].to_vec();
                let most = if self.below(16) == 0 { 64 } else { 3 };
                let times = 1 + self.below(most);
                let copies = copy.repeat(times);
                input.splice(at..at, copies);
            }
            5 => {
                let other = &pool[self.below(pool.len())];
                let from = self.below(other.len() + 1);
                let piece = other[from..from + self.below(other.len() - from + 1)].to_vec();
                input.splice(at..at + len, piece);
            }
            6 | 7 if !words.is_empty() => {
                let word = words[self.below(words.len())].as_bytes().to_vec();
                input.splice(at..at + len.min(word.len()) * self.below(2), word);
            }
            8 => {
                // Numbers at the edge of something, as text and as a varint.
                const EDGES: [i64; 12] = [
                    0,
                    1,
                    -1,
                    127,
                    128,
                    255,
                    65_536,
                    2_147_483_647,
                    -2_147_483_648,
                    i64::MAX,
                    i64::MIN,
                    253_402_300_799,
                ];
                let edge = EDGES[self.below(EDGES.len())];
                let mut bytes = Vec::new();
                match self.below(3) {
                    0 => bytes.extend(edge.to_string().bytes()),
                    1 => crate::domain::targets::write_varint(&mut bytes, edge.cast_unsigned()),
                    _ => bytes.extend(edge.to_be_bytes()),
                }
                let digits = input[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
                input.splice(at..at + digits, bytes);
            }
            _ => input.truncate(at.max(1)),
        }
    }
}
