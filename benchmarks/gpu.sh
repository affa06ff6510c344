#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, each part in under 9 minutes, writing results as it goes:
#   bash benchmarks/gpu.sh OUT [loss|memory]
set -uo pipefail
out=${1:?name a folder for the results}
part=${2:-all}
mkdir -p "$out"
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels:${PYTHONPATH:-}" PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$out/gpu.txt"

if [ "$part" != memory ]; then
timeout 150 python3 -m pytest -q -m gpu tests/kernels --ignore tests/kernels/test_offload_gpu.py 2>&1 | tee "$out/kernel-tests.txt"

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

if [ "$part" != loss ]; then
timeout 100 python3 -m pytest -q -m gpu tests/kernels/test_offload_gpu.py 2>&1 | tee "$out/offload-tests.txt"

# 8 of the 32 layers of an 8B model: what a layer costs is the same, and every provider has to load them.
tiers() { timeout "$1" python3 benchmarks/memory.py --output "$out/memory.jsonl" --rounds 1 --timeout 60 "${@:2}" 2>&1 | tee -a "$out/memory.txt"; }
tiers 200 --shape 8B --layers 8 --tokens 32768 --only "torch checkpoint" "transformers offload" "TRL offload" Unsloth "ours, offload" "ours, auto"
tiers 120 --shape 8B --layers 8 --tokens 8192 --only "torch checkpoint" "nothing recomputed" "ours, offload" "ours, auto"
fi
