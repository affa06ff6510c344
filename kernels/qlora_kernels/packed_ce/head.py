"""The output head as the kernels see it: a dense [V, D] tensor, or NF4 that is dequantised tile by tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class NF4Head:
    """A frozen 4-bit head [V, D] of which never more than one tile of rows exists in full precision.

    packed: uint8, two values per byte, V * D / 2 of them in row-major order (bitsandbytes' ``Params4bit.data``);
    absmax: float32 [V * D / blocksize], scales of the blocks (nested quantisation already undone);
    code: float32 [16]; shape: (V, D); blocksize divides D; dtype: what the tiles are dequantised to.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    shape: tuple[int, int]
    blocksize: int
    dtype: torch.dtype
    requires_grad: bool = False

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @classmethod
    def from_bitsandbytes(cls, packed: Tensor, quant_state: Any) -> NF4Head:
        """From a quantised weight and its ``quant_state``, as ``Linear4bit.weight`` carries them."""
        absmax = quant_state.absmax
        if quant_state.nested:
            from bitsandbytes.functional import dequantize_blockwise

            absmax = dequantize_blockwise(absmax, quant_state.state2) + quant_state.offset
        vocabulary, width = quant_state.shape
        if width % quant_state.blocksize:
            raise ValueError(f"head: its width {width} is not a multiple of the block size {quant_state.blocksize}")
        packed, absmax, code = packed.detach().reshape(-1), absmax.float(), quant_state.code.float()
        return cls(packed, absmax, code, (vocabulary, width), quant_state.blocksize, quant_state.dtype)

    def rows(self, which: slice | Tensor) -> Tensor:
        """Rows of the head, dequantised: [n, D] in ``dtype``."""
        vocabulary, width = self.shape
        packed = self.packed.view(vocabulary, width // 2)[which]
        scale = self.absmax.view(vocabulary, width // self.blocksize)[which]
        code = self.code.to(packed.device)
        # The high half of a byte comes first.
        values = torch.stack((code[(packed >> 4).int()], code[(packed & 15).int()]), dim=-1)
        blocks = values.view(len(scale), -1, self.blocksize)
        return (blocks * scale[..., None]).view(len(scale), width).to(self.dtype)


Head = Tensor | NF4Head


def head_rows(head: Head, which: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of either kind of head: [n, D] in ``dtype``; a view where nothing has to be converted."""
    rows = head.rows(which) if isinstance(head, NF4Head) else head.detach()[which]
    return rows.to(dtype)
