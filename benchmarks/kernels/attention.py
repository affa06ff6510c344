"""Question: which way to attend inside documents is fastest, by head shape and length of the documents?

    python benchmarks/kernels/attention.py [--tokens 8192 32768] [--documents 1 4 16] [--output FILE]

Forward and backward of one layer's causal attention over a packed sequence. Ways: varlen (FlashAttention 2), and
one call of sdpa per document with each of its kernels. All take turns; times are medians. Outputs and gradients are
compared with those of the first way that ran. The last row of a case says what a run would choose at its start, by
which figures (FlashAttention 3 and 4 are among them where they are installed), and how many seconds that takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it sees its own folder only

from measuring import clock, measured_on

if TYPE_CHECKING:
    from cell import Cell

RESULTS = Path(__file__).resolve().parents[1] / "results" / "attention.jsonl"
# query heads, key and value heads, size of a head
SHAPES = {"Llama-3.1-8B": (32, 8, 128), "Qwen3-4B": (32, 8, 128), "Llama-3.2-1B": (32, 8, 64), "tiny": (4, 2, 16)}
Way = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    from qlora_sft.model.attention import _varlen

    return _varlen(q, k, v, bounds, int((bounds[1:] - bounds[:-1]).max()), None, None)


def ours_one_by_one(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    from qlora_sft.model.attention import _one_by_one
    from qlora_sft.model.attention_capped import Scores

    return _one_by_one(q, k, v, bounds, Scores(), repeats=False)


def one_by_one(backend: SDPBackend | None, shared: bool) -> Way:
    """Attends with sdpa document by document.

    With ``shared`` keys and values keep fewer heads, else they are repeated.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
        times = 1 if shared else q.shape[1] // k.shape[1]
        parts = []
        for a, b in pairwise(bounds.tolist()):
            key, value = (x[:, :, a:b].repeat_interleave(times, 1) if times > 1 else x[:, :, a:b] for x in (k, v))
            if backend is None:
                parts.append(
                    F.scaled_dot_product_attention(q[:, :, a:b], key, value, is_causal=True, enable_gqa=shared)
                )
                continue
            with sdpa_kernel(backend):
                parts.append(
                    F.scaled_dot_product_attention(q[:, :, a:b], key, value, is_causal=True, enable_gqa=shared)
                )
        return torch.cat(parts, 2).transpose(1, 2)

    return attend


WAYS: dict[str, Way] = {
    "varlen": varlen,
    "ours, one by one": ours_one_by_one,
    "sdpa": one_by_one(None, True),
    "sdpa, keys repeated": one_by_one(None, False),
    "sdpa cuDNN": one_by_one(SDPBackend.CUDNN_ATTENTION, True),
    "sdpa flash": one_by_one(SDPBackend.FLASH_ATTENTION, True),
    "sdpa cuDNN, keys repeated": one_by_one(SDPBackend.CUDNN_ATTENTION, False),
}


def once(way: Way, inputs: list[Tensor], bounds: Tensor, gradient: Tensor) -> tuple[float, float, list[Tensor]]:
    """Returns the seconds of the forward, those of the backward, and the output with the gradients."""
    wait = torch.cuda.synchronize if inputs[0].is_cuda else lambda: None
    wait()
    started = clock()
    q, k, v = inputs
    out = way(q, k, v, bounds)
    wait()
    middle = clock()
    gradients = torch.autograd.grad(out, inputs, gradient)
    wait()
    return middle - started, clock() - middle, [out.detach(), *gradients]


def bytes_of(way: Way, inputs: list[Tensor], bounds: Tensor, gradient: Tensor) -> dict[str, int]:
    """Measures on a GPU what is kept until the backward, and the most that the backward takes beyond it."""
    if not inputs[0].is_cuda:
        return {}
    before = torch.cuda.memory_allocated()
    q, k, v = inputs
    out = way(q, k, v, bounds)
    kept = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(out, inputs, gradient)
    return {"kept_bytes": kept, "backward_bytes": torch.cuda.max_memory_allocated() - before - kept}


def measure(shape: str, tokens: int, documents: int, repeats: int, device: torch.device) -> list[Cell]:
    heads, groups, size = SHAPES[shape]
    dtype = torch.bfloat16
    torch.manual_seed(0)
    # As the projections leave them: [1, T, H, d] in memory, seen as [1, H, T, d].
    inputs = [
        torch.randn(1, tokens, n, size, device=device).to(dtype).transpose(1, 2).requires_grad_()
        for n in (heads, groups, groups)
    ]
    edges = [i * tokens // documents for i in range(documents + 1)]
    bounds = torch.tensor(edges, dtype=torch.int32, device=device)
    gradient = torch.randn(1, tokens, heads, size, device=device).to(dtype)
    cells: dict[str, Cell] = {}
    times: dict[str, list[tuple[float, float]]] = {}
    exact: list[Tensor] | None = None
    for name, way in WAYS.items():
        cells[name] = {"provider": name, "shape": shape, "tokens": tokens, "documents": documents}
        try:
            _, _, found = once(way, inputs, bounds, gradient)
            once(way, inputs, bounds, gradient)
        except (RuntimeError, NotImplementedError, ImportError) as error:
            cells[name]["not_measured"] = str(error).splitlines()[0][:160]
            continue
        exact = exact or found
        cells[name]["difference"] = max(
            float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, exact, strict=True)
        )
        times[name] = []
    for _ in range(repeats):
        for name, taken in times.items():
            forward, backward, _ = once(WAYS[name], inputs, bounds, gradient)
            taken.append((forward, backward))
    for name in times:
        cells[name] |= bytes_of(WAYS[name], inputs, bounds, gradient)
    for name, taken in times.items():
        forward, backward = (statistics.median(each) for each in zip(*taken, strict=True))
        cells[name] |= {"forward_ms": 1000 * forward, "backward_ms": 1000 * backward}
        cells[name]["milliseconds"] = 1000 * (forward + backward)
    return list(cells.values())


def choice(shape: str, tokens: int, documents: int, device: torch.device) -> Cell:
    """Returns what a run whose documents are all of this length would choose."""
    from qlora_sft.model.attention_measured import Shape, attend_by, candidates, measured_choice

    ways = {way: attend_by(way) for way in candidates()}
    started = clock()
    chosen = measured_choice(Shape(*SHAPES[shape]), device, torch.bfloat16, [tokens // documents] * documents, ways)
    return {
        "provider": "chosen at the start", "shape": shape, "tokens": tokens, "documents": documents,
        "chosen": chosen.way, "reason": chosen.reason, "seconds": clock() - started,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["Llama-3.1-8B"] if gpu else ["tiny"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768] if gpu else [512])
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device("cuda" if gpu else "cpu")
    for shape in options.shape:
        for tokens in options.tokens:
            for documents in options.documents:
                cells = measure(shape, tokens, documents, options.repeats, device)
                for cell in [*cells, choice(shape, tokens, documents, device)]:
                    with options.output.open("a") as file:
                        file.write(json.dumps({**measured_on("attention"), **cell}) + "\n")
                    took = f"{cell['milliseconds']:9.2f} ms" if "milliseconds" in cell else cell.get("not_measured")
                    took = took or f"{cell['chosen']} in {cell['seconds']:.1f} s ({cell['reason']})"
                    print(f"{shape} {tokens:>6} x {documents:<3} {cell['provider']:<28}{took}", flush=True)


if __name__ == "__main__":
    main()
