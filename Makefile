# The targets set up .venv when pyproject.toml or constraints.txt changed, and only then.
PYTHON ?= python3
PYTEST_ARGS ?=
BIN := .venv/bin
STAMP := .venv/installed
AOT = JAX_PLATFORMS=cpu PYTHONPATH=.aot $(BIN)/python -m pytest tests/test_ahead_of_time.py \
	tests/test_ptx.py -n 2 --dist worksteal

# Material tells at each start that MkDocs has a successor.
MKDOCS = NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/mkdocs

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow aot aot-full aot-tpu lint docs docs-serve gallery bench clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP)  ## Two simulations and a training, with pictures, in runs/
	$(BIN)/jaxflow simulate --n 512 --d 3 --beta 9 --t1 30 --out runs/demo-sphere
	$(BIN)/jaxflow simulate --text examples/gettysburg.txt --d 16 --beta 12 --t1 16 \
		--threshold 0.99 --out runs/demo-text
	rm -rf runs/demo-lm
	$(BIN)/jaxflow train lm --preset demo --out runs/demo-lm
	@echo "Open runs/demo-sphere/flow.html and runs/demo-text/flow.html in a browser; the loss of"
	@echo "the language model is in runs/demo-lm/loss.png."

test: $(STAMP)  ## The tests, but for the long ones; PYTEST_ARGS is passed on
	$(BIN)/python -m pytest tests -n 2 --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-slow: $(STAMP)  ## The long tests, which rarely break
	$(BIN)/python -m pytest tests -n 2 --dist worksteal -m "slow and not aot_full" $(PYTEST_ARGS)

aot: .aot/installed  ## The CUDA kernels without a GPU: compiled, and run on the CPU; AOT_ARGS is passed on
	$(AOT) -m "slow and not aot_full" $(AOT_ARGS)

aot-full: .aot/installed  ## The same of every kernel, for every device: an hour and a half
	$(AOT) $(AOT_ARGS)

aot-tpu: .aot-tpu/installed  ## Kernels and programs for TPUs, without one
	JAX_PLATFORMS=cpu PYTHONPATH=.aot-tpu $(BIN)/python -m pytest tests/test_tpu_ahead_of_time.py \
		-n 0 $(AOT_ARGS)

lint: $(STAMP)  ## Style, format, types and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/codespell

docs: $(STAMP)  ## The site, in build/site: open index.html there
	$(MKDOCS) build --strict

gallery: $(STAMP)  ## The pictures of the site's gallery, drawn anew in some ten minutes
	PYTHONPATH=. $(BIN)/python docs/draw.py

docs-serve: $(STAMP)  ## The same at http://127.0.0.1:8000, built anew at each change
	$(MKDOCS) serve --watch jaxflow

bench: $(STAMP)  ## The benchmarks on this machine
	$(BIN)/python -m benchmarks

clean:  ## Remove .venv, .aot, .aot-tpu, runs/ and caches
	rm -rf .venv .aot .aot-tpu runs build dist .hypothesis .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# constraints.txt holds the versions that passed on Python 3.11; newer Pythons take newer jax.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	held=$$($(BIN)/python -c 'import sys; print("-c constraints.txt" * (sys.version_info[:2] == (3, 11)))') \
	&& $(BIN)/python -m pip install --quiet --disable-pip-version-check $$held -e ".[dev]"
	touch $@

# Beside .venv and not in it, where JAX would look for a GPU at each start; without what they depend
# on, which is CUDA's libraries.
.aot/installed: $(STAMP)
	rm -rf .aot
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .aot \
		$$($(BIN)/python -m benchmarks.machine_code)
	touch $@

.aot-tpu/installed: $(STAMP)
	rm -rf .aot-tpu
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .aot-tpu libtpu
	touch $@
