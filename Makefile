# What a contributor runs is what CI runs.
#   make test          everything, on both databases (starts a private PostgreSQL; NUDGED_TEST_POSTGRES_URL uses yours)
#   make test ARGS='--lib config::'   a part of it
#   make check         formatting, lints, docs, dependencies, house rules
#   make bench         the whole pipeline against fake providers, CPU per delivery beside a bare client's, on both stores;
#                      the tables of docs/performance.md (half an hour; ARGS=--quick: a few minutes, and worthless figures)
#   make release       the fastest binary, laid out by a profile of the server at work: target/profiled/nudged (scripts/release.sh;
#                      twenty minutes; `cargo build --release` does without)
#   make proto         buf lint and buf breaking against the last release (or main), where buf is installed (part of make check)
#   make examples      callers in Python, Node, Go and Java against the real binary (needs their package registries)
#   make powercut      SQLite on a disk that forgets what was not synced: so many random cuts (CUTS=10000 SEED_FROM=1) and
#                      one at every write and sync; part of make test with 300
#   make sim           simulated histories of the whole engine: so many (HISTORIES=1000000 SEED_FROM=1, FILES=1 on WAL files), or
#                      one, told in full and made small (SEED=7); part of make test with 20 000
#   make sim-cluster   … of two to four replicas on one store: so many (HISTORIES=10000 SEED_FROM=1; SHOW=1 prints every fact of
#                      the red ones); part of make test with 200
#   make torture       kill -9 of the release binary under load: STORE=sqlite, postgres or postgres-itself (Postgres is killed),
#                      KILLS=100 EVENTS=10000 (between kills) SEED= (LEDGER=yes: into docs/ledger.tsv); part of make test
#                      with 45 kills
#   make fuzz          attacks every parser (src/fuzzing) for SECONDS=60 or HOURS= each; TARGET= one of them; INPUT=file that again
#   make consent       nothing forbidden later than a second: TARGETS=20000 queued, SECS=10, on both stores; part of make test
#   make soak          a steady mixed load with faults on the release binary for MINUTES=10; red when anything rises
#   make planted       shows that the tests can fail: plants every bug of tests/planted.tsv and runs the tests that must
#                      find it (not part of CI; ARGS='NAME…': only those; PLANTED_TABLE=docs/planted.md keeps the table)
#   make faults        every provider fault × platform × store × moment in simulated time, held to the table in docs/reliability.md
#                      (FAULT='REFUSED_STREAM': only rows that contain it; SEED=7: another order of things); TLS=yes: against the
#                      real binary over real TLS, on both stores; both part of make test, over TLS one moment of each row
#   make demo          the whole story against fake providers, in a minute

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CARGO ?= cargo
ARGS ?=
FAULT ?=

.PHONY: help test check fmt clippy doc deny proto tidy bench release examples fuzz powercut sim sim-cluster torture consent soak planted faults demo

help:
	@sed -n 's/^#   //p' Makefile

test:
	scripts/with-postgres.sh $(CARGO) test --locked $(ARGS)
	$(if $(ARGS),,$(MAKE) sim HISTORIES=20000)

check: fmt clippy doc deny proto tidy

fmt:
	$(CARGO) fmt --check

clippy:
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) metadata --locked --format-version 1 --manifest-path fuzz/Cargo.toml >/dev/null

doc:
	RUSTDOCFLAGS='-D warnings -A rustdoc::private-intra-doc-links' $(CARGO) doc --locked --no-deps --document-private-items

deny:
	@if $(CARGO) deny --version >/dev/null 2>&1; then \
		$(CARGO) deny check bans licenses sources; \
	else \
		echo 'make check: SKIPPED dependency check: cargo-deny is not installed (cargo install --locked cargo-deny)' >&2; \
	fi

# What the protos are compared with: the last release, and main before the first.
BREAKING_AGAINST ?= $(shell git describe --tags --abbrev=0 2>/dev/null || echo main)
BUF ?= $(shell command -v buf || ls "$$(go env GOPATH 2>/dev/null)/bin/buf" 2>/dev/null)

