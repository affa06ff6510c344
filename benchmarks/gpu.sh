#!/usr/bin/env bash
# Measures everything that needs an NVIDIA GPU, in at most nine minutes, most valuable first:
#
#   bash benchmarks/gpu.sh OUT              all parts
#   bash benchmarks/gpu.sh OUT PART ...     some: tests training parts context layers prefixes sweeps kernels
#   bash benchmarks/gpu.sh OUT --dry-run    a walk through all parts on a CPU, with tiny shapes
#
# Needs torch with CUDA and the packages of requirements.lock, and no network. Correctness runs in parallel; timings run
# one at a time. Every part has its own limit and writes its rows as they come; OUT/results.tar.gz holds all of them.
set -uo pipefail
out=$(mkdir -p "${1:?name a folder for the results}" && cd "$1" && pwd)
shift
dry=
[[ ${1:-} == --dry-run ]] && { dry=yes; shift; }
parts=" ${*:-tests training parts context layers prefixes sweeps kernels} "
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
python=${PYTHON:-python3}
# Two processes at a time here have two threads each, which on a small CPU would wait for one another.
[[ $dry ]] && export OMP_NUM_THREADS=1
started=$SECONDS

# run SECONDS NAME COMMAND...: one command with a limit; what it prints goes to OUT/NAME.txt.
run() {
  local limit=$1 name=$2 code=0
  shift 2
  timeout -k 10 "$limit" "$@" > "$out/$name.txt" 2>&1 || code=$?
  echo "$((SECONDS - started)) s: $name ended with $code" | tee -a "$out/parts.txt"
}

# bench SECONDS NAME SCRIPT ARGUMENT...: a benchmark, its rows in OUT/SCRIPT.jsonl.
bench() {
  run "$1" "$2" "$python" "benchmarks/$3.py" --output "$out/$(basename "$3").jsonl" "${@:4}"
}

pack() {
  tar -C "$out" -czf "$out/results.tar.gz" --exclude=results.tar.gz . 2> /dev/null
}

wanted() {
  [[ $parts == *" $1 "* ]]
}

{
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2> /dev/null || echo "no GPU"
  "$python" -c "import torch, triton, transformers; print(torch.__version__, triton.__version__, transformers.__version__)"
} > "$out/machine.txt" 2>&1

if [[ $dry ]]; then
  wanted tests && run 240 gpu-tests "$python" -m pytest -q -m gpu --collect-only tests
  wanted training && bench 240 training backends --steps 2
  wanted context && bench 120 context max_context --smoke
  wanted layers && bench 240 layers layers --shape tiny --layers 2 --cases 64x1 64x4 --repeats 1
  wanted prefixes && bench 120 prefixes prefixes --shape tiny --layers 2 --tokens 2048 --repeats 1
  wanted sweeps && bench 120 attention kernels/attention --repeats 1 --documents 1 4
  wanted sweeps && bench 120 packed_ce_paths kernels/packed_ce_paths --repeats 1
  pack
  ! grep -v "ended with 0" "$out/parts.txt"
  exit
fi

# ------------------------------------------------------------------ correctness, in parallel
wanted tests && run 200 gpu-tests "$python" -m pytest -q -m gpu -n 8 --timeout 120 tests &
wanted training && bench 150 training backends --steps 20 &
if wanted parts; then
  for attention in varlen sdpa; do
    bench 180 "parts-$attention" max_context --layers 4 --attention $attention --parts 14336 92160 &
  done
fi
wait
pack

# ------------------------------------------------------------------ the longest sequences, by one real step
if wanted context; then
  # Only a quarter of a large card's layers run, in a quarter of the time; the bytes of the others lie beside them.
  bench 240 context-8-12 max_context --cards 8 12 --steps 1 --verify &
  bench 240 context-16 max_context --cards 16 --layers 8 --steps 1 --verify &
  bench 240 context-24 max_context --cards 24 --layers 8 --steps 1 --verify --attention sdpa &
  wait
  pack
fi

# ------------------------------------------------------------------ timings, alone
wanted layers && bench 200 layers layers
wanted prefixes && bench 60 prefixes prefixes --shape 8B --tokens 65536
pack
if wanted sweeps; then
  bench 60 attention kernels/attention
  bench 60 packed_ce_paths kernels/packed_ce_paths
  pack
fi
if wanted kernels; then
  bench 80 packed_ce kernels/packed_ce --rows 8192 --share 0.25 1 --shape Llama-3.1-8B Gemma-2-2B --repeats 5
  bench 60 nf4_lora kernels/nf4_lora --shape Llama-3.1-8B --tokens 4096 32768
  # The row kernel writes bfloat16 over the float32 bytes that it reads.
  if command -v compute-sanitizer > /dev/null; then
    run 60 racecheck compute-sanitizer --tool racecheck --kernel-regex kns=row_kernel \
      "$python" -m pytest -q -m gpu tests/kernels/test_packed_ce_gpu.py -k bit_for_bit
  fi
fi
pack
cat "$out/parts.txt"
