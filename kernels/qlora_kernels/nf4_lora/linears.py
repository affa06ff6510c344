"""Computes several linear layers with LoRA of one input, such as q, k and v.

One product does for the A of all layers, and one weight is dequantised at a time.

::

    u  = x [A1; A2; ..]^T                        [t, r1 + r2 + ..]
    yi = x Wi^T + biasi + scalei ui Bi^T
    v  = [scale1 dy1 B1, scale2 dy2 B2, ..]      [t, r1 + r2 + ..]
    dx = sum_i dyi Wi + v [A1; A2; ..]           [dA1; dA2; ..] = v^T x      dBi = scalei dyi^T ui

Saved for the backward: x and u, once for all of them; without adapters nothing. Each weight is dequantised once in a
forward and once in a backward, and is gone before the next one is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.nf4 import NF4Weight
from qlora_kernels.nf4_lora.linear import flat
from qlora_kernels.nf4_lora.projection import (
    Adapter,
    FrozenWeight,
    InUse,
    Precision,
    Projection,
    add_product,
    sum_product,
)


def lora_linears(x: Tensor, layers: Sequence[Projection], *, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Computes ``x W^T + bias + scale (x A^T) B^T`` for each layer.

    Gradients flow to x and to each A, B and bias that wants one.

    Args:
        x: [.., in]. Each result is [t, out], all leading dimensions of x in one. It is no view and nothing saves it,
            so whoever gets it may write over it.
        layers: at least one; their weights are all dense or all `NF4Weight`.
        dtype: of the products with the weights; which type is used for what: `Precision`.

    Raises ValueError for a weight that does not fit x, and for weights of both kinds.
    """
    if not layers or any(p.weight.shape[1] != x.shape[-1] for p in layers):
        raise ValueError(f"expected weights [out, {x.shape[-1]}], got {[list(p.weight.shape) for p in layers]}")
    if len({isinstance(p.weight, NF4Weight) for p in layers}) > 1:
        raise ValueError("layers: some weights are in NF4 and some are not")
    weights = tuple((p.weight, p.scale) for p in layers)
    precision = Precision.of(x, layers[0].weight, dtype)
    tensors = [t for p in layers for t in p.adapter]
    return cast("tuple[Tensor, ...]", _LoraLinears.apply(weights, precision, x, *tensors))


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: tuple[tuple[FrozenWeight, float], ...], precision: Precision, x: Tensor, *tensors: Any
    ) -> tuple[Tensor, ...]:
        layers = with_adapters(weights, tensors)
        with torch.autocast(x.device.type, enabled=False):
            a, rows = stacked(layers, precision), flat(x)
            u = None if a is None else rows.to(a.dtype) @ a.t()
            results = tuple(
                InUse(p, precision).forward(rows, part) for p, part in zip(layers, parts(u, layers), strict=True)
            )
        ctx.save_for_backward(None if u is None else x, u, *tensors)
        ctx.weights, ctx.precision, ctx.shape, ctx.dtype = weights, precision, x.shape, x.dtype
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, u, *tensors = ctx.saved_tensors
        need_x, *wanted = ctx.needs_input_grad[2:]
        layers, precision = with_adapters(ctx.weights, tensors), ctx.precision
        with torch.autocast(gradients[0].device.type, enabled=False):
            dx: Tensor | None = None
            shares: list[Tensor] = []  # v of each adapter
            found: list[list[Tensor | None]] = []
            for i, (p, part, dy) in enumerate(zip(layers, parts(u, layers), gradients, strict=True)):
                want_b, want_bias = wanted[3 * i + 1 : 3 * i + 3]
                layer = InUse(p, precision, (False, want_b, want_bias))
                v = layer.up(dy)
                layer.accumulate(dy, part, dy, v)  # the gradients of all A come at once, below
                if need_x and dx is None:
                    dx = layer.backward(dy, None)
                elif dx is not None:
                    layer.add_backward(dx, dy, None)
                shares += [] if v is None else [v]
                found.append(layer.gradients(p))
                del layer  # with its dense weight
            v = torch.cat(shares, 1) if shares else None
            if dx is not None:
                dx = add_product(dx, v, stacked(layers, precision)).to(ctx.dtype).view(ctx.shape)
            if v is not None and any(wanted[::3]):
                set_first(found, layers, wanted[::3], flat(x), v)
        return None, None, dx, *(g for of_layer in found for g in of_layer)


def set_first(
    found: list[list[Tensor | None]], layers: Sequence[Projection], wanted: Sequence[bool], x: Tensor, v: Tensor
) -> None:
    """Puts dA = v^T x of each layer that wants it into its place in ``found``."""
    total = torch.zeros(v.shape[1], x.shape[1], dtype=torch.promote_types(v.dtype, torch.float32), device=x.device)
    sum_product(total, v.t(), x.to(v.dtype))
    for gradients, p, part, want in zip(found, layers, parts(total.t(), layers), wanted, strict=True):
        if p.A is not None and part is not None and want:
            gradients[0] = part.t().to(p.A.dtype)


def with_adapters(weights: Sequence[tuple[FrozenWeight, float]], tensors: Sequence[Any]) -> list[Projection]:
    """Returns the layers; ``tensors`` are A, B and bias of each in turn."""
    adapters = [cast(Adapter, tuple(tensors[3 * i : 3 * i + 3])) for i in range(len(weights))]
    return [
        Projection(weight, A, B, scale, bias) for (weight, scale), (A, B, bias) in zip(weights, adapters, strict=True)
    ]


def stacked(layers: Sequence[Projection], precision: Precision) -> Tensor | None:
    """Returns the A of all layers, one above the other, in the type in which they multiply; None if there is none."""
    factors = [p.A.to(precision.lora or p.A.dtype) for p in layers if p.A is not None]
    return torch.cat(factors) if factors else None


def parts(u: Tensor | None, layers: Sequence[Projection]) -> list[Tensor | None]:
    """Returns the columns of ``u`` [.., r1 + r2 + ..] that belong to each layer; None for a layer without adapter."""
    ranks = [0 if p.A is None else len(p.A) for p in layers]
    if u is None:
        return [None for _ in ranks]
    return [part if rank else None for part, rank in zip(u.split(ranks, dim=1), ranks, strict=True)]
