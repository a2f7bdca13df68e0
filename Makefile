# SPDX-License-Identifier: Apache-2.0
# Every target installs its requirements: system packages (as root; otherwise it prints the command),
# then .venv with the package and its compiled engine.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

BUILD_PACKAGES := gcc libc6-dev libssl-dev python3 python3-dev python3-venv
TEST_PACKAGES := e2fsprogs fish fiu-utils libvirt-clients libvirt-daemon \
	libvirt-daemon-driver-qemu libxml2-utils strace systemd zsh
KIT_PACKAGES := debian-archive-keyring debootstrap
FUZZ_PACKAGES := clang libclang-rt-dev

# QEMU=no excludes the tests that boot a guest or run etcd: both need Debian packages unpacked by root.
QEMU ?= yes
PYTEST_ARGS ?=
# Processes that run tests side by side in make test; 0 runs all in one, which --pdb needs.
WORKERS ?= 2
# A file's tests run in one worker, which makes what they share once; files in their order, long ones
# first (docs/decisions/0030-workers.md).
PARALLEL = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Duration of each fuzz target.
SECONDS ?= 60
FUZZ_TARGETS ?= rings packed frames stream

# The sanitizers' library has to be loaded before Python, also in child processes. CPython does not
# free all memory at exit, so leak detection is off; its own allocator would hide errors. The daemon
# keeps control of SIGBUS and of the core dump limit; the quarantine of freed memory is bounded.
SANITIZER_ENV := PYTHONMALLOC=malloc UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:handle_sigbus=0:disable_coredump=0:quarantine_size_mb=8
# Excluded: tests that build with other compiler flags or bound time or memory, which the sanitizers
# multiply. pyproject.toml defines the markers. The tests of stores and of the package, which are not
# listed, execute next to no compiled code. The thread of faulthandler, which begins and ends with each
# test, would disturb tests that fork (see tests/conftest.py).
NOT_SANITIZED := etcd or kept or long or qemu or needs_network or needs_ptrace or needs_sigsegv or timing or \
	memory
SANITIZED := $(addprefix tests/,client crash daemon driver fuzz hostile rpmb vhost_user virtio)

# Excluded from coverage: tests that install a build of their own, and tests that are too slow with tracing.
NOT_TRACED := qemu or needs_network or needs_ptrace or timing

# Compiled sources and package metadata: a change rebuilds. Python files are not listed, .venv uses
# them in place (an editable install). The stamp's name encodes the list of files and the kind of
# build, so that a removed file or another kind also rebuilds.
BUILD_INPUTS := pyproject.toml setup.py vhost_rpmb/__init__.py \
	$(sort $(shell find vhost_rpmb -name '*.pyx' -o -name '*.pxd' -o -name '*.h'))
STAMP := .venv/installed-$(shell echo \
	'$(BUILD_INPUTS) $(VHOST_RPMB_BUILD_CHECKED) $(VHOST_RPMB_BUILD_TRACED)' | cksum | cut -d ' ' -f 1)
