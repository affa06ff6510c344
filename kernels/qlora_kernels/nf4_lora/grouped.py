"""Multiplies the rows of each group by the group's own matrix.

Rows are sorted by group, and ``ends`` says where the rows of each group end. It is a plain loop with one matrix product
for every group that has rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def group_rows(ends: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yields (group, its rows) for every group that has rows."""
    begin = 0
    for group, end in enumerate(ends):
        if end > begin:
            yield group, slice(begin, end)
        begin = end


def grouped_product(x: Tensor, w: Tensor, ends: Sequence[int]) -> Tensor:
    """Multiplies the rows of each group by its matrix: x [n, K], w [G, K, N] -> [n, N]."""
    y = x.new_empty(len(x), w.shape[2])
    for group, rows in group_rows(ends):
        torch.mm(x[rows], w[group], out=y[rows])
    return y


def add_grouped_product(y: Tensor, x: Tensor, w: Tensor, ends: Sequence[int], scale: float = 1.0) -> Tensor:
    """Adds scale * `grouped_product` to y in place, and returns y. If all types are equal, the sum is rounded once."""
    if x.dtype != y.dtype:
        return y.add_(grouped_product(x, w, ends), alpha=scale)
    for group, rows in group_rows(ends):
        y[rows].addmm_(x[rows], w[group], alpha=scale)
    return y
