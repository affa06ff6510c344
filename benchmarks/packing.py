"""Question: how long does it take to pack a million documents, and how full do the rows get?

Run as::

    python benchmarks/packing.py
"""

from __future__ import annotations

import math
import random
import statistics
import time

from qlora_sft.data.packing import Strategy, pack

DOCUMENTS, CAPACITY, RUNS = 1_000_000, 4096, 5


def main() -> None:
    rng = random.Random(0)
    lengths = [max(1, min(CAPACITY, int(rng.lognormvariate(6, 1)))) for _ in range(DOCUMENTS)]
    least = math.ceil(sum(lengths) / CAPACITY)
    print(f"{DOCUMENTS:,} lognormal lengths (median e^6) into {CAPACITY}; at least {least:,} rows are needed")
    strategies: list[Strategy] = ["bfd", "ffd"]
    for strategy in strategies:
        seconds = []
        for _ in range(RUNS):
            started = time.perf_counter()
            sequences = pack(lengths, CAPACITY, strategy=strategy)
            seconds.append(time.perf_counter() - started)
        fill = len(sequences) / least
        print(f"{strategy}: median {statistics.median(seconds):.2f} s of {RUNS}, {fill:.4f} of the least rows")


if __name__ == "__main__":
    main()
