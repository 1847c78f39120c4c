# Needs git, make and Python 3.10 or newer; everything else goes into .venv.
PYTHON ?= python3
PYTEST_WORKERS ?= 2
VENV ?= .venv
CONSTRAINTS ?= constraints.txt

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test lint types unit compiled oldest newest format benchmark clean

help:
	@echo "make demo       fine-tune perspectives on embedded data and print where the results lie"
	@echo "make test       lint, type check and tests (what continuous integration runs)"
	@echo "make lint       ruff, its linter and its formatter"
	@echo "make types      mypy"
	@echo "make unit       pytest, without the tests marked slow; kernels in Triton's interpreter, or on the GPU"
	@echo "make compiled   pytest on the kernels as they are compiled, on the CPU (without a GPU)"
	@echo "make oldest     the tests, with the oldest versions of what trwkv needs (.venv-oldest)"
	@echo "make newest     the tests, with the newest (.venv-newest)"
	@echo "make format     rewrite the code as ruff wants it"
	@echo "make benchmark  throughput of the op on this machine"
	@echo "make clean      remove .venv and caches"

demo: $(INSTALLED)
	$(BIN)/python examples/finetune_lambada.py

test: lint types unit compiled

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

unit: $(INSTALLED)
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal -m "not slow"

# Decided when kernels are imported: hence a run of its own.
compiled: $(INSTALLED)
	TRWKV_EMULATE=90 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal -m "not slow" tests/compiled \
		tests/ops/test_gated.py tests/ops/test_in_place.py tests/ops/test_token_shift_mix.py

oldest:
	$(MAKE) unit compiled VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

newest:
	rm -rf .venv-newest
	$(MAKE) unit compiled VENV=.venv-newest CONSTRAINTS=/dev/null

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(INSTALLED)
	$(BIN)/python benchmarks/throughput.py

# Installed again whenever the requirements change.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else \
	"trwkv needs Python 3.10 or newer; this is %s. Choose another: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
