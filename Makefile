# Every target sets itself up first, from nothing if need be. ARGS goes to the command: make test ARGS="tests/tandem -x"
.DEFAULT_GOAL := help
.PHONY: help setup run test helm-test exact chaos check bench bench-growth bench-transfer bench-peers quantized-data quantized-model gpu-check gpu-table clean

help: ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: ## .venv with pinned packages, and the default model (instant when nothing changed)
	@scripts/setup

run: setup ## start everything on this machine, ask the model a question, stay up until Ctrl-C
	@exec .venv/bin/tandem up --ask "What is the capital of France, and what is it known for?" $(ARGS)

test: setup ## all tests (no network, no GPU)
	@exec scripts/test $(ARGS)

helm-test: setup ## the chart: lint, golden files, schemas, rules, and its processes run as rendered (ARGS="-k golden")
	@exec scripts/helm-test $(ARGS)

exact: setup ## the same tokens in every way of running (the full matrix; hours on two cores)
	@exec scripts/test tests/exact --exact-full -v --durations=0 -o log_cli=true -o log_cli_level=INFO $(ARGS)

chaos: setup ## kill, hang, drain and cut off processes under streams that must not notice (ARGS="--minutes 20 --seed 7")
	@exec .venv/bin/python tests/chaos $(ARGS)

check: setup ## ruff, mypy strict, import-linter, buf lint, stub freshness
	@exec scripts/check

bench: setup ## one JSON line per point: the engine alone, then through the gateway
	@exec scripts/bench $(ARGS)

bench-growth: setup ## one decode step over the batch and over the context, beside its floor
	@exec .venv/bin/python -m bench.growth $(ARGS)

quantized-data: ## the tests' quantised checkpoints by the tools that write such (ARGS: which; minutes of installing)
	@exec scripts/quantized-data $(ARGS)

quantized-model: setup ## the default model by the same tools, and how near Tandem is to them (ARGS: which; many minutes)
	@exec scripts/quantized-data --default $(ARGS)

gpu-table: setup ## what the GPU kernels use (registers, shared memory, spills), compiled without a GPU; minutes
	@exec .venv/bin/python -m bench.gpu_table --markdown docs/gpu-table.md $(ARGS)

gpu-check: ## the GPU kernels on this machine's GPU: parity, then speed beside floors (any Python with torch: PYTHON=)
	@PYTHONPATH=. exec $${PYTHON:-python3} -m bench.gpu_check $(ARGS)

bench-transfer: setup ## KV transfer between two processes by each transport, beside a memory copy and a bare NIXL agent
	@exec .venv/bin/python -m bench.transfer $(ARGS)

bench-peers: setup ## beside OpenVINO, vLLM and llama.cpp on this machine, as ratios (PEERS=, ROUNDS=, POINTS=)
	@exec .venv/bin/python -m bench.peers $(ARGS)

clean: ## remove .venv and caches of tools
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache node_modules build *.egg-info
