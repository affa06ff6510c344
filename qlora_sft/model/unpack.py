"""Computes the 16-bit weights of MXFP4 and FP8 from their codes and scales, slice by slice, as transformers does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

import torch

from qlora_sft.model.packed_layout import Part
from qlora_sft.model.tensors import DTYPES, Planned, Stored, copied, row_ranges

# The 16 values of a code of 4 bits: sign, 2 bits of exponent, 1 of mantissa.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# A scale of one byte is an exponent of two, from which this is subtracted.
EXPONENT_BIAS = 127


def unpacked(part: Part, stored: Mapping[str, Stored]) -> Planned:
    """Plans a tensor of the 16-bit model, made of the tensors ``stored`` in the files."""
    codes = stored[part.codes]
    if part.scales is None:
        return copied(part.name, codes)
    scales, dtype = stored[part.scales], DTYPES[part.dtype]
    if part.block == (0, 0):
        return Planned(part.name, dtype, part.shape, lambda: _from_mxfp4(codes, scales, dtype))
    return Planned(part.name, dtype, part.shape, lambda: _from_fp8(codes, scales, part.block, dtype))


def _from_mxfp4(codes: Stored, scales: Stored, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yields the weight [inputs, outputs] of every expert: ``w = value(code) * 2**(scale - 127)``.

    codes [experts, outputs, groups, bytes] hold two codes a byte, the lower half first; scales [experts, outputs,
    groups]. In memory gpt-oss has its experts the other way round.
    """
    values = torch.tensor(FP4, dtype=dtype)
    for expert in range(codes.shape[0]):
        packed = codes.rows(expert, expert + 1)[0]
        exponents = scales.rows(expert, expert + 1)[0].to(torch.int32) - EXPONENT_BIAS
        pairs = torch.stack((values[(packed & 15).int()], values[(packed >> 4).int()]), dim=-1)
        weight = torch.ldexp(pairs.flatten(-2), exponents[..., None])
        yield weight.flatten(1).T.contiguous()


def _from_fp8(codes: Stored, scales: Stored, block: tuple[int, int], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yields the rows of a weight: ``w = code * scale of its block``, in float32, rounded once."""
    rows, columns = codes.shape[-2:]
    high, wide = block
    factors = _factors(scales).reshape(-1, -(-rows // high), -(-columns // wide))
    flat = replace(codes, shape=(prod(codes.shape[:-1]), columns))
    for start, stop in row_ranges(flat.shape):
        number = torch.arange(start, stop)
        each = factors[number // rows, number % rows // high].repeat_interleave(wide, dim=1)[:, :columns]
        yield (flat.rows(start, stop).float() * each).to(dtype)


def _factors(scales: Stored) -> torch.Tensor:
    """Reads scales as float32; those of one byte are exponents of two."""
    found = scales.whole()
    return (found.float() - EXPONENT_BIAS).exp2() if found.dtype == torch.uint8 else found.float()
