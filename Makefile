# make help says what there is. Everything runs in .venv, which is made on first use and again when its recipe changes.
# Tests with torchvision, timm, ONNX, Triton, TensorBoard, MLflow and Optuna run in .venv-extras, which has these and sees the packages of .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := .venv-extras
DOCS := .venv-docs
ARGS ?=
JOBS ?= 2
# Hundreds of processes import the same modules: none of them compiles a module again.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help train doctor test test-extras test-gpu test-interpreter test-slurm test-image docs dist prove-docs prove-layer prove-exchange prove-faults prove-images prove-slurm lint format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(VENV)/ready ## train the default network; settings: make train ARGS="norm=local seed=1"
	@$(BIN)/python train.py $(ARGS)

doctor: $(VENV)/ready ## check this machine for training, without training; as JSON: make doctor ARGS=--json
	@$(BIN)/syncbn doctor $(ARGS)

test: $(VENV)/ready ## run the tests, two files at a time; a choice of them: make test ARGS="tests/nn -k empty"
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-extras: $(EXTRAS)/ready ## run the tests with torchvision, timm, ONNX, TensorBoard, MLflow and Optuna
	@$(EXTRAS)/bin/python -m pytest tests/extras $(ARGS)

test-gpu: $(VENV)/ready ## run the tests of the layer on a GPU
	@$(BIN)/python -m pytest tests/gpu $(ARGS)

test-interpreter: $(EXTRAS)/ready ## run what they try that needs no GPU, in Triton's interpreter and with its compiler
	@$(EXTRAS)/bin/python -m pytest tests/gpu --device cpu $(ARGS)

test-slurm: $(VENV)/ready ## run the tests on a Slurm that is started on this machine; installs Debian's packages, as root
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests/slurm $(ARGS)

test-image: $(EXTRAS)/ready ## run the Dockerfile's steps without Docker, as root; with all downloads: ARGS=--download
	@$(BIN)/python -m tests.soak.image $(ARGS)

prove-layer: $(VENV)/ready ## try the layer on 2,000 drawn cases, on 1 to 4 ranks: make prove-layer ARGS="--examples 200"
	@$(BIN)/python -m tests.soak.layer $(ARGS)

prove-exchange: $(VENV)/ready ## send a million messages through shared memory, and kill or stop a rank 100 times
	@$(BIN)/python -m tests.soak.exchange $(ARGS)

prove-faults: $(VENV)/ready ## kill 20 runs and compare what is resumed bit by bit; and every other fault, twice
	@$(BIN)/python -m tests.soak.faults $(ARGS)

prove-docs: $(VENV)/ready ## follow the tutorials, command by command, and compare what is printed: make prove-docs ARGS="--shortened export"
	@$(BIN)/python -m tests.soak.docs $(ARGS)

prove-images: $(EXTRAS)/ready ## train on 5,000 images with augmentation, kill, resume and compare: make prove-images ARGS=CIFAR
	@$(EXTRAS)/bin/python -m tests.soak.images $(ARGS)

prove-slurm: $(VENV)/ready ## the same with nodes that have a network each, whose links are cut; and ten signals at drawn moments
	@$(BIN)/python -m tests.soak.slurm $(ARGS)

lint: $(VENV)/ready ## check style and types, and shell scripts with shellcheck
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@command -v shellcheck >/dev/null || { echo "error: no shellcheck; on Debian and Ubuntu: apt install shellcheck"; exit 1; }
	@shellcheck -x slurm/*.sh slurm/*.sbatch .ci/run .ci/dist

docs: $(DOCS)/ready ## build the documentation into docs/_build/html, and run its notebooks; a warning is an error
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(DOCS)/bin/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

dist: ## build the sdist and the wheel of a release into dist/ and check them: make dist TAG=v0.1.0
	@PYTHON=$(PYTHON) .ci/dist "$(TAG)"

format: $(VENV)/ready ## put the code into its style
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean: ## remove the environments, caches and what was compiled; runs stay
	rm -rf $(VENV) $(EXTRAS) $(DOCS) docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis syncbn/nn/kernels/libcpu.so

$(VENV)/ready: pyproject.toml constraints.txt hatch_build.py $(wildcard syncbn/nn/kernels/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $$($(PYTHON) --version) is too old: Python 3.11 or later is needed; make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(BIN)/python install_packages.py --constraint constraints.txt --editable '.[dev]'
	@touch $@

# A line of a .pth file is a directory where packages are too, or an import for each process to begin with.
$(EXTRAS)/ready: $(VENV)/ready tests/extras/support/cpu_torchvision.py
	@rm -rf $(EXTRAS)
	@$(BIN)/python -m venv --without-pip $(EXTRAS)
	@packages='import sysconfig; print(sysconfig.get_path("purelib"))' \
		&& here=$$($(EXTRAS)/bin/python -c "$$packages") \
		&& $(BIN)/python -c "$$packages" > $$here/venv.pth \
		&& cp tests/extras/support/cpu_torchvision.py $$here \
		&& echo "import cpu_torchvision" > $$here/cpu_torchvision.pth
	@$(EXTRAS)/bin/python install_packages.py --constraint constraints.txt --editable '.[vision,export,triton,tensorboard,mlflow,search]' onnxruntime
	@touch $@

$(DOCS)/ready: $(VENV)/ready
	@rm -rf $(DOCS)
	@$(BIN)/python -m venv --without-pip $(DOCS)
	@packages='import sysconfig; print(sysconfig.get_path("purelib"))' \
		&& here=$$($(DOCS)/bin/python -c "$$packages") \
		&& $(BIN)/python -c "$$packages" > $$here/venv.pth
	@$(DOCS)/bin/python install_packages.py --constraint constraints.txt --editable '.[docs]'
	@touch $@
