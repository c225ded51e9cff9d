# Thin wrappers: `make sweep` and `make test` set up what they need on a fresh machine.
PYTHON ?= python3
CONFIG ?= configs/sweep.yaml
STUDY ?= $(basename $(notdir $(CONFIG)))
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help sweep plan test test-slow test-ui lint ui report screenshots bench proof docs audit constraints clean

help:  ## What can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# torch comes first and pinned: unpinned it brings several GB of CUDA packages along
.venv/.run: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 2; }
	@echo "Installing into .venv: about 1 GB, some minutes, the first time" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) install --quiet -c constraints.txt torch
	@$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

.venv/.dev: .venv/.run
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

sweep: .venv/.run  ## Run a study (CONFIG=, ARGS=), then the verdict
	@$(BIN)/pagating sweep $(CONFIG) $(ARGS)

plan: .venv/.run  ## What a study will cost (CONFIG=, ARGS=); nothing runs
	@$(BIN)/pagating plan $(CONFIG) $(ARGS)

test: .venv/.dev  ## The test suite
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: .venv/.dev  ## What takes minutes
	$(BIN)/python -m pytest -q -m slow $(ARGS)

# Chromium is not of PyPI: Debian's package `chromium`, or a Chrome on the PATH
.venv/.browser: .venv/.dev
	$(PIP) install --quiet -c constraints.txt -e '.[browser]'
	@touch $@

test-ui: .venv/.browser  ## Click through MLflow's UI on a small study (2 minutes; needs Chromium)
	$(BIN)/python -m pytest -q -m slow tests/ui $(ARGS)

lint: .venv/.dev  ## Style, types, and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

ui: .venv/.run  ## The MLflow UI on what was logged
	@$(BIN)/pagating ui $(ARGS)

report: .venv/.run  ## Rebuild the report of a study (STUDY=)
	@$(BIN)/pagating report $(STUDY) $(ARGS)

screenshots: .venv/.browser  ## Pictures of a study for the docs, into docs/img (STUDY=; needs Chromium)
	$(BIN)/python docs/make_screenshots.py studies/$(STUDY) $(ARGS)

.venv/.bench: .venv/.dev
	$(PIP) install --quiet -c constraints.txt -e '.[bench]'
	@touch $@

bench: .venv/.bench  ## Measure gates, trials, packs, tables and what a study costs; writes docs/performance.md (an hour)
	$(BIN)/python benchmarks/trial_speed.py
	$(BIN)/python benchmarks/packed_speed.py --output docs
	$(BIN)/python benchmarks/study_overhead.py --output docs
	$(BIN)/python benchmarks/gate_cost.py --compile --output docs
	$(BIN)/python benchmarks/large_table.py --output docs

proof: .venv/.run  ## Simulate how often the whole decision errs (hours); writes docs/protocol.md
	$(BIN)/python benchmarks/decision_error.py --write docs/protocol.md $(ARGS)

docs: .venv/.dev  ## Write the page of the study file, the API pages (build/api), check links and examples
	$(BIN)/python docs/make_configuration.py
	$(BIN)/python docs/make_gates.py
	$(BIN)/python docs/make_published.py
	$(BIN)/python docs/make_plan.py
	$(BIN)/python docs/make_api.py
	$(BIN)/python -m pytest -q tests/docs -m 'slow or not slow' $(ARGS)

# In an environment of its own: its dependencies must not move the pins. A pin that cannot be looked up is a failure (--strict)
audit:  ## Look up the pins of constraints.txt in the advisory database
	test -x .venv/audit/bin/pip-audit || \
	  { $(PYTHON) -m venv .venv/audit && .venv/audit/bin/python -m pip install --quiet pip-audit; }
	@.venv/audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip --progress-spinner off || \
	  { echo "make audit: failed. Either a pin has an advisory (listed above), or the advisory service did not answer" \
	    "for a pin, and then nothing is known of the pins" >&2; exit 1; }

# Only the direct pins are chosen by hand; the rest follows from them
constraints: .venv/.dev  ## Write constraints.txt anew
	$(PIP) install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-emit-index-url \
	  --no-annotate --no-header -c pins.txt -o constraints.txt pyproject.toml

clean:  ## Remove what was installed; studies stay
	rm -rf .venv build *.egg-info
