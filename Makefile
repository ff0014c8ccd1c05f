# `make help` lists the targets. Each one makes the virtual environment it needs on its first run.
#
# On Linux without a GPU, plain pip brings torch's CUDA build, several GB. To get the CPU build,
# set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index before the first `make`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# One thread per test process: the models under test are too small to gain from more.
TEST_THREADS ?= 1
TEST_WORKERS ?= auto
PYTEST_ARGS ?= -m "not slow and not zoo"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format types wheel zoo zoo-all bench convergence clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# A stamp newer than these three files means that nothing need be installed. An environment made
# by hand has no stamp and is completed in place.
$(VENV)/.mpgraph-dev: pyproject.toml constraints.txt Makefile
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "mpgraph needs Python 3.10 or newer: make PYTHON=python3.12, after make clean"; exit 1; }
	$(PIP_INSTALL) -q -e '.[torch,dev,demo,onnx]'
	@touch $@

$(VENV)/.mpgraph-zoo: $(VENV)/.mpgraph-dev
	$(PIP_INSTALL) -q -e '.[zoo]'
	$(PIP_INSTALL) -q --no-deps timm
	@touch $@

demo: $(VENV)/.mpgraph-dev ## train a small GPT three ways and compare them (on two CPU cores, 5 to 12 minutes)
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

test: $(VENV)/.mpgraph-dev ## run the tests (without those marked slow or zoo)
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/pytest -q -n $(TEST_WORKERS) --maxprocesses=8 $(PYTEST_ARGS)

lint: $(VENV)/.mpgraph-dev ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.mpgraph-dev ## put the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# setuptools leaves modules that are gone from the tree in build/lib; start from nothing.
wheel: $(VENV)/.mpgraph-dev ## build the wheel into dist/
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m build -q --wheel --no-isolation

# Type checks the installed wheel, from an empty folder: what a user's checker would see, py.typed
# and packaging included. The environment holds the wheel alone and borrows torch from $(VENV).
types: wheel ## build the wheel, install it and type check that
	rm -rf build/types
	mkdir -p build/types/empty
	$(BIN)/python -m venv --without-pip build/types/venv
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(build/types/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	$(BIN)/python -m pip --python build/types/venv/bin/python install -q --no-deps --no-index dist/*.whl
	cd build/types/empty && "$(abspath $(BIN))/mypy" --strict --config-file "$(CURDIR)/pyproject.toml" \
		--cache-dir "$(CURDIR)/.mypy_cache" --python-executable ../venv/bin/python -p mpgraph

zoo: $(VENV)/.mpgraph-zoo ## convert and check a selection of public models
	$(BIN)/python tools/zoo.py run --set public $(ZOO_ARGS)

zoo-all: $(VENV)/.mpgraph-zoo ## convert and check every model of the zoo (hours)
	$(BIN)/python tools/zoo.py sweep $(ZOO_ARGS)

bench: $(VENV)/.mpgraph-zoo ## time eager steps next to autocast, and the passes
	$(BIN)/python tools/bench_eager.py $(BENCH_ARGS)
	$(BIN)/python tools/bench_passes.py

convergence: $(VENV)/.mpgraph-zoo ## train in fp32, bf16 and fp16 over three seeds (on a GPU: minutes)
	$(BIN)/python tools/convergence.py $(CONVERGENCE_ARGS)

clean: ## remove what the other targets made, the environment too
	rm -rf $(VENV) build dist *.egg-info demo-output zoo-output
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
