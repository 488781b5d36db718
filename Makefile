# Every target makes its own virtual environment and installs what it needs. Each install is one
# resolver run, which chooses torch and torchvision together.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1

.PHONY: help demo test test-slow test-upstream test-floors test-quanda lint docs wheel bench bench-full bench-gpu lds lds-lengths lds-remove lds-retrain exact-ggn coverage clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /: /'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# one stamp for each extra, so that a target installs only what it needs
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

demo: $(VENV)/.installed-demo  ## which digits influenced these samples? (writes demo-output/)
	$(BIN)/python docs/examples/influence_digits.py --output demo-output

test: $(VENV)/.installed-tests  ## the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.installed-tests  ## the long statistical tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

UPSTREAM_TESTS := tests/test_upstream.py tests/test_curvlinops_tools.py tests/test_ladder.py \
	tests/test_readme.py tests/diffusion/test_regression.py tests/influence/test_scores.py \
	tests/influence/test_kernel_regression.py tests/linalg \
	tests/curvature/test_kfac.py

# CURVLINOPS=FOLDER is the root of its checkout
test-upstream: $(VENV)/.installed-tests  ## what touches curvlinops, on another version of it
	PYTHONPATH=$(CURDIR):$(CURVLINOPS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(UPSTREAM_TESTS)

# the least versions that pyproject.toml allows, in an environment of their own
FLOORS := .venv-floors
$(FLOORS)/.installed: pyproject.toml .ci/floors.py
	$(PYTHON) -m venv $(FLOORS)
	$(PYTHON) .ci/floors.py > $(FLOORS)/constraints.txt
	$(FLOORS)/bin/python -m pip install --quiet --constraint $(FLOORS)/constraints.txt --editable '.[cli]' pytest
	@touch $@

test-floors: $(FLOORS)/.installed  ## a part of the tests at the least versions of what is needed
	OMP_NUM_THREADS=1 $(FLOORS)/bin/python -m pytest tests/linalg tests/runtime/test_files.py \
		tests/runtime/test_modes.py tests/test_ladder.py tests/test_attributor.py

# captum, which quanda needs, holds NumPy below 2, which pyarrow refuses; omegaconf it does not name
QUANDA := .venv-quanda
$(QUANDA)/.installed: pyproject.toml
	$(PYTHON) -m venv $(QUANDA)
	$(QUANDA)/bin/python -m pip install --quiet --editable '.[cli]' pytest quanda omegaconf
	$(QUANDA)/bin/python -m pip install --quiet --no-deps --upgrade 'numpy>=2'
	@touch $@

test-quanda: $(QUANDA)/.installed  ## quanda's metrics on our scores
	OMP_NUM_THREADS=1 $(QUANDA)/bin/python -m pytest tests/validation/test_quanda.py

lint: $(VENV)/.installed-lint  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# without the checkout on the path; what is installed in an environment of its own, CI tries out
wheel: $(VENV)/.installed-release  ## build, check and try out the wheel, into dist/
	rm -rf dist build
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build dist/*.whl
	PYTHONPATH=build OMP_NUM_THREADS=1 $(BIN)/python -P .ci/try_wheel.py build

# SPHINXOPTS="-D plot_gallery=0" leaves the gallery's programs unrun
docs: $(VENV)/.installed-docs  ## the documentation with its gallery, into docs/_build/html
	$(BIN)/python -m sphinx -q -W --keep-going $(SPHINXOPTS) docs docs/_build/html
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W $(SPHINXOPTS) -b doctest docs docs/_build/doctest

bench: $(VENV)/.installed-bench  ## the benchmarks, about half an hour, into benchmarks/results/
	$(BIN)/python -m benchmarks.factor_pass --upstream --kronfluence
	$(BIN)/python -m benchmarks.factor_pass --upstream --kronfluence --problem dit
	$(BIN)/python -m benchmarks.eigenvalue_draws
	$(BIN)/python -m benchmarks.ggn_product
	$(BIN)/python -m benchmarks.inverse_products --repeats 2
	$(BIN)/python -m benchmarks.peak_memory
	$(BIN)/python -m benchmarks.draws --repeats 2
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.positions
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.precision
	$(BIN)/python -m benchmarks.scoring --kronfluence
	$(BIN)/python -m benchmarks.stored_gradients
	$(BIN)/python -m benchmarks.shards
	$(BIN)/python -m benchmarks.report_page
	$(BIN)/python -m benchmarks.cost_model

bench-full: bench  ## the benchmarks that take longer as well
	$(BIN)/python -m benchmarks.factor_pass --upstream --problem cifar --num-data 16 --batch-size 8 \
		--not-decomposed
	$(BIN)/python -m benchmarks.score_draws
	$(BIN)/python -m benchmarks.refinement

bench-gpu: $(VENV)/.installed-bench $(VENV)/.installed-tests  ## on a GPU: its tests, then times and memory, eight minutes
	$(BIN)/python -m benchmarks.gpu

lds-retrain: $(VENV)/.installed-bench  ## the linear data-modelling score from nothing: core-hours
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.retrain --problem digits
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.retrain --problem fashion
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.retrain --problem photographs
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.retrain --problem styles
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.retrain --problem dreambooth
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.retrain --problem textures
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.retrain --problem textures_32

lds-lengths: $(VENV)/.installed-bench  ## retraining against the training's length: two core-hours
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.lengths
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.against_length

lds: $(VENV)/.installed-bench  ## the linear data-modelling score, from kept retrainings: ten core-hours or more
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.evaluate --problem digits
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.evaluate --problem fashion
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.evaluate --problem photographs
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.evaluate --problem styles
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.evaluate --problem dreambooth
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.evaluate --problem textures
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.evaluate --problem textures_32
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.draws
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.checks
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.sizes
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.calibration
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.unlearning --queries 8

lds-remove: $(VENV)/.installed-bench  ## retraining without the most helpful digits: five core-hours
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lds.remove --problem digits

exact-ggn: $(VENV)/.installed-bench  ## K-FAC and EK-FAC against the exact GGN of a trained UNet
	$(BIN)/python -m benchmarks.exact_ggn

coverage: $(VENV)/.installed-bench  ## the table of networks and how near their blocks are
	$(BIN)/python -m benchmarks.coverage

clean:  ## remove what the targets made
	rm -rf $(VENV) $(FLOORS) $(QUANDA) build dist demo-output docs/_build docs/_tables docs/_figures docs/gallery
