# The verbs of this project. Everything happens in .venv, which is made on demand; nothing else is needed but
# Python 3.11 or newer with its headers, a C compiler and make.

PYTHON ?= python3
VENV := .venv
# into how many processes the suite is divided; a debugger wants 0, which is pytest's own
TEST_WORKERS ?= 2
BIN := $(VENV)/bin
CORE := $(wildcard src/cagey_sessions/*.pyx src/cagey_sessions/core/*.pxi)
SOURCES := pyproject.toml setup.py $(CORE)
DEBUG := build/debug
SANITIZE := build/sanitize
COVERAGE := build/coverage
# what a build leaves behind, and a build with other switches would take for its own
LEFTOVERS = build/lib* build/temp* build/bdist*
ASV_BENCH := track_(find_hot|timer_schedule|save_total|lag|bytes)[(]
GROWTH := find_1e6,timer_schedule,timer_refresh,timer_cancel,timer_expire,tick_idle,timer_schedule_uvloop,timer_refresh_uvloop

.PHONY: help demo test test-debug check-core lint types coverage format bench bench-adapters shape figures plots mutants simulation \
  crash nightly diagrams docs shots dist workflows clean

help:
	@echo "make demo        a game server and its bots, stopped and killed: nothing acknowledged is lost"
	@echo "make test        the whole suite, and what moves users about on a debug build (TEST_WORKERS=2)"
	@echo "make check-core  the core under assertions, sanitizers and leak scripts (CHECK_ARGS='--only leaks')"
	@echo "make lint types  ruff, cython-lint and codespell; mypy in strict mode, pyright, and the stub against the core"
	@echo "make coverage    how much of the Python and of the core the tests run: at least 95 % (TEST_ARGS=)"
	@echo "make workflows   the GitHub workflows against their schema, and a security linter over them"
	@echo "make dist        sdist and wheels for each Python here, installed and used outside the checkout (PYTHONS='...')"
	@echo "make format      ruff's formatter"
	@echo "make bench       benchmarks against what one would use instead (BENCH_ARGS='--quick')"
	@echo "make shape       how many functions and modules a call passes through, and the shape of the sources (SHAPE_ARGS=)"
	@echo "make figures     the whole run and the growth runs into docs/plots, then make plots"
	@echo "make plots       docs/plots/*.svg and the tables of docs/performance.md from the figures there"
	@echo "make simulation  random servers, databases and crashes in virtual time (SIMULATION_ARGS='--seeds 2000')"
	@echo "make crash       writers killed with SIGKILL on SQLite, PostgreSQL and Redis (CRASH_ARGS='--only redis --kills 20')"
	@echo "make mutants     known faults put into the sources: the tests have to find each (MUTANTS_ARGS='--only release')"
	@echo "make nightly     all of that for hours (NIGHTLY_SEEDS=50000, NIGHTLY_EXAMPLES=20000)"
	@echo "make diagrams    the pictures of the pages, drawn from the code"
	@echo "make docs        the documentation site, into build/site; a link that leads nowhere fails it"
	@echo "make shots       pictures of the demo for the pages, by playing it (SHOTS_ARGS='--bots 100')"
	@echo "make clean       remove .venv and everything built"

$(VENV)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cagey-sessions needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/demo: $(VENV)/python $(SOURCES)
	$(BIN)/pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/dev: $(VENV)/python $(SOURCES)
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/demo

$(VENV)/bench: $(VENV)/dev
	$(BIN)/pip install --quiet --editable '.[bench]'
	@touch $@

$(VENV)/docs: $(VENV)/dev
	$(BIN)/pip install --quiet --editable '.[docs]'
	@touch $@

$(DEBUG)/built: $(VENV)/dev $(SOURCES) $(wildcard src/cagey_sessions/*.py)
	rm -rf $(DEBUG) $(LEFTOVERS)
	CAGEY_SESSIONS_DEBUG=1 $(BIN)/pip install --quiet --no-deps --target $(DEBUG) .
	PYTHONPATH=$(DEBUG) $(BIN)/python -c 'from cagey_sessions import _core; assert _core.DEBUG'
	@touch $@

$(SANITIZE)/built: $(VENV)/dev $(SOURCES) $(wildcard src/cagey_sessions/*.py) | $(DEBUG)/built
	rm -rf $(SANITIZE) $(LEFTOVERS)
	CAGEY_SESSIONS_SANITIZE=1 $(BIN)/pip install --quiet --no-deps --target $(SANITIZE) .
	@touch $@

demo: $(VENV)/demo
	$(BIN)/cagey-sessions demo $(DEMO_ARGS)

test: $(VENV)/dev test-debug
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(TEST_ARGS)

test-debug: $(DEBUG)/built
	PYTHONPATH=$(DEBUG) CAGEY_TEST_EXAMPLES=40 $(BIN)/python -m pytest tests/random/test_manager_machine.py \
	  tests/sessions/test_login.py tests/sessions/test_open.py tests/sessions/test_users.py tests/sessions/test_edits.py

check-core: $(VENV)/dev $(DEBUG)/built $(SANITIZE)/built
	PYTHONPATH=tests $(BIN)/python -m corecheck --debug $(DEBUG) --sanitize $(SANITIZE) $(CHECK_ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint $(CORE)
	$(BIN)/codespell

types: $(VENV)/dev
	@mkdir -p build
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest --allowlist tests/typing/stubtest_allowlist.txt cagey_sessions._core
	$(BIN)/pyright --pythonpath $(BIN)/python --warnings
# here it asks the python on the path what is installed, whatever --pythonpath says
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=$(CURDIR)/src \
	  $(BIN)/pyright --verifytypes cagey_sessions --ignoreexternal >build/types.txt || \
	  { grep -v 'No docstring' build/types.txt; exit 1; }

# what is measured is a copy, built with line tracing. Tests that look at what is imported see what coverage imports, and
# those that look at speed or run the tests themselves have no place here; nor has a second interpreter, which it cannot trace
coverage: $(VENV)/dev
	$(BIN)/pip install --quiet --editable '.[coverage]'
	rm -rf $(COVERAGE) $(LEFTOVERS)
	mkdir -p $(COVERAGE)
	cp -r src tests benchmarks docs examples *.md LICENSE MANIFEST.in Makefile mkdocs.yml pyproject.toml setup.py $(COVERAGE)
	find $(COVERAGE) -name '*.so' -delete
	cd $(COVERAGE) && CAGEY_SESSIONS_TRACE=1 CFLAGS=-O1 $(CURDIR)/$(BIN)/python setup.py --quiet build_ext --inplace
# scripts of the tests run anywhere, with src alone on the path
	mv $(COVERAGE)/tests/support/traced.py $(COVERAGE)/src/
	cd $(COVERAGE) && export PYTHONPATH=$(CURDIR)/$(COVERAGE)/src; \
	CAGEY_TEST_EXAMPLES=20 CAGEY_TEST_HISTORIES=30 CAGEY_TEST_SEEDS=50 CAGEY_TEST_USERS=10000 PYTEST_TIMEOUT=600 \
	  $(CURDIR)/$(BIN)/python -m coverage run -m pytest -q -o faulthandler_timeout=590 --ignore tests/mutants \
	  --ignore tests/packaging --ignore tests/benchmarks --ignore tests/core/test_leaks.py \
	  -k 'not is_imported and not second_interpreter' $(TEST_ARGS); passed=$$?; \
	$(CURDIR)/$(BIN)/python -m coverage combine --quiet && $(CURDIR)/$(BIN)/python -m coverage report && exit $$passed

# by schema, then for what an attacker could use; nothing is looked up on the network
workflows: $(VENV)/dev
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/zizmor --offline --no-progress --quiet .github

dist: $(VENV)/dev
	PYTHONPATH=tests $(BIN)/python -m distcheck --pythons "$(PYTHONS)" $(DIST_ARGS)

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/bench
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# tiny, to see that the adapters work. asv starts a process for each row and side, so it looks at all and runs a few;
# what it knows of a machine it keeps in $$HOME
bench-adapters: $(VENV)/bench
	CAGEY_BENCH_ROUNDS=1 $(BIN)/python -m pytest benchmarks -q --benchmark-only --benchmark-columns=median
	mkdir -p build/asv
	HOME=$(CURDIR)/build/asv $(BIN)/asv machine --yes >build/asv/machine.txt
	HOME=$(CURDIR)/build/asv $(BIN)/asv check --python=same
	HOME=$(CURDIR)/build/asv CAGEY_BENCH_MANY=1000 CAGEY_BENCH_MOST=2000 \
	  $(BIN)/asv run --python=same --quick --dry-run --show-stderr --bench '$(ASV_BENCH)'

# beside another checkout: there --json FILE, here --against FILE
shape: $(VENV)/dev
	$(BIN)/python -m benchmarks.shape $(SHAPE_ARGS)

# minutes; a goal that is missed is a figure, too
figures: $(VENV)/bench
	-$(BIN)/python -m benchmarks --json docs/plots/results.json
	-for size in 10000 100000; do \
	  $(BIN)/python -m benchmarks --size $$size --only $(GROWTH) --json docs/plots/growth-$$size.json; done
	$(MAKE) --no-print-directory plots

plots: $(VENV)/bench
	$(BIN)/python -m benchmarks.plots docs/plots

simulation: $(VENV)/dev
	PYTHONPATH=tests $(BIN)/python -m simulation $(SIMULATION_ARGS)

crash: $(VENV)/dev
	PYTHONPATH=tests $(BIN)/python -m crashes $(CRASH_ARGS)

mutants: $(VENV)/dev
	PYTHONPATH=tests $(BIN)/python -m mutants $(MUTANTS_ARGS)

diagrams: $(VENV)/dev
	$(BIN)/python docs/draw.py

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

shots: $(VENV)/docs
	$(BIN)/python docs/shots.py $(SHOTS_ARGS)

nightly: $(VENV)/dev $(DEBUG)/built
	CAGEY_TEST_LEAK_SECONDS=5 $(MAKE) --no-print-directory check-core \
	  CHECK_ARGS="--examples $(or $(NIGHTLY_CHECK_EXAMPLES),1000) --patience 14400"
	$(MAKE) --no-print-directory simulation SIMULATION_ARGS="--seeds $(or $(NIGHTLY_SEEDS),50000)"
	$(MAKE) --no-print-directory crash CRASH_ARGS="--kills $(or $(NIGHTLY_KILLS),1000)"
	$(MAKE) --no-print-directory mutants
	PYTHONPATH=$(DEBUG) HYPOTHESIS_PROFILE=nightly CAGEY_TEST_EXAMPLES=$(or $(NIGHTLY_EXAMPLES),20000) \
	  $(BIN)/python -m pytest tests/core tests/random/test_manager_machine.py --timeout 0 -o faulthandler_timeout=0
	CAGEY_TEST_HISTORIES=$(or $(NIGHTLY_HISTORIES),20000) \
	  $(BIN)/python -m pytest tests/random/test_store_histories.py tests/random/test_spill_histories.py \
	  --timeout 0 -o faulthandler_timeout=0

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .hypothesis
	find src -name '*.so' -delete -o -name '_core.c' -delete
