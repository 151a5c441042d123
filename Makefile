# `make run` and `make test` are all that a machine with Python 3.11 and make needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test lint types unit soak faults fuzz clean

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Python 3.11 to 3.13 is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,dev]'
	touch $@

run: $(READY)
	$(BIN)/livestate run

test: $(READY) lint types unit

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

# Two at a time: most of the time is spent waiting for brokers and workers.
unit: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# A hundred random faults while events flow, then every topic and disk is checked; the same seed plays the same again.
SEED ?= 1

soak: $(READY)
	$(BIN)/python -m tests.fault.soak --seed $(SEED)

# A trainer killed at twenty random moments, and one whose broker is away for a minute.
faults: $(READY)
	$(BIN)/python -m pytest tests/trainer/test_crash.py tests/trainer/test_parameter_faults.py --seed $(SEED) --broker-away 60

# A million fuzzed records among good ones.
fuzz: $(READY)
	$(BIN)/python -m tests.fault.fuzz --seed $(SEED)

clean:
	rm -rf $(VENV) data run build *.egg-info