# Compiled modules that are missing.
MISSING := $(strip $(foreach source,$(wildcard vhost_rpmb/_fast/*.pyx),\
	$(if $(wildcard $(basename $(source)).*.so),,$(source))))

# C compiler warnings are errors in our own builds, never in those of a user with a newer compiler.
# (CPPFLAGS, because setuptools appends them to Python's own flags; CFLAGS would replace those.)
export CPPFLAGS := -Werror $(CPPFLAGS)
# Imports come from .venv only, and bytecode is cached, as in an installation.
unexport PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

.PHONY: setup
setup: $(STAMP) ## Build and install into .venv

.PHONY: demo
demo: $(STAMP) ## Show a real guest that keeps its secrets across restarts (QEMU)
	@if [ "$$(id -u)" -eq 0 ]; then tools/system-packages $(KIT_PACKAGES); fi
	.venv/bin/python -m tests.e2e.demo

.PHONY: test
test: $(STAMP) ## Run the tests on both engines, in WORKERS=2 processes; QEMU=no: without guests and etcd
	@tools/system-packages $(TEST_PACKAGES)
ifeq ($(QEMU),no)
	.venv/bin/pytest --cov --cov-report=term $(PARALLEL) -m 'not (qemu or etcd or long)' $(PYTEST_ARGS)
else
	@tools/system-packages $(KIT_PACKAGES)
	@.venv/bin/python -m tests.e2e.kit || \
		{ echo 'make test QEMU=no excludes the tests that need it' >&2; exit 1; }
	.venv/bin/pytest --cov --cov-report=term $(PARALLEL) -m 'not long' $(PYTEST_ARGS)
endif

# Three consecutive runs, because most failures under load are rare.
.PHONY: test-loaded
test-loaded: $(STAMP) ## Run all tests three times while stress-ng loads the processors
	@tools/system-packages stress-ng
	@$(if $(filter no,$(QEMU)),true,tools/system-packages $(KIT_PACKAGES) && .venv/bin/python -m tests.e2e.everything)
	@stress-ng --cpu 4 --quiet & load=$$!; trap "kill $$load" EXIT; \
	for run in 1 2 3; do $(MAKE) test; done

# A second tree for an engine built in another way; .venv and the engine in this tree are not changed.
define copy_tree
	@mkdir -p $(1)
	@find $(1) -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
	@tar --create --exclude-vcs --exclude='*.so' --exclude=__pycache__ --exclude='./.*_cache' \
		--exclude=./.venv --exclude=./build --exclude=./dist . | tar --extract -C $(1)
endef

# Coverage reports need Cython and its generated C files.
.PHONY: coverage
coverage: ## Measure the lines of Python and of the compiled engine that the tests execute
	@tools/system-packages $(BUILD_PACKAGES) $(TEST_PACKAGES)
	$(call copy_tree,build/coverage)
	sed -i 's/^\[tool\.coverage\.run\]$$/&\nplugins = ["Cython.Coverage"]/' build/coverage/pyproject.toml
	VHOST_RPMB_BUILD_TRACED=1 $(MAKE) -C build/coverage setup
	build/coverage/.venv/bin/python -m pip install --quiet --disable-pip-version-check Cython
	cd build/coverage && .venv/bin/python -m pytest --cov \
		--cov-report=term-missing:skip-covered -m 'not ($(NOT_TRACED))' $(PYTEST_ARGS)

.PHONY: test-sanitized
test-sanitized: ## Run the tests that execute compiled code, without guests, under the sanitizers
	@tools/system-packages $(BUILD_PACKAGES) $(TEST_PACKAGES)
	$(call copy_tree,build/sanitized)
	VHOST_RPMB_BUILD_CHECKED=1 $(MAKE) -C build/sanitized setup
	cd build/sanitized && $(SANITIZER_ENV) LD_PRELOAD="$$(gcc -print-file-name=libasan.so)" \
		.venv/bin/python -m pytest -o faulthandler_timeout=0 \
		-m 'not ($(NOT_SANITIZED))' $(SANITIZED) $(PYTEST_ARGS)

# Excluded: tests of features that an emulated chroot with only the installed package lacks (the
# emulator has no ptrace, Landlock or seccomp: docs/decisions/0016-aarch64.md). Packages are not installed
# from PyPI there: pip would be emulated, and this target builds and installs the wheel itself.
NOT_EMULATED := etcd or qemu or needs_host or needs_network or needs_ptrace or needs_sandbox or \
	needs_sources or timing
.PHONY: test-aarch64
test-aarch64: $(STAMP) ## Build the wheel for aarch64 and test it under QEMU's user emulation (root)
	@tools/system-packages $(KIT_PACKAGES)
	$(call copy_tree,build/aarch64)
	.venv/bin/python -m tests.e2e.aarch64 build/aarch64 -m 'not ($(NOT_EMULATED))' \
		$(PYTEST_ARGS)

# New inputs of a campaign are kept in build/fuzz-corpus, failing ones in build/fuzz-found.
.PHONY: fuzz
fuzz: ## Fuzz the sanitized engine, SECONDS=60 for each of FUZZ_TARGETS="rings packed frames stream"
	@tools/system-packages $(BUILD_PACKAGES) $(FUZZ_PACKAGES)
	$(call copy_tree,build/fuzz)
	CC=clang CPPFLAGS=-fsanitize=fuzzer-no-link VHOST_RPMB_BUILD_CHECKED=1 \
		$(MAKE) -C build/fuzz setup
	build/fuzz/.venv/bin/python -m pip install --quiet --disable-pip-version-check atheris
	for target in $(FUZZ_TARGETS); do \
		mkdir -p build/fuzz-corpus/$$target build/fuzz-found; \
		tests/fuzz/run build/fuzz $$target -max_total_time=$(SECONDS) \
			-artifact_prefix="$$PWD/build/fuzz-found/$$target-" \
			"$$PWD/build/fuzz-corpus/$$target" "$$PWD/tests/fuzz/corpus/$$target"; \
	done

.PHONY: test-long
test-long: $(STAMP) ## Run the campaigns of power loss, kills, restarts, failing storage and attacks in full
	@tools/system-packages $(TEST_PACKAGES)
ifneq ($(QEMU),no)
	@tools/system-packages $(KIT_PACKAGES)
endif
	VHOST_RPMB_CRASH_STATES=60000 VHOST_RPMB_EVERY_SYNC=1 VHOST_RPMB_KILL_ROUNDS=100 \
	VHOST_RPMB_FAULT_CASES=0 VHOST_RPMB_HOSTILE_FULL=1 VHOST_RPMB_BLK_KILLS=200 \
	VHOST_RPMB_FRONTEND_KILLS=100 VHOST_RPMB_RESTART_KILLS=200 VHOST_RPMB_SYSTEMD_RESTARTS=50 \
	.venv/bin/pytest -o timeout=7200 tests/crash tests/hostile tests/vhost_user/test_frontends.py \
	tests/daemon/test_handover_messages.py tests/daemon/test_handover_signals.py \
	tests/e2e/test_blk.py tests/e2e/test_restarts.py tests/e2e/test_systemd_restarts.py \
	$(if $(filter no,$(QEMU)),-m 'not qemu') $(PYTEST_ARGS)
ifneq ($(QEMU),no)
	.venv/bin/pytest -o timeout=7200 -m long tests $(PYTEST_ARGS)
endif

.PHONY: lint
lint: $(STAMP) ## Check style, types, spelling, the compiled modules' stubs, workflows, systemd units
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	PATH="$$PWD/.venv/bin:$$PATH" cython-lint vhost_rpmb
	.venv/bin/python tools/constants.py --check
	.venv/bin/mypy
	.venv/bin/stubtest --concise vhost_rpmb._fast
	.venv/bin/codespell
	PATH="$$PWD/.venv/bin:$$PATH" jactionlint
	@tools/system-packages systemd
	tools/check-units

.PHONY: docs
docs: $(STAMP) ## Build the documentation into build/docs
	.venv/bin/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env docs build/docs

# --benchmark-save=NAME keeps a run, --benchmark-compare compares with it: docs/performance.md.
BENCH_ARGS ?=
BENCH := .venv/bin/pytest -o timeout=0 --benchmark-columns=min,median,iqr,rounds \
	--benchmark-sort=name bench
.PHONY: bench
bench: $(STAMP) ## Measure both engines against their floors, into build/bench.json
	@tools/system-packages $(TEST_PACKAGES) valgrind
	$(BENCH) --benchmark-json=build/bench.json $(if $(filter no,$(QEMU)),-m 'not etcd') $(BENCH_ARGS)

.PHONY: bench-gate
bench-gate: $(STAMP) ## Check the goals of docs/performance.md; BENCH_ARGS=--stable for shared machines
	@tools/system-packages strace valgrind
	$(BENCH) -m 'gate$(if $(filter no,$(QEMU)), and not etcd)' $(BENCH_ARGS)

# A daemon that others wrote, which listens at SOCKET on processor 0; KEY is the file of its device's key.
.PHONY: bench-peer
bench-peer: $(STAMP) ## Measure the daemon that listens at SOCKET, whose device has the key in KEY, beside ours
	$(BENCH)/test_latency.py --peer='$(SOCKET)' --peer-key='$(KEY)' \
		--benchmark-json=build/peer.json $(BENCH_ARGS)
	@.venv/bin/python -m bench.page --compare build/peer.json

.PHONY: guest-dkms
guest-dkms: ## Build the Debian package of the Linux guest driver (DKMS) in build
	@tools/guest-dkms build

.PHONY: clean
clean: ## Remove all build results (the guest kit in the cache stays)
	rm -rf .venv build dist docs/plots *.egg-info .coverage .coverage.* .hypothesis
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	rm -f vhost_rpmb/_fast/*.so
	find bench tests vhost_rpmb -name __pycache__ -prune -exec rm -r {} +

.PHONY: always
$(STAMP): $(BUILD_INPUTS) $(if $(MISSING),always)
	@tools/system-packages $(BUILD_PACKAGES)
	@test -x .venv/bin/python || "$$(tools/find-python)" -m venv .venv
	rm -rf .venv/installed-* build/lib* vhost_rpmb/_fast/*.so
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,bench,docs,lint]'
	@touch $@
