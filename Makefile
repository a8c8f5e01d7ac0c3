.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{ printf "  make %-13s %s\n", $$1, $$2 }'

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(READY) ## Create .venv and install gcbench into it

run: $(READY) ## Install and measure gpt2 at batch 16
	$(BIN)/gcbench run --model gpt2 --batch 16

TESTS := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

test: $(READY) ## Install and run the tests, those apart that take their time
	$(TESTS) -m "not slow"

test-slow: $(READY) ## Run the tests that take their time
	$(TESTS) -m slow

CUDA_PYTHON ?= $(BIN)/python
CARD ?= h100

test-emulated: $(READY) ## Run the GPU tests on an emulated CARD, with a CUDA build of torch in CUDA_PYTHON's environment
	$(CUDA_PYTHON) tests/support/run_emulated.py $(CARD)

lint: $(READY) ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY) ## Write the generated parts of README.md and docs/ again
	$(BIN)/python docs/write_pages.py

bench: $(READY) ## Measure gcbench itself: start-up, waits, overhead of the default job
	$(BIN)/python benchmarks/startup.py
	PYTHONPATH=tests/plan:tests/support $(BIN)/python benchmarks/waits.py
	$(BIN)/python benchmarks/overhead.py

reference: $(READY) ## Make the committed results again (replaces the folders in results/reference)
	rm -rf results/reference/gpt2-cpu
	$(BIN)/gcbench run --config configs/gpt2-cpu.toml --out results/reference/gpt2-cpu

	rm -rf results/reference/llama-8b-rtx-4090
	$(BIN)/gcbench predict --config configs/llama-8b-rtx-4090.toml --explain --out results/reference/llama-8b-rtx-4090

	rm -rf results/reference/strategies
	$(BIN)/gcbench predict --config configs/strategies.toml --out results/reference/strategies

	rm -rf results/reference/plan-llama-3.1-8b
	$(BIN)/gcbench plan -m llama-3.1-8b --seq-len 4096 --precision bf16 --device h200 --out results/reference/plan-llama-3.1-8b

	rm -rf results/reference/check-llama-3.1-8b
	$(BIN)/gcbench check -m llama-3.1-8b --device cpu --out results/reference/check-llama-3.1-8b

frontier: $(READY) ## Measure the README's frontier of strategies again (some ten minutes)
	rm -rf results/reference/frontier-cpu
	$(BIN)/gcbench run --config configs/frontier-cpu.toml --out results/reference/frontier-cpu

families: $(READY) ## Check every type of causal LM, scaled down (goes on where it stopped)
	$(BIN)/python benchmarks/families.py

truth: $(READY) ## Measure the grid that predictions are held to, on this machine's device (goes on where it stopped)
	$(BIN)/python benchmarks/truth.py

gpu-hour: $(READY) ## Use the minutes one has a card for, eight at most: GPU tests, runs, the grid, rates, a plan
	$(BIN)/python benchmarks/gpu_hour.py results/gpu-hour

EMULATED_CARDS ?= h100 a100-80gb rtx-4090 t4
LOOP_CARDS ?= h100 t4
truth-emulated: ## Measure the grid, and plain loops, on emulated cards, with CUDA_PYTHON's CUDA build of torch (goes on where it stopped)
	set -e; for card in $(EMULATED_CARDS); do $(or $(CUDA_PYTHON),$(BIN)/python) benchmarks/truth.py --emulate $$card; done
	set -e; for card in $(LOOP_CARDS); do $(or $(CUDA_PYTHON),$(BIN)/python) benchmarks/loop_truth.py --emulate $$card; done

accuracy: $(READY) ## Predict every measured grid and say how far off the predictions are
	$(BIN)/python benchmarks/accuracy.py

published: $(READY) ## Predict what others measured and published, and say how far off the predictions are
	$(BIN)/python benchmarks/published.py
	$(BIN)/python benchmarks/published_times.py

bench-predict: $(READY) ## Measure how fast predictions are, and for how many types of models there is one
	$(BIN)/python benchmarks/prediction_speed.py
	$(BIN)/python benchmarks/coverage.py

bench-plan: $(READY) ## Measure how good plans are: regret on this machine, frontier by prediction, speed
	$(BIN)/python benchmarks/regret.py
	$(BIN)/python benchmarks/plan_frontier.py
	$(BIN)/python benchmarks/plan_speed.py

clean: ## Remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info

.PHONY: help install run test test-slow test-emulated lint docs bench reference truth truth-emulated gpu-hour accuracy bench-predict bench-plan frontier families clean
