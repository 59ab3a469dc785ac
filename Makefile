# Everything that a developer or CI runs. `make` alone lists the targets.

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

CARGO  ?= cargo
PYTHON ?= python3
INSTAR := target/release/instar
VENV   := .venv
# A worker that has nothing left takes from the others.
PYTEST := $(VENV)/bin/python -m pytest --dist worksteal
# Temporary files of tests are on an ext4 in memory, unless TMPDIR says where.
IN_MEMORY := tests/tools/in_memory.sh
# Parallel pytest workers; each may run a virtual machine, and waits for one now and then.
WORKERS ?= $(shell expr $$(nproc) + 1)
PYTEST_ARGS ?=
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?=
# What `cargo fuzz` passes, of which stable compilers know all.
# With SANITIZE=address, all code of the fuzzer is checked for bad addresses as well; with coverage, it is counted as OSS-Fuzz shows it.
SANITIZE ?=
SANITIZE_address := -Zsanitizer=address
SANITIZE_coverage := -Cinstrument-coverage
FUZZ_RUSTFLAGS := $(SANITIZE_$(SANITIZE)) -Cpasses=sancov-module $(addprefix -Cllvm-args=-sanitizer-coverage-,level=4 inline-8bit-counters pc-table trace-compares)
# The sandbox of all tests, campaigns and the demo, where they are not about one: kvm or process. If it is not named, programs
# use their default, and the fuzz targets none.
SANDBOX ?=
ifneq ($(SANDBOX),)
export INSTAR_TEST_SANDBOX := $(SANDBOX)
endif
# Random states after each write of a commit that `make crash` replays, and as many with torn sectors.
CRASH_DRAWN ?= 10
# Which pairs `make damage` draws, and how many.
DAMAGE_SEED ?= 1
DAMAGE_COUNT ?= 10000
# Which chains `make chains` draws, and how many.
CHAINS_SEED ?= 1
CHAINS_COUNT ?= 2000
# Which mutants `make mutants-sample` draws, and how many; `make mutants` tries all, or those of MUTANTS_ARGS.
MUTANTS_SEED ?= 1
MUTANTS_COUNT ?= 50
MUTANTS_ARGS ?=
# Tools that cargo installs, and their versions: into the target directory, so that nothing of the machine changes.
TOOLS := target/tools
CARGO_MUTANTS := 27.1.0
INFERNO := 0.12.8
# What only Rust tests and campaigns use, which build it with another profile.
TEST_CRATES := instar-fuzz instar-contract-tests instar-test-lab instar-testkit \
	$(patsubst plugins/%/testkit,instar-%-testkit,$(wildcard plugins/*/testkit))

# `make test-integration tests/integration/test_commit.py`: everything after the goal goes to pytest.
ifeq (test-integration,$(firstword $(MAKECMDGOALS)))
PATHS := $(wordlist 2,$(words $(MAKECMDGOALS)),$(MAKECMDGOALS))
endif
PATHS ?=

include packaging/packaging.mk

.PHONY: help instar lint test-rust test-integration test test-deep crash every-state mutations mutants mutants-sample asan faults damage chains fuzz fuzz-corpus demo picture readme-numbers rustdoc book aarch64-check bench bench-quick bench-guard profile \
	clean python fuzzer qemu-img file-systems semver

help: ## this list; SANDBOX=process runs tests, campaigns and the demo without /dev/kvm
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | \
		awk -F'|' '{ printf "  %-18s %s\n", $$1, $$2 }'

instar: ## build everything: the program, the plugins, the guest modules, the manual pages
	$(CARGO) build --release --workspace $(TEST_CRATES:%=--exclude %)
	@rm -rf $(ASSETS)
	@$(dated) target/release/instar-assets $(ASSETS)

lint: ## formatting, clippy, circles of files, widths, links, wording, licences and advisories
	$(CARGO) fmt --all --check
	$(CARGO) clippy --profile checked --workspace --all-targets -- -D warnings
	@$(PYTHON) tests/tools/circles.py
	@$(PYTHON) tests/tools/markdown_width.py
	@$(PYTHON) tests/tools/links.py
	@$(PYTHON) tests/tools/wording.py
	@if ! $(CARGO) deny --version >/dev/null 2>&1; then \
		echo 'lint: cargo-deny is not installed: licences and advisories were not checked'; \
	elif $(CARGO) deny fetch db >/dev/null 2>&1; then $(CARGO) deny check; \
	else echo 'lint: the advisory database cannot be fetched: advisories were not checked'; \
		$(CARGO) deny check licenses bans sources; fi

# Crash states are images that are made and dropped by the thousand: the C library keeps their memory instead of mapping each of
# them anew, which was a third of the time.
test-rust: export MALLOC_MMAP_THRESHOLD_ := 1073741824
test-rust: export MALLOC_TRIM_THRESHOLD_ := 4294967296
test-rust: export MALLOC_TOP_PAD_ := 67108864
# Those of the KVM sandbox are the tests of a machine with KVM, and are left out only if the run is about the other one.
test-rust: qemu-img ## the Rust tests
	@nextest=() other=(); \
	if [ '$(SANDBOX)' = process ] && ! [ -e /dev/kvm ]; then \
		echo 'test-rust: no /dev/kvm: the tests of the KVM sandbox are skipped'; \
		nextest=(-E 'not test(/(^|::)kvm$$|^virtual_machine::/)') other=(-- --skip ::kvm --skip virtual_machine::); \
	fi; \
	if $(CARGO) nextest --version >/dev/null 2>&1; then \
		$(IN_MEMORY) $(CARGO) nextest run --cargo-profile checked --workspace "$${nextest[@]}" && \
		$(CARGO) test --profile checked --doc $$(tests/tools/documented.sh); \
	else $(IN_MEMORY) $(CARGO) test --profile checked --workspace "$${other[@]}"; fi

test-integration: instar python qemu-img file-systems mandoc ## the Python tests; paths and options after the goal go to pytest
	INSTAR_BIN=$(CURDIR)/$(INSTAR) $(IN_MEMORY) $(PYTEST) -n $(WORKERS) $(PYTEST_ARGS) $(or $(PATHS),tests/integration)

# One after the other, whatever -j says: each of them uses all processors by itself.
test: ## everything that CI runs: lint, test-rust, test-integration
	$(MAKE) lint
	$(MAKE) test-rust
	$(MAKE) test-integration

test-deep: instar python qemu-img file-systems mandoc ## the long tests: more random images, more crash points, 500 sequences of commands beside qemu-img (hours)
	PROPTEST_CASES=20000 INSTAR_DEEP=1 $(CARGO) test --profile checked --workspace
	INSTAR_BIN=$(CURDIR)/$(INSTAR) INSTAR_DEEP=1 $(PYTEST) -n $(WORKERS) $(PYTEST_ARGS) tests/integration

fuzz: fuzzer ## run every fuzz target (or FUZZ_TARGETS) for FUZZ_SECONDS seconds each
	@fuzz/run.sh $(FUZZ_SECONDS) $(FUZZ_TARGETS)

fuzz-corpus: fuzzer ## take what the fuzz targets found to cover more into fuzz/corpus, as little of it as does
	@fuzz/run.sh merge $(FUZZ_TARGETS)

crash: instar python qemu-img file-systems ## power losses: replay what commands wrote, more random states than the tests have; on real file systems, also twice in a row
	@log=$$(mktemp); trap 'rm -f "$$log"' EXIT; \
	export INSTAR_CRASH_DRAWN=$(CRASH_DRAWN); \
	{ $(CARGO) test --profile checked -p instar-parallels-driver -p instar-qcow-driver -p instar-qcow2-driver -p instar-vdi-driver -p instar-vhd-driver -p instar-vhdx-driver -p instar-vmdk-driver -- --nocapture && \
		$(CARGO) test --profile checked -p instar-fuzz --test crashes -- --nocapture; } > "$$log" 2>&1 || \
		{ grep -E 'panicked at|^error|FAILED' -B2 -A3 "$$log"; echo 'crash: a violation, see above' >&2; exit 1; }; \
	awk '/crash states: / { sub(/.*crash states: /, ""); states += $$1; commits++ } \
		END { print states " states of " commits " commits, 0 violations"; exit states < 20000 }' "$$log"
	INSTAR_BIN=$(CURDIR)/$(INSTAR) unshare --mount $(VENV)/bin/python tests/campaigns/power_loss.py
	INSTAR_BIN=$(CURDIR)/$(INSTAR) unshare --mount $(VENV)/bin/python tests/campaigns/atomic_devices.py

every-state: qemu-img ## all states that a power loss can leave of small images, at least a million of all commands and formats (an hour)
	$(PYTHON) tests/campaigns/every_state.py $(EVERY_STATE_ARGS)

mutations: python qemu-img ## would the crash tests notice? takes out every flush of the drivers, swaps steps (an hour or two)
	$(VENV)/bin/python tests/campaigns/mutations.py $(MUTATIONS)

mutants: cargo-mutants qemu-img ## cargo-mutants over drivers, format libraries, devices, confinement and images (a day; MUTANTS_ARGS)
	$(PYTHON) tests/campaigns/mutants.py --tools $(TOOLS)/bin $(MUTANTS_ARGS)

mutants-sample: cargo-mutants qemu-img ## as many of them as MUTANTS_COUNT says (50), drawn with MUTANTS_SEED (hours)
	$(PYTHON) tests/campaigns/mutants.py --tools $(TOOLS)/bin --draw $(MUTANTS_COUNT) --seed $(MUTANTS_SEED) $(MUTANTS_ARGS)

faults: instar python qemu-img file-systems ## every system call on an image fails once, is cut short, is where the program is killed: all commands
	INSTAR_BIN=$(CURDIR)/$(INSTAR) $(if $(filter 0,$(shell id -u)),unshare --mount )$(VENV)/bin/python tests/campaigns/every_fault.py

# The switch of the compiler is not stable: RUSTC_BOOTSTRAP lets the stable compiler take it, for tests only. The C code (zstd)
# is instrumented by the C compiler, and both report to one runtime. A leak is no bad address, and some tests leak what has to live
# as long as they do.
ASAN := ASAN_OPTIONS=detect_leaks=0 RUSTC_BOOTSTRAP=1 RUSTFLAGS='-Zsanitizer=address' CFLAGS_x86_64_unknown_linux_gnu='-fsanitize=address -fno-omit-frame-pointer'
ASAN_CRATES ?= instar-qcow2-format instar-guest-sdk instar-guest-view instar-plugin-api

asan: ## the C code of zstd, and `unsafe` of the SDK and the contract, under AddressSanitizer: their tests (ASAN_CRATES)
	$(ASAN) $(CARGO) test --profile checked --target x86_64-unknown-linux-gnu --target-dir target/asan --lib --tests \
		$(ASAN_CRATES:%=-p %) --features $(if $(filter instar-guest-sdk,$(ASAN_CRATES)),instar-guest-sdk/memory)

damage: ## commit, check, map, resize, rebase, convert and repair pairs of which one to three words of metadata are wrong (DAMAGE_SEED, DAMAGE_COUNT)
	$(CARGO) run --profile checked -p instar-fuzz --bin instar-damage -- $(DAMAGE_SEED) $(DAMAGE_COUNT)

chains: ## commit drawn chains of all formats, two to nine images deep (CHAINS_SEED, CHAINS_COUNT)
	$(CARGO) run --profile checked -p instar-fuzz --bin instar-chains -- $(CHAINS_SEED) $(CHAINS_COUNT)

demo: instar ## commit a small overlay and show before and after (needs no qemu)
	@INSTAR_BIN=$(CURDIR)/$(INSTAR) PYTHON=$(PYTHON) tests/tools/demo.sh

rustdoc: ## the documentation of all crates, without a warning: links inside it lead somewhere
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps

# Installed into target/, once for each version.
MDBOOK_VERSION := 0.5.4
MDBOOK := target/tools/mdbook-$(MDBOOK_VERSION)/bin/mdbook

$(MDBOOK):
	$(CARGO) install mdbook --version $(MDBOOK_VERSION) --locked --no-default-features --features search \
		--root target/tools/mdbook-$(MDBOOK_VERSION) --target-dir target/tools/build

book: $(MDBOOK) ## the documents as a book, in target/book/book; the table of contents is made from docs/README.md
	@$(PYTHON) tests/tools/book.py sources target/book
	@$(MDBOOK) build target/book
	@$(PYTHON) tests/tools/book.py links target/book/book

picture: instar ## draw docs/demo.svg, the terminal in the README, from a real run of the demo
	@INSTAR_BIN=$(CURDIR)/$(INSTAR) $(PYTHON) tests/tools/demo_picture.py

readme-numbers: ## copy the measurements that the README shows from docs/performance.md
	@$(PYTHON) tests/tools/readme_numbers.py

# What is measured is what is installed: beside a build lie the plugins of the tests, which would be loaded, too.
BENCHED := target/stage/bench

.PHONY: benched
benched: instar
	@rm -rf $(BENCHED)
	@$(MAKE) --no-print-directory install DESTDIR=$(CURDIR)/$(BENCHED) PREFIX= > /dev/null

bench: benched python qemu-img file-systems ## measure against qemu-img commit and refresh docs/performance.md
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r tests/requirements-bench.txt
	$(VENV)/bin/python tests/bench --instar $(BENCHED)/bin/instar $(or $(BENCH_ARGS),--write-docs)
	@$(PYTHON) tests/tools/readme_numbers.py

bench-quick: benched qemu-img file-systems ## the same with small images, under two minutes, changes no file of the project
	$(PYTHON) tests/bench --instar $(BENCHED)/bin/instar --quick $(BENCH_ARGS)

bench-guard: instar python qemu-img ## count what fixed workloads ask for and move, against tests/bench/guard.json (BLESS='why' writes it)
	@INSTAR_BIN=$(CURDIR)/$(INSTAR) $(IN_MEMORY) $(VENV)/bin/python tests/bench/guard.py $(if $(BLESS),--bless '$(BLESS)')

profile: instar inferno qemu-img ## flame graphs of a workload of the benchmark in both sandboxes, with perf (WORKLOAD, PROFILE_ARGS)
	$(PYTHON) tests/bench/flamegraph.py --instar $(INSTAR) --tools $(TOOLS)/bin $(WORKLOAD) $(PROFILE_ARGS)

# Everything but what is made for x86-64 by its nature, and what is built on that:
# - instar (engine/): the registers of a virtual machine and its page tables (sandbox/kvm), the system calls of the filter and their
#   names (confine/calls.rs, call_names.rs), the registers of a signal's context (confine/signal_mask.rs);
# - instar-cli and instar-assets, which are built on it;
# - what only tests use: it is built on the engine, or reads the registers of a traced process (instar-test-inject).
X86_64 := instar instar-cli instar-assets instar-test-inject $(TEST_CRATES)

aarch64-check: ## does what is not made for x86-64 compile for aarch64? The contract, the SDK, all formats, their plugins and guests
	$(call need,aarch64-linux-gnu-gcc,gcc-aarch64-linux-gnu libc6-dev-arm64-cross)
	@if command -v rustup >/dev/null; then rustup target add aarch64-unknown-linux-gnu 2>/dev/null; fi
	$(CARGO) check --profile checked --target aarch64-unknown-linux-gnu --workspace $(X86_64:%=--exclude %)

# Installing the tool takes ten minutes.
semver: ## are the plugin crates still compatible with those of contract 1.0? (cargo-semver-checks)
	@$(CARGO) semver-checks --version >/dev/null 2>&1 || $(CARGO) install cargo-semver-checks --locked
	@for crate in plugin-api guest/abi guest/build guest/sdk; do \
		$(CARGO) semver-checks --manifest-path $$crate/Cargo.toml --baseline-root tests/compat/plugin-api-1.0 \
			--release-type minor || exit 1; done

clean: ## remove what was built; the tools in .venv, too
	$(CARGO) clean
	rm -rf $(VENV) bench-results tests/.pytest_cache

# --- set-up ---------------------------------------------------------------------------------------------------

python: $(VENV)/.ready

# Debian splits ensurepip off: where it is missing, virtualenv does the same, from pip if it is not there either.
$(VENV)/.ready: tests/requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo 'python3 is needed: apt-get install python3 python3-venv' >&2; exit 1; }
	@rm -rf $(VENV); \
	if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -m virtualenv --version >/dev/null 2>&1; then $(PYTHON) -m virtualenv -q $(VENV); \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && apt-get install -y -q --no-install-recommends python3-venv && $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -m pip install -q --user --break-system-packages virtualenv 2>/dev/null || \
		$(PYTHON) -m pip install -q --user virtualenv; then $(PYTHON) -m virtualenv -q $(VENV); \
	else echo 'python3 cannot make a virtual environment: apt-get install python3-venv' >&2; exit 1; fi
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r tests/requirements.txt
	@touch $@

# With a target named, build scripts and macros are not instrumented.
fuzzer:
	@if command -v c++ >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && apt-get install -y -q --no-install-recommends g++; \
	else echo 'a C++ compiler is needed for libFuzzer: apt-get install g++' >&2; exit 1; fi
	$(if $(SANITIZE),RUSTC_BOOTSTRAP=1) RUSTFLAGS='$(FUZZ_RUSTFLAGS)' $(CARGO) build --profile checked --target x86_64-unknown-linux-gnu -p instar-fuzz \
		--features libfuzzer --bin instar-fuzz

qemu-img:
	@if command -v qemu-img >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && apt-get install -y -q --no-install-recommends qemu-utils; \
	else echo 'qemu-img is needed to compare with: apt-get install qemu-utils' >&2; exit 1; fi

# File systems that share extents: to try and to measure that.
file-systems:
	@if command -v mkfs.xfs >/dev/null && command -v mkfs.btrfs >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && apt-get install -y -q --no-install-recommends xfsprogs btrfs-progs; \
	else echo 'mkfs.xfs and mkfs.btrfs are needed: apt-get install xfsprogs btrfs-progs' >&2; exit 1; fi

.PHONY: cargo-mutants inferno
cargo-mutants:
	@grep -qsF 'cargo-mutants $(CARGO_MUTANTS) ' $(TOOLS)/.crates.toml || \
		$(CARGO) install cargo-mutants --version '=$(CARGO_MUTANTS)' --locked --root $(TOOLS)

inferno:
	@grep -qsF 'inferno $(INFERNO) ' $(TOOLS)/.crates.toml || \
		$(CARGO) install inferno --version '=$(INFERNO)' --locked --root $(TOOLS)

# Goals after test-integration are arguments of pytest, not goals.
ifneq ($(PATHS),)
.PHONY: $(PATHS)
$(PATHS):
	@:
endif
