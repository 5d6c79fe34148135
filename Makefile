# Each target sets up what it needs. `make demo` and `make test` work from a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY ?= passive

.PHONY: setup demo test check format lock bench-overhead check-lossless clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

demo: setup  ## edge and verifier as two processes, on the real pair; every text must be identical
	$(BIN)/wisp demo

test: setup  ## offline, on the tiny pair
	$(BIN)/python -m pytest

check: setup  ## format, lint, types
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy

check-lossless: setup
	$(BIN)/wisp check-lossless --pair tiny

bench-overhead: setup  ## what a verification costs beside the engine
	$(BIN)/wisp bench-overhead

format: setup
	$(BIN)/ruff format src tests
	$(BIN)/ruff check --fix src tests

# Exact pins with hashes, and no registry's address, from the ranges in pyproject.toml.
lock: setup
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --quiet pyproject.toml --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --no-header --upgrade -o requirements/base.txt
	$(BIN)/uv pip compile --quiet pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --no-header -c requirements/base.txt -o requirements/dev.txt
	$(BIN)/uv pip compile --quiet pyproject.toml --extra lab --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --no-header -c requirements/base.txt -o requirements/lab.txt

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
