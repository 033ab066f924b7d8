# Two commands for a newcomer: `make up` and `make test`. Everything else is for people who change mxn.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Where the registry in use offers only the CUDA build of torch, name an index with the CPU build:
#   make up PIP_ARGS="--extra-index-url <PyTorch's CPU index>"
PIP_ARGS ?=
PORT   ?= 8000
TESTS  ?= tests
# Each has half of the tests in a row and takes over from the other at the end, so that what a file
# sets up is set up once.
WORKERS ?= 2

.PHONY: up install dev test test-all test-sim check fix bench docs clean

up: $(VENV)/.installed           ## install if needed, then serve the models that ship with mxn
	$(BIN)/mxn up --port $(PORT)

install: $(VENV)/.installed      ## create the environment, install mxn into it
dev: $(VENV)/.dev                ## the same with what tests and checks need

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch $@

test: $(VENV)/.dev               ## the fast suite: no accelerator, no network, two cores
	$(BIN)/python -m pytest $(TESTS) -n $(WORKERS) --dist worksteal -m "not slow"

test-all: $(VENV)/.dev           ## everything that this machine can run
	$(BIN)/python -m pytest $(TESTS) -n $(WORKERS) --dist worksteal

test-sim: $(VENV)/.dev           ## model and engine suites on the simulated chip
	MXN_TEST_DEVICE=sim:0 $(BIN)/python -m pytest tests/parity tests/engine -n $(WORKERS) --dist worksteal -m "not slow"

check: $(VENV)/.dev              ## lint, format, types, import floors, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/codespell

fix: $(VENV)/.dev                ## repair what can be repaired by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev              ## mxn against plain transformers, a few minutes
	$(BIN)/mxn bench --out bench/results

docs: $(VENV)/.dev               ## write the generated parts of the documentation
	$(BIN)/python tools/make_docs.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
