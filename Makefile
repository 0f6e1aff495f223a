# make demo    install the command line into .venv and run the demonstration
# make test    install everything for development and run all quick checks
# make format  format the code and apply safe lint fixes
# make stub    regenerate the type stub that editors read (git ignores it)
# make clean   remove the environment and everything generated

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
METADATA = pyproject.toml constraints.txt hatch_build.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test format stub clean

help:
	@sed -n 's/^# make/make/p' Makefile

demo: $(VENV)/.demo
	$(BIN)/trimtab demo

# One thread per test process: two processes that each take every core are slower than one.
test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

stub: $(VENV)/.dev
	$(BIN)/python hatch_build.py

# torch is installed first and alone, pinned, so that no dependency can pull in another build of it.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(METADATA)
	$(INSTALL) --editable '.[demo]'
	touch $@

# The development install holds everything the demonstration needs.
$(VENV)/.dev: $(VENV)/.torch $(METADATA)
	$(INSTALL) --editable '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist runs src/trimtab/__init__.pyi .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
