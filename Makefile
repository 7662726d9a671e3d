# `make demo` and `make test` need nothing but Python 3.11 to 3.13: each makes the environment first where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow lint bench bench-trust clean

demo: $(INSTALLED)
	$(BIN)/qat compare --bits 1,2,4 --methods baseline,winq --out runs/demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

bench: bench-trust

bench-trust: $(INSTALLED)
	$(BIN)/python benchmarks/trust/coverage.py --out benchmarks/trust/coverage.json

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

# torch goes first and alone, at the pinned version, so that nothing pulls another build of it.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) runs
