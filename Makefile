# `make test` and `make quickstart` need Python 3.11 or newer and pip, nothing else.
#   make PYTHON=python3.12 ...     another interpreter
#   make fuzz FUZZ_ARGS="--inputs 1000 --seed 7"    see tests/fuzz/README.md
#   make PIP_ARGS="..." ...        further arguments of pip, e.g. an index with CPU builds of torch
PYTHON ?= python3
PIP_ARGS ?=
MODEL ?= glassllm
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2
FUZZ_ARGS ?=
KILLS ?= 32

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt
INSTALLED := $(VENV)/.installed

.PHONY: help venv install lint test fuzz fault-injection slurm-test quickstart study study-smoke clean

help:
	@echo "make test | fuzz | fault-injection [KILLS=32] | slurm-test | quickstart [MODEL=glassllm|smollm2] | study | study-smoke | lint | install | clean"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml setup.py constraints.txt requirements-launch.txt | $(BIN)/python
	@echo "Installing into $(VENV), once; this takes some minutes"
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps --requirement requirements-launch.txt
	@touch $@

venv: $(BIN)/python

install: $(INSTALLED)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadgroup $(PYTEST_ARGS)

# Installs Slurm and munge by apt, where they are missing: needs root and Debian or Ubuntu.
slurm-test: $(INSTALLED)
	$(BIN)/python -m tests.slurm.preemption

fuzz: $(INSTALLED)
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

fault-injection: $(INSTALLED)
	$(BIN)/python -m pytest tests/faults --kills $(KILLS) $(PYTEST_ARGS)

quickstart: $(INSTALLED)
	$(BIN)/python examples/quickstart.py --model $(MODEL)

# About two hours on two cores; what is done already is kept.
study: $(INSTALLED)
	$(BIN)/python examples/study.py run

study-smoke: $(INSTALLED)
	$(BIN)/python examples/study.py run --smoke

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
