# Every target runs in .venv, which `setup` makes; `make help` lists them.
#
#   VARIANT=cpu|cuda   which pins (requirements/$(VARIANT).txt); keep it for all commands of one checkout
#   PYTHON=...         the interpreter to build .venv on

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VARIANT ?= cpu
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-$(VARIANT)
TESTS ?=
TYPED := server adapters training clients/python/src tests deploy requirements $(if $(wildcard bench/*.py),bench)
ARGS ?=

export PYTHON

.PHONY: help
help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-8s %s\n", $$1, $$2 }'

.PHONY: setup
setup: $(STAMP) ## Make .venv from the pins; VARIANT=cuda for GPUs

$(STAMP): requirements/$(VARIANT).txt requirements/dev.txt requirements/install.sh requirements/setup.sh \
		pyproject.toml clients/python/pyproject.toml
	@rm -f $(VENV)/.setup-*
	@requirements/setup.sh $(VENV) $(VARIANT)
	@touch $@

.PHONY: demo
demo: setup ## Train an adapter from its own rollouts and serve it; DEMO_EXIT=1 ends after the table
	@deploy/debian-packages.sh run
	@exec $(BIN)/trimtab demo $(if $(filter-out 0 no false,$(DEMO_EXIT)),--exit) $(ARGS)

.PHONY: serve
serve: setup ## Serve a model: MODEL=directory-or-id [ADAPTER=name=directory ...] [ARGS=...]
	@[ -n '$(MODEL)' ] || { echo 'usage: make serve MODEL=directory-or-hub-id [ADAPTER=name=directory] [ARGS="--port 8000"]' >&2; exit 2; }
	@deploy/debian-packages.sh run
	@exec $(BIN)/trimtab serve --model '$(MODEL)' $(foreach adapter,$(ADAPTER),--adapter '$(adapter)') $(ARGS)

.PHONY: test
test: setup ## Unit, contract and integration tests; TESTS=tests/unit for a part, ARGS for pytest
	@deploy/debian-packages.sh run test
	@$(if $(TESTS),$(BIN)/python -m pytest $(TESTS),deploy/run-tests.sh $(BIN)/python) $(ARGS)

.PHONY: check
check: setup ## Lint, formatting, types, import directions, sizes, secrets
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPED)
	$(BIN)/lint-imports
	$(BIN)/python deploy/size_guard.py
	$(BIN)/python deploy/source_scan.py

.PHONY: bench
bench: setup ## Run every script in bench/
	@shopt -s nullglob; scripts=(bench/*.py); \
	[ $${#scripts[@]} -gt 0 ] || { echo 'bench/ holds no scripts'; exit 0; }; \
	for script in "$${scripts[@]}"; do echo "==> $$script"; $(BIN)/python "$$script" $(ARGS); done

.PHONY: fmt
fmt: setup ## Format and apply safe lint fixes
	$(BIN)/ruff check --fix-only --exit-zero .
	$(BIN)/ruff format .

.PHONY: pins
pins: setup ## Resolve pyproject.toml again and rewrite requirements/*.txt
	$(BIN)/python requirements/compile.py

.PHONY: clean
clean: ## Remove caches and build results; .venv stays (make clean-all removes it too)
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

.PHONY: clean-all
clean-all: clean
	@rm -rf $(VENV)
