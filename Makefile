# Each target sets up all it needs; `make help` lists them. See scripts/setup.sh for the variables.
#   make test PYTHON=python3.12
#   make test TORCH="torch==2.13.0 --index-url URL"

PYTHON ?=
VENV ?= .venv
TORCH ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo

.DEFAULT_GOAL := help
.PHONY: help demo test

help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

$(READY): pyproject.toml scripts/setup.sh
	@PYTHON='$(PYTHON)' VENV='$(VENV)' TORCH='$(TORCH)' bash scripts/setup.sh
	@touch $@

demo: $(READY) ## compress the embedded model, talk to it, compare it with the dense one
	rm -rf $(DEMO)
	$(BIN)/starkv analyze spectra --out $(DEMO)/spectra
	$(BIN)/starkv calibrate --recipe recipes/tiny.yaml --out $(DEMO)/tiny
	$(BIN)/starkv chat $(DEMO)/tiny --prompt "The history of the city begins" --max-new-tokens 64
	$(BIN)/starkv eval $(DEMO)/tiny --windows 16 --prompts 1

test: $(READY) ## lint, types and tests
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile
