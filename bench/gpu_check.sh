#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under ten minutes:
#
#     bench/gpu_check.sh [RESULTS]        (default: bench/results/gpu)
#
# builds for the GPU at hand, runs the tests, compute-sanitizer and the measurements, and writes a log
# of every step (text), the measurements (JSON) and a summary. Needs a Python environment with torch
# (built with CUDA), pytest, hypothesis, pybind11, scikit-build-core, cmake and ninja, and nvcc.
# PYTHON chooses the interpreter. Goes on after a step that fails; ends with 1 if any did.
set -uo pipefail
cd "$(dirname "$0")/.."
results=$(realpath -m "${1:-bench/results/gpu}")
python=${PYTHON:-python3}
mkdir -p "$results"
: >"$results/summary.txt"
failed=0

say() { echo "$*" | tee -a "$results/summary.txt"; }

# step NAME SECONDS COMMAND...: runs a command with a time limit and a log of its own.
step() {
  local name=$1 limit=$2 begin=$SECONDS status=0
  shift 2
  timeout "$limit" "$@" >"$results/$name.txt" 2>&1 || status=$?
  if [ "$status" = 0 ]; then
    say "ok      $name ($((SECONDS - begin)) s)"
  else
    say "FAILED  $name (status $status, $((SECONDS - begin)) s; see $name.txt)"
    tail -n 15 "$results/$name.txt"
    failed=1
  fi
  return "$status"
}

say "$(date -u +%FT%TZ) $(git rev-parse --short HEAD 2>/dev/null || echo 'no commit')"
nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total --format=csv,noheader |
  tee -a "$results/summary.txt"

step build 300 "$python" -m pip install . --no-build-isolation --no-deps --force-reinstall \
  -Ccmake.define.TRAK_EXT_CUDA=ON -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native \
  -Cbuild-dir=build/gpu_check || exit 1
bin=$(dirname "$(command -v "$python")")
step info 60 "$bin/trak-ext" info

# By pytest's own command, so that the installed package is imported and not the source folder.
step tests 180 "$bin/pytest" -q tests/test_cuda_device.py tests/test_cuda_device_scoring.py
if ! grep -qE '[0-9]+ passed' "$results/tests.txt" || grep -q 'no CUDA device' "$results/tests.txt"; then
  say "FAILED  the tests did not run on a CUDA device"
  failed=1
fi

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    step "sanitizer_$tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" bench/small_projections.py
  done
else
  say "left out: compute-sanitizer is not on the PATH"
fi

step machine_code 60 "$python" bench/machine_code.py --json "$results/machine_code.json"
if step projection 240 "$python" bench/projection.py --device cuda \
  --json "$results/projection.json"; then
  cat "$results/projection.txt"
fi

say "$([ "$failed" = 0 ] && echo 'all clean' || echo 'NOT clean')"
exit "$failed"
