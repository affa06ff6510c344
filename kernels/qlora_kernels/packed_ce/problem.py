"""What the two paths are given, and what they return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kernels.cpu import bfloat16_products
from qlora_kernels.packed_ce.head import Head
from qlora_kernels.packed_ce.options import Options


@dataclass
class Result:
    """objective, nll, hit: [M]; unscaled: d objective / d hidden row [M, D]; head, bias: gradients of
    ``sum_i weights_i * objective_i`` in at least float32; None where nobody asked."""

    objective: Tensor
    nll: Tensor
    hit: Tensor
    unscaled: Tensor | None = None
    head: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Problem:
    """What every path is given. rows, ids: int [M]; weights: float [M], read only for the head's gradient."""

    hidden: Tensor
    head: Head
    bias: Tensor | None
    rows: Tensor
    ids: Tensor
    weights: Tensor | None
    options: Options
    need_hidden: bool
    need_head: bool
    need_bias: bool

    @property
    def vocabulary(self) -> int:
        return self.head.shape[0]


def compute_dtype(hidden: torch.dtype, head: torch.dtype, device: torch.device) -> torch.dtype:
    """What the products of the path in plain torch run in: bfloat16 only if both factors are and the device is faster
    with it."""
    if torch.float64 in (hidden, head):
        return torch.float64
    if hidden != torch.bfloat16 or head != torch.bfloat16:
        return torch.float32
    return torch.bfloat16 if device.type != "cpu" or bfloat16_products()[0] else torch.float32
