#!/usr/bin/env bash
# Shows that the harnesses can fail: plants each bug of tests/planted.tsv and runs each harness that must find it.
#   scripts/planted.sh [NAME…]     all of them, or those named
# One build with the feature `planted` serves all: NUDGED_PLANTED=name breaks a process at run time. First every harness
# runs without a bug and must pass, then with each of its bugs and must fail, within five minutes of CPU. A hang or a
# crash of the harness itself proves nothing and counts as not found. Prints a row for each bug and harness as it goes and
# a sum at the end; the exit status is 0 only if every harness passed and found each of its bugs.
# Tests on Postgres need scripts/with-postgres.sh around this (make planted).
#   PLANTED_MINUTES    the whole run's bound (60)
#   PLANTED_TABLE      where the table is written to, beside standard output (docs/planted.md keeps one)
#   PLANTED_HARNESS    only harnesses that begin so, as `sim` or `lib delivery`
set -euo pipefail
cd "$(dirname "$0")/.."
table=tests/planted.tsv
cpu_secs=300
deadline=$((SECONDS + ${PLANTED_MINUTES:-60} * 60))
unset NUDGED_PLANTED
# A planted failure is nothing to remember.
export PROPTEST_DISABLE_FAILURE_PERSISTENCE=1

# A bug has as many rows here as harnesses.
names=() bugs=() harnesses=() distinct=() targets=() known=0
while IFS=$'\t' read -r name bug rest; do
    case $name in '' | '#'*) continue ;; esac
    if [ $# -gt 0 ]; then
        case " $* " in *" $name "*) ;; *) continue ;; esac
    fi
    known=$((known + 1))
    IFS=$'\t' read -ra finders <<<"$rest"
    for harness in "${finders[@]}"; do
        case $harness in "${PLANTED_HARNESS:-}"*) ;; *) continue ;; esac
        names+=("$name") bugs+=("$bug") harnesses+=("$harness")
        case $'\n'"$(printf '%s\n' "${distinct[@]-}")"$'\n' in *$'\n'"$harness"$'\n'*) ;; *) distinct+=("$harness") ;; esac
        target=${harness%% *}
        case " ${targets[*]-} " in *" $target "*) ;; *) targets+=("$target") ;; esac
    done
done <"$table"
if [ ${#names[@]} -eq 0 ] || { [ $# -gt 0 ] && [ "$known" -ne $# ]; }; then
    echo "planted: unknown names among: $*" >&2
    exit 2
fi

# The test programs, found in what cargo says that it built.
selected=()
for target in "${targets[@]}"; do
    if [ "$target" = lib ]; then selected+=(--lib); else selected+=(--test "$target"); fi
done
work=$(mktemp -d "${TMPDIR:-/tmp}/nudged-planted.XXXXXX")
trap 'rm -rf "$work"' EXIT
if ! ${CARGO:-cargo} test --locked --features planted --no-run "${selected[@]}" >"$work/build" 2>&1; then
    cat "$work/build" >&2
    exit 1
fi
declare -A program
while read -r source path; do
    case $source in
        src/lib.rs) program[lib]=$path ;;
        tests/*) target=${source#tests/} target=${target%.rs} program[${target%/main}]=$path ;;
    esac
done < <(sed -nE 's/^ *Executable (unittests )?([^ ]+) \((.*)\)$/\2 \3/p' "$work/build")

# run HARNESS [BUG]: the harness's exit status; $cpu and $found are set, output is in $work/output.
run() {
    local status=0 words
    read -ra words <<<"$1"
    local path=${program[${words[0]}]:-}
    if [ -z "$path" ]; then
        echo "planted: cargo built no test program ${words[0]}" >&2
        exit 1
    fi
    local left=$((deadline - SECONDS))
    if [ "$left" -le 0 ]; then
        echo 'planted: out of time (PLANTED_MINUTES)' >&2
        exit 1
    fi
    [ "$left" -lt $((2 * cpu_secs)) ] || left=$((2 * cpu_secs))
    times >"$work/before"
    (
        ulimit -t $cpu_secs
        [ -z "${2:-}" ] || export NUDGED_PLANTED=$2
        exec timeout -k 5 "$left" "$path" "${words[@]:1}"
    ) >"$work/output" 2>&1 || status=$?
    times >"$work/after"
    # The second line is of the children.
    cpu=$(cat "$work/before" "$work/after" | awk 'NR % 2 == 0 {
        for (at = 1; at <= 2; at++) { split($at, parts, /[ms]/); used[NR] += 60 * parts[1] + parts[2] }
    } END { printf "%.1f", used[4] - used[2] }')
    # From the list at the end: a line of its own may be broken by what a thread prints.
    # Which rule of the contract a simulated history broke says more.
    rule=$(sed -nE 's/^[0-9]+ histories from .*; findings: ([a-z]+): .*/ (rule \1)/p' "$work/output" | head -n 1)
    found=$(awk '/^failures:$/ { listed = 1; next } listed && /^    [^ ]/ { name = $1 } END { print name }' "$work/output")
    return "$status"
}

failed=0 total=0
count() { total=$(awk "BEGIN { printf \"%.1f\", $total + $cpu }"); }
for harness in "${distinct[@]}"; do
    if ! run "$harness"; then
        echo "planted: red without a bug: $harness" >&2
        tail -n 40 "$work/output" >&2
        failed=1
    elif ! grep -qE '^test result: ok\. [1-9]' "$work/output"; then
        echo "planted: runs no test: $harness" >&2
        failed=1
    else
        echo "planted: green without a bug in $cpu s of CPU: $harness" >&2
    fi
    count
done
[ "$failed" -eq 0 ] || exit 1

row() {
    printf '%s\n' "$1"
    [ -z "${PLANTED_TABLE:-}" ] || printf '%s\n' "$1" >>"$PLANTED_TABLE"
}
[ -z "${PLANTED_TABLE:-}" ] || : >"$PLANTED_TABLE"
missed=() slowest=0
row '| Planted bug | What is broken | Found by | CPU seconds |'
row '|---|---|---|---|'
for at in "${!names[@]}"; do
    status=0
    run "${harnesses[$at]}" "${names[$at]}" || status=$?
    count
    # What libtest says when a test failed; anything else is no verdict.
    if [ "$status" -eq 101 ] && [ -n "$found" ]; then
        by="\`${harnesses[$at]%% *} $found\`$rule"
    else
        by="**NOT FOUND** by \`${harnesses[$at]}\` (exit $status)"
        missed+=("${names[$at]}")
    fi
    row "| ${names[$at]} | ${bugs[$at]} | $by | $cpu |"
    slowest=$(printf '%s\n' "$slowest" "$cpu" | sort -n | tail -n 1)
done
sum="$known bugs, ${#names[@]} times to be found; ${#distinct[@]} harnesses green without one; $total s of CPU, at most $slowest for a bug"
if [ ${#missed[@]} -gt 0 ]; then
    echo "planted: NOT FOUND: ${missed[*]} ($sum)"
    exit 1
fi
echo "planted: every one found ($sum)"
