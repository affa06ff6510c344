"""Computes a gated MLP with LoRA over frozen weights, tiled over tokens in its forward and again in its own backward.

::

    y = down(act(gate(x)) * up(x))                 gate, up, down: `Projection`

    forward:   saves x alone. Per tile: gate, up, h = act(gate) up, y.
    backward:  per tile: gate and up again, then at once
               dh = down.dx(dy);  h, dgate, dup in the places of dh, gate, up;  dx = up.dx(dup) + gate.dx(dgate)
               and the tile's share of the six factors' gradients, added up in float32.

So of the intermediate width no more than a tile exists at any time (3 values per token and column), and each weight
is dequantised once in a forward and once in a backward, where the recomputation and dx share it. Inside a
checkpointed region that ends with the MLP, `hold` keeps the recomputation from running it: in all, down is computed
once, gate and up twice. Without ``recompute`` gate and up are saved as well and computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.nf4_lora.gated import Activation, check_activation, gated, gated_backward
from qlora_kernels.nf4_lora.hold import held_tensors, hold
from qlora_kernels.nf4_lora.linear import flat
from qlora_kernels.nf4_lora.projection import Adapter, FrozenWeight, InUse, Precision, Projection

# Fewer tokens do not fill a GPU with a product.
SMALLEST_TILE = 1024
# Tiles are cut in multiples of what a product does at once.
ROUND = 64


def lora_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: Activation = "silu",
    *,
    tile: int | None = None,
    recompute: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Computes ``down(act(gate(x)) * up(x))``, with gradients for x and for each A, B and bias that requires one.

    Args:
        x: [.., D].
        gate, up: D -> F; down: F -> D.
        tile: tokens at a time; default: `default_tile`.
        recompute: compute gate and up again in the backward instead of saving them (2 values per token and column
            of F). What to choose: True in a checkpointed layer or where memory is short, else False.
        dtype: of the products with the weights; which type is used for what: `Precision`.

    Raises ValueError for shapes that do not fit, trainable weights, and an unknown activation.
    """
    check_activation(activation)
    check_shapes(x, gate, up, down)
    size = tile if tile is not None else default_tile(x.shape[-1])
    if size < 1:
        raise ValueError(f"tile: expected at least one token, got {size}")
    layers = (gate, up, down)
    weights = tuple((p.weight, p.scale) for p in layers)
    spec = Spec(weights, activation, size, Precision.of(x, gate.weight, dtype), x.requires_grad)
    tensors = [t for p in layers for t in p.adapter]
    kept = (None, None) if recompute or not torch.is_grad_enabled() else intermediates(spec, x, gate, up)
    held = hold(x, *kept, *tensors)
    return cast(Tensor, _LoraMLP.apply(spec, held, *kept, *tensors))


def default_tile(width: int) -> int:
    """Returns the tokens of a tile for hidden size ``width``.

    They are as many as make its intermediates, 3 F values per token, take what the three dequantised weights of D F
    values each take. Smaller tiles would save little and multiply slower.
    """
    return max(SMALLEST_TILE, width)


@dataclass(frozen=True)
class Spec:
    """Holds what one call hands from its forward to its backward, besides tensors.

    weights: (weight, scale) of each layer.
    """

    weights: tuple[tuple[FrozenWeight, float], ...]
    activation: Activation
    tile: int
    precision: Precision
    need_x: bool

    def layers(self, tensors: tuple[Tensor | None, ...]) -> list[Projection]:
        """Returns gate, up and down, given A, B and bias of each in turn."""
        adapters: list[Adapter] = [cast(Adapter, tensors[i : i + 3]) for i in (0, 3, 6)]
        return [
            Projection(weight, A, B, scale, bias)
            for (weight, scale), (A, B, bias) in zip(self.weights, adapters, strict=True)
        ]


