# Everything runs inside .venv, which `make venv` creates; the other targets call it first. `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CSRC := $(shell find csrc -type f)
CXX_FOUND := $(firstword $(shell command -v $(CXX) c++ g++ clang++))

# The stamp makes an up-to-date environment cost nothing. Its name tells whether a compiler was there, so that installing
# one later is noticed.
STAMP := $(VENV)/.stamp-$(if $(CXX_FOUND),compiled,python-only)

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all lint format bench compare gpu clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## create .venv, install the package with all dependencies, compile the C++ module (only what changed)

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "unif2ace: '$(PYTHON)' is not a Python >= 3.10; name one: make venv PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "unif2ace: '$(PYTHON)' has no venv module (Debian: apt install python3-venv; or PYTHON=...)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Changed metadata: install everything again. Changed C++ only: ninja compiles the files that changed, in place.
$(STAMP): pyproject.toml constraints.txt setup.py $(CSRC) | $(BIN)/python
	@$(if $(CXX_FOUND),:,echo "unif2ace: no C++ compiler: going on without the compiled module (Debian: apt install g++)" >&2)
	@set -e; if [ -n "$(filter %.toml %.txt %.py,$?)" ]; then \
	  echo "unif2ace: installing into $(VENV) (minutes the first time)"; \
	  $(PIP) install --quiet --constraint constraints.txt "setuptools>=77" wheel ninja torch; \
	  $(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'; \
	else \
	  PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace; \
	fi
	@$(BIN)/python -c 'from unif2ace import native; print("unif2ace: compiled module:", native.why_not() or "ready")'
	@touch $@

demo: venv ## train nothing, download nothing: show understanding and generation on the bundled small model
	$(BIN)/unif2ace demo

# One process per core; threads inside of them would only get into each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

test: venv ## the test suite without its slow part
	$(PYTEST) -m "not slow"

test-all: venv ## the whole test suite
	$(PYTEST)

lint: venv ## style and likely bugs, Python and C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(filter %.h %.cpp %.cu %.cuh,$(CSRC))

format: venv ## rewrite files in the project's style
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.h %.cpp %.cu %.cuh,$(CSRC))

bench: venv ## check and time the back ends against the reference on this machine: one table, under three minutes
	@$(BIN)/python -m benchmarks.run

BASE ?= main
compare: venv ## time this checkout against another revision: make compare BASE=main (OPS="routing experts" for some)
	@$(BIN)/python -m benchmarks.compare $(BASE) $(OPS)

# No `venv` first: machines with a GPU often come with their own torch, and without a network.
QUICK ?=
gpu: ## prove and measure the engine on a CUDA device, under nine minutes: make gpu (QUICK=1: under two)
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(if $(QUICK),--quick)

clean: ## remove builds, caches and the compiled module (the packages in .venv stay)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks unif2ace/_C*.so $(VENV)/.stamp-*
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
