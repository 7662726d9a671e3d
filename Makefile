# `make demo` and `make test` need nothing but Python 3.11 to 3.13: each makes the environment first where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CORE := $(VENV)/core
PEERS := $(VENV)/peers
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-peers test-core test-slow soak mutation lint bench bench-trust bench-speed figures site clean

demo: $(INSTALLED)
	$(BIN)/qat compare --bits 1,2,4 --methods baseline,winq --out runs/demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

# The tests that compare with other libraries, which the environment does not have.
test-peers: $(INSTALLED) $(PEERS)/.installed
	PYTHONPATH=$(PEERS) $(BIN)/python -m pytest -q tests/qat/export/test_torchao_tensors.py \
		tests/qat/layers/test_schemes.py tests/spectra/operators/test_gauss_newton.py -k "torchao or curvlinops"

# What works without any extra, in an environment that has none.
test-core: $(CORE)/.installed
	$(CORE)/bin/python -m pytest -q tests/core

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# 50 kills, 500 measurements, over 2,000 random calls: the figures of docs/reliability.md.
soak: $(INSTALLED)
	SPECTRA_EXAMPLES=300 $(BIN)/python -m pytest -s tests/reliability tests/spectra/runs/test_faults.py

# Faults seeded into the numerical rooms, and how many of them the tests catch. SAMPLE=0 seeds all, which takes days.
SAMPLE ?= 300
SEED ?= 0
mutation: $(INSTALLED)
	$(BIN)/python benchmarks/mutation/mutation.py --sample $(SAMPLE) --seed $(SEED)

bench: bench-trust bench-speed

# FIGURE=docs/trust.png draws the negative shares there.
bench-trust: $(INSTALLED) $(PEERS)/.installed
	PYTHONPATH=$(PEERS) $(BIN)/python benchmarks/trust/coverage.py $(if $(FIGURE),--figure $(FIGURE))
	$(BIN)/python benchmarks/trust/finite_precision.py
	$(BIN)/python benchmarks/trust/band.py
	$(BIN)/python benchmarks/trust/congruence.py

# SPEED="--models 1M --tasks density --repeats 3" for a part of it, or more of it; `speed.py --help` lists what there is.
SPEED ?= --bits 16 --repeats 1 --products-scale 0.1
bench-speed: $(INSTALLED) $(PEERS)/.installed
	PYTHONPATH=$(PEERS) $(BIN)/python benchmarks/speed/speed.py $(SPEED) --out runs/speed
	$(BIN)/python benchmarks/speed/check_costs.py

# The libraries compared with lie in a folder of their own, which only the benchmarks see.
$(PEERS)/.installed: benchmarks/peers.txt $(INSTALLED)
	rm -rf $(PEERS)
	$(BIN)/python -m pip install --quiet --no-deps --target $(PEERS) --requirement benchmarks/peers.txt
	touch $@

# The figures of the README, of docs/speed.md and of the gallery. The README's second one is drawn where `make demo` has been run.
figures: $(INSTALLED)
	$(BIN)/python docs/figures.py $(if $(wildcard runs/demo/table.json),--study runs/demo)
	$(BIN)/python docs/site/gallery.py

# The site, into site/: docs/ and the docstrings, without network; a link that leads nowhere ends it with an error.
site: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/pydoclint --quiet spectra qat
	$(BIN)/lint-imports
	$(BIN)/pyright

# torch goes first and alone, at the pinned version, so that nothing pulls another build of it. The dev extra has all
# the others in it.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(INSTALLED)

$(CORE)/.installed: $(INSTALLED)
	$(PYTHON) -m venv $(CORE)
	$(CORE)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(CORE)/bin/python -m pip install --quiet --constraint constraints.txt --editable . pytest
	touch $@

clean:
	rm -rf $(VENV) runs site
