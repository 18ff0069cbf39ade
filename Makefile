# `make demo` and `make test` do everything on a machine with Python 3.11-3.13 and a C++ compiler:
# make .venv, install what constraints.txt pins (again only when pyproject.toml or the pins change), run.
# PYTHON=... chooses the interpreter, OUT=... the demo's folder, ARGS=... adds arguments to the (first) command.
.PHONY: help install demo test lint bench guard guard-update zoo networks kills fused-zoo study surgeon peers curvature nvcc-check gpu-check wheel-check clean
.DELETE_ON_ERROR:

SHELL := /bin/bash
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
BENCH := $(VENV)/.bench-installed
OUT ?= demo-out
ARGS ?=

# GNU OpenMP's threads spin for a moment and then sleep while they wait. By default they spin for long, which costs
# nothing on idle cores and many times the work itself on shared ones.
GOMP_SPINCOUNT ?= 10000
export GOMP_SPINCOUNT

help:
	@echo "make demo | test | lint | bench | guard | zoo | networks | kills | fused-zoo | study | surgeon | peers | curvature | nvcc-check | gpu-check | wheel-check | clean"

install: $(STAMP)

# Candidates are run, not only looked up: a version manager's shim exists even where its Python does not.
# --no-build-isolation: setuptools is the pinned one, and a later run needs no network.
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(RUN) -m pip --version >/dev/null 2>&1 || { \
	  for python in $(PYTHON) python3.11 python3 python3.12 python3.13; do \
	    "$$python" -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	      >/dev/null 2>&1 && exec "$$python" -m venv --clear $(VENV); \
	  done; \
	  echo "make: found no Python 3.11, 3.12 or 3.13 with the venv module: install one" \
	    "(python3.11 and python3.11-venv on Debian), or name it with PYTHON=/path/to/python" >&2; exit 1; }
	$(RUN) -m pip install --quiet -c constraints.txt setuptools
	$(RUN) -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[test,lint]'
	@touch $@

demo: $(STAMP)
	$(RUN) -m taylorkern demo --out "$(OUT)" $(ARGS)

test: $(STAMP)
	$(RUN) -m pytest $(ARGS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Writes docs/zoo.md and bench/results/zoo.json; an hour or so. ARGS="--family torchvision --only 'resnet*'" for a part.
zoo: $(BENCH)
	$(RUN) -m bench.zoo --publish $(ARGS)

# The property test of random networks at length: make networks ARGS="--seed 3"
networks: $(STAMP)
	$(RUN) -W ignore -m tests.random_networks 2000 $(ARGS)

# `taylorkern prune`, killed 20 times at random moments: the same bits in the end. make kills ARGS="--kills 100 --seed 3"
kills: $(STAMP)
	$(RUN) -m tests.job_kills --kills 20 $(ARGS)

fused-zoo: $(STAMP)
	$(RUN) -m bench.fused_zoo --json bench/results/fused-zoo.json $(ARGS)

study: $(STAMP)
	$(RUN) -m bench.study $(ARGS)
	$(RUN) -m bench.study.hessian $(HESSIAN_ARGS)

surgeon: $(STAMP)
	$(RUN) -m bench.surgeon $(ARGS)
	$(RUN) -m bench.surgeon.resnet50 --json bench/results/surgeon-resnet50.json

$(BENCH): $(STAMP)
	$(RUN) -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[bench,integrations,zoo]'
	@touch $@

# Prints the tables and keeps bench/results/<machine>.json; python -m bench.readme then renews README, page and picture.
bench: $(BENCH)
	$(RUN) -m bench $(ARGS)

# Instruction counts and ratios against the recorded ones; guard-update records them anew.
guard: $(BENCH)
	$(RUN) -m bench.guard $(ARGS)

guard-update: $(BENCH)
	$(RUN) -m bench.guard --update $(ARGS)

peers: $(BENCH)
	$(RUN) -m pytest tests/test_diagonals.py tests/test_bench*.py tests/test_examples.py tests/test_integrations.py \
	  tests/test_torch_pruning.py tests/test_zoo*.py $(ARGS)

curvature: $(BENCH)
	$(RUN) -m bench.curvature --network resnet50 --batch 8 --size 224 --pairs 15 --channels-last \
	  --json bench/results/curvature-resnet50.json
	$(RUN) -m bench.diagonals --network chain --json bench/results/diagonals-chain.json
	$(RUN) -m bench.diagonals --network residual --json bench/results/diagonals-residual.json

nvcc-check:
	bash csrc/nvcc_check.sh

# On a machine with a GPU, offline and in under nine minutes: no .venv is made. In pieces by ARGS="--only steps compiled".
GPU_PYTHON := $(or $(PYTHON),$(if $(wildcard $(RUN)),$(RUN),python3))
gpu-check:
	PYTHONPATH="$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))" $(GPU_PYTHON) -m bench.gpu $(ARGS)

wheel-check: $(STAMP)
	bash .ci/wheel-check $(RUN)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks demo-out study-out
	find . -name __pycache__ -prune -exec rm -rf {} +
