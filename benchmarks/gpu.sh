#!/usr/bin/env bash
# Builds, checks and measures weft on this machine's GPU, with the Python and torch that are there:
# nothing is installed and nothing outside OUT and build/gpu is written. `make gpu OUT=folder`.
#
# A step that fails does not stop the others; at the end the failed ones are named. All steps
# together take at most 10 minutes: each has its own limit and none runs past the whole's. What could
# wait for ever (blocks that meet) runs first and alone, and no family shares a process with another,
# so a fault costs its own step.
#   DRY_RUN=1   prints the steps and their limits, runs none
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

OUT=${1:?usage: benchmarks/gpu.sh OUT}
PYTHON=${PYTHON:-python3}
DRY_RUN=${DRY_RUN:-0}
WHOLE_LIMIT=590
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
LOGS=$PWD/build/gpu/logs
mkdir -p "$LOGS"
failed=()

# step NAME SECONDS COMMAND...: runs it under a limit; its output goes to the end of OUT/steps.log.
step() {
  local name=$1 limit=$2 left=$((WHOLE_LIMIT - SECONDS)) status started=$SECONDS log=$LOGS/$1.log
  shift 2
  if ((left < limit)); then limit=$left; fi
  if [[ $DRY_RUN == 1 ]]; then
    echo "==> ${name} (at most ${limit} s): $*"
    return
  fi
  if ((limit < 5)); then
    echo "==> ${name}: no time left"
    failed+=("${name} (no time left)")
    return
  fi
  echo "==> ${name} (at most ${limit} s)"
  timeout --kill-after=5 "$limit" "$@" > "$log" 2>&1
  status=$?
  { echo "==> ${name}"; cat "$log"; } >> "$OUT/steps.log"
  if ((status == 0)); then
    echo "    passed in $((SECONDS - started)) s"
  else
    tail -n 15 "$log" | sed 's/^/    /'
    if ((status == 124 || status == 137)); then
      failed+=("${name} (ran past ${limit} s)")
    else
      failed+=("${name} (exit ${status})")
    fi
  fi
}

# torch's own definitions of its ops import expecttest, which torch does not bring; the tests here use
# no more of it than that it is there.
stand_ins() {
  $PYTHON -c "import expecttest" 2> /dev/null && return
  printf 'import unittest\n\nACCEPT = False\nTestCase = unittest.TestCase\n' \
    > build/gpu/python/expecttest.py
}

build() {
  $PYTHON setup.py -q build_ext --build-lib build/gpu/python --build-temp build/gpu/temp &&
    tar -C python -c --exclude=_built_for.py --exclude='*.so' weft | tar -C build/gpu/python -x &&
    stand_ins
}

machine() {
  nvidia-smi
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit --format=csv
  nvcc --version
  $PYTHON -m weft info
}

sanitizer() {
  local tool=$1
  shift
  compute-sanitizer --tool "$tool" --error-exitcode 9 $PYTHON -m pytest -x "$@"
}

export PYTHON
export WEFT_CUDA=1 WEFT_HOST_EXECUTION=0 WEFT_BUILD_DIR=build/gpu/kernels
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a} MAX_JOBS=${MAX_JOBS:-16}
export PYTHONPATH=$PWD/build/gpu/python:$PWD/tests PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export PYTEST_ADDOPTS="-p no:cacheprovider" HYPOTHESIS_STORAGE_DIRECTORY=build/gpu/hypothesis
export -f build stand_ins machine sanitizer

# The words of the device vocabulary, and one small test a family: a sanitizer slows kernels 100-fold.
meetings=(tests/test_device.py -k "cuda and not host and (meet or cluster)")
words=(tests/test_device.py -k "cuda and not host and not meet and not cluster")
sequences=(tests/test_rnn_layers.py tests/test_rnn_variants.py -x -k "cuda and not host and not compile")
# Hopper's own words and kernels, apart: a wrong one may wait for ever, and take the process with it.
hopper_words=(tests/test_device_hopper.py -k "cuda and not host")
hopper=(tests/test_conv_wgmma.py -k "cuda and not host")
small=(tests/test_pool.py -k "cuda and not host and samples and float32 and max_pool2d")

step build 240 bash -c build
step machine 30 bash -c machine
step meetings 40 "$PYTHON" -m pytest "${meetings[@]}"
step sequences 45 "$PYTHON" -m pytest "${sequences[@]}"
step words 40 "$PYTHON" -m pytest "${words[@]}"
for family in pool conv rnn; do
  step "check-$family" 60 "$PYTHON" -m weft check "$family"
done
for family in pool conv rnn; do
  step "bench-$family" 90 "$PYTHON" -m weft bench "$family" --full --json "$OUT/bench_$family.json"
done
step words-hopper 30 "$PYTHON" -m pytest "${hopper_words[@]}"
step hopper 40 "$PYTHON" -m pytest "${hopper[@]}"
step check-hopper 40 env WEFT_SM90A=1 "$PYTHON" -m weft check conv
step bench-hopper 60 env WEFT_SM90A=1 "$PYTHON" -m weft bench conv --json "$OUT/bench_hopper.json"
step resources 20 "$PYTHON" benchmarks/kernel_report.py build/gpu/kernels --json "$OUT/resources.json"
step memcheck 60 bash -c 'sanitizer memcheck "$@"' _ "${words[@]}"
step racecheck 60 bash -c 'sanitizer racecheck "$@"' _ "${words[@]}"
step memcheck-hopper 60 bash -c 'sanitizer memcheck "$@"' _ "${hopper_words[@]}"
step memcheck-pool 60 bash -c 'sanitizer memcheck "$@"' _ "${small[@]}"
step tests 180 "$PYTHON" -m pytest -k "cuda and not host and not hopper and not wgmma" tests

if ((${#failed[@]})); then
  printf '==> failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "==> all passed in ${SECONDS} s; results in ${OUT}"
