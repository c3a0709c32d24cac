# make benchmark      environment, suite, table          make SUITE=classic benchmark
# make test           the tests                          make test ARGS="-k metrics -x"
# make help           the rest
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

SUITE  ?= auto
DEVICE ?= auto
ARGS   ?=
VENV   := .venv
BIN    := $(CURDIR)/$(VENV)/bin

HOST_PATH := $(PATH)
# ninja, which compiles DeepSpeed's and torch's extensions, lies in the environment
export PATH := $(BIN):$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true

.PHONY: help venv benchmark test containers bench lint format requirements clean distclean

help:           ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */  make \1\t/' | expand -t 24

venv:           ## the virtual environment .venv (DEVICE=auto|cpu|cuda, PYTHON=...)
	@PATH="$(HOST_PATH)" docker/venv.sh make $(VENV) $(DEVICE)

benchmark: venv ## runs the suite (SUITE=auto: the four Amazon domains where they are prepared, else smoke)
	@$(BIN)/harness run --suite $(SUITE) $(ARGS)

test: venv      ## the tests, two to four at a time (ARGS="-k name"; ARGS="-n 0 -s" for one at a time); those with containers: .ci/run
	@$(BIN)/python -m pytest -m "not containers" -n auto --dist loadgroup $(ARGS)

containers: venv ## builds the images and runs the compose file for real (needs a Docker engine)
	@$(BIN)/python -m pytest tests/containers -m containers --timeout 3000 $(ARGS)

bench: venv     ## the speed measurements (pytest-benchmark)
	@$(BIN)/python -m pytest tests/benchmarks -o addopts="--import-mode=importlib --strict-markers" --benchmark-only $(ARGS)

lint: venv      ## ruff, mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --quiet --check . || { echo "make format mends what it can"; exit 1; }
	@$(BIN)/mypy

format: venv    ## ruff's fixes and formatting
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

requirements: venv ## pins again from pyproject.toml (ARGS=--upgrade to move to newer versions)
	@UV=$(BIN)/uv docker/requirements/export.sh $(ARGS)

clean:          ## caches; keeps .venv, data and results
	rm -rf .pytest_cache .ruff_cache .mypy_cache .benchmarks build *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## caches and .venv
	rm -rf $(VENV) $(VENV).lock uv.lock
