#!/usr/bin/env bash
# Measures everything that docs/performance.md shows and puts the tables there: scripts/performance.sh [ARGUMENT…]
#
# Arguments go to every `nudged bench` (say --quick to try it). PERFORMANCE_STORES and PERFORMANCE_TABLES choose, e.g.
# PERFORMANCE_STORES=sqlite PERFORMANCE_TABLES=budget. Nothing else should run on the machine meanwhile. The JSON of every
# run is left in target/performance.
set -euo pipefail
cd "$(dirname "$0")/.."

program=${NUDGED_BENCH_PROGRAM:-target/release/nudged}
if [ -z "${NUDGED_BENCH_PROGRAM:-}" ]; then
    "${CARGO:-cargo}" build --locked --release
fi
out=target/performance
mkdir -p "$out"

# Replaces what stands between the marks of a name in the document.
put() {
    local name=$1 file=$2
    awk -v name="$name" -v file="$file" '
        $0 == "<!-- begin " name " -->" { print; print ""; while ((getline line < file) > 0) print line; skipping = 1 }
        $0 == "<!-- end " name " -->" { skipping = 0 }
        !skipping || $0 == "<!-- end " name " -->" { if ($0 != "<!-- begin " name " -->") print }
    ' docs/performance.md >"$out/document.md"
    mv "$out/document.md" docs/performance.md
}

for store in ${PERFORMANCE_STORES:-sqlite postgres}; do
    for table in ${PERFORMANCE_TABLES:-budget growth}; do
        # The growth table is long enough with two repeats; see --help for what a repeat is.
        repeats=3
        if [ "$table" = growth ]; then repeats=2; fi
        echo "performance: $table on $store" >&2
        "$program" bench "$table" --store "$store" --repeats "$repeats" \
            --markdown "$out/$store-$table.md" --json "$out/$store-$table.json" "$@" >/dev/null
        put "$store-$table" "$out/$store-$table.md"
    done
done
