# Everything sets itself up in .venv from the package registries; no root is needed.
PYTHON ?= python3
RANKS ?= 4
BIN := .venv/bin
MPIRUN := $(BIN)/mpirun

.PHONY: run test test-fast lint format clean demo

run: .venv/run.stamp  ## tell a story on RANKS ranks
	$(MPIRUN) -n $(RANKS) $(BIN)/python -m mpillama $(ARGS)

test: .venv/test.stamp lint  ## everything that CI runs
	$(BIN)/python -m pytest

test-fast: .venv/test.stamp  ## without the tests marked slow
	$(BIN)/python -m pytest -m "not slow"

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: .venv/dev.stamp  ## rebuild data/demo.h5 (takes about an hour on 2 cores)
	$(BIN)/python data/train_demo.py

.venv/run.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[mpich]'
	touch $@

.venv/test.stamp: .venv/run.stamp
	$(BIN)/python -m pip install --quiet --editable '.[mpich,test]'
	touch $@

.venv/dev.stamp: .venv/test.stamp
	$(BIN)/python -m pip install --quiet --editable '.[mpich,test,dev]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
