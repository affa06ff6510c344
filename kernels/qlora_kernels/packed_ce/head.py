"""The output head as the kernels see it: a dense [V, D] tensor, or NF4 that is dequantised tile by tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_kernels.nf4 import NF4Weight


class NF4Head(NF4Weight):
    """A frozen 4-bit head [V, D] of which never more than one tile of rows exists in full precision.

    Its scales are kept in float32 (an eighth of the packed bytes), so that a tile reads its own only.
    """

    @classmethod
    def from_bitsandbytes(cls, packed: Tensor, quant_state: Any) -> NF4Head:
        """From a quantised weight and its ``quant_state``, as ``Linear4bit.weight`` carries them."""
        weight = NF4Weight.from_bitsandbytes(packed, quant_state)
        width = weight.shape[1]
        if width % weight.blocksize:
            raise ValueError(f"head: its width {width} is not a multiple of the block size {weight.blocksize}")
        return cls(weight.packed, weight.scales(), weight.code, weight.shape, weight.blocksize, weight.dtype)


Head = Tensor | NF4Head


def head_rows(head: Head, which: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of either kind of head: [n, D] in ``dtype``; a view where nothing has to be converted."""
    rows = head.rows(which) if isinstance(head, NF4Head) else head.detach()[which]
    return rows.to(dtype)
