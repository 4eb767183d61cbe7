# The two commands a newcomer types are `make demo` and `make test`.
PYTHON ?= python3
# Where pip looks for torch. Empty: wherever pip is configured to look. For a given CUDA build:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cu130
TORCH_INDEX ?=
# Processes of `make test`, one thread each.
PROCESSES ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow peers campaign check format clean gpu gpu-wheels
demo: $(INSTALLED)  ## three minutes: text -> tokenizer -> training -> evaluation -> samples -> report
	$(BIN)/gptworks run laptop --out runs/demo

test: $(INSTALLED)  ## the whole suite, under ten minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal $(ARGUMENTS)

test-slow: $(INSTALLED)  ## the tests too long for `make test`; properties with four times as many examples
	$(BIN)/python -m pytest -m slow
	GPTWORKS_EXAMPLES=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) tests/core tests/data tests/infer

peers: $(INSTALLED)  ## what we export, in llama.cpp; builds llama-cpp-python from source the first time, minutes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peers]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/peers

campaign: $(INSTALLED)  ## hostile and damaged inputs, all of them: one table, and JSON (ARGUMENTS="--json FILE NAME ...")
	OMP_NUM_THREADS=1 $(BIN)/python tests/system/campaign.py $(ARGUMENTS)

gpu:  ## all that is to be learnt from one NVIDIA GPU in eight minutes, without installing (ARGUMENTS="--tiny": a rehearsal)
	$(PYTHON) benchmarks/gpu.py $(ARGUMENTS)

gpu-wheels:  ## for a machine without a network: the wheels it may lack, into benchmarks/.gpu/wheels
	$(PYTHON) benchmarks/gpu.py --prepare wheels

check: $(INSTALLED)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "gptworks needs Python 3.11 or newer; try: make $(firstword $(MAKECMDGOALS)) PYTHON=python3.12"; exit 64; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX) --extra-index-url https://pypi.org/simple) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
