# `make sweep` and `make test` install what they need on a fresh machine.
PYTHON ?= python3
CONFIG ?= configs/sweep.yaml
STUDY ?= $(basename $(notdir $(CONFIG)))
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help sweep plan test test-slow coverage test-ui lint ui report screenshots bench proof docs audit constraints clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# torch is installed first and pinned: an unpinned one brings several GB of CUDA packages
.venv/.run: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 2; }
	@echo "Installing into .venv: about 1 GB, some minutes, the first time" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) install --quiet -c constraints.txt torch
	@$(PIP) install --quiet -c constraints.txt -e '.[study]'
	@touch $@

.venv/.dev: .venv/.run
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

sweep: .venv/.run  ## Run a study and print its verdict (CONFIG=, ARGS=)
	@$(BIN)/pagating sweep $(CONFIG) $(ARGS)

plan: .venv/.run  ## Print what a study will cost (CONFIG=, ARGS=); it trains nothing
	@$(BIN)/pagating plan $(CONFIG) $(ARGS)

# tests start many processes: with this variable each would compile our files, and the asserts of all tests, anew
test test-slow test-ui: export PYTHONDONTWRITEBYTECODE =

test: .venv/.dev  ## Run the tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: .venv/.dev  ## Run the tests that take minutes
	$(BIN)/python -m pytest -q -m slow $(ARGS)

# Chromium is not on PyPI: install Debian's package `chromium`, or have a Chrome on the PATH
.venv/.browser: .venv/.dev
	$(PIP) install --quiet -c constraints.txt -e '.[browser]'
	@touch $@

test-ui: .venv/.browser  ## Click through MLflow's UI on a small study (2 minutes; needs Chromium)
	$(BIN)/python -m pytest -q -m slow tests/ui $(ARGS)

lint: .venv/.dev  ## Check style, types and imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

ui: .venv/.run  ## Open the MLflow UI
	@$(BIN)/pagating ui $(ARGS)

report: .venv/.run  ## Make the report of a study again (STUDY=)
	@$(BIN)/pagating report $(STUDY) $(ARGS)

screenshots: .venv/.browser  ## Take the docs' pictures of a study, into docs/img (STUDY=; needs Chromium)
	$(BIN)/python docs/make_screenshots.py studies/$(STUDY) $(ARGS)

.venv/.bench: .venv/.dev
	$(PIP) install --quiet -c constraints.txt -e '.[bench]'
	@touch $@

bench: .venv/.bench  ## Measure gates, trials, packs, tables and studies, an hour; write docs/performance.md
	$(BIN)/python benchmarks/headline.py --output docs
	$(BIN)/python benchmarks/trial_speed.py
	$(BIN)/python benchmarks/packed_speed.py --output docs
	$(BIN)/python benchmarks/study_overhead.py --output docs
	$(BIN)/python benchmarks/gate_cost.py --compile --output docs
	$(BIN)/python benchmarks/large_table.py --output docs
	$(BIN)/python benchmarks/examples.py --output docs

proof: .venv/.run  ## Simulate how often the decision errs, and repeat a study, hours; write docs/protocol.md
	$(BIN)/python benchmarks/decision_error.py --json docs/decision_error.json --write docs/protocol.md $(ARGS)
	$(BIN)/python benchmarks/looks.py --json docs/racing.json --write docs/protocol.md
	$(BIN)/python benchmarks/resampling.py --json docs/resampling.json --write docs/protocol.md
	$(BIN)/python benchmarks/ladder_trend.py --json docs/ladder_trend.json --write docs/protocol.md
	$(BIN)/python benchmarks/reserve.py --json docs/reserve.json --write docs/protocol.md
	$(BIN)/python benchmarks/calibration_designs.py --json docs/calibration_designs.json --write docs/protocol.md
	$(BIN)/python benchmarks/replicates.py --json docs/replicates.json --write docs/protocol.md

docs: .venv/.dev  ## Write the generated pages and build/api, check links and run examples
	$(BIN)/python docs/make_configuration.py
	$(BIN)/python docs/make_gates.py
	$(BIN)/python docs/make_published.py
	$(BIN)/python docs/make_plan.py
	$(BIN)/python docs/make_api.py
	$(BIN)/python -m pytest -q tests/docs -m 'slow or not slow' $(ARGS)

# pip-audit has its own environment, so that it moves no pin. A pin that cannot be looked up is a failure (--strict)
audit:  ## Look up the pins in PyPI's advisory database
	test -x .venv/audit/bin/pip-audit || \
	  { $(PYTHON) -m venv .venv/audit && .venv/audit/bin/python -m pip install --quiet pip-audit; }
	@.venv/audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip --progress-spinner off || \
	  { echo "make audit: failed. Either a pin has an advisory (listed above), or the advisory service did not answer" \
	    "for a pin, and then nothing is known of the pins" >&2; exit 1; }

# Only the pins in pins.txt are chosen by hand; the others follow from them
constraints: .venv/.dev  ## Write constraints.txt again
	$(PIP) install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-emit-index-url \
	  --no-annotate --no-header -c pins.txt -o constraints.txt pyproject.toml

clean:  ## Remove what was installed; keep the studies
	rm -rf .venv build *.egg-info
