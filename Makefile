# `make help` lists the targets. Each does its own set-up: all that a machine needs is
# Python 3.11 or newer, and make.
#
#   PYTHON      interpreter for the environment (default: the first that is new enough)
#   EXTRAS      optional parts to install: dev,tasks, or for instance dev,tasks,cuda12
#   TRAIN_ARGS  overrides for `make train`, for instance "--steps 100 --zero.stage 2"
#   PYTEST_ARGS more for pytest, for instance "-n 2 -k zero"
#   BENCH_ARGS  more for the benchmarks

VENV := .venv
PY := $(VENV)/bin/python
EXTRAS := dev,tasks
READY := $(VENV)/.installed-$(EXTRAS)
DOCS_READY := $(VENV)/.installed-docs
PYTHON_NAMES := python3.11 python3.12 python3.13 python3 python

.DEFAULT_GOAL := help
.PHONY: help setup train test quick fmt lint type docs bench check clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

setup: $(READY)  ## make .venv and install everything into it

train: $(READY)  ## train a small GPT on the bundled text, print a sample
	@$(PY) train.py configs/tiny.py $(TRAIN_ARGS)

test: $(READY)  ## run the test-suite (all but the tests that need a GPU)
	$(PY) -m pytest -m "not gpu" $(PYTEST_ARGS)

quick: $(READY)  ## run the tests that take less than 5 seconds each
	$(PY) -m pytest -m "not slow and not gpu" $(PYTEST_ARGS)

fmt: $(READY)  ## format the code and sort the imports
	$(PY) -m ruff check --select I --fix .
	$(PY) -m ruff format .

lint: $(READY)  ## check format and style
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

type: $(READY)  ## check the types
	$(PY) -m basedpyright --pythonpath $(PY)

docs: $(DOCS_READY)  ## build the documentation into site/
	$(PY) -m mkdocs build --strict

bench: $(READY)  ## run the benchmarks
	$(PY) benchmarks/run.py $(BENCH_ARGS)

check: lint type test  ## all that a change must pass

clean:  ## remove what the other targets made, except runs/
	rm -rf .cache .pytest_cache .ruff_cache .venv build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment without a working pip (an interrupted set-up, say) is made anew.
$(READY) $(DOCS_READY): $(VENV)/.installed-%: pyproject.toml requirements.lock
	@$(PY) -m pip --version >/dev/null 2>&1 || { found=; \
	  for python in $(or $(PYTHON),$(PYTHON_NAMES)); do \
	    "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
	      2>/dev/null && found=$$python && break; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "jaxspeed needs Python 3.11 or newer with venv; tried: $(or $(PYTHON),$(PYTHON_NAMES))." >&2; \
	    echo "Install it (Debian, Ubuntu: apt-get install python3 python3-venv)," >&2; \
	    echo "or say where it is: make PYTHON=/path/to/python3 ..." >&2; \
	    exit 1; \
	  fi; \
	  "$$found" -m venv --clear $(VENV); \
	}
	@echo "Installing jaxspeed[$*] into $(VENV) (once; about a minute and 1.5 GB) ..."
	@$(PY) -m pip install -qq --disable-pip-version-check -c requirements.lock -e '.[$*]'
	@touch $@
