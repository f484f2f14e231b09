# The verbs of this project. Everything happens in .venv, which is made on demand; nothing else is needed but
# Python 3.11 or newer with its headers, a C compiler and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard src/cagey_sessions/*.pyx src/cagey_sessions/core/*.pxi)
DEBUG := build/debug

.PHONY: help demo test test-debug lint types format bench mutants simulation nightly diagrams clean

help:
	@echo "make demo        a game server and its bots, stopped and killed: nothing acknowledged is lost"
	@echo "make test        the whole suite, then the core's tests again on a debug build"
	@echo "make lint types  ruff, and mypy in strict mode"
	@echo "make format      ruff's formatter"
	@echo "make bench       benchmarks against the pure-Python port (BENCH_ARGS='--quick')"
	@echo "make simulation  random servers, databases and crashes in virtual time (SIMULATION_ARGS='--seeds 2000')"
	@echo "make mutants     known faults put into the sources: the tests have to find each (MUTANTS_ARGS='--only release')"
	@echo "make nightly     all of that for hours (NIGHTLY_SEEDS=50000, NIGHTLY_EXAMPLES=20000)"
	@echo "make diagrams    the pictures of the pages, drawn from the code"
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

$(DEBUG)/built: $(VENV)/dev $(SOURCES) $(wildcard src/cagey_sessions/*.py)
	rm -rf $(DEBUG)
	CAGEY_SESSIONS_DEBUG=1 $(BIN)/pip install --quiet --no-deps --target $(DEBUG) .
	PYTHONPATH=$(DEBUG) $(BIN)/python -c 'from cagey_sessions import _core; assert _core.DEBUG'
	@touch $@

demo: $(VENV)/demo
	$(BIN)/cagey-sessions demo $(DEMO_ARGS)

test: $(VENV)/dev test-debug
	$(BIN)/python -m pytest $(TEST_ARGS)

test-debug: $(DEBUG)/built
	PYTHONPATH=$(DEBUG) CAGEY_TEST_EXAMPLES=40 $(BIN)/python -m pytest tests/core tests/test_manager_machine.py \
	  tests/test_store_users.py $(TEST_ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev
	$(BIN)/mypy

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/dev
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

simulation: $(VENV)/dev
	PYTHONPATH=tests $(BIN)/python -m simulation $(SIMULATION_ARGS)

mutants: $(VENV)/dev
	PYTHONPATH=tests $(BIN)/python -m mutants $(MUTANTS_ARGS)

diagrams: $(VENV)/dev
	$(BIN)/python docs/draw.py

nightly: $(VENV)/dev $(DEBUG)/built
	$(MAKE) --no-print-directory simulation SIMULATION_ARGS="--seeds $(or $(NIGHTLY_SEEDS),50000)"
	$(MAKE) --no-print-directory mutants
	PYTHONPATH=$(DEBUG) HYPOTHESIS_PROFILE=nightly CAGEY_TEST_EXAMPLES=$(or $(NIGHTLY_EXAMPLES),20000) \
	  $(BIN)/python -m pytest tests/core tests/test_manager_machine.py --timeout 0 -o faulthandler_timeout=0
	CAGEY_TEST_HISTORIES=$(or $(NIGHTLY_HISTORIES),20000) CAGEY_TEST_CRASHES=300 \
	  $(BIN)/python -m pytest tests/test_store_histories.py tests/test_spill_histories.py tests/test_crash.py \
	  --timeout 0 -o faulthandler_timeout=0

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .hypothesis
	find src -name '*.so' -delete -o -name '_core.c' -delete
