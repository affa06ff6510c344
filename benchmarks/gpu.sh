#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in under 9 minutes, writing results as it goes:  bash benchmarks/gpu.sh OUT
set -uo pipefail
out=${1:?name a folder for the results}
mkdir -p "$out"
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels:${PYTHONPATH:-}" PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$out/gpu.txt"

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

mlp() { timeout "$1" python3 benchmarks/kernels/nf4_lora.py --output "$out/nf4_lora.jsonl" "${@:2}" 2>&1 | tee -a "$out/nf4_lora.txt"; }
mlp 60 --shape Llama-3.1-8B --tokens 4096 32768
mlp 40 --shape Llama-3.2-1B --tokens 8192 --repeats 5
