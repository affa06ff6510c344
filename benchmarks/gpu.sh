#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, writing results as it goes, each part in under 9 minutes:
#   bash benchmarks/gpu.sh OUT [kernels | context]
set -uo pipefail
out=${1:?name a folder for the results}
part=${2:-kernels context}
mkdir -p "$out"
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels:${PYTHONPATH:-}" PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$out/gpu.txt"

if [[ $part == *kernels* ]]; then
  timeout 150 python3 -m pytest -q -m gpu tests/kernels 2>&1 | tee "$out/kernel-tests.txt"

  # The row kernel writes bfloat16 over the float32 bytes it reads.
  if command -v compute-sanitizer > /dev/null; then
    timeout 60 compute-sanitizer --tool racecheck --kernel-regex kns=row_kernel \
      python3 -m pytest -q -m gpu tests/kernels/test_packed_ce_gpu.py -k "bit_for_bit" 2>&1 | tee "$out/racecheck.txt"
  else
    echo "compute-sanitizer: not installed, not measured" | tee "$out/racecheck.txt"
  fi

  bench() { timeout "$1" python3 benchmarks/kernels/packed_ce.py --output "$out/packed_ce.jsonl" "${@:2}" 2>&1 | tee -a "$out/packed_ce.txt"; }
  bench 120 --rows 8192 --share 0.25
  bench 120 --rows 2048 32768 --share 0.25 --shape Llama-3.1-8B --repeats 5
  bench 80 --rows 8192 --share 0.1 0.5 1 --shape Llama-3.1-8B Llama-3.2-1B --repeats 5
fi

if [[ $part == *context* ]]; then
  # Larger cards take minutes per step: python3 benchmarks/max_context.py --cards 24 48 80
  timeout 500 python3 benchmarks/max_context.py --cards 8 12 16 --seconds 120 --output "$out/max_context.jsonl" 2>&1 \
    | tee "$out/max_context.txt"
fi
