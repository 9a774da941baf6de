//! What an attacker can send, as fuzz targets: each reads bytes as one of our parsers would get them and checks more than
//! that nothing panics: sizes of what comes out, round trips, agreement of two ways to the same answer.
//!
//! Two engines run the same targets. libFuzzer (the package in `fuzz/`, `make fuzz`) is guided by coverage and made for
//! hours; [`engine`] needs nothing but stable Rust, replays the committed corpus in every test run and mutates it for a
//! moment. Time and memory are bounded by both: libFuzzer's `-timeout` and `-malloc_limit_mb`, the engine's watch and the
//! allocator of the tests, see [`memory`]. The corpus lies in `fuzz/corpus`, a file of
//! escaped lines for each target, see [`corpus`].
//!
//! A target says what an input came to as a number; inputs that come to something new are worth mutating further. Compiled
//! for tests and with the feature `fuzzing` only.

pub mod corpus;
pub mod engine;
pub mod memory;
mod targets;
#[cfg(test)]
mod tests;

use std::hash::{DefaultHasher, Hash, Hasher};

/// Inputs are cut here: longer ones find nothing that shorter ones do not, and every parser of ours has its own limit
/// below it or far above it.
pub const MAX_INPUT_BYTES: usize = 16 * 1024;

/// One parser under attack.
pub struct Target {
    pub name: &'static str,
    /// Panics when a promise is broken. What the input came to, roughly.
    pub run: fn(&[u8]) -> u64,
    /// Words of its language, for mutations.
    pub words: &'static [&'static str],
}

/// Not counted: it has a planted bug, and an engine that does not find it finds nothing.
pub const CANARY: Target = Target { name: "canary", run: canary, words: &[] };

fn canary(input: &[u8]) -> u64 {
    let depth = b"nudge".iter().zip(input).take_while(|(a, b)| a == b).count();
    assert!(depth < 5, "the canary's planted bug");
    depth as u64
}

/// The same of memory: the planted bug holds twice of what an input may, and nothing panics.
pub const HOARDER: Target = Target { name: "hoarder", run: hoarder, words: &[] };

fn hoarder(input: &[u8]) -> u64 {
    let depth = b"more!".iter().zip(input).take_while(|(a, b)| a == b).count();
    let held = vec![0_u8; if depth < 5 { depth } else { 2 * memory::TOO_MUCH }];
    std::hint::black_box(&held);
    depth as u64
}

/// Every target, by name.
#[must_use]
pub fn targets() -> &'static [Target] {
    targets::ALL
}

#[must_use]
pub fn target(name: &str) -> Option<&'static Target> {
    targets::ALL
        .iter()
        .find(|target| target.name == name)
        .or([&CANARY, &HOARDER].into_iter().find(|target| target.name == name))
}

/// A number for whatever an input came to.
fn shape(of: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}
