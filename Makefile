VENV ?= .venv
PYTHON ?= python3
OUT ?= out/demo
BIN = $(VENV)/bin

.PHONY: demo demo-company docs test clean
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
	$(INSTALL) -e '.[test]'
	touch $@

demo: $(VENV)/.ready  ## train a subject and a style on pico, compose them, write a report
	$(BIN)/qrlora demo --out $(OUT)

demo-company: $(VENV)/.registry  ## a pilot from one picture to an approved, marked catalog; then tampering
	$(BIN)/qrlora demo --company --out out/company

test: $(VENV)/.tools  ## lint, types, import contracts, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q

docs: $(VENV)/.tools  ## both documentation sites, English and Japanese, into out/site
	$(BIN)/python docs/build.py

clean:
	rm -rf $(VENV) out build
