#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under ten minutes:
#
#     bench/gpu_check.sh [RESULTS]        (default: bench/results/gpu)
#     bench/gpu_check.sh --rehearse [RESULTS]
#
# builds for the GPU at hand, runs the known-answer self-test, the tests, compute-sanitizer and the
# measurements, and writes a log of every step (text), the measurements (JSON), a summary and
# page.md, what docs/gpu.md shows. Needs a Python environment with torch (built with CUDA), pytest,
# hypothesis, pybind11, scikit-build-core, cmake and ninja, and nvcc.
#
# Goes on after a step that fails; ends with 1 if any did. Run again with the same RESULTS it goes
# on where it was: steps that ended well are not repeated (GPU_CHECK_AGAIN=1 repeats all).
#
#   PYTHON              the interpreter (default: python3)
#   GPU_CHECK_SECONDS   what all steps may take together (default: 590)
#   WHEEL               a built wheel to install instead of building one
#   FAST_JL             a checkout of fast_jl to build and compare with
#
# What the compiler made of the kernels needs no GPU: bench/machine_code.py.
#
# --rehearse goes through the measurements on the CPU with small problems and the package as it is
# installed: it needs neither GPU nor nvcc.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
device=cuda
if [ "${1:-}" = --rehearse ]; then
  device=rehearsal
  shift
fi
results=$(realpath -m "${1:-bench/results/$([ "$device" = cuda ] && echo gpu || echo rehearsal)}")
python=${PYTHON:-python3}
bin=$(dirname "$(command -v "$python")")
seconds=${GPU_CHECK_SECONDS:-590}
mkdir -p "$results/done"
[ -z "${GPU_CHECK_AGAIN:-}" ] || rm -f "$results"/done/*
failed=0

say() { echo "$*" | tee -a "$results/summary.txt"; }

# step NAME SECONDS COMMAND...: runs a command with a time limit and a log of its own, within what is
# left of all seconds.
step() {
  local name=$1 limit=$2 begin=$SECONDS left=$((seconds - SECONDS)) status=0
  shift 2
  if [ -e "$results/done/$name" ]; then
    say "ok      $name (before)"
    return 0
  fi
  if [ "$left" -lt 5 ]; then
    say "FAILED  $name (no time left)"
    return 1
  fi
  [ "$limit" -le "$left" ] || limit=$left
  timeout "$limit" "$@" >"$results/$name.txt" 2>&1 || status=$?
  if [ "$status" = 0 ]; then
    touch "$results/done/$name"
    say "ok      $name ($((SECONDS - begin)) s)"
  else
    say "FAILED  $name (status $status, $((SECONDS - begin)) s; see $name.txt)"
    tail -n 15 "$results/$name.txt"
  fi
  return "$status"
}

# together: waits for the steps that were started in the background.
declare -A running
together() {
  local name
  for name in "${!running[@]}"; do
    wait "${running[$name]}" || failed=1
  done
  running=()
}

install() {
  if [ -n "${WHEEL:-}" ]; then
    "$python" -m pip install --no-index --no-deps --force-reinstall "$WHEEL"
  else
    # sm_90a is an architecture of its own, which "native" does not mean.
    local architecture
    architecture=$("$python" -c 'import torch; c = torch.cuda.get_device_capability(); \
print("90a-real" if c == (9, 0) else "%d%d-real" % c)') || architecture=native
    "$python" -m pip install . --no-build-isolation --no-deps --force-reinstall \
      -Ccmake.define.TRAK_EXT_CUDA=ON "-Ccmake.define.CMAKE_CUDA_ARCHITECTURES=$architecture" \
      -Cbuild-dir=build/gpu_check
  fi
}

# By pytest's own command, so that the installed package is imported and not the source folder.
run_tests() {
  local parallel=()
  if "$python" -c 'import xdist' 2>/dev/null; then
    parallel=(-n 6 -p no:benchmark)  # which warns where tests run side by side
  fi
  "$bin/pytest" -q -p no:cacheprovider -rs "${parallel[@]}" tests/cuda/test_device*.py || return
  if grep -q 'no CUDA device' "$results/tests.txt"; then
    echo "the tests did not run on a CUDA device"
    return 1
  fi
}

say "$(date -u +%FT%TZ) $(git rev-parse --short HEAD 2>/dev/null || echo 'no commit')"
if [ "$device" = cuda ]; then
  nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total --format=csv,noheader |
    tee -a "$results/summary.txt"
  export -f install run_tests
  export python bin results
  step build 300 bash -c install || exit 1
  step info 60 "$bin/trak-ext" info || failed=1
  # What is not timed runs side by side. (Every first use of a path has its quick self-test before.)
  step selftest 120 "$bin/trak-ext" selftest --device cuda &
  running[selftest]=$!
  if [ -n "${FAST_JL:-}" ]; then
    # A peer that does not build is left out by the measurement itself.
    step fast_jl 240 "$python" -m pip install "$FAST_JL" --no-build-isolation --no-deps &
    running[fast_jl]=$!
  fi
  step tests 240 bash -c run_tests &
  running[tests]=$!
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
      # Looking for races takes minutes.
      [ "$tool" = racecheck ] && few=few || few=
      for what in projections scores; do
        step "sanitizer_${tool}_$what" 150 compute-sanitizer --tool "$tool" --error-exitcode 9 \
          "$python" "bench/small_$what.py" cuda $few &
        running[sanitizer_${tool}_$what]=$!
      done
    done
  else
    say "left out: compute-sanitizer is not on the PATH"
  fi
  together
  small=()
else
  step info 60 "$bin/trak-ext" info || failed=1
  step selftest 120 "$bin/trak-ext" selftest || failed=1
  for what in projections scores; do
    step "small_$what" 60 "$python" "bench/small_$what.py" cpu || failed=1
  done
  small=(--samples 300 --targets 5 --proj-dim 64)
fi

for name in projection scoring; do
  sizes=()
  [ "$name" = scoring ] && sizes=(${small[@]+"${small[@]}"})
  step "$name" 150 "$python" "bench/$name.py" --device "$device" ${sizes[@]+"${sizes[@]}"} \
    --json "$results/$name.json" || failed=1
done
step page 60 "$python" bench/gpu_page.py "$results" || failed=1
sed -n '/^The faster path/,$p' "$results/projection.txt"

say "$([ "$failed" = 0 ] && echo 'all clean' || echo 'NOT clean')"
exit "$failed"
