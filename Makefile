# Each target sets up what it needs. Python 3.11 or later, g++ and make are all a machine must have.
PYTHON ?= python3
VENV := .venv
CUDA_VENV := .venv-cuda
BIN := $(CURDIR)/$(VENV)/bin
CUDA_BIN := $(CURDIR)/$(CUDA_VENV)/bin
TORCH := torch==2.13.0
BENCH_ARGS := $(if $(FULL),--full)

.PHONY: bench test lint format sanitize cuda kernels gpu build clean

bench: build
	$(BIN)/python benchmarks/workloads/digits.py --json benchmarks/results/latest_digits.json
	$(BIN)/python benchmarks/workloads/characters.py --json benchmarks/results/latest_characters.json
	$(BIN)/python -m weft bench --json benchmarks/results/latest.json $(BENCH_ARGS)

test: build
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*' | xargs $(BIN)/clang-format -i

# torch first and alone: where pip is set to prefer a CPU build, that one is taken.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH) numpy
	$(BIN)/python -m pip install -q $$($(BIN)/python -c "import tomllib; \
	  extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
	  print(' '.join(sorted({r.replace(' ', '') for e in extras.values() for r in e} | {'rich'})))")
	touch $@

# Incremental: ninja rebuilds what changed. The install is editable, so the sources are what runs.
build: $(VENV)/ready
	@PATH=$(BIN):$$PATH WEFT_HOST_EXECUTION=1 WEFT_CUDA=0 \
	  $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .

clean:
	rm -rf build python/weft/*.so python/weft/_built_for.py
