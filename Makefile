# One virtual environment, .venv, for every target. PYTHON chooses the interpreter it is made with (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test lint fuzz bench a100 gpu golden proto clean

help:
	@echo "make demo    set up, then a two-turn chat with the embedded model through a real server"
	@echo "make test    set up, then lint, type checks and all tests"
	@echo "make lint    ruff and mypy alone"
	@echo "make fuzz    the random tests alone, on examples that no run has drawn yet"
	@echo "make bench   serve real multi-turn dialogues and print throughput and latency"
	@echo "make a100    compile for an A100 with no GPU: fits, in place, copies, collectives, registers"
	@echo "make gpu     GPU tests and benchmarks, with the python and packages that are installed already"
	@echo "make golden  regenerate the golden files with torch and transformers, and compare"
	@echo "make proto   regenerate the gRPC stubs"
	@echo "make clean   remove the virtual environment and caches"

$(VENV)/.run: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "jserve needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(BIN)/pip install --quiet --editable '.[test]'
	@touch $@

demo: $(VENV)/.run
	$(BIN)/python -m jserve.demo

test: lint
	$(BIN)/pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(VENV)/.test
	$(BIN)/pytest -m hypothesis --hypothesis-profile=fuzz

bench: $(VENV)/.run
	$(BIN)/python -m bench.serve

# JAX's CUDA plugin goes to .a100, not into the environment: there it would look for a GPU at every start of JAX.
a100: $(VENV)/.run
	$(BIN)/python -m bench.a100 --install --short

# No virtual environment and no install: the machine brings Python, JAX for CUDA and the other packages.
gpu:
	PYTHONPATH=".$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m bench.gpu

golden:
	$(PYTHON) -m venv .venv-golden
	.venv-golden/bin/pip install --quiet 'torch==2.13.0' 'transformers>=5,<6' 'safetensors<1' 'numpy>=2,<3'
	.venv-golden/bin/python tests/fixtures/models/make.py --check

proto: $(VENV)/.test
	$(BIN)/python -m jserve.server.proto.generate

clean:
	rm -rf $(VENV) .venv-golden .a100 .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
