# Every target sets itself up: the first one that runs creates .venv and installs the pinned packages.
#
#   make nano        tokenizer -> pretrain -> midtrain -> SFT -> the stages of RL -> table -> report, from nothing, on a CPU
#   make nano-seeds  the same for the seeds 0, 1 and 2, each with its baseline, and a table over the seeds
#   make smoke       the same stages at toy size, in minutes: does it all run?
#   make test        lint, then the tests
#   make test-slow   the tests that `make test` leaves out: minutes of work, or tens of gigabytes
#
# Settings (environment or command line):
#   PYTHON       interpreter to build .venv with, 3.11 or newer          (python3)
#   TORCH_INDEX  package index for torch alone. pip's own default, if left empty. PyTorch's CPU-only
#                build is a much smaller download: TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   WORKERS      test processes                                          (2)
PYTHON ?= python3
TORCH_INDEX ?=
WORKERS ?= 2

VENV := .venv
STAMP := $(VENV)/installed.stamp
BIN := $(VENV)/bin
TORCH_VERSION := 2.13.0

# A thread that waits for another spins for microseconds only: long spins cost most of the speed on a machine with
# other work, none at all costs a quarter of it on an idle one (measured: docs/lab-notes.md).
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 1000
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST = $(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup nano nano-seeds smoke test test-slow test-all lint format bench docs clean

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile
	@echo "also: make test-all, lint, format, bench, docs, clean"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "$(PYTHON) is $$($(PYTHON) -V 2>&1 || true), but OpenZAYA needs Python 3.11 or newer;" \
	       "install one and name it: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot create a virtual environment (Debian, Ubuntu: install python3-venv)" >&2; \
	  rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(TORCH_VERSION)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

nano: $(STAMP)
	$(BIN)/openzaya run recipes/nano --out runs/nano

nano-seeds: $(STAMP)
	$(BIN)/python benchmarks/nano_seeds.py --run --seeds 0 1 2

smoke: $(STAMP)
	$(BIN)/openzaya run recipes/smoke --out runs/smoke

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(PYTEST) -m "not slow"

test-slow: $(STAMP)
	$(PYTEST) -m slow

test-all: lint
	$(PYTEST)

bench: $(STAMP)
	@for script in benchmarks/*.py; do \
	  echo "== $$script"; $(BIN)/python $$script --quick || exit 1; \
	done

docs: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest tests/test_docs.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
