# Everything sets itself up in .venv from the package registries; no root is needed, but a C++ compiler.
PYTHON ?= python3
MPI ?= mpich# or openmpi; `make clean` before another one
RANKS ?= 4
JOBS ?= $(shell echo $$(($$(nproc) + 1)))# tests that run at once, a file of them each: one of them often waits
BIN := .venv/bin
MPIRUN := $(BIN)/mpirun
BESIDE := .venv/openmpi# another environment with the same packages and another MPI
# The system's CMake where it is new enough, else one from the package registry.
CMAKE := $(shell printf '3.16\n%s\n' "$$(cmake --version 2>/dev/null | sed -n 's/^cmake version //p')" | sort -VC \
	&& command -v cmake || echo $(CURDIR)/$(BIN)/cmake)
# `pip install` only writes down where the checkout lies: the kernels are there already.
INSTALL := CMAKE_ARGS=-DMPILLAMA_BUILD_KERNELS=OFF CMAKE_EXECUTABLE=$(CMAKE) CMAKE_GENERATOR="Unix Makefiles" \
	$(BIN)/python -m pip install --quiet --editable

PYTEST := -m pytest --numprocesses=$(JOBS) --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

.PHONY: run kernels setup test test-openmpi test-fast lint format clean demo

run: .venv/run.stamp build/host.stamp  ## tell a story on RANKS ranks; compiles what this machine needs
	$(MPIRUN) -n $(RANKS) $(BIN)/python -m mpillama $(ARGS)

kernels: build/kernels.stamp  ## compile the kernels, for all instruction sets that the compiler knows

setup: .venv/test.stamp build/kernels.stamp  ## all that run, lint and test need; with -j2 it compiles and downloads at once

test: setup lint  ## everything that CI runs
	$(BIN)/python $(PYTEST)

test-openmpi: setup  ## what may differ between MPIs, on Open MPI; left out, with a reason, where it cannot be installed
	@if reason=$$($(MAKE) --no-print-directory $(BESIDE)/stamp 2>&1); \
	then $(BESIDE)/bin/python $(PYTEST) @tests/system/mpi/on_open_mpi.txt; \
	else echo "No tests on Open MPI, which cannot be installed: $$(echo "$$reason" | grep -m 1 -i error)"; fi

test-fast: setup  ## without the tests marked slow
	$(BIN)/python $(PYTEST) -m "not slow"

# Tests start Python thousands of times: its modules are compiled once, whatever the environment says.
test test-openmpi test-fast: export PYTHONDONTWRITEBYTECODE =

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

# Open MPI alone, before the packages of .venv: mpi4py takes the MPI of the environment that runs it.
$(BESIDE)/stamp: .venv/test.stamp
	$(BIN)/python -m venv --clear --without-pip $(BESIDE)
	$(BIN)/python -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["openmpi"], sep="\n")' \
		>$(BESIDE)/requirements.txt
	$(BIN)/python -m pip --python $(BESIDE)/bin/python install --quiet --requirement $(BESIDE)/requirements.txt
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		>"$$($(BESIDE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	touch $@

clean:
	rm -rf .venv build mpillama/kernels/lib .mypy_cache .ruff_cache .pytest_cache .hypothesis
