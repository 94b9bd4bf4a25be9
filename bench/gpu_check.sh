#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under ten minutes:
#
#     bench/gpu_check.sh [RESULTS]        (default: bench/results/gpu)
#     bench/gpu_check.sh --rehearse [RESULTS]
#
# builds for the GPU at hand, runs the tests, compute-sanitizer and the measurements, and writes a log
# of every step (text), the measurements (JSON) and a summary. Needs a Python environment with torch
# (built with CUDA), pytest, hypothesis, pybind11, scikit-build-core, cmake and ninja, and nvcc.
# PYTHON chooses the interpreter; GPU_CHECK_SECONDS is what all steps may take together; FAST_JL, if set, is a checkout of fast_jl to build and compare with.
# Goes on after a step that fails; ends with 1 if any did. --rehearse goes through the measurements on
# the CPU with small problems and the package as it is installed: it needs neither GPU nor nvcc.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
device=cuda
if [ "${1:-}" = --rehearse ]; then
  device=rehearsal
  shift
fi
results=$(realpath -m "${1:-bench/results/$([ "$device" = cuda ] && echo gpu || echo rehearsal)}")
python=${PYTHON:-python3}
mkdir -p "$results"
: >"$results/summary.txt"
failed=0
seconds=${GPU_CHECK_SECONDS:-590}

say() { echo "$*" | tee -a "$results/summary.txt"; }

# step NAME SECONDS COMMAND...: runs a command with a time limit and a log of its own, within what is
# left of all seconds.
step() {
  local name=$1 limit=$2 begin=$SECONDS left=$((seconds - SECONDS)) status=0
  shift 2
  if [ "$left" -lt 5 ]; then
    say "FAILED  $name (no time left)"
    failed=1
    return 1
  fi
  [ "$limit" -le "$left" ] || limit=$left
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
bin=$(dirname "$(command -v "$python")")

if [ "$device" = cuda ]; then
  nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total --format=csv,noheader |
    tee -a "$results/summary.txt"
  # sm_90a is an architecture of its own, which "native" does not mean.
  architecture=$("$python" -c 'import torch; c = torch.cuda.get_device_capability(); \
print("90a-real" if c == (9, 0) else "%d%d-real" % c)') || architecture=native
  step build 300 "$python" -m pip install . --no-build-isolation --no-deps --force-reinstall \
    -Ccmake.define.TRAK_EXT_CUDA=ON "-Ccmake.define.CMAKE_CUDA_ARCHITECTURES=$architecture" \
    -Cbuild-dir=build/gpu_check || exit 1
  if [ -n "${FAST_JL:-}" ]; then
    # A peer that does not build is left out by the measurement itself.
    step fast_jl 120 "$python" -m pip install "$FAST_JL" --no-build-isolation --no-deps
  fi
fi
step info 60 "$bin/trak-ext" info

if [ "$device" = cuda ]; then
  # By pytest's own command, so that the installed package is imported and not the source folder.
  step tests 180 "$bin/pytest" -q tests/test_cuda_device.py tests/test_cuda_device_scoring.py
  if ! grep -qE '[0-9]+ passed' "$results/tests.txt" ||
    grep -q 'no CUDA device' "$results/tests.txt"; then
    say "FAILED  the tests did not run on a CUDA device"
    failed=1
  fi
  small=()
else
  step small_projections 60 "$python" bench/small_projections.py cpu
  small=(--samples 300 --targets 5 --proj-dim 64)
fi

for name in projection scoring; do
  sizes=()
  [ "$name" = scoring ] && sizes=(${small[@]+"${small[@]}"})
  if step "$name" 150 "$python" "bench/$name.py" --device "$device" ${sizes[@]+"${sizes[@]}"} \
    --json "$results/$name.json"; then
    cat "$results/$name.txt"
  fi
done

if [ "$device" = cuda ]; then
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
      step "sanitizer_$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$python" bench/small_projections.py
    done
  else
    say "left out: compute-sanitizer is not on the PATH"
  fi
fi
step machine_code 120 "$python" bench/machine_code.py --json "$results/machine_code.json"

say "$([ "$failed" = 0 ] && echo 'all clean' || echo 'NOT clean')"
exit "$failed"
