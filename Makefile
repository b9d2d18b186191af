# Usage: make help
#
# PYTHON      interpreter of a new .venv, 3.10 to 3.13 (PYTHON=python3.12 make test)
# ARGS        overrides for train.py, or options for pytest in test and unit
# EXPERIMENT  the experiment of train, a file of configs/experiment
# WORKERS     test processes
# ONLY        the experiments of smoke

PYTHON     ?= python3
EXPERIMENT ?= gpt_dts
WORKERS    ?= 2
ARGS       ?=
ONLY       ?= $(basename $(notdir $(wildcard configs/experiment/*.yaml)))

BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help train test lint unit smoke clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: .venv/installed  ## Train; EXPERIMENT=name picks another recipe, ARGS="key=value ..." changes it
	@$(BIN)/python train.py experiment=$(EXPERIMENT) $(ARGS)

test: lint unit  ## Lint, types, layering and tests

lint: .venv/installed-dev  ## Ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread for each test process: torch would otherwise start one per core in every process.
unit: .venv/installed-dev  ## The tests alone; ARGS="-k router" picks some
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

smoke: .venv/installed  ## A few batches of every experiment, or of ONLY="gpt_dts mlm_dts"
	@set -e; for name in $(ONLY); do \
		case $$name in mlm_* | glue_*) model=roberta_tiny ;; mt_*) model=transformer_tiny ;; vit_*) model=vit_tiny ;; *) model=gpt_tiny ;; esac; \
		echo "== $$name"; \
		$(BIN)/python train.py experiment=$$name debug=fast_dev_run model=$$model $(ARGS); \
	done

clean:  ## Remove the environment and the caches; logs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist src/*.egg-info

# The stamps lie in .venv, so that they vanish with it, and are older than an edited pyproject.toml.
.venv/installed: .venv/pyvenv.cfg pyproject.toml
	$(BIN)/python -m pip install -e .
	@touch $@

.venv/installed-dev: .venv/pyvenv.cfg pyproject.toml
	$(BIN)/python -m pip install -e ".[dev]"
	@touch $@ .venv/installed

# Its recipe runs each time, and does nothing while .venv works and has the version of the PYTHON that was named, if any.
.venv/pyvenv.cfg: FORCE
	@if $(BIN)/python -c 'import pip' 2>/dev/null && $(if $(NAMED),$(SAME_VERSION),true); then exit 0; fi; \
	command -v "$(PYTHON)" >/dev/null || { echo "error: no $(PYTHON) here; $(NAME_ANOTHER)" >&2; exit 2; }; \
	"$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
		{ echo "error: Python 3.10 to 3.13 is needed, and $(PYTHON) is $$("$(PYTHON)" -V 2>&1); $(NAME_ANOTHER)" >&2; exit 2; }; \
	"$(PYTHON)" -m venv --clear .venv || \
		{ echo "error: $(PYTHON) made no virtual environment; on Debian and Ubuntu, install python3-venv" >&2; exit 2; }

NAMED        := $(filter-out file,$(origin PYTHON))
NAME_ANOTHER := name another, for example: PYTHON=python3.12 make test
SAME_VERSION := [ "$$("$(PYTHON)" -V 2>&1)" = "$$($(BIN)/python -V 2>&1)" ]

.PHONY: FORCE
FORCE:
