"""Describes the output head as the kernels see it.

It is a dense [V, D] tensor, a head in NF4 that is dequantised tile by tile, or either of them with a few rows that are
trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_kernels.nf4 import NF4Weight

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


class NF4Head(NF4Weight):
    """Holds a frozen 4-bit head [V, D] of which never more than one tile of rows exists in full precision.

    Its scales are kept in float32 (an eighth of the packed bytes), so that a tile reads only its own.
    """

    @classmethod
    def from_bitsandbytes(cls, packed: Tensor, quant_state: QuantState) -> NF4Head:
        """Makes a head of a quantised weight and its ``quant_state``, as ``Linear4bit.weight`` carries them."""
        weight = NF4Weight.from_bitsandbytes(packed, quant_state)
        width = weight.shape[1]
        if width % weight.blocksize:
            raise ValueError(f"head: its width {width} is not a multiple of the block size {weight.blocksize}")
        return cls(weight.packed, weight.scales(), weight.code, weight.shape, weight.blocksize, weight.dtype)


@dataclass(frozen=True)
class PatchedHead:
    """Holds a frozen head [V, D] whose rows ``token_ids`` are replaced by the trained ``values`` [k, D].

    Added tokens are trained like this. To train the whole head for them would take its gradient, [V, D] in float32.
    """

    base: Tensor | NF4Head
    token_ids: tuple[int, ...]
    values: Tensor
    requires_grad = False

    @property
    def shape(self) -> tuple[int, int]:
        vocabulary, width = self.base.shape
        return vocabulary, width

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device

    def rows(self, which: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Returns rows of the head [n, D] in ``dtype``, and copies only what it changes.

        The host knows the token ids, so it never waits for a device.
        """
        # Rounded to the head's type first, as they are wherever else the model is computed.
        rows, values = head_rows(self.base, which, dtype), self.values.detach().to(self.dtype).to(dtype)
        if isinstance(which, Tensor):
            for token, value in zip(self.token_ids, values, strict=True):
                rows = torch.where((which == token)[:, None], value, rows)
            return rows
        first = which.start or 0
        inside = [
            (place, token - first) for place, token in enumerate(self.token_ids) if 0 <= token - first < len(rows)
        ]
        if inside and isinstance(self.base, Tensor) and self.base.dtype == dtype:
            rows = rows.clone()  # a view of the head itself; else it is a copy already
        for place, row in inside:
            rows[row] = values[place]
        return rows


Head = Tensor | NF4Head | PatchedHead


def head_rows(head: Head, which: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """Returns rows of any kind of head: [n, D] in ``dtype``, as a view where nothing has to be converted."""
    if isinstance(head, PatchedHead):
        return head.rows(which, dtype)
    rows = head.rows(which) if isinstance(head, NF4Head) else head.detach()[which]
    return rows.to(dtype)
