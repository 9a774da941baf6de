//! Every target, in every run of the tests: the committed corpus, and mutations of it for a moment.
//!
//! `NUDGED_TEST_FUZZ_SECONDS` (per target), `NUDGED_TEST_FUZZ_TARGET`, `NUDGED_TEST_FUZZ_SEED` and
//! `NUDGED_TEST_FUZZ_INPUT` (one file, run again) are what `make fuzz` sets.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::engine::{self, Bound, Ran};
use super::{CANARY, HOARDER, MAX_INPUT_BYTES, Target, corpus, target, targets};

/// A moment: enough to notice what a change broke at once.
const INPUTS: u64 = 2_000;
const TIME: Duration = Duration::from_secs(3);
/// Of all the corpora together.
const MAX_CORPUS_BYTES: u64 = 400 * 1024;

fn set(name: &str) -> Option<String> {
    std::env::var(format!("NUDGED_TEST_FUZZ_{name}")).ok().filter(|value| !value.is_empty())
}

fn artifacts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fuzz-red")
}

fn bound() -> Bound {
    match set("SECONDS") {
        None => Bound { inputs: INPUTS, time: TIME },
        Some(seconds) => Bound { inputs: u64::MAX, time: Duration::from_secs(seconds.parse().expect("whole seconds")) },
    }
}

#[test]
fn every_target_keeps_its_promises() {
    let seed = set("SEED")
        .map_or_else(|| crate::runtime::Runtime::production().random_u64(), |seed| seed.parse().expect("a seed"));
    let chosen: Vec<&Target> = match set("TARGET") {
        Some(name) => vec![target(&name).expect("a target of this name")],
        None => targets().iter().collect(),
    };
    let mut red = Vec::new();
    for target in chosen {
        let inputs = match set("INPUT") {
            Some(file) => vec![std::fs::read(file).expect("the input")],
            None => corpus::read(&corpus::file(target.name)).expect("a corpus"),
        };
        assert!(!inputs.is_empty(), "{} has no corpus", target.name);
        let bound = if set("INPUT").is_some() { Bound { inputs: 0, time: TIME } } else { bound() };
        match engine::fuzz(target, &inputs, seed, bound, &artifacts()) {
            Ok(Ran { inputs, shapes, held }) => {
                println!(
                    "fuzz\t{}\t{inputs} inputs\t{shapes} shapes\t{} KiB held\tseed {seed}",
                    target.name,
                    held >> 10
                );
            }
            Err(found) => red.push(found.to_string()),
        }
    }
    assert!(red.is_empty(), "{} targets are red\n{}", red.len(), red.join("\n"));
}

#[test]
fn the_planted_bug_is_found_cut_down_and_red_again() {
    let directory = tempfile::tempdir().expect("a directory");
    let bound = Bound { inputs: 5_000_000, time: Duration::from_secs(120) };
    let found = engine::fuzz(&CANARY, &[b"hello".to_vec()], 1, bound, directory.path());
    let found = found.expect_err("an engine that does not find the canary finds nothing");
    assert_eq!(found.input, b"nudge");
    let written = std::fs::read(&found.file).expect("written out");
    assert!(engine::run(&CANARY, &written).is_err());
    assert!(found.to_string().contains("make fuzz TARGET=canary INPUT="), "{found}");
}

#[test]
fn an_input_that_holds_too_much_memory_is_found_cut_down_and_red_again() {
    let directory = tempfile::tempdir().expect("a directory");
    let bound = Bound { inputs: 5_000_000, time: Duration::from_secs(120) };
    let found = engine::fuzz(&HOARDER, &[b"more?".to_vec()], 1, bound, directory.path());
    let found = found.expect_err("memory is not bounded");
    assert_eq!(found.input, b"more!");
    assert!(found.why.contains("it held 64 MiB"), "{found}");
    assert!(engine::run(&HOARDER, &found.input).is_err() && engine::run(&HOARDER, b"more").is_ok());
}

#[test]
fn the_corpus_is_small_and_every_file_is_a_targets() {
    let directory = corpus::file("x").parent().expect("a directory").to_owned();
    let mut bytes = 0;
    for entry in std::fs::read_dir(directory).expect("the corpus") {
        let path = entry.expect("an entry").path();
        let name = path.file_stem().and_then(|name| name.to_str()).expect("a name").to_owned();
        assert!(target(&name).is_some(), "{name} is no target");
        bytes += path.metadata().expect("a file").len();
        for input in corpus::read(&path).expect("escaped lines") {
            assert!(input.len() <= MAX_INPUT_BYTES, "an input of {name} is too long");
        }
    }
    assert!(bytes <= MAX_CORPUS_BYTES, "{bytes} bytes of corpus, at most {MAX_CORPUS_BYTES}");
}

#[test]
fn escaped_inputs_read_back() {
    let every: Vec<u8> = (0..=255).collect();
    assert_eq!(corpus::unescape(&corpus::escape(&every)), Some(every));
    assert_eq!(corpus::unescape("a\\"), None);
    assert_eq!(corpus::unescape("\\x0"), None);
}

/// For libFuzzer, which wants directories: `make fuzz` sets these two.
#[test]
fn the_corpus_goes_to_a_directory_and_comes_back() {
    let (unpack, pack) = (set("UNPACK"), set("PACK"));
    let room = usize::try_from(MAX_CORPUS_BYTES).expect("small") / (targets().len() + 1);
    for target in targets() {
        if let Some(directory) = &unpack {
            corpus::unpack(target.name, &Path::new(directory).join(target.name)).expect("unpacked");
        }
        if let Some(directory) = &pack {
            let directory = Path::new(directory).join(target.name);
            if directory.is_dir() {
                let added = corpus::pack(target.name, &directory, room).expect("packed");
                println!("fuzz\t{}\t{added} inputs added to the corpus", target.name);
            }
        }
    }
    let directory = tempfile::tempdir().expect("a directory");
    let name = targets()[0].name;
    let count = corpus::unpack(name, directory.path()).expect("unpacked");
    assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), count);
}
