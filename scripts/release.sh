#!/usr/bin/env bash
# The fastest binary: a release build laid out by a profile of the server at work. scripts/release.sh [PROGRAM]
#
# Builds once with counters, lets `nudged bench` drive that (SQLite, and Postgres where its programs are), and builds again
# with what was counted; the result is copied to PROGRAM (target/profiled/nudged). Twenty minutes and 5 GB on two cores.
# Needs `rustup component add llvm-tools`. Where there is a clang of rustc's LLVM version (clang-22 for LLVM 22), SQLite
# is profiled too; it says so if not. Such a build behaves as any other; only its speed differs.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo=${CARGO:-cargo}
program=${1:-target/profiled/nudged}
work=$PWD/target/profiled
host=$(rustc -vV | sed -n 's/^host: //p')
major=$(rustc -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p')
profdata=$(rustc --print sysroot)/lib/rustlib/$host/bin/llvm-profdata
if [ ! -x "$profdata" ]; then
    echo 'release: llvm-profdata is missing: rustup component add llvm-tools' >&2
    exit 1
fi
mkdir -p "$work"
rm -rf "$work/raw" "$work/run"
mkdir "$work/raw"

# Only what the server spends its time in: a profile must not decide how cryptography branches.
compiler=
if command -v "clang-$major" >/dev/null; then
    compiler=$work/cc
    cat >"$compiler" <<EOF
#!/usr/bin/env bash
for argument in "\$@"; do
    case \$argument in *sqlite3.c) exec clang-$major \$NUDGED_PROFILE_CFLAGS "\$@" ;; esac
done
exec clang-$major "\$@"
EOF
    chmod +x "$compiler"
else
    echo "release: without clang-$major SQLite is built as usual" >&2
fi

# build NAME RUSTFLAGS CFLAGS. With --target the flags are not for build scripts.
build() {
    env ${compiler:+CC="$compiler"} NUDGED_PROFILE_CFLAGS="$3" RUSTFLAGS="$2" NUDGED_BUILD=profiled \
        "$cargo" build --release --locked --target "$host" --target-dir "$work/$1" --bin nudged >&2
}

build counted "-Cprofile-generate=$work/raw" "-fprofile-generate"
stores=sqlite
if command -v postgres >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null; then
    stores='sqlite postgres'
fi
for store in $stores; do
    LLVM_PROFILE_FILE="$work/raw/%p-%m.profraw" timeout 600 "$work/counted/$host/release/nudged" bench --store "$store" \
        --devices 200000 --pushes 40000 --repeats 1 --rows broadcast,stream,unary,calls,failing --dir "$work/run/$store" >&2
done
"$profdata" merge --output "$work/merged.profdata" "$work"/raw/*.profraw
build nudged-build "-Cprofile-use=$work/merged.profdata" "-fprofile-use=$work/merged.profdata -Wno-profile-instr-unprofiled"
install -D -m 755 "$work/nudged-build/$host/release/nudged" "$program"
rm -rf "$work/raw" "$work/run"
echo "release: $program"
