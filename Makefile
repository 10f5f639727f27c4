# Each target sets itself up on a machine with make and Python 3.11 or later: a virtual environment in
# .venv, made once, and what pip installs into it. `make demo PYTHON=/path/to/python` names an interpreter.

.DEFAULT_GOAL := help
.PHONY: help demo test thorough check bench clean

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
CANDIDATES := $(or $(PYTHON),python3.12 python3.11 python3.13 python3)

# Compiled programs are kept between runs, so that the second call of anything starts quickly.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

help:
	@echo "make demo    fine-tune a small chat model on this machine and talk to it (CPU, some ten minutes in all)"
	@echo "make test    the test suite"
	@echo "make thorough  what the suite leaves out: every row of the tables in docs/ (an hour or so)"
	@echo "make check   format, lint, types and the fast tests: what to run before a commit"
	@echo "make bench   tokens per second on this machine, beside Transformers + PEFT and TRL"
	@echo "make clean   remove the virtual environment and the caches; runs/ stays"

demo: $(VENV)/.package
	$(RUN) demo/run.py

test: $(VENV)/.test
	$(RUN) -m pytest -n 2 --dist worksteal

thorough: $(VENV)/.test
	$(RUN) -m pytest -n 2 --dist worksteal -m thorough

check: $(VENV)/.test
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) -m pytest -n 2 --dist worksteal -q -m "not slow and not real and not thorough"

bench: $(VENV)/.bench
	$(RUN) tools/get_demo_model.py
	$(RUN) tools/bench.py --json .cache/bench.json --png .cache/bench.png

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .mypy_cache

# Some commands named python3.12 are only shims that say "not found", so each candidate has to run.
$(VENV)/.made:
	@for python in $(CANDIDATES); do \
	  if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "Making a virtual environment in $(VENV) with $$($$python --version) ($$python)"; \
	    $$python -m venv --clear $(VENV) && touch $@; exit; \
	  fi; \
	done; \
	echo "No Python 3.11 or later with the venv module was found; tried: $(CANDIDATES)"; \
	echo "Install one (Debian and Ubuntu: apt install python3 python3-venv) or name one: make PYTHON=/path/to/python3.11 ..."; \
	exit 2

$(VENV)/.package: $(VENV)/.made pyproject.toml
	@echo "Installing jaxtune and what it needs into $(VENV) (about 1 GB; a few minutes the first time)"
	$(PIP) install --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.package
	@echo "Installing what the tests need into $(VENV) (PyTorch and PEFT, to compare with, and the linters)"
	$(PIP) install --editable ".[test]"
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	@echo "Installing what the benchmark compares with into $(VENV) (TRL)"
	$(PIP) install --editable ".[bench]"
	@touch $@
