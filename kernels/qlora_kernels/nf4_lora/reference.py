"""The textbook: what `lora_linear` and `lora_mlp` compute, in plain operations that autograd differentiates.

Given float64 tensors it is the truth that tests compare with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kernels.nf4 import NF4Weight
from qlora_kernels.nf4_lora.gated import Activation, activate
from qlora_kernels.nf4_lora.projection import Projection


def reference_linear(x: Tensor, p: Projection) -> Tensor:
    """x [.., in] -> [.., out], all in the type of ``x``."""
    weight = p.weight.dequantize(torch.float32) if isinstance(p.weight, NF4Weight) else p.weight
    y = x @ weight.to(x.dtype).t()
    if p.bias is not None:
        y = y + p.bias.to(x.dtype)
    if p.A is not None and p.B is not None:
        y = y + p.scale * ((x @ p.A.to(x.dtype).t()) @ p.B.to(x.dtype).t())
    return y


def reference_mlp(x: Tensor, gate: Projection, up: Projection, down: Projection, activation: Activation) -> Tensor:
    """x [.., D] -> [.., D]"""
    hidden = activate(reference_linear(x, gate), activation) * reference_linear(x, up)
    return reference_linear(hidden, down)
