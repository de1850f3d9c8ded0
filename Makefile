# The commands of this repository. `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help train test test-cpus test-gpu lint format docs

# Containers often set this variable. Each process then compiles every module that it imports, those of torch and transformers
# too, which takes longer than the import itself.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
ARGS ?=
WORKERS ?= auto
BIN := .venv/bin

help:  ## list these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

train: .venv/installed  ## train the default model, a few minutes on a CPU; ARGS="attention=strided seed=2" for another
	$(BIN)/python train.py $(ARGS)

test: .venv/installed  ## run the tests, several at a time; ARGS="-k layout" for some of them
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --maxprocesses=8 --dist=worksteal $(ARGS)

# Tests of masks, settings, graphs and choices of a backend compute no number that a vectorized kernel could round otherwise.
NUMERICAL := $(filter-out %/test_compiled.py %/test_config.py %/test_dispatch.py %/test_peers.py %/test_reach.py \
	%/test_synthetic_recall.py, $(wildcard tests/kernels/test_*.py tests/model/test_*.py tests/model/attention/test_*.py)) \
	tests/kernels/selection tests/kernels/summaries tests/kernels/decoding -m "not gpu and not slow"

# Each test runs on both kinds of CPU, each of its cases on one of them (and on this machine's own, by `make test`). Both
# run at the same time, a process each: to import and to collect takes a good part of the minute.
test-cpus: .venv/installed  ## run the numerical tests with PyTorch's kernels for CPUs without AVX-512, and without AVX2
	$(MAKE) --jobs=2 --output-sync test-cpu-avx2-first test-cpu-default-second

test-cpu-%:
	cpu=$*; OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=$${cpu%-*} $(BIN)/python -m pytest --half=$${cpu#*-} $(NUMERICAL) $(ARGS)

test-gpu: .venv/installed  ## run the tests that need a GPU, those that want it for themselves at the end
	$(BIN)/python -m pytest -m "gpu and not alone" --numprocesses=8 --dist=worksteal $(ARGS)
	$(BIN)/python -m pytest -m "gpu and alone" $(ARGS)

lint: .venv/installed  ## check style, spelling, types, imports between packages, and for large files outside docs/
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/pyrefly check --summary=none
	PYTHONPATH=. $(BIN)/lint-imports
	git ls-files -z -- ':!docs' | xargs -0 $(BIN)/check-added-large-files --maxkb=100 --enforce-all

docs: .venv/installed  ## write the tables and numbers of README.md and docs/ from docs/results
	PYTHONPATH=. $(BIN)/cog -r -P -p 'from docs.tables import *' README.md docs/*.md docs/log/*.md

format: .venv/installed  ## fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Python compiles a module when it is first imported; pip would compile all that no command imports, in one process.
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Farsight needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	@echo "installing packages into .venv; PyTorch is large, so this takes minutes where it is downloaded"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	@touch $@
