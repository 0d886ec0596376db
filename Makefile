# The two commands of README: `make quickstart` and `make test`. Everything happens in .venv; a second call installs nothing.
# Another interpreter: make test PYTHON=python3.12. Other pytest arguments: make test PYTEST_ARGS="-k estimators".

PYTHON ?= python3
PYTEST_ARGS ?= -n 2
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check

# Everything in benchmarks/ but what scripts share, what needs CIFAR-10, and what takes hours.
BENCHMARKS = $(filter-out benchmarks/processes.py benchmarks/memory_kept.py benchmarks/inference.py benchmarks/_%.py,$(sort $(wildcard benchmarks/*.py)))

.PHONY: help quickstart install test test-slow fuzz lint format typecheck bench bench-inference docs clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   install abste[train] into .venv and train a small binary network on embedded data"
	@echo "make test         install what tests need and run the fast tests"
	@echo "make test-slow    run the tests that take minutes or measure speed"
	@echo "make fuzz         fuzz the reader of .abste files (clang); MINUTES=30"
	@echo "make lint         ruff check and ruff format --check"
	@echo "make format       let ruff fix and format"
	@echo "make typecheck    mypy"
	@echo "make bench        the benchmarks behind README's numbers"
	@echo "make bench-inference  packed networks against torch, onnxruntime and OpenVINO; takes hours, and can be stopped"
	@echo "make docs         the documentation, with the API's, as a site in site/"
	@echo "make clean        remove .venv and caches; runs/ stays"

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: abste needs Python 3.11 or newer and '$(PYTHON)' is not: name one, as in 'make test PYTHON=python3.12'." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "make: '$(PYTHON) -m venv' failed: install your system's venv package (Debian: python3-venv) and try again." >&2; exit 1; }

# What the installation compiles or records: a change of these installs again. Python files are read where they are.
BUILT := pyproject.toml CMakeLists.txt src/abste/_version.py $(wildcard csrc/*/*.c csrc/*/*.h csrc/*/*.cpp)

# torch and torchvision are resolved in one pip command, so that their builds match.
$(VENV)/.train: $(BUILT) | $(BIN)/pip
	$(PIP_INSTALL) -e ".[train]"
	@touch $@

$(VENV)/.dev: $(BUILT) | $(BIN)/pip
	$(PIP_INSTALL) -e ".[train,bench,report,dev]"
	@touch $(VENV)/.train $@

install: $(VENV)/.dev

quickstart: $(VENV)/.train
	$(BIN)/abste quickstart

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# One process: tests that measure time must not share the machine.
test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

# The report of a long run is committed: make fuzz FUZZ_OUT=tests/c/fuzz-report.json
MINUTES ?= 30
fuzz: $(VENV)/.dev
	$(BIN)/python tests/c/fuzz.py --minutes $(MINUTES) $(if $(FUZZ_OUT),--out $(FUZZ_OUT))

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.dev
	$(BIN)/mypy

$(VENV)/.bench: $(BUILT) | $(BIN)/pip
	$(PIP_INSTALL) -e ".[train,bench]"
	@touch $(VENV)/.train $@

bench-inference: $(VENV)/.bench
	$(BIN)/python benchmarks/inference.py

bench: $(VENV)/.train
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done

$(VENV)/.docs: $(BUILT) | $(BIN)/pip
	$(PIP_INSTALL) -e ".[docs]"
	@touch $@

# Strict: a broken link or anchor fails, but not with --quiet, which hides warnings from it too.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site/index.html"

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
