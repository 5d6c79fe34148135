# Each target sets up what it needs. `make demo` and `make test` work from a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY ?= passive

.PHONY: setup demo test test-replicas check format lock bench bench-overhead bench-drafting check-lossless clean

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

test-replicas: setup $(VENV)/.ray  ## several verifiers as Ray actors, killed, drained and scaled
	$(BIN)/python -m pytest -m ray

$(VENV)/.ray: requirements/ray.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/ray.txt
	@touch $@

check: setup  ## format, lint, types
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy

check-lossless: setup
	$(BIN)/wisp check-lossless --pair tiny

bench-overhead: setup  ## what a verification costs beside the engine
	$(BIN)/wisp bench-overhead

bench: setup  ## every simulated experiment: pages, data and plots, in two processes
	$(BIN)/wisp experiments --out docs/results --jobs 2

bench-drafting: setup  ## drafting policies over a grid of devices, links and verifiers, on the shipped traces
	$(BIN)/wisp replay --out docs/results

format: setup
	$(BIN)/ruff format src tests
	$(BIN)/ruff check --fix src tests

# Exact pins with hashes, and no registry's address, from the ranges in pyproject.toml.
LOCK := $(BIN)/uv pip compile --quiet pyproject.toml --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-annotate --no-header --upgrade
lock: setup
	$(BIN)/pip install --quiet uv
	$(LOCK) -o requirements/base.txt
	$(LOCK) --extra dev --extra lab -o requirements/dev.txt
	$(LOCK) --extra ray --constraint requirements/dev.txt -o requirements/ray.txt

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
