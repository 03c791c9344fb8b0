# Each target sets up what it needs. Python 3.11 or later, g++ and make are all a machine must have.
PYTHON ?= python3
VENV := .venv
CUDA_VENV := .venv-cuda
BIN := $(CURDIR)/$(VENV)/bin
CUDA_BIN := $(CURDIR)/$(CUDA_VENV)/bin
TORCH := torch==2.13.0
BENCH_ARGS := $(if $(FULL),--full)

# The CUDA compiler: the one that is there, else NVIDIA's own wheels in a folder of ours.
NVCC_WHEELS := $(CURDIR)/.venv-nvcc
NVCC = $(or $(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc),$(NVCC_WHEELS)/nvidia/cu13/bin/nvcc)
CUDA_ARCH_LIST := $(or $(TORCH_CUDA_ARCH_LIST),8.0;9.0a+PTX)

.PHONY: bench plots test lint format sanitize cuda kernels gpu build nvcc clean

bench: build
	$(BIN)/python benchmarks/workloads/digits.py --json benchmarks/results/latest_digits.json
	$(BIN)/python benchmarks/workloads/characters.py --json benchmarks/results/latest_characters.json
	$(BIN)/python benchmarks/workloads/photographs.py --json benchmarks/results/latest_photographs.json
	$(BIN)/python benchmarks/workloads/regions.py --json benchmarks/results/latest_regions.json
	$(BIN)/python benchmarks/workloads/dates.py --json benchmarks/results/latest_dates.json
	$(BIN)/python -m weft bench --json benchmarks/results/latest.json $(BENCH_ARGS)

# Every family over sizes, as the pages of docs/ show them.
plots: build
	$(BIN)/python benchmarks/pool_plots.py --json benchmarks/results/latest_pool_sizes.json
	$(BIN)/python benchmarks/conv_plots.py --json benchmarks/results/latest_conv_sizes.json
	$(BIN)/python benchmarks/rnn_plots.py --json benchmarks/results/latest_rnn_sizes.json

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

# Address and undefined-behaviour sanitizers over the CPU kernels and host execution, in a copy of
# the package of their own. Left out: tests of what is not weft's own memory accesses (torch's
# compilers, the process after a fork, the growth of memory, which a sanitizer's quarantine hides),
# and gradcheck, which calls kernels that other tests call hundreds of times more. What the address
# sanitizer says lies in build/sanitize/report.*; the other one writes to stderr, past a capture of
# Python's own output.
SANITIZE_TESTS = $(addsuffix .py,$(addprefix tests/test_,device device_hopper eager pool pool_cpu \
  pool_columns pool_eager pool_errors pool_layers pool_regions conv conv_backward conv_block \
  conv_columns conv_depthwise conv_eager conv_empty conv_flat conv_pooled conv_product conv_surface \
  conv_wgmma conv_winograd rnn rnn_layers rnn_sequence rnn_variants mdlstm))
SANITIZE_SKIP := compile or after_fork or does_not_grow or gradcheck or gradients_of_both_orders
PRELOAD = $(shell for library in asan ubsan stdc++; do $(or $(CXX),g++) -print-file-name=lib$$library.so; done)
sanitize: REPORT = build/sanitize/report
sanitize: $(VENV)/ready
	PATH=$(BIN):$$PATH WEFT_HOST_EXECUTION=1 WEFT_CUDA=0 WEFT_SANITIZE=1 \
	  WEFT_BUILD_DIR=build/sanitize/kernels $(BIN)/python setup.py -q build_ext \
	  --build-lib build/sanitize/python --build-temp build/sanitize/temp
	$(call copy_package,build/sanitize/python)
	PYTHONPATH=build/sanitize/python LD_PRELOAD="$(PRELOAD)" \
	  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:log_path=$(REPORT) \
	  UBSAN_OPTIONS=print_stacktrace=1:log_path=$(REPORT) \
	  timeout 5400 $(BIN)/python -m pytest -x -p no:cacheprovider --capture=sys \
	  -k "not ($(SANITIZE_SKIP))" $(SANITIZE_TESTS)

# Compiles, links and imports all CUDA code against the CUDA build of torch. Needs no GPU.
cuda: $(CUDA_VENV)/ready nvcc
	PATH=$(dir $(NVCC)):$(CUDA_BIN):$$PATH WEFT_HOST_EXECUTION=0 WEFT_CUDA=1 \
	  TORCH_CUDA_ARCH_LIST="$(CUDA_ARCH_LIST)" WEFT_BUILD_DIR=build/kernels-cuda \
	  $(CUDA_BIN)/python setup.py -q build_ext \
	  --build-lib build/cuda/python --build-temp build/cuda/temp
	$(call copy_package,build/cuda/python)
	PYTHONPATH=build/cuda/python $(CUDA_BIN)/python .ci/check_cuda_build.py

# Registers, spills, shared memory and occupancy of every CUDA kernel; fails where a hot one spills.
kernels: $(VENV)/ready nvcc
	PATH=$(BIN):$$PATH cmake -S . -B build/kernels-cuda -G Ninja -DWEFT_CUDA=1 \
	  -DWEFT_HOST_EXECUTION=0 -DWEFT_SANITIZE=0 "-DWEFT_CUDA_ARCH_LIST=$(CUDA_ARCH_LIST)" \
	  -DWEFT_NVCC=$(NVCC) > /dev/null
	PATH=$(BIN):$$PATH cmake --build build/kernels-cuda --target weft_cuda_objects
	$(BIN)/python benchmarks/kernel_report.py build/kernels-cuda \
	  --json build/kernels-cuda/report.json

# On a machine with a GPU, with the Python and torch that are there.
gpu:
	@test -n "$(OUT)" || { echo "usage: make gpu OUT=folder"; exit 2; }
	PYTHON=$(PYTHON) benchmarks/gpu.sh "$(OUT)"

# The sources of the package, beside an extension that was built for them.
copy_package = tar -C python -c --exclude=_built_for.py --exclude='*.so' weft | tar -C $(1) -x

$(CUDA_VENV)/ready:
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_BIN)/python -m pip install --isolated -q $(TORCH) numpy rich setuptools cmake ninja pybind11
	touch $@

nvcc: $(VENV)/ready
	@test -x $(NVCC) || { \
	  echo "nvcc is not on PATH: installing NVIDIA's wheels into $(NVCC_WHEELS)"; \
	  $(BIN)/python -m pip install --isolated -q --target $(NVCC_WHEELS) $(foreach part, \
	    cuda-nvcc cuda-crt cuda-runtime cuda-cccl nvvm,"nvidia-$(part)==13.0.*"); \
	} || { echo "weft: there is no nvcc: install CUDA 13.0 and put its bin folder on PATH"; exit 1; }

clean:
	rm -rf build python/weft/*.so python/weft/_built_for.py
