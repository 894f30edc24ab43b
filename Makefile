VENV ?= .venv
PYTHON ?= python3
OUT ?= out/demo
BIN = $(VENV)/bin

.PHONY: demo demo-company docs notebooks test test-quick clean
.DEFAULT_GOAL := demo

INSTALL = $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

# A file of the environment stands for the whole of it: rebuilt when what it was made from changes.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e .
	touch $@

$(VENV)/.registry: $(VENV)/.ready
	$(INSTALL) -e '.[registry]'
	touch $@

$(VENV)/.tools: $(VENV)/.ready  # what tests need besides: optional packages, too, which slow the start of every command
	$(INSTALL) -e '.[dev]'
	touch $@

demo: $(VENV)/.ready  ## train a subject and a style on pico, compose them, write a report
	$(BIN)/qrlora demo --out $(OUT)

demo-company: $(VENV)/.registry  ## a pilot from one picture to an approved, marked catalog; then tampering
	$(BIN)/qrlora demo --company --out out/company

# One process a core (so one thread in each), four at most: each takes a gigabyte or two.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist worksteal

test: $(VENV)/.tools  ## lint, types, the oldest Python, import contracts, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/vermin -q -t=3.10- --eval-annotations --exclude long src tests examples
	$(BIN)/lint-imports
	$(PYTEST)

# Of every room what takes little time and tells much. A test checks that no room is missing.
QUICK = \
	method/test_adapter method/test_bad_files method/test_basis method/test_composition method/test_space \
	models/test_dataset models/test_families models/test_family_losses models/test_first_losses models/test_recipe \
	quality/test_brand quality/test_learned quality/test_measures quality/test_report quality/test_study \
	apps/test_outputs apps/test_reading pico/test_pico \
	lab/test_baselines_deltas lab/test_baselines_measures lab/test_baselines_merges lab/test_benchmarks lab/test_claims operations/test_registry operations/test_policy_rules

test-quick: $(VENV)/.tools  ## before each commit: lint, and a minute of tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) $(QUICK:%=tests/%.py)

docs: $(VENV)/.tools  ## both documentation sites, English and Japanese, into out/site
	$(BIN)/python docs/build.py

notebooks: $(VENV)/.tools  ## run the notebooks on pico; with their outputs they lie in out/notebooks
	mkdir -p out/notebooks
	for name in $(notdir $(basename $(wildcard notebooks/*.py))); do \
		$(BIN)/jupytext --quiet --to ipynb --output out/notebooks/$$name.ipynb notebooks/$$name.py && \
		$(BIN)/jupyter execute --inplace out/notebooks/$$name.ipynb || exit 1; \
	done

clean:
	rm -rf $(VENV) out build
