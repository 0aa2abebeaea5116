.DEFAULT_GOAL := help
PYTHON ?= python3
RUN := .venv/bin/python

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: .venv/installed ## set up .venv with everything that tests and the demo need

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --editable '.[dev,emoji,lora,quant]'
	touch $@

ORIGINALS := $(wildcard tests/parity/originals/*.txt)

originals: venv $(ORIGINALS:tests/parity/originals/%.txt=.originals/%/installed) ## the reward models' own packages, for the tests that compare with them

.originals/%/installed: tests/parity/originals/%.txt | .venv/installed
	rm -rf .originals/$*
	.venv/bin/pip install --quiet --no-deps --target .originals/$* --requirement $<
	touch $@

define train  # moves an earlier run of the recipe aside
	@if [ -e runs/$(1) ]; then n=1; while [ -e runs/$(1)_$$n ]; do n=$$((n + 1)); done; \
		mv runs/$(1) runs/$(1)_$$n && echo "the earlier run is runs/$(1)_$$n now"; fi
	$(RUN) -m srpo_lightning fit --config configs/$(1).yaml
endef

demo: venv ## training of the built-in model: numbers and pictures before and after, in minutes
	$(call train,emoji_demo)

demo-video: venv ## the same with clips: a small Wan towards things that spin
	$(call train,moving_demo)

test: originals ## run the whole test suite
	HF_HUB_OFFLINE=1 $(RUN) -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder  # tests/conftest.py has the order

docs: venv ## the documentation as pages, in docs/_build
	$(RUN) -m sphinx --builder html --fail-on-warning --quiet docs docs/_build

notebooks: venv ## run the notebooks and keep their outputs in them, with a short run to look at
	HF_HUB_OFFLINE=1 $(RUN) -m tools.notebooks

check: venv ## lint, types, direction of imports
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	.venv/bin/lint-imports

clean: ## delete environments and caches, keep runs
	rm -rf .venv .originals .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.PHONY: help venv originals demo demo-video test docs notebooks check clean
