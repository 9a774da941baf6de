#!/usr/bin/env bash
# Builds and runs the examples of every language whose tools are on this machine, against the real binary and the
# sandbox. Names the languages it leaves out. Needs only the languages' package registries. Leaves the work tree as it
# was: everything is built in a copy below target/.
#   examples/run.sh                 all
#   examples/run.sh python node     some
# A language whose packages cannot be fetched is left out, too; one that does not build or run is a failure.
# NUDGED_BIN: the binary (default: built by cargo). EXAMPLES_STRICT=1: a language that is left out is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=${CARGO_TARGET_DIR:-$root/target}/examples
mkdir -p "$work"

if [ -z "${NUDGED_BIN:-}" ]; then
    cargo build --locked --quiet --bin nudged
    NUDGED_BIN=${CARGO_TARGET_DIR:-$root/target}/debug/nudged
fi

dir=$(mktemp -d)
started=()
finish() {
    [ ${#started[@]} -eq 0 ] || kill "${started[@]}" 2>/dev/null || true
    wait 2>/dev/null || true
    rm -rf "$dir"
}
trap finish EXIT

"$NUDGED_BIN" sandbox --dir "$dir" --quiet >"$dir/sandbox.log" 2>&1 &
started+=($!)
for _ in $(seq 100); do
    grep -q '^Next' "$dir/sandbox.log" && break
    sleep 0.1
done
NUDGED_GRPC__LISTEN=127.0.0.1:0 NUDGED_ADMIN__LISTEN=127.0.0.1:0 \
    "$NUDGED_BIN" serve --config "$dir/nudged.toml" >"$dir/server.log" 2>&1 &
started+=($!)
address=
for _ in $(seq 100); do
    address=$(sed -n 's/.*"grpc_address":"\([^"]*\)".*/\1/p' "$dir/server.log" | head -n 1)
    [ -z "$address" ] || break
    sleep 0.1
done
if [ -z "$address" ]; then
    echo 'examples: the server does not start:' >&2
    cat "$dir/sandbox.log" "$dir/server.log" >&2
    exit 1
fi
export NUDGED_ADDRESS=$address
export NUDGED_SERVICE_CONFIG=$root/examples/service_config.json
export NUDGED_PROTO_DIR=$root/proto

# A fresh copy of an example's sources; what was built and downloaded before stays.
copy() {
    mkdir -p "$work/$1"
    cp -R "$root/examples/$1/." "$work/$1/"
}

# What a language's run exits with when a registry does not answer.
unfetched=75

# A registry may fail once, and may not answer at all.
fetch() {
    timeout 200 "$@" || { sleep 3; timeout 100 "$@"; } || return $unfetched
}

python_tools() {
    [ -x "$work/python/venv/bin/python" ] || python3 -m venv "$work/python/venv"
    fetch "$work/python/venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$root/examples/python/requirements.txt"
}

# Prints why a language cannot run here, or nothing.
missing() {
    case $1 in
    python) command -v python3 >/dev/null && python3 -c 'import venv' 2>/dev/null || echo 'python3 with venv' ;;
    node) command -v node >/dev/null && command -v npm >/dev/null || echo 'node and npm' ;;
    go)
        if ! command -v go >/dev/null; then
            echo 'go'
        elif ! command -v protoc >/dev/null && ! command -v python3 >/dev/null; then
            echo 'protoc (python3 would bring one)'
        fi
        ;;
    java) command -v javac >/dev/null && command -v mvn >/dev/null || echo 'javac and mvn' ;;
    *) echo "an example in $1" ;;
    esac
}

run_python() {
    copy python
    python_tools || return
    (cd "$work/python" && venv/bin/python -m grpc_tools.protoc -I "$root/proto" --python_out=. --grpc_python_out=. \
        "$root"/proto/nudged/v1/*.proto && venv/bin/python example.py)
}

run_node() {
    copy node
    (cd "$work/node" && fetch npm install --silent --no-audit --no-fund --no-package-lock && node example.js)
}

run_go() {
    copy go
    local protoc=(protoc)
    if ! command -v protoc >/dev/null; then
        mkdir -p "$work/python"
        python_tools || return
        protoc=("$work/python/venv/bin/python" -m grpc_tools.protoc)
    fi
    local mapped=()
    for file in "$root"/proto/nudged/v1/*.proto; do
        mapped+=("--go_opt=Mnudged/v1/$(basename "$file")=nudged-example/nudgedv1"
            "--go-grpc_opt=Mnudged/v1/$(basename "$file")=nudged-example/nudgedv1")
    done
    (cd "$work/go" && fetch go mod download &&
        go build -o bin/ google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc &&
        PATH="$work/go/bin:$PATH" "${protoc[@]}" -I "$root/proto" \
            --go_out=. --go_opt=module=nudged-example --go-grpc_out=. --go-grpc_opt=module=nudged-example "${mapped[@]}" \
            "$root"/proto/nudged/v1/*.proto &&
        go run .)
}

run_java() {
    copy java
    local log=$work/java/build.log
    local mvn=(mvn --quiet --batch-mode -Dstyle.color=never -Dproto.dir="$root/proto")
    cd "$work/java"
    # Maven fetches while it builds; its words tell a registry's failure from ours.
    if ! "${mvn[@]}" compile >"$log" 2>&1 && ! "${mvn[@]}" -U compile >"$log" 2>&1; then
        cat "$log" >&2
        grep -qE 'Could not (transfer|resolve|find) |Unable to resolve artifact|could not be resolved' "$log" && return $unfetched
        return 1
    fi
    "${mvn[@]}" compile exec:java
}

passed=0 failed=0 skipped=0
for language in "${@:-python node go java}"; do
    for language in $language; do
        lacking=$(missing "$language")
        if [ -n "$lacking" ]; then
            echo "examples: $language SKIPPED: this machine has no $lacking"
            skipped=$((skipped + 1))
            continue
        fi
        status=0
        ("run_$language") </dev/null || status=$?
        if [ "$status" -eq $unfetched ]; then
            echo "examples: $language SKIPPED: its packages could not be fetched"
            skipped=$((skipped + 1))
        elif [ "$status" -eq 0 ]; then
            passed=$((passed + 1))
        else
            echo "examples: $language FAILED (exit $status)" >&2
            failed=$((failed + 1))
        fi
    done
done
echo "examples: $passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] && { [ "${EXAMPLES_STRICT:-0}" != 1 ] || [ "$skipped" -eq 0 ]; }
