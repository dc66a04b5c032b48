#!/usr/bin/env bash
# All checks that need a GPU, in under ten minutes: build, tests on the device, compute-sanitizer, benchmarks.
# Leaves its findings under $OUT (default: gpu-check) and prints a short table last. Exits with 1 if a check failed.
#
#   scripts/gpu_check.sh                 # needs torch, Triton, nvcc, pytest and compute-sanitizer; installs nothing
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-$PWD/gpu-check}
mkdir -p "$OUT"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
failed=()

# stage NAME SECONDS COMMAND...: its output goes to $OUT/NAME.log, its last line is printed.
stage() {
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    if timeout "$limit" "$@" >"$OUT/$name.log" 2>&1; then local verdict=passed; else local verdict="FAILED ($?)" && failed+=("$name"); fi
    printf '%-14s%-14s%4d s  %s\n' "$name" "$verdict" $((SECONDS - started)) "$(tail -n 1 "$OUT/$name.log" | cut -c1-150)"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || exit 1
stage build 120 python setup.py build_ext --inplace
tests=(tests/test_*_triton.py tests/test_*_cuda.py tests/test_fused.py)
stage tests 200 python -m pytest -q -x --maxfail 20 -n 6 "${tests[@]}" --junitxml "$OUT/tests.xml"
stage marked 60 python -m pytest -q -m gpu tests --ignore tests/test_published.py --junitxml "$OUT/marked.xml"
for backend in triton cuda; do
    for tool in memcheck racecheck initcheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool-$backend" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            --kernel-name-exclude kernel_substring=at:: python scripts/sanitize_ops.py "$backend"
    done
done
stage benchmarks 240 python benchmarks/gpu.py --out "$OUT/gpu.json"
cat "$OUT/benchmarks.log"
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
echo "all checks passed"
