#!/usr/bin/env bash
# Fuzzes the targets of src/fuzzing: by libFuzzer where `cargo fuzz` and a nightly toolchain are installed, else by the
# engine of our own, saying so. First the canaries, whose planted bugs must be found.
#   SECONDS_EACH   for each target (60)
#   TARGET         only this one
#   INPUT          with TARGET: run this file once more, nothing else
#   ENGINE         `ours` or `libfuzzer`: this one or none
# What libFuzzer found interesting joins fuzz/corpus as far as there is room. A red input is under target/fuzz-red.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo=${CARGO:-cargo}
each=${SECONDS_EACH:-60}
work=target/fuzz-work red=target/fuzz-red
mkdir -p "$red"

# Built first: the limit is for what is tested. An input that asks for more than the system gives ends the process, after the
# target and the seed were told.
max_address_mib=4096
ours() {
    local test=$1
    shift
    "$cargo" test --locked --lib --no-run
    (
        ulimit -v $((max_address_mib * 1024)) || echo 'fuzz: a lower limit of memory holds already' >&2
        env "$@" "$cargo" test --locked --lib "fuzzing::tests::$test" -- --nocapture
    )
}

if [ -n "${INPUT:-}" ]; then
    [ -n "${TARGET:-}" ] || { echo 'fuzz: INPUT needs TARGET' >&2; exit 2; }
    ours every_target "NUDGED_TEST_FUZZ_TARGET=$TARGET" "NUDGED_TEST_FUZZ_INPUT=$(realpath "$INPUT")"
    exit
fi

engine=${ENGINE:-}
if [ -z "$engine" ]; then
    if "$cargo" fuzz --version >/dev/null 2>&1 && "$cargo" +nightly --version >/dev/null 2>&1; then
        engine=libfuzzer
    else
        engine=ours
        echo 'fuzz: cargo-fuzz or a nightly toolchain is missing (cargo install cargo-fuzz; rustup toolchain install nightly):' \
            'running the engine of our own, which no coverage guides' >&2
    fi
fi
if [ "$engine" = ours ]; then
    ours the_planted_bug
    ours an_input_that_holds
    ours every_target "NUDGED_TEST_FUZZ_SECONDS=$each" "NUDGED_TEST_FUZZ_TARGET=${TARGET:-}"
    exit
fi

rm -rf "$work"
ours the_corpus_goes "NUDGED_TEST_FUZZ_UNPACK=$PWD/$work" >/dev/null
# Safe code on our side: coverage and checked arithmetic are what is wanted, not memory errors.
"$cargo" +nightly fuzz build --sanitizer none any
run() {
    mkdir -p "$work/$1"
    NUDGED_FUZZ_TARGET=$1 "$cargo" +nightly fuzz run --sanitizer none any "$work/$1" -- \
        -max_total_time="$2" -timeout=10 -rss_limit_mb=2048 -malloc_limit_mb=256 -max_len=16384 \
        -artifact_prefix="$red/$1-" -print_final_stats=1
}
if run canary 120 >"$work/canary.log" 2>&1 || ! grep -q "the canary's planted bug" "$work/canary.log"; then
    echo "fuzz: the canary's planted bug was not found: nothing else would be either ($work/canary.log)" >&2
    exit 1
fi
rm -f "$red"/canary-*
status=0
for target in $(ls "$work" | grep -v '^canary'); do
    [ -z "${TARGET:-}" ] || [ "$TARGET" = "$target" ] || continue
    if run "$target" "$each" >"$work/$target.log" 2>&1; then
        printf 'fuzz\t%s\t%s inputs\t%s seconds\n' "$target" \
            "$(sed -n 's/^stat::number_of_executed_units: *//p' "$work/$target.log")" "$each"
    else
        status=1
        echo "fuzz: $target is red: $(ls -t "$red/$target-"* | head -1); see $work/$target.log" >&2
    fi
done
ours the_corpus_goes "NUDGED_TEST_FUZZ_PACK=$PWD/$work" | grep 'added to the corpus' || true
exit "$status"
