# All that is needed to work on Shoal, from Python 3.11 alone. `make demo` and `make test` are the two to know.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
# Stamps: the runtime alone (make demo), and with the test and dev extras.
RUNTIME := $(VENV)/.runtime
DEV     := $(VENV)/.dev
# The pinned helm is a binary for x86-64 Linux; elsewhere the chart's tests take one from the PATH, or say that they skip.
HELM    := $(if $(filter Linux/x86_64,$(shell uname -s)/$(shell uname -m)),.kube-tools/helm)
TESTS   ?=

.PHONY: demo test lint wheel env train-demo-model clean
.DEFAULT_GOAL := test

demo: $(RUNTIME)
	$(BIN)/python -m deploy.cli.demo

# TESTS narrows it: make test TESTS=tests/unit/cluster. Whole cells have the machine for themselves; what runs in one
# process is dealt over two.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
test: $(DEV) $(HELM)
ifeq ($(TESTS),)
	$(PYTEST) --durations=15 tests --ignore=tests/unit --ignore=tests/helm
	$(PYTEST) --durations=10 -n 2 tests/helm tests/unit
else
	$(PYTEST) $(TESTS)
endif

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/mypy --strict tools/*.py
	$(BIN)/lint-imports
	$(BIN)/yamllint --strict -c .yamllint.yaml helm/shoal/Chart.yaml helm/shoal/values.yaml tests/helm .pre-commit-config.yaml
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tools/generate_protos.sh --check

wheel: $(DEV)
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist
	$(BIN)/python tools/check_wheel.py dist/*.whl

env: $(DEV)

# About an hour on 2 quiet cores; stopped or killed, it goes on where it was. Idle threads sleep: it runs beside others.
train-demo-model: $(DEV)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m training.cli train
	$(BIN)/python -m tests.demo_exam --serve .demo-model/shoal-demo .demo-model/exam.json
	$(BIN)/python -m training.cli card
	@echo "to ship it: cp .demo-model/shoal-demo/* deploy/models/shoal-demo/"

clean:
	rm -rf dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .kube-tools $(VENV)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3 on the PATH"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"{sys.executable} is Python {sys.version.split()[0]}; 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --progress-bar off -q -c constraints.txt -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --progress-bar off -q -c constraints.txt -e '.[test,dev]'
	@touch $(RUNTIME) $@

.kube-tools/helm: tools/get_helm.py | $(BIN)/python
	$(BIN)/python tools/get_helm.py .kube-tools
	@touch $@
