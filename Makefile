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

test: $(VENV)/.tools  ## lint, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

bench: $(VENV)/.ready  ## fast basis against the full decomposition, a large weight and pico's; adapters at inference
	mkdir -p out/benchmarks
	$(BIN)/python benchmarks/basis.py --json out/benchmarks/basis.json
	$(BIN)/python benchmarks/basis.py --rank 16 --summary --json out/benchmarks/basis-pico.json \
		--weights src/qrlora/pico/weights/pipeline/transformer/diffusion_pytorch_model.safetensors
	$(BIN)/python benchmarks/inference.py --quick

clean:
	rm -rf $(VENV) out build
