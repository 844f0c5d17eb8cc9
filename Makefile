# Each target sets up what it needs: git, make, Python 3.10+ and a package registry are enough.
.DEFAULT_GOAL := help
.PHONY: help setup demo test quick doctest lint format check clean

SHELL := /bin/sh
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The first interpreter that is new enough and can make a virtual environment.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	&& { echo $$p; break; }; done)

help:           ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/'

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.10 with venv found; install one" \
		"(on Debian also python3-venv) or say 'make PYTHON=/path/to/python'" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(STAMP) ## the virtual environment .venv with everything in it

demo: $(STAMP)  ## reads a line of print from a picture
	$(BIN)/cogvlm ask examples/line.png "What does the picture say?"

test: $(STAMP)  ## every test and doctest
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

quick: $(STAMP) ## the tests that take seconds
	$(BIN)/python -m pytest -m "not slow"

lint: $(STAMP)  ## style, format and types, nothing changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## put style and format right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test ## what CI asks for

clean:          ## remove the virtual environment and caches
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
