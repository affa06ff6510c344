"""Finds the supervised positions on the device, in Triton: count, prefix sum, ordered compaction.

There are no atomics, so the positions come out in order and always the same. Plain reference:
`targets._select_in_torch`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def keep(labels, documents, t, T, ignore):
    """Loads a block of positions and returns which are supervised, their labels and their documents."""
    follows = t + 1 < T
    y = tl.load(labels + t + 1, mask=follows, other=0)
    here = tl.load(documents + t, mask=t < T, other=-1)
    there = tl.load(documents + t + 1, mask=follows, other=-2)
    return follows & (y != ignore) & (here == there), y, here


@triton.jit
def count_kernel(labels, documents, counts, T, ignore, BLOCK: tl.constexpr):
    """Counts the supervised positions of a block."""
    block = tl.program_id(0)
    kept, _, _ = keep(labels, documents, block * BLOCK + tl.arange(0, BLOCK), T, ignore)
    tl.store(counts + block, tl.sum(kept.to(tl.int32), 0))


@triton.jit
def compact_kernel(labels, documents, ends, positions, kept_labels, kept_documents, T, ignore, BLOCK: tl.constexpr):
    """Writes the supervised positions of a block behind those of the blocks before it.

    ends: the inclusive prefix sum of the counts.
    """
    block = tl.program_id(0)
    t = block * BLOCK + tl.arange(0, BLOCK)
    kept, y, document = keep(labels, documents, t, T, ignore)
    one = kept.to(tl.int32)
    begin = tl.load(ends + block) - tl.sum(one, 0)
    place = begin + tl.cumsum(one, 0) - one
    tl.store(positions + place, t, mask=kept)
    tl.store(kept_labels + place, y.to(tl.int32), mask=kept)
    tl.store(kept_documents + place, document, mask=kept)


def select_positions(
    labels: Tensor, documents: Tensor, ignore_index: int, n_supervised: int | None, block: int = 1024
) -> tuple[Tensor, Tensor, Tensor]:
    """Selects the supervised positions: labels int [T], documents int32 [T] -> positions, labels, documents int32 [M].

    The host waits for the device once, for M, unless ``n_supervised`` says it.
    """
    T = labels.numel()
    blocks = triton.cdiv(T, block)
    counts = torch.empty(blocks, dtype=torch.int32, device=labels.device)
    count_kernel[(blocks,)](labels, documents, counts, T, ignore_index, BLOCK=block)
    ends = counts.cumsum(0, dtype=torch.int32)
    positions, kept_labels, kept_documents = (torch.empty(T, dtype=torch.int32, device=labels.device) for _ in range(3))
    compact_kernel[(blocks,)](
        labels, documents, ends, positions, kept_labels, kept_documents, T, ignore_index, BLOCK=block
    )
    count = int(ends[-1]) if n_supervised is None else n_supervised
    return positions[:count], kept_labels[:count], kept_documents[:count]