proto:
	@if [ -z '$(BUF)' ]; then \
		echo 'make check: SKIPPED buf lint and buf breaking: buf is not installed (go install github.com/bufbuild/buf/cmd/buf@latest)' >&2; \
	else \
		(cd proto && '$(BUF)' lint && '$(BUF)' format --diff --exit-code) || exit 1; \
		if git rev-parse --quiet --verify '$(BREAKING_AGAINST)' >/dev/null; then \
			'$(BUF)' breaking proto --against "$$(git rev-parse --git-common-dir)#ref=$$(git rev-parse '$(BREAKING_AGAINST)'),subdir=proto"; \
		else \
			echo 'make check: SKIPPED buf breaking: there is no $(BREAKING_AGAINST) to compare with' >&2; \
		fi; \
	fi

tidy:
	$(CARGO) test --locked --test tidy

release:
	CARGO='$(CARGO)' scripts/release.sh

bench:
	CARGO='$(CARGO)' scripts/performance.sh $(ARGS)

TLS ?=

faults:
	NUDGED_TEST_FAULT='$(FAULT)' NUDGED_TEST_FAULT_SEED='$(SEED)' NUDGED_TEST_FAULT_MOMENTS=all \
		$(if $(TLS),scripts/with-postgres.sh) $(CARGO) test --locked --test $(if $(TLS),it,sim) faults:: -- --nocapture $(ARGS)

examples:
	examples/run.sh $(ARGS)

CUTS ?= 300
SEED_FROM ?= 1000

powercut:
	NUDGED_TEST_CUTS='$(CUTS)' NUDGED_TEST_CUTS_FROM='$(SEED_FROM)' $(CARGO) test --locked --test powercut -- --nocapture

HISTORIES ?=
SEED_FROM ?=
SEED ?=
FILES ?=
THREADS ?=

# A campaign is optimised; what it is linked with is not built anew. Its checks of arithmetic and invariants stay.
sim:
	$(if $(HISTORIES),CARGO_PROFILE_DEV_OPT_LEVEL=1) NUDGED_SIM_HISTORIES='$(HISTORIES)' NUDGED_SIM_SEED_FROM='$(SEED_FROM)' \
		NUDGED_SIM_SEED='$(SEED)' NUDGED_SIM_FILES='$(FILES)' NUDGED_SIM_THREADS='$(THREADS)' \
		$(CARGO) test --locked --test sim $(ARGS) -- --nocapture \
		$(if $(SEED),one_seed_is_told_in_full,$(if $(HISTORIES),histories_keep_the_contract))

SHOW ?=

sim-cluster:
	NUDGED_SIM_CLUSTER_HISTORIES='$(HISTORIES)' NUDGED_SIM_CLUSTER_FROM='$(SEED_FROM)' NUDGED_SIM_CLUSTER_SHOW='$(SHOW)' \
		$(CARGO) test --locked --test sim $(ARGS) -- --nocapture cluster::

# Seconds for each target.
fuzz:
	CARGO='$(CARGO)' SECONDS_EACH=$$(( $(or $(SECONDS),60) + 3600 * $(or $(HOURS),0) )) \
		TARGET='$(TARGET)' INPUT='$(INPUT)' ENGINE='$(ENGINE)' scripts/fuzz.sh

planted:
	CARGO='$(CARGO)' scripts/with-postgres.sh scripts/planted.sh $(ARGS)

consent:
	NUDGED_CONSENT_TARGETS='$(TARGETS)' NUDGED_CONSENT_SECS='$(SECS)' NUDGED_CONSENT_SEED='$(SEED)' \
		$(CARGO) test --locked --release --test it consent:: -- --nocapture --test-threads=1

MINUTES ?= 10

soak:
	NUDGED_SOAK_SECS=$$(( $(MINUTES) * 60 )) NUDGED_SOAK_SEED='$(SEED)' \
		$(CARGO) test --locked --release --test it soak::nothing -- --nocapture

export STORE KILLS EVENTS SEED REPLICAS BREAK LEDGER

torture:
	CARGO='$(CARGO)' scripts/torture.sh

demo:
	$(CARGO) run --locked --release -- demo $(ARGS)
