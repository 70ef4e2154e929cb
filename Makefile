# Everything works from a clean clone; the only things needed are make and Python 3.11 or newer with venv.
PYTHON ?= python3
# test processes; each starts its own servers
JOBS ?= 2
# further arguments for pytest: make test PYTEST='-k decoder'
PYTEST ?=
# arguments for the benchmarks: make bench BENCH='--rounds 5'
BENCH ?=

BIN := .venv/bin
STAMP := .venv/.installed

.NOTPARALLEL:
.PHONY: setup lint types test soak mutations demo bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup
	$(BIN)/mypy

# a session that outlives its limit fails; so does one that runs no test (pytest exits with 5)
test: lint types
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow" --session-timeout=2000 $(PYTEST)

# everything, on the oldest server too, and every crash point more often
soak: lint types
	SOAK=1 $(BIN)/python -m pytest -n $(JOBS) --session-timeout=7200 $(PYTEST)

# every fault put in on purpose turns a test red
mutations: setup
	$(BIN)/python -m tests.mutations

demo: setup
	$(BIN)/cdc demo

bench: setup
	$(BIN)/python -m bench.decode
	$(BIN)/python -m bench.values
	$(BIN)/python -m bench.backlog $(BENCH)
	$(BIN)/python -m bench.snapshot $(BENCH)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
