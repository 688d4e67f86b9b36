# Everything that development needs, in .venv. Needs Python 3.10 or newer with its venv module, and nothing else.
#
#   make install PYTHON=python3.12         another Python
#   make install DEVICE=cpu                leave the GPUs of this machine alone (or DEVICE=gpu)
#   make install TORCH_INDEX=URL           take torch from another package index than pip's default
#   make quickstart ARGS="data=folder data.root=PATH"
#   make test ARGS="tests/data -k order"

PYTHON ?= python3
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
TORCH_INDEX ?=
ARGS ?=
# Tests of one file stay together: those that start ranks share a launch. tests/conftest.py orders the files.
TEST_WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/installed-$(DEVICE)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints/$(DEVICE).txt
SHELL_SCRIPTS := .ci/run $(wildcard launch/*.sh slurm/*.sh slurm/*.sbatch tests/*/*.sh)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-long bench text-model autoencoder-table ablation check format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 20

install: $(STAMP) ## make .venv with everything that development, tests and the quickstart need

# torch goes first and alone, so that no other package's wishes decide which build of it comes.
$(STAMP): pyproject.toml constraints/$(DEVICE).txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "ldmscale needs Python 3.10 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1): make install PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) comes without venv (on Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) --editable '.[dev,quickstart,s3$(if $(filter gpu,$(DEVICE)),$(comma)gpu)]'
	$(BIN)/python -m pip check
	$(if $(filter gpu,$(DEVICE)),$(BIN)/ldmscale doctor)
	touch $@

quickstart: $(STAMP) ## the whole pipeline on real images, on this machine, in about 10 minutes
	$(BIN)/ldmscale quickstart $(ARGS)

test: $(STAMP) ## run the tests that every change must pass
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder -m "not long" $(ARGS)

test-long: $(STAMP) ## run the tests that take minutes each, before an issue is closed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder -m long $(ARGS)

text-model: $(STAMP) ## train a model that follows text in 45 minutes of CPU and write docs/text_model.md
	$(BIN)/python -m benchmarks.text_model $(ARGS)

autoencoder-table: $(STAMP) ## train KL-f4 and VQ-f4 with and without the GAN and write docs/autoencoder_table.md (30 minutes)
	$(BIN)/python -m benchmarks.autoencoder_table $(ARGS)

ablation: $(STAMP) ## train LDM-1, 2, 4 and 8 at equal compute and write docs/ablation_table.md and .png (an hour)
	$(BIN)/python -m benchmarks.ablation $(ARGS)

bench: $(STAMP) ## side by side with other implementations; make bench ARGS="unet_step_8 --seconds 60"
	@for network in unet autoencoder; do \
	    $(BIN)/python -m benchmarks.pretended_cuda $$network || [ $$? -eq 3 ] || exit 1; done # 3: no compiler
	$(BIN)/python -m benchmarks $(ARGS)

check: $(STAMP) ## lint, formatting, types, shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck $(SHELL_SCRIPTS)

format: $(STAMP) ## format the code, mend what the linter can mend
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean: ## remove .venv and all caches; runs/ stays
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache dist
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

comma := ,
