"""Holds a frozen weight in NF4, as bitsandbytes packs it, and turns it back into a type that matrix products take.

::

    w[i] = code[q[i]] * absmax[i // blocksize]                  q: 4 bits each, two per byte, the first in the high half
    absmax[b] = nested.code[q'[b]] * nested.absmax[b // 256] + nested.offset      where the scales are quantised too

Source: QLoRA (https://arxiv.org/abs/2305.14314), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


@dataclass(frozen=True)
class NestedScales:
    """Holds what undoes the quantisation of the scales.

    absmax: float32, one per block of scales; code: float32 [256].
    """

    absmax: Tensor
    code: Tensor
    offset: Tensor
    blocksize: int


@dataclass(frozen=True)
class NF4Weight:
    """Holds a weight [out, in] in 4 bits.

    packed: uint8, two values per byte, out * in / 2 of them in row-major order (bitsandbytes' ``Params4bit.data``);
    absmax: [out * in / blocksize], float32, or uint8 with ``nested``; code: float32 [16]; dtype: the weight's own.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    shape: tuple[int, int]
    blocksize: int
    dtype: torch.dtype
    nested: NestedScales | None = None
    requires_grad: bool = False

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @classmethod
    def from_bitsandbytes(cls, packed: Tensor, quant_state: QuantState) -> NF4Weight:
        """Makes a weight of a quantised one and its ``quant_state``, as ``Linear4bit.weight`` carries them.

        Nothing is copied. Raises ValueError for another 4-bit type, and for a weight repacked for bitsandbytes' CPU
        inference.
        """
        if quant_state.quant_type != "nf4":
            raise ValueError(f"expected a weight in nf4, got {quant_state.quant_type}")
        if getattr(quant_state, "packing_format_for_cpu", False):
            raise ValueError("this weight was repacked for CPU inference; load the model anew to train it")
        nested = None
        if quant_state.nested:
            second = quant_state.state2
            nested = NestedScales(second.absmax, second.code, quant_state.offset, second.blocksize)
        packed, shape = packed.detach().reshape(-1), tuple(quant_state.shape)
        return cls(
            packed, quant_state.absmax, quant_state.code, shape, quant_state.blocksize, quant_state.dtype, nested
        )

    def scales(self) -> Tensor:
        """Returns the scales in float32 [out * in / blocksize]."""
        if self.nested is None:
            return self.absmax.float()
        n = self.nested
        operators = bitsandbytes_operators("dequantize_blockwise")
        if operators is not None:
            absmax = operators.dequantize_blockwise(self.absmax, n.absmax, n.code, n.blocksize, torch.float32)
            return cast(Tensor, absmax) + n.offset
        block = torch.arange(self.absmax.numel(), device=self.device) // n.blocksize
        return n.code.float()[self.absmax.int()] * n.absmax[block] + n.offset

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the weight [out, in] in ``dtype`` (default: its own)."""
        dtype = dtype or self.dtype
        operators = bitsandbytes_operators("dequantize_4bit") if dtype.itemsize <= 4 else None
        if operators is None:
            return self.dequantize_in_torch(dtype)
        dense = operators.dequantize_4bit(
            self.packed.view(-1, 1), self.scales(), self.blocksize, "nf4", list(self.shape), dtype
        )
        return cast(Tensor, dense)

    def dequantize_in_torch(self, dtype: torch.dtype) -> Tensor:
        """Returns what `dequantize` does, in plain torch, which takes 12 bytes of scratch per value."""
        values = unpack(self.packed, self.code)[: self.shape[0] * self.shape[1]]
        scale = self.scales().repeat_interleave(self.blocksize)[: values.numel()]
        return (values * scale).view(self.shape).to(dtype)

    def rows(self, which: slice | Tensor) -> Tensor:
        """Returns some rows of the weight, dequantised: [n, in] in its own type.

        Raises ValueError if a block spans two rows.
        """
        count, width = self.shape
        if width % self.blocksize:
            raise ValueError(f"its width {width} is not a multiple of the block size {self.blocksize}")
        packed, scale = self.packed.view(count, width // 2)[which], self.scales().view(count, -1)[which]
        shape = (len(packed), width)
        part = NF4Weight(packed.reshape(-1), scale.reshape(-1), self.code, shape, self.blocksize, self.dtype)
        return part.dequantize()


@dataclass(frozen=True)
class NF4Stack:
    """Holds the weights [E, R, C] of E experts in 4 bits.

    Every expert's rows are cut into equal parts. Each part was quantised on its own, scales included, so that it has
    the bits that it would have as a layer of its own.

    packed: uint8 [E, R * C / 2], as in `NF4Weight`; absmax: uint8 [E * parts, blocks of a part]; nested: what undoes
    the quantisation of these scales, with absmax [E * parts, n] and offset [E * parts]; code: float32 [16].
    """

    packed: Tensor
    absmax: Tensor
    nested: NestedScales
    code: Tensor
    shape: tuple[int, int, int]
    blocksize: int
    dtype: torch.dtype
    requires_grad: bool = False

    def scales(self, experts: slice | Tensor) -> Tensor:
        """Returns the scales of the chosen experts, float32 [n, R * C / blocksize]."""
        count, n = self.shape[0], self.nested
        absmax = self.absmax.view(count, -1, self.absmax.shape[-1])[experts]
        nested = n.absmax.view(count, -1, n.absmax.shape[-1])[experts].repeat_interleave(n.blocksize, dim=-1)
        values = n.code[absmax.int()] * nested[..., : absmax.shape[-1]]
        return values.add_(n.offset.view(count, -1, 1)[experts]).flatten(1)

    def dequantize(self, experts: slice | Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the weights [n, R, C] of the chosen experts in ``dtype`` (default: the weights' own)."""
        dtype = dtype or self.dtype
        packed, scales = self.packed[experts], self.scales(experts)
        shape = (len(packed), *self.shape[1:])
        operators = bitsandbytes_operators("dequantize_4bit") if dtype.itemsize <= 4 else None
        if operators is None:
            values = unpack(packed, self.code) * scales.repeat_interleave(self.blocksize, dim=1)
            return values.view(shape).to(dtype)
        # They are dequantised as one row. On a CPU bitsandbytes (0.50) begins a new block with every row, also where
        # rows are shorter than a block and blocks were quantised across them.
        flat = operators.dequantize_4bit(
            packed.reshape(-1, 1), scales.view(-1), self.blocksize, "nf4", [2 * packed.numel()], dtype
        )
        return cast(Tensor, flat).view(shape)


def unpack(packed: Tensor, code: Tensor) -> Tensor:
    """Returns the values of packed weights: uint8 [..., n] -> float32 [..., 2 n]."""
    code = code.to(packed.device, torch.float32)
    return torch.stack((code[(packed >> 4).int()], code[(packed & 15).int()]), dim=-1).flatten(-2)


def bitsandbytes_operators(name: str) -> Any:
    """Returns bitsandbytes' kernels if they are loaded (whoever holds its weights has loaded them), else None."""
    operators = torch.ops.bitsandbytes
    return operators if hasattr(operators, name) else None
