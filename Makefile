# Every target works as the first command after a clone: the virtual environment is made on demand.
PYTHON    ?= python3
VENV      ?= .venv
TASK      ?= sort_digits
ESTIMATOR ?= rloo
SEED      ?= 0
WORKERS   ?= 2
RUN       ?= runs/$(TASK)-$(ESTIMATOR)-seed$(SEED)
BIN       := $(VENV)/bin
PACKAGE   := $(VENV)/.installed-package
STAMP     := $(VENV)/.installed

.PHONY: install train test test-slow test-gpu lint type format check clean
.DEFAULT_GOAL := help

help:
	@echo "make train      install the package, train the default task ($(TASK), $(ESTIMATOR)) into $(RUN)"
	@echo "make install    install the package with all that the tests and the tools below need"
	@echo "make test       quick tests            make test-slow   the slow ones"
	@echo "make test-gpu   those that need a GPU (skipped without one)"
	@echo "make lint type  ruff, mypy             make format      ruff format and fixes"
	@echo "make check      lint, type, test       make clean       remove caches and the environment"

install: $(STAMP)

# What training needs, and, in the second, what tests and tools need beside it; the second includes the first.
$(PACKAGE): WHAT := .
$(STAMP): WHAT := .[dev]
$(PACKAGE) $(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tokenrl needs Python 3.10 or later; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '$(WHAT)'
	@# pip makes byte code with one processor only; a file for another release of Python has none, which is no failure.
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null 2>&1 || true
	touch $(PACKAGE) $@

train: $(PACKAGE)
	$(BIN)/tokenrl train --task $(TASK) --estimator $(ESTIMATOR) --seed $(SEED) --output-dir $(RUN) --overwrite

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu" -n $(WORKERS) --timeout=1800

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint type test

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
