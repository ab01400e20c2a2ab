# Everything runs in .venv, which `setup` makes and which every other target makes when it has to.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Kept apart: transformers imports it at every start where it is installed, which takes seconds. Only the tests
# of several processes look there.
DEEPSPEED := deepspeed einops hjson msgpack ninja py-cpuinfo
BENCHMARKS = $(filter-out benchmarks/kill_matrix.py benchmarks/contestants.py,$(sort $(wildcard benchmarks/*.py)))

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak lint bench clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## Make .venv and install lorakit into it with the exact versions of constraints.txt

# Written last, so that an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
		--target .venv/deepspeed $(DEEPSPEED)
	@touch $@

demo: $(STAMP) ## Train an adapter for a small real model and show what it is worth
	$(BIN)/lorakit demo

test: $(STAMP) ## Fetch the demo's model and data once, then run all tests offline
	$(BIN)/lorakit demo --prepare
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

soak: $(STAMP) ## Kill runs and fill disks at every change that saving makes, for an hour or more
	$(BIN)/python benchmarks/kill_matrix.py

lint: $(STAMP) ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) ## Run every program in benchmarks/
	@set -e; for program in $(BENCHMARKS); do echo "$$program"; $(BIN)/python $$program; done

clean: ## Remove .venv, caches and builds; runs/ and the model cache stay
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
