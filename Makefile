# Everything starts here: `make help`. Each target sets up $(VENV) first, which takes no time once it is done.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
SEED ?= 1
QUICKSTART = output/quickstart
BENCHMARKS = output/benchmarks

BIN = "$(VENV)/bin"
# One thread per worker: two workers with all threads each get in each other's way.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --durations=15

.PHONY: help setup quickstart benchmarks test test-all lint clean

help:
	@echo "make quickstart  make synthetic scenes, train a small detector on them, evaluate it, draw its detections"
	@echo "make benchmarks  measure every part beside Detectron2's own, write the table of docs/benchmarks.md"
	@echo "make test        the tests, without the slow ones"
	@echo "make test-all    the tests, all of them"
	@echo "make lint        check the code's style, and that no room uses what stands above it"
	@echo "make setup       only set up $(VENV) (every target above does so by itself)"
	@echo "make clean       remove .venv, caches and the quickstart's output"
	@echo
	@echo "PYTHON=python3          the Python (3.10 or newer) that .venv is made with"
	@echo "SEED=1                  of the quickstart's scenes and training"
	@echo "VENV=/path/to/env       use this environment instead; its torch and Detectron2 are kept"

setup:
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) on this machine: install Python 3.10 or" \
		"newer, or name one, as in: make test PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m bootstrap --venv "$(VENV)"

quickstart: setup
	@$(BIN)/fpn-d2 quickstart --output $(QUICKSTART) --seed $(SEED)

# Rows that are there from the same code, versions and settings are kept: what was stopped goes on where it was.
benchmarks: setup
	@$(BIN)/fpn-d2 benchmark --output $(BENCHMARKS)
	@$(BIN)/python docs/generate.py --benchmarks $(BENCHMARKS)

test: setup
	@$(PYTEST) -m "not slow"

test-all: setup
	@$(PYTEST)

lint: setup
	@$(BIN)/python -m ruff check .
	@$(BIN)/lint-imports --no-cache --no-logo

clean:
	rm -rf .venv output/quickstart build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
