"""Computes a linear layer with LoRA over a frozen weight: formulas in `projection`, plain version in `reference`.

Saved for the backward: x, and u = x A^T, which is r wide. The weight is dequantised once in the forward and once in
the backward. The product with it comes after the last tensor is saved, so a checkpointed region that ends with this
layer does not compute it a second time.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.nf4_lora.hold import held_tensors, hold
from qlora_kernels.nf4_lora.projection import FrozenWeight, InUse, Precision, Projection


def lora_linear(
    x: Tensor,
    weight: FrozenWeight,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Computes ``x W^T + bias + scale (x A^T) B^T``, with gradients for x, A, B and bias where they require one.

    Args:
        x: [.., in].
        weight: frozen [out, in], dense or `NF4Weight`.
        A, B: [r, in] and [out, r], in any floating type; gradients come back in that type. Or neither.
        scale: alpha / r; for rsLoRA alpha / sqrt(r).
        bias: [out].
        dtype: of the product with the weight; which type is used for what: `Precision`.

    Raises ValueError for shapes that do not fit, and for a weight that is trainable.
    """
    p = Projection(weight, A, B, scale, bias)
    precision = Precision.of(x, weight, dtype)
    u = None
    if p.A is not None:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            lora = precision.lora or p.A.dtype
            u = flat(x).to(lora) @ p.A.to(lora).t()
    held = hold(x, u, *p.adapter)
    return cast(Tensor, _LoraLinear.apply(p, precision, x.requires_grad, held, u, *p.adapter))


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, p: Projection, precision: Precision, need_x: bool, held: Tensor, u: Tensor | None, *_: Tensor | None
    ) -> Tensor:
        ctx.hold, ctx.weight, ctx.scale, ctx.precision, ctx.need_x = held.grad_fn, p.weight, p.scale, precision, need_x
        with torch.autocast(held.device.type, enabled=False):
            y = InUse(p, precision).forward(flat(held), u)
        return y.view(*held.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, u, A, B, bias = held_tensors(ctx.hold)
        dy = gradients[0]
        with torch.autocast(dy.device.type, enabled=False):
            p = Projection(ctx.weight, A, B, ctx.scale, bias)
            layer = InUse(p, ctx.precision, ctx.needs_input_grad[5:])
            flat_dy = flat(dy)
            v = layer.up(flat_dy)
            layer.accumulate(flat(x), u, flat_dy, v)
            dx = layer.backward(flat_dy, v).to(x.dtype).view(x.shape) if ctx.need_x else None
        return None, None, None, dx, None, *layer.gradients(p)


def flat(x: Tensor) -> Tensor:
    """Returns the tokens of ``x`` as rows: [.., n] -> [t, n]."""
    return x.reshape(-1, x.shape[-1])
