"""Defines what both paths are given, and what they return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kernels.cpu import bfloat16_products
from qlora_kernels.packed_ce.head import Head
from qlora_kernels.packed_ce.options import Options


@dataclass
class LossResult:
    """Holds what a path returns for the M supervised positions.

    token_loss, nll, correct: [M]; grad_hidden: d token_loss / d hidden state, [M, D]; grad_head, grad_bias: gradients
    of ``sum_i weights_i * token_loss_i`` in at least float32. A gradient that nobody asked for is None.
    """

    token_loss: Tensor
    nll: Tensor
    correct: Tensor
    grad_hidden: Tensor | None = None
    grad_head: Tensor | None = None
    grad_bias: Tensor | None = None


@dataclass(frozen=True)
class LossInputs:
    """Holds what every path is given. positions, labels: int [M]; weights: float [M], read for the head's gradient."""

    hidden: Tensor
    head: Head
    bias: Tensor | None
    positions: Tensor
    labels: Tensor
    weights: Tensor | None
    options: Options
    need_hidden: bool
    need_head: bool
    need_bias: bool

    @property
    def vocabulary(self) -> int:
        return self.head.shape[0]


def compute_dtype(hidden: torch.dtype, head: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the type in which the path in plain torch multiplies.

    It is bfloat16 only if both factors are and the device is faster with it.
    """
    if torch.float64 in (hidden, head):
        return torch.float64
    if hidden != torch.bfloat16 or head != torch.bfloat16:
        return torch.float32
    return torch.bfloat16 if device.type != "cpu" or bfloat16_products()[0] else torch.float32
