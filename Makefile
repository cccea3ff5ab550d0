# Every target works on a fresh machine: it makes the virtual environment first. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

MODEL ?= package://bridge_rl/tiny/model
SUITE ?= tiny
WIDTHS ?= 1,2,4,8
SAMPLES ?= 8
ARGS ?=

.PHONY: setup demo test test-slow lint eval bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,serve,eval,lm-eval,quantized,workspaces,dev]'
	touch $@

demo: $(READY)  ## warm-up, RLVR and evaluation of the embedded model, about 5 minutes on two cores
	$(BIN)/bridge-rl demo

test: $(READY)  ## everything but the slow tests
	$(BIN)/python -m pytest -m 'not slow'

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

eval: $(READY)  ## make eval MODEL=runs/demo SUITE=tiny WIDTHS=1,2,4,8 ARGS=--controls; without MODEL, the embedded base
	$(BIN)/bridge-rl eval --model $(MODEL) --suite $(SUITE) --widths $(WIDTHS) --samples $(SAMPLES) $(ARGS)

bench: $(READY)  ## the figures in benchmarks/results
	$(BIN)/python benchmarks/block_cost.py
	$(BIN)/python benchmarks/rollout.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/drift.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/intervals.py
	$(BIN)/python benchmarks/rollout_kl.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
