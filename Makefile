VENV ?= .venv
PYTHON ?= python3
OUT ?= out/demo
BIN = $(VENV)/bin

.PHONY: demo test bench clean
.DEFAULT_GOAL := demo

INSTALL = $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

# A file of the environment stands for the whole of it: rebuilt when what it was made from changes.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e .
	touch $@

$(VENV)/.tools: $(VENV)/.ready  # what tests need besides: optional packages, too, which slow the start of every command
	$(INSTALL) -e '.[test]'
	touch $@

demo: $(VENV)/.ready  ## teach pico a subject and a style, compose them, write a report
	$(BIN)/qrlora demo --out $(OUT)

test: $(VENV)/.tools  ## lint, types, import contracts, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q

# All tables in minutes on two cores. QUICK= takes the sizes and rounds of docs/speed.md instead, and
# SHAPES='--shapes flux.1' all layers of that model; each table as JSON is in out/benchmarks, with machine facts.
QUICK ?= --quick
SHAPES ?=
PICO = src/qrlora/pico/weights/pipeline/transformer/diffusion_pytorch_model.safetensors

bench: $(VENV)/.tools  ## a basis, a training step, adapters at inference, a server: each beside what else there is
	$(BIN)/python benchmarks/basis.py --peft $(SHAPES) --json out/benchmarks/basis.json
	$(BIN)/python benchmarks/basis.py --rank 16 --summary --weights $(PICO) --json out/benchmarks/basis-pico.json
	$(BIN)/python benchmarks/training.py $(QUICK) --json out/benchmarks/training.json
	$(BIN)/python benchmarks/inference.py $(QUICK) --json out/benchmarks/inference.json
	$(BIN)/python benchmarks/serve.py $(QUICK) --json out/benchmarks/serve.json

clean:
	rm -rf $(VENV) out build