class _LoraMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: Spec, held: Tensor, kept_gate: Tensor | None, kept_up: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        ctx.hold, ctx.spec = held.grad_fn, spec
        x = flat(held)
        with torch.autocast(x.device.type, enabled=False):
            gate, up, down = spec.layers(tensors)
            last = InUse(down, spec.precision)
            kept = [k for k in (kept_gate, kept_up) if k is not None]
            first = [] if kept else [InUse(gate, spec.precision), InUse(up, spec.precision)]
            y = x.new_empty(len(x), down.weight.shape[0], dtype=spec.precision.out)
            for t in tiles(len(x), spec.tile):
                g, u = (k[t] for k in kept) if kept else both(first, x[t])
                h = gated(g, u, spec.activation, out=None if kept else g)
                y[t] = last.forward(h, last.down(h))
                del g, u, h  # else they live on beside those of the next tile
        return y.view(*held.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        spec: Spec = ctx.spec
        x, kept_gate, kept_up, *tensors = held_tensors(ctx.hold)
        kept = None if kept_gate is None else (kept_gate, kept_up)
        with torch.autocast(x.device.type, enabled=False):
            layers = spec.layers(tuple(tensors))
            wanted = ctx.needs_input_grad[4:]
            in_use = [InUse(p, spec.precision, wanted[3 * i : 3 * i + 3]) for i, p in enumerate(layers)]
            dx = tiled_backward(spec, in_use, flat(x), flat(gradients[0]), kept)
            of_factors = [d for layer, p in zip(in_use, layers, strict=True) for d in layer.gradients(p)]
        return None, None if dx is None else dx.view(x.shape), None, None, *of_factors


def tiled_backward(
    spec: Spec, layers: list[InUse], x: Tensor, dy: Tensor, kept: tuple[Tensor, Tensor] | None
) -> Tensor | None:
    """Computes the backward tile by tile: x [t, D], dy [t, D] -> dx [t, D], or None if nobody needs it.

    The gradients of the factors are left in ``layers``. kept: gate and up [t, F], if the forward has kept them.
    """
    gate, up, down = layers
    dx = torch.empty_like(x) if spec.need_x else None
    for t in tiles(len(x), spec.tile):
        part = x[t]
        u_gate, u_up = gate.down(part), up.down(part)
        if kept is None:
            g, u = gate.forward(part, u_gate), up.forward(part, u_up)
        else:
            g, u = kept[0][t], kept[1][t]
        v = down.up(dy[t])
        dh = down.backward(dy[t], v).to(spec.precision.out)
        # What is kept may be asked for again (retain_graph), so it is not written over.
        h, dgate, dup = gated_backward(dh, g, u, spec.activation, keep=kept is not None)
        down.accumulate(h, down.down(h), dy[t], v)
        v_gate, v_up = gate.up(dgate), up.up(dup)
        gate.accumulate(part, u_gate, dgate, v_gate)
        up.accumulate(part, u_up, dup, v_up)
        if dx is not None:
            sum_dx = up.backward(dup, v_up)
            gate.add_backward(sum_dx, dgate, v_gate)
            dx[t] = sum_dx
            del sum_dx
        del dh, g, u, h, dgate, dup  # else they live on beside those of the next tile
    return dx


def intermediates(spec: Spec, x: Tensor, gate: Projection, up: Projection) -> tuple[Tensor, Tensor]:
    """Returns gate and up [t, F] of all tokens."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return both((InUse(gate, spec.precision), InUse(up, spec.precision)), flat(x))


def both(first: Sequence[InUse], x: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = first
    return gate.forward(x, gate.down(x)), up.forward(x, up.down(x))


def tiles(count: int, size: int) -> list[slice]:
    """Cuts the tokens into equal parts of at most ``size``, because a ragged rest multiplies badly."""
    if not count:
        return []
    equal = -(-count // -(-count // size))
    step = min(size, -(-equal // ROUND) * ROUND)
    return [slice(a, min(a + step, count)) for a in range(0, count, step)]


def check_shapes(x: Tensor, gate: Projection, up: Projection, down: Projection) -> None:
    inner, width = gate.weight.shape
    if up.weight.shape != (inner, width) or down.weight.shape[1] != inner or x.shape[-1] != width:
        shapes = ", ".join(str(list(p.weight.shape)) for p in (gate, up, down))
        raise ValueError(f"expected gate and up [F, D], down [D, F] and x [.., D], got {shapes} and {list(x.shape)}")
