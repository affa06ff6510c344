#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, writing results as it goes, each part in under 9 minutes:
#   bash benchmarks/gpu.sh OUT [kernels | memory | context]
set -uo pipefail
out=${1:?name a folder for the results}
part=${2:-kernels memory context}
mkdir -p "$out"
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels:${PYTHONPATH:-}" PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$out/gpu.txt"

# bench SECONDS NAME ARGUMENT...: one benchmark, its rows and what it prints.
bench() {
  timeout "$1" python3 "benchmarks/$2.py" --output "$out/$(basename "$2").jsonl" "${@:3}" 2>&1 | tee -a "$out/$(basename "$2").txt"
}

if [[ $part == *kernels* ]]; then
  timeout 150 python3 -m pytest -q -m gpu tests/kernels tests/model --ignore tests/kernels/test_offload_gpu.py 2>&1 | tee "$out/kernel-tests.txt"

  # The row kernel writes bfloat16 over the float32 bytes it reads.
  if command -v compute-sanitizer > /dev/null; then
    timeout 60 compute-sanitizer --tool racecheck --kernel-regex kns=row_kernel \
      python3 -m pytest -q -m gpu tests/kernels/test_packed_ce_gpu.py -k "bit_for_bit" 2>&1 | tee "$out/racecheck.txt"
  else
    echo "compute-sanitizer: not installed, not measured" | tee "$out/racecheck.txt"
  fi
  bench 80 kernels/packed_ce --rows 8192 --share 0.25
  bench 80 kernels/packed_ce --rows 2048 32768 --share 0.25 --shape Llama-3.1-8B --repeats 5
  bench 70 kernels/packed_ce --rows 8192 --share 0.1 0.5 1 --shape Llama-3.1-8B Llama-3.2-1B --repeats 5
  bench 60 kernels/nf4_lora --shape Llama-3.1-8B --tokens 4096 32768
  bench 40 kernels/nf4_lora --shape Llama-3.2-1B --tokens 8192 --repeats 5
fi

if [[ $part == *memory* ]]; then
  timeout 100 python3 -m pytest -q -m gpu tests/kernels/test_offload_gpu.py 2>&1 | tee "$out/offload-tests.txt"
  # 8 of the 32 layers of an 8B model: what a layer costs is the same, and every provider has to load them.
  bench 200 memory --rounds 1 --timeout 60 --shape 8B --layers 8 --tokens 32768 \
    --only "torch checkpoint" "transformers offload" "TRL offload" Unsloth "ours, offload" "ours, auto"
  bench 120 memory --rounds 1 --timeout 60 --shape 8B --layers 8 --tokens 8192 \
    --only "torch checkpoint" "nothing recomputed" "ours, offload" "ours, auto"
fi

if [[ $part == *context* ]]; then
  # Larger cards take minutes per step: python3 benchmarks/max_context.py --cards 24 48 80
  bench 500 max_context --cards 8 12 16 --seconds 120
fi
