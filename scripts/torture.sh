#!/usr/bin/env bash
# Kills the release binary under load, again and again, and holds the providers' record against what was acknowledged.
#   STORE=sqlite|postgres|postgres-itself  KILLS=…  EVENTS=… (acknowledged between kills)  SEED=…  REPLICAS=… (Postgres)
#   BREAK=lost|other-identity|shared-identity|shared-notification   falsify the ledger: must be red
#   LEDGER=yes   append the run to docs/ledger.tsv
set -euo pipefail
cd "$(dirname "$0")/.."

store=${STORE:-sqlite}
case $store in
    sqlite | postgres) test=torture::$store ;;
    postgres-itself) test=torture::postgres_itself ;;
    *) sed -n '2,5s/^# *//p' "$0" >&2; exit 2 ;;
esac
export NUDGED_TORTURE_KILLS=${KILLS:-100} NUDGED_TORTURE_EVENTS=${EVENTS:-10000}
export NUDGED_TORTURE_SEED=${SEED:-} NUDGED_TORTURE_REPLICAS=${REPLICAS:-} NUDGED_TORTURE_BREAK=${BREAK:-}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
# shellcheck disable=SC2086
${CARGO:-cargo} test --locked ${PROFILE:---release} --test it -- --exact "$test" --nocapture 2>&1 | tee "$log"
if [ "${LEDGER:-}" = yes ]; then
    seed=$(sed -n 's/.*processes, seed //p' "$log")
    done=$(sed -n 's/^ledger://p' "$log")
    scripts/ledger.sh torture "STORE=$store KILLS=$NUDGED_TORTURE_KILLS EVENTS=$NUDGED_TORTURE_EVENTS SEED=$seed" "$done" none
fi
