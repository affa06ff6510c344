"""Question: whole rows of logits, or tiles of the vocabulary, and with how large a workspace?

    python benchmarks/kernels/packed_ce_paths.py [--output FILE]

Loss and gradient of the hidden states, frozen head, for every path and workspace in turn; times are medians. The floor
is the time of the two products alone, over all supervised positions at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from qlora_kernels.packed_ce import packed_linear_cross_entropy
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it sees its own folder only

from ce_providers import Labels
from measuring import clock, measured_on
from packed_ce import GPU_SHAPES, make_inputs, run_once

RESULTS = Path(__file__).resolve().parents[1] / "results" / "packed_ce_paths.jsonl"
MIB = 2**20
WORKSPACES = (256, 512, 1024, 2048)
TILES = (None, 8192, 16384, 32768)


def floor(hidden: Tensor, head: Tensor, count: int, repeats: int) -> float:
    """Measures the seconds of both products for ``count`` positions."""
    x = hidden.detach()[:count]
    seconds = []
    for _ in range(repeats + 1):
        if x.is_cuda:
            torch.cuda.synchronize()
        started = clock()
        for part in x.split(4096):
            (part @ head.t()) @ head
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--shape", nargs="+", default=["Llama-3.1-8B", "Gemma-2-2B"] if gpu else ["tiny"])
    parser.add_argument("--rows", type=int, default=8192 if gpu else 256)
    parser.add_argument("--share", type=float, nargs="+", default=[0.25, 1.0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device("cuda" if gpu else "cpu")
    for shape in options.shape:
        width, vocabulary = {**GPU_SHAPES, "tiny": (64, 1000)}[shape]
        for share in options.share:
            hidden, head, labels = make_inputs(options.rows, width, vocabulary, share, torch.bfloat16, device)
            lowest = floor(hidden, head, labels.count, options.repeats)
            for tile in TILES:
                for workspace in WORKSPACES if gpu else WORKSPACES[:1]:

                    def loss(x: Tensor, w: Tensor, y: Labels, tile: int | None = tile, size: int = workspace) -> Tensor:
                        return packed_linear_cross_entropy(x, w, y.targets, tile=tile, workspace_bytes=size * MIB).loss

                    run_once(loss, hidden, head, labels)
                    seconds = statistics.median(run_once(loss, hidden, head, labels)[0] for _ in range(options.repeats))
                    cell = {
                        "shape": shape, "supervised": labels.count, "tile": tile, "workspace_mib": workspace,
                        "milliseconds": 1000 * seconds, "floor_ms": 1000 * lowest, "share_of_floor": lowest / seconds,
                    }  # fmt: skip
                    with options.output.open("a") as file:
                        file.write(json.dumps({**measured_on("packed_ce_paths"), **cell}) + "\n")
                    print(
                        f"{shape} {labels.count:>6} tile {tile or 'none':>6} {workspace:>5} MiB "
                        f"{1000 * seconds:8.2f} ms {lowest / seconds:.0%}", flush=True,
                    )  # fmt: skip


if __name__ == "__main__":
    main()
