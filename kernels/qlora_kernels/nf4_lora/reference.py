"""Computes what `lora_linear`, `lora_mlp` and `lora_experts` do, as a textbook would: autograd differentiates it.

Given float64 tensors it is the truth that tests compare with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kernels.nf4 import NF4Stack, NF4Weight
from qlora_kernels.nf4_lora.experts import Experts, Middle
from qlora_kernels.nf4_lora.gated import Activation, activate
from qlora_kernels.nf4_lora.projection import Projection


def reference_linear(x: Tensor, p: Projection) -> Tensor:
    """Computes a linear layer with LoRA, all in the type of ``x``: x [.., in] -> [.., out]."""
    weight = p.weight.dequantize(torch.float32) if isinstance(p.weight, NF4Weight) else p.weight
    y = x @ weight.to(x.dtype).t()
    if p.bias is not None:
        y = y + p.bias.to(x.dtype)
    if p.A is not None and p.B is not None:
        y = y + p.scale * ((x @ p.A.to(x.dtype).t()) @ p.B.to(x.dtype).t())
    return y


def reference_mlp(x: Tensor, gate: Projection, up: Projection, down: Projection, activation: Activation) -> Tensor:
    """Computes a gated MLP of three layers with LoRA: x [.., D] -> [.., D]."""
    hidden = activate(reference_linear(x, gate), activation) * reference_linear(x, up)
    return reference_linear(hidden, down)


def reference_experts(x: Tensor, index: Tensor, weights: Tensor, up: Experts, down: Experts, middle: Middle) -> Tensor:
    """Computes a mixture of experts, one row and one expert at a time: x [T, D] -> [T, D].

    index, weights: [T, K], as for `lora_experts`.
    """
    rows = []
    for t, row in enumerate(x):
        total = torch.zeros_like(row)
        for k, expert in enumerate(index[t].tolist()):
            if expert < up.count:
                hidden = middle(reference_linear(row, one_of(up, expert))[None])[0]
                total = total + weights[t, k] * reference_linear(hidden, one_of(down, expert))
        rows.append(total)
    return torch.stack(rows)


def one_of(p: Experts, expert: int) -> Projection:
    """Returns the projection of one expert, as a linear layer."""
    which = slice(expert, expert + 1)
    stack = p.weight.dequantize(which, torch.float32) if isinstance(p.weight, NF4Stack) else p.weight[which]
    weight = stack[0].t() if p.transposed else stack[0]
    A, B, bias = (None if t is None else t[expert] for t in (p.A, p.B, p.bias))
    return Projection(weight, A, B, p.scale, bias)
