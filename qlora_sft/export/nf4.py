"""Reads weights as a 4-bit model computes with them, row by row: through NF4 and back, or from an NF4 checkpoint."""

from __future__ import annotations

import json
import math
from typing import Protocol

import torch

from qlora_sft.errors import RunError
from qlora_sft.model.tensors import Stored, row_ranges

# The block sizes with which model/load.py has bitsandbytes quantise.
BLOCK = 64
NESTED_BLOCK = 256


class RowReader(Protocol):
    """Reads the rows of a matrix when they are needed."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def rows(self, start: int, stop: int) -> torch.Tensor: ...


class ThroughNF4:
    """Quantises a weight to NF4 (blocks of 64, double quantisation) and dequantises it, exactly as bitsandbytes does.

    The codes of a block depend on that block alone, but its scale is quantised together with all others. So the first
    pass keeps codes and scales of the whole tensor, a quarter of its bf16 size, and the second gives rows.
    """

    def __init__(self, source: RowReader):
        from bitsandbytes.functional import dequantize_blockwise, quantize_4bit, quantize_blockwise

        self.shape, self.dtype = source.shape, source.dtype
        self.width = math.prod(source.shape[1:])
        codes, scales = [], []
        for start, stop in row_ranges(source.shape):
            packed, state = quantize_4bit(source.rows(start, stop), blocksize=BLOCK, quant_type="nf4")
            codes.append(packed.reshape(-1))
            scales.append(state.absmax)
        self.codes = torch.cat(codes)
        absmax = torch.cat(scales)
        offset = absmax.mean()
        quantized, state = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        self.absmax = dequantize_blockwise(quantized, state) + offset

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return _decoded(self.codes, self.absmax, BLOCK, "nf4", (start, stop), self.width, self.dtype)


class FromNF4Checkpoint:
    """Dequantises a tensor of a checkpoint that was saved in 4 bits, as the model would."""

    def __init__(self, name: str, tensors: dict[str, Stored]):
        from bitsandbytes.functional import QuantState, dequantize_blockwise

        parts = {key: tensors[key] for key in companions(name, tensors)}
        facts = {key.removeprefix(f"{name}."): part.whole() for key, part in parts.items()}
        try:
            state = QuantState.from_dict(facts, device=torch.device("cpu"))
        except (AssertionError, KeyError, ValueError) as error:
            raise RunError(f"{name}: its 4-bit description is not one of bitsandbytes ({error})") from None
        self.shape, self.dtype = tuple(state.shape), state.dtype
        self.width = math.prod(self.shape[1:])
        self.kind, self.block = state.quant_type, state.blocksize
        self.codes = tensors[name].whole().reshape(-1).view(torch.uint8)
        self.absmax = state.absmax
        if state.nested:
            self.absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
        self.absmax = self.absmax.float()

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return _decoded(self.codes, self.absmax, self.block, self.kind, (start, stop), self.width, self.dtype)


def described(name: str, tensors: dict[str, Stored]) -> tuple[tuple[int, ...], torch.dtype]:
    """Returns the shape and the type that a 4-bit tensor has once it is dequantised, without reading its values."""
    state = next(key for key in companions(name, tensors) if ".quant_state." in key)
    facts = json.loads(bytes(tensors[state].whole().tolist()))
    return tuple(facts["shape"]), getattr(torch, facts["dtype"])


def companions(name: str, tensors: dict[str, Stored]) -> list[str]:
    """Returns the names of the tensors that describe the 4-bit tensor ``name``; none if it is an ordinary tensor."""
    suffixes = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    states = [f"{name}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
    return [key for key in [*(f"{name}.{suffix}" for suffix in suffixes), *states] if key in tensors]


def _decoded(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    block: int,
    kind: str,
    rows: tuple[int, int],
    width: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Decodes the rows [start, stop) of packed codes, over whole blocks, of which a row need not be a multiple."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

    begin, end = rows[0] * width, rows[1] * width
    first, last = begin // block, -(-end // block)
    values = min(last * block, 2 * codes.numel()) - first * block
    state = QuantState(
        absmax=absmax[first:last].contiguous(),
        shape=torch.Size([values]),
        code=get_4bit_type(kind, device="cpu"),
        blocksize=block,
        quant_type=kind,
        dtype=dtype,
    )
    packed = codes[first * block // 2 : (first * block + values + 1) // 2].reshape(-1, 1)
    flat = dequantize_4bit(packed, state).reshape(-1)
    rows_: torch.Tensor = flat[begin - first * block : end - first * block].reshape(rows[1] - rows[0], width)
    return rows_
