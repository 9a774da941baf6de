#!/usr/bin/env bash
# Appends a run of a harness to docs/ledger.tsv, or adds up what is in it.
#   scripts/ledger.sh HARNESS PARAMETERS DONE FINDINGS    DONE: NUMBER UNIT[, NUMBER UNIT…]; FINDINGS: words, which begin with
#                                                         `none` where there are none
#   scripts/ledger.sh                                     the sum of each harness and unit
set -euo pipefail
cd "$(dirname "$0")/.."
ledger=docs/ledger.tsv

if [ $# -eq 0 ]; then
    awk -F'\t' '!/^#/ {
        rows = split($5, parts, /, */)
        for (i = 1; i <= rows; i++) {
            space = index(parts[i], " ")
            sum[$3 "\t" substr(parts[i], space + 1)] += substr(parts[i], 1, space - 1)
        }
        if ($6 !~ /^none/) found[$3]++
    }
    END {
        for (key in sum) { split(key, at, "\t"); printf "%s\t%d %s\t%d runs with findings\n", at[1], sum[key], at[2], found[at[1]] }
    }' "$ledger" | sort
    exit
fi
if [ $# -ne 4 ]; then
    sed -n '2,5s/^# *//p' "$0" >&2
    exit 2
fi
for field in "$@"; do
    case $field in *$'\t'* | *$'\n'*) echo 'ledger: no tabs and line breaks in a field' >&2; exit 2 ;; esac
done
if ! [[ $3 =~ ^[0-9]+\ [^,]+(,\ [0-9]+\ [^,]+)*$ ]]; then
    echo 'ledger: DONE is NUMBER UNIT[, NUMBER UNIT...]' >&2
    exit 2
fi
commit=$(git rev-parse --short=12 HEAD)
git diff --quiet HEAD -- src tests || commit+='+changes'
printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$(date -u +%Y-%m-%dT%H:%MZ)" "$commit" "$@" >>"$ledger"
