//! Runs the target that NUDGED_FUZZ_TARGET names.

#![no_main]

use std::sync::OnceLock;

use nudged::fuzzing::{self, Target};

fn target() -> &'static Target {
    static TARGET: OnceLock<&'static Target> = OnceLock::new();
    TARGET.get_or_init(|| {
        let name = std::env::var("NUDGED_FUZZ_TARGET").expect("NUDGED_FUZZ_TARGET names a target");
        fuzzing::target(&name).expect("a target of src/fuzzing")
    })
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let _ = (target().run)(input);
});
