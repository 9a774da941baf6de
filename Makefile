# What a contributor runs is what CI runs.
#   make test          everything, on both databases (starts a private PostgreSQL; NUDGED_TEST_POSTGRES_URL uses yours)
#   make test ARGS='--lib config::'   a part of it
#   make check         formatting, lints, docs, dependencies, house rules
#   make bench         the whole pipeline against fake providers, CPU per delivery beside a bare client's
#   make demo          the whole story against fake providers, in a minute

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CARGO ?= cargo
ARGS ?=

.PHONY: help test check fmt clippy doc deny tidy bench demo

help:
	@sed -n 's/^#   //p' Makefile

test:
	scripts/with-postgres.sh $(CARGO) test --locked $(ARGS)

check: fmt clippy doc deny tidy

fmt:
	$(CARGO) fmt --check

clippy:
	$(CARGO) clippy --locked --all-targets -- -D warnings

doc:
	RUSTDOCFLAGS='-D warnings -A rustdoc::private-intra-doc-links' $(CARGO) doc --locked --no-deps --document-private-items

deny:
	@if $(CARGO) deny --version >/dev/null 2>&1; then \
		$(CARGO) deny check bans licenses sources; \
	else \
		echo 'make check: SKIPPED dependency check: cargo-deny is not installed (cargo install --locked cargo-deny)' >&2; \
	fi

tidy:
	$(CARGO) test --locked --test tidy

bench:
	$(CARGO) run --locked --release -- bench $(ARGS)

demo:
	$(CARGO) run --locked --release -- demo $(ARGS)
