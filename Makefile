# `make demo` and `make test` do everything on a fresh machine; `make help` lists the rest.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
# Keep Python's compiled files: without them torch and timm take 10 s to import, in every process of the tests.
unexport PYTHONDONTWRITEBYTECODE

PYTHON_IN_VENV := .venv/bin/python
UV := $(firstword $(wildcard .venv/bin/uv) uv)
DIGITS := demo_data/digits/ORIGIN.txt
SHAPES := demo_data/shapes/ORIGIN.txt
SHAPES_BETON := $(addprefix demo_data/shapes_beton/,train.beton train.json val.beton val.json)
BETON := $(addprefix demo_data/beton/,train.beton train.json val.beton val.json)
PYTEST := $(PYTHON_IN_VENV) -m pytest
# On all cores, eight at most: each worker imports and compiles for itself. tests/conftest.py divides the tests.
ON_ALL_CORES := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
ORDINARY := $(ON_ALL_CORES) -m "not gpu and not slurm and not slow" --cov=ffcv_convnext

.PHONY: help setup demo demo-ladder test test-lowest test-slurm gpu slow lint format types architecture coverage requirements clean

help:  ## list these commands
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/  make \1\t\2/p' Makefile | expand -t 22

setup:  ## make .venv and install everything (demo, test and the others do it themselves)
	@bash scripts/setup.sh

demo: $(BETON) | setup  ## real images through the whole path: convert, train two small networks, print the table
	$(PYTHON_IN_VENV) train.py --config rn_configs/demo_resnet.yaml --data_path demo_data/beton --output_dir runs/demo_resnet
	$(PYTHON_IN_VENV) train.py --config rn_configs/demo_convnext.yaml --data_path demo_data/beton --output_dir runs/demo_convnext
	.venv/bin/ffcv-convnext report runs/demo_resnet runs/demo_convnext

# Two runs at a time with one thread each: the networks are too small for more.
SUBMIT_MINIATURE := OMP_NUM_THREADS=1 .venv/bin/ffcv-convnext ladder submit --configs rn_configs/demo_ladder \
	--data_path demo_data/shapes_beton --seeds 0,1,2 --executor local --ngpus 1 --max_parallel 2

demo-ladder: $(SHAPES_BETON) | setup  ## a miniature ladder of six steps with three seeds and three recipes, and its report (an hour)
	$(SUBMIT_MINIATURE) --job_dir runs/demo_ladder/long
	$(SUBMIT_MINIATURE) --job_dir runs/demo_ladder/short --config rn_configs/demo_ladder/recipes/short.yaml
	$(SUBMIT_MINIATURE) --job_dir runs/demo_ladder/progressive --config rn_configs/demo_ladder/recipes/progressive.yaml
	.venv/bin/ffcv-convnext report runs/demo_ladder --configs rn_configs/demo_ladder --html --out runs/demo_ladder

$(DIGITS): scripts/digits_to_folder.py | setup
	$(PYTHON_IN_VENV) scripts/digits_to_folder.py --out demo_data/digits

$(BETON) &: $(DIGITS) | setup
	$(PYTHON_IN_VENV) write_ffcv_dataset.py --data_path demo_data/digits --out_dir demo_data/beton --split all --overwrite

$(SHAPES): scripts/shapes_to_folder.py | setup
	$(PYTHON_IN_VENV) scripts/shapes_to_folder.py --out demo_data/shapes

$(SHAPES_BETON) &: $(SHAPES) | setup
	$(PYTHON_IN_VENV) write_ffcv_dataset.py --data_path demo_data/shapes --out_dir demo_data/shapes_beton --split all --overwrite

test: lint types  ## lint, types, and the tests that need neither a GPU nor Slurm; coverage must reach 90 %
	$(PYTEST) $(ORDINARY) --cov-report=term --cov-fail-under=90

test-lowest:  ## the same tests with the oldest versions that pyproject.toml allows, in .venv-lowest
	@bash scripts/setup.sh lowest
	.venv-lowest/bin/python -m pytest $(ON_ALL_CORES) -m "not gpu and not slurm and not slow"
	.venv-lowest/bin/python -m pytest tests/bench/test_gpu_code.py::test_no_kernel_of_convnext_tiny_spills

gpu: | setup  ## try everything that needs a GPU, in nine minutes; ARGS="--device cpu" tries it without one
	$(PYTHON_IN_VENV) -m ffcv_convnext.cli bench gpu $(ARGS)

test-slurm: | setup  ## the tests on a real Slurm: it starts two nodes on this machine and ends them
	@bash scripts/setup.sh slurm
	$(PYTEST) -m slurm

slow: | setup  ## the long tests: benchmarks from end to end, mutated images, other processors, the page in Chromium
	@bash scripts/setup.sh chromium
	$(PYTEST) -m "slow and not gpu and not slurm"

lint: | setup  ## ruff: rules and formatting
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .

format: | setup  ## let ruff format and fix what it can
	$(PYTHON_IN_VENV) -m ruff check --fix .
	$(PYTHON_IN_VENV) -m ruff format .

types: | setup  ## mypy, strict
	$(PYTHON_IN_VENV) -m mypy

architecture: | setup  ## draw docs/architecture.svg from the imports of the package
	$(PYTHON_IN_VENV) scripts/draw_architecture.py

coverage: | setup  ## the tests again, with the lines they miss as pages in htmlcov/
	$(PYTEST) $(ORDINARY) --cov-report=html --cov-report=term-missing

requirements: | setup  ## renew the pins in requirements.txt from pyproject.toml
	bash scripts/pin.sh "$(UV)"

clean:  ## remove caches, demo data and the demo's runs; .venv and other runs stay
	rm -rf demo_data runs/demo_resnet runs/demo_convnext runs/demo_ladder htmlcov build .pytest_cache .mypy_cache .ruff_cache
	rm -f .coverage .coverage.*
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
