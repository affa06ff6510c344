"""Products of many matrices, each with the rows of its group: rows are sorted by group, ``ends`` says where each ends.

The plain loop over groups, in which one matrix product does the work of each group that has rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def group_rows(ends: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(group, its rows) of every group that has rows."""
    begin = 0
    for group, end in enumerate(ends):
        if end > begin:
            yield group, slice(begin, end)
        begin = end


def grouped_product(x: Tensor, w: Tensor, ends: Sequence[int]) -> Tensor:
    """x [n, K], w [G, K, N] -> [n, N]: the rows of each group times its matrix."""
    y = x.new_empty(len(x), w.shape[2])
    for group, rows in group_rows(ends):
        torch.mm(x[rows], w[group], out=y[rows])
    return y


def add_grouped_product(y: Tensor, x: Tensor, w: Tensor, ends: Sequence[int], scale: float = 1.0) -> Tensor:
    """y += scale * `grouped_product`, in place: rounded once where all types are equal."""
    if x.dtype != y.dtype:
        return y.add_(grouped_product(x, w, ends), alpha=scale)
    for group, rows in group_rows(ends):
        y[rows].addmm_(x[rows], w[group], alpha=scale)
    return y
