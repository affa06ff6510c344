"""Computes the experts of a mixture with LoRA over frozen weights; each token goes through those that its router chose.

::

    y[t] = sum over k of  weights[t, k] down_e(middle(up_e(x[t])))          e = index[t, k]

    forward:   saves x, index and weights alone. Rows are sorted by expert and taken group by group (experts whose
               dequantised weights take little together) and tile by tile of rows:  z = up_e(x), h = middle(z), y.
    backward:  per tile z and h again, then at once, with g = dy[t]
               dh = g W_down;   dweights = dh h + g bias;   dz = middle'(weights dh);   dx = dz W_up
               and the tile's share of the gradients of every expert's factors, added up in float32.

W stands for an expert's weight with its adapter, W + scale B A. Each weight is dequantised once in a forward and once
in a backward, and only those of experts that a token was sent to. An expert without tokens has a gradient of zero.
One wait for the device per pass: how many rows each expert has decides what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.nf4 import NF4Stack
from qlora_kernels.nf4_lora.grouped import add_grouped_product, group_rows, grouped_product
from qlora_kernels.nf4_lora.hold import held_tensors, hold
from qlora_kernels.nf4_lora.mlp import default_tile, tiles
from qlora_kernels.nf4_lora.projection import Precision, sum_product, zeros_like

# Values of the dequantised weights that exist at a time, unless one expert has more: 64 MiB in 16 bits.
GROUP_VALUES = 2**25

Middle = Callable[[Tensor], Tensor]
"""Computes, row by row, what stands between the two projections: the activation, and the gate where there is one."""


@dataclass(frozen=True)
class Experts:
    """Holds one projection of every expert.

    weight: frozen [E, out, in], or [E, in, out] if ``transposed``; A: [E, r, in] and B: [E, out, r], or neither; bias:
    frozen [E, out] or None.
    """

    weight: Tensor | NF4Stack
    transposed: bool = False
    A: Tensor | None = None
    B: Tensor | None = None
    scale: float = 1.0
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.A is None) != (self.B is None):
            raise ValueError("A and B: give both or neither")
        if self.A is not None and self.B is not None:
            count, rank = self.A.shape[:2]
            if self.A.shape != (count, rank, self.width) or self.B.shape != (self.count, self.out, rank):
                raise ValueError(
                    f"expected A [{self.count}, r, {self.width}] and B [{self.count}, {self.out}, r], "
                    f"got {list(self.A.shape)}, {list(self.B.shape)}"
                )

    @property
    def trained(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    @property
    def count(self) -> int:
        return self.weight.shape[0]

    @property
    def out(self) -> int:
        return self.weight.shape[2 if self.transposed else 1]

    @property
    def width(self) -> int:
        return self.weight.shape[1 if self.transposed else 2]


def lora_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Experts,
    down: Experts,
    middle: Middle,
    *,
    tile: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sends each row of ``x`` through its experts and adds up what they return; formula above.

    Args:
        x: [T, D].
        index: int64 [T, K], the experts of each row; E and more: none.
        weights: [T, K], what each expert's result counts.
        up, down: D -> F' and F -> D.
        middle: [n, F'] -> [n, F], differentiable.
        tile: rows at a time; default: `default_tile`.
        dtype: of the products with the weights; which type is used for what: `Precision`.

    Returns [T, D], with gradients for x, weights and every A and B. Raises ValueError for shapes that do not fit.
    """
    if up.width != x.shape[-1] or down.out != x.shape[-1] or up.count != down.count or index.shape != weights.shape:
        raise ValueError(
            f"x {list(x.shape)}, index {list(index.shape)}, weights {list(weights.shape)} do not go with "
            f"{up.count} experts {up.width} -> {up.out} and {down.count} experts {down.width} -> {down.out}"
        )
    if torch.is_grad_enabled() and (up.trained or down.trained):
        raise ValueError("weight and bias of experts: lora_experts computes no gradient for them, so freeze them")
    size = tile if tile is not None else default_tile(x.shape[-1])
    bare_up, bare_down = replace(up, A=None, B=None), replace(down, A=None, B=None)
    spec = Spec(bare_up, bare_down, middle, size, Precision.of(x, up.weight, dtype), x.requires_grad)
    factors = (up.A, up.B, down.A, down.B)
    held = hold(x, index, weights, *factors)
    return cast(Tensor, _LoraExperts.apply(spec, held, index, weights, *factors))


@dataclass(frozen=True)
class Spec:
    """Holds what one call hands from its forward to its backward, besides tensors.

    up, down: the two projections without their factors A and B.
    """

    up: Experts
    down: Experts
    middle: Middle
    tile: int
    precision: Precision
    need_x: bool

    def groups(
        self, index: Tensor, factors: Sequence[Tensor | None]
    ) -> Iterator[tuple[Group, Group, Tensor, list[int]]]:
        """Yields some experts at a time: (up, down, slots, ends).

        slots: the flat positions in ``index`` of the rows of these experts, sorted by expert. ends: where the rows of
        each expert end among them. factors: A and B of up, A and B of down.
        """
        chosen, order = index.reshape(-1).sort(stable=True)
        every = torch.arange(self.up.count, device=index.device)
        ends = torch.searchsorted(chosen, every, right=True).tolist()
        hit = [expert for expert, rows in group_rows(ends)]
        size = max(1, GROUP_VALUES // (self.up.out * self.up.width + self.down.out * self.down.width))
        a_up, b_up, a_down, b_down = factors
        begin = 0
        for first in range(0, len(hit), size):
            experts = hit[first : first + size]
            up = Group(replace(self.up, A=a_up, B=b_up), experts, self.precision)
            down = Group(replace(self.down, A=a_down, B=b_down), experts, self.precision)
            yield up, down, order[begin : ends[experts[-1]]], [ends[expert] - begin for expert in experts]
            begin = ends[experts[-1]]

    def tiles(self, slots: Tensor, ends: list[int]) -> Iterator[tuple[Tensor, list[int]]]:
        """Yields ``slots`` in pieces of at most ``tile`` rows, each with where the rows of every expert end in it."""
        for part in tiles(len(slots), self.tile):
            size = part.stop - part.start
            yield slots[part], [min(max(end - part.start, 0), size) for end in ends]


class _LoraExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: Spec, held: Tensor, index: Tensor, weights: Tensor, *factors: Tensor | None) -> Tensor:
        ctx.hold, ctx.spec = held.grad_fn, spec
        with torch.autocast(held.device.type, enabled=False):
            y = zeros_like(held)
            flat = weights.reshape(-1, 1)
            for up, down, slots, ends in spec.groups(index, factors):
                for part, stops in spec.tiles(slots, ends):
                    tokens = part // index.shape[1]
                    rows = down.forward(spec.middle(up.forward(held[tokens], stops)), stops)
                    y.index_add_(0, tokens, rows.to(y.dtype).mul_(flat[part]))
        return y.to(spec.precision.out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        spec: Spec = ctx.spec
        x, index, weights, *factors = held_tensors(ctx.hold)
        need_weights, wanted = ctx.needs_input_grad[3], ctx.needs_input_grad[4:]
        sums = [zeros_like(f) if f is not None and want else None for f, want in zip(factors, wanted, strict=True)]
        dx = zeros_like(x) if spec.need_x else None
        flat, dweights = weights.reshape(-1, 1), zeros_like(weights).view(-1, 1) if need_weights else None
        with torch.autocast(x.device.type, enabled=False):
            for up, down, slots, ends in spec.groups(index, factors):
                for part, stops in spec.tiles(slots, ends):
                    tokens = part // index.shape[1]
                    rows, g = x[tokens], gradients[0][tokens]
                    z, h = differentiable(spec.middle, up.forward(rows, stops))
                    dh = down.backward(g, stops).to(h.dtype)
                    if dweights is not None:
                        dweights[part] = down.dot(g, dh, h, stops).to(dweights.dtype)
                    down.accumulate(h, g * flat[part].to(g.dtype), stops, *sums[2:])
                    (dz,) = torch.autograd.grad(h, z, dh.mul_(flat[part]))
                    up.accumulate(rows, dz, stops, *sums[:2])
                    if dx is not None:
                        dx.index_add_(0, tokens, up.backward(dz, stops).to(dx.dtype))
                    del rows, g, z, h, dh, dz  # else they live on beside those of the next tile
        of_factors = [s if s is None or f is None else s.to(f.dtype) for s, f in zip(sums, factors, strict=True)]
        of_weights = None if dweights is None else dweights.view(weights.shape).to(weights.dtype)
        return None, None if dx is None else dx.to(x.dtype), None, of_weights, *of_factors


def differentiable(middle: Middle, z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns z and middle(z), with autograd's graph from the one to the other."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        return z, middle(z)


class Group:
    """Holds one projection of some experts during one pass.

    Their weights are dequantised once, and their factors are in the type they multiply in. The rows that the methods
    take are sorted by expert; ``ends`` says where those of each expert end.
    """

    def __init__(self, p: Experts, experts: list[int], precision: Precision):
        self.experts, self.precision, self.scale = experts, precision, p.scale
        device = (p.weight.packed if isinstance(p.weight, NF4Stack) else p.weight).device
        chosen = choice(experts, device)
        if isinstance(p.weight, NF4Stack):
            weight = p.weight.dequantize(chosen, precision.base)
        else:
            weight = p.weight.detach()[chosen].to(precision.base)
        self.weight = weight.transpose(1, 2) if p.transposed else weight  # [G, out, in]
        self.bias = None if p.bias is None else p.bias.detach()[chosen].to(precision.base)
        self.a = self.b = None
        if p.A is not None and p.B is not None:
            lora = precision.lora or p.A.dtype
            self.a, self.b = p.A.detach()[chosen].to(lora), p.B.detach()[chosen].to(lora)

    def forward(self, x: Tensor, ends: list[int]) -> Tensor:
        y = grouped_product(x.to(self.precision.base), self.weight.transpose(1, 2), ends)
        if self.bias is not None:
            for group, rows in group_rows(ends):
                y[rows] += self.bias[group]
        y = y.to(self.precision.out)
        if self.a is None or self.b is None:
            return y
        u = grouped_product(x.to(self.a.dtype), self.a.transpose(1, 2), ends)
        return add_grouped_product(y, u, self.b.transpose(1, 2), ends, self.scale)

    def backward(self, dy: Tensor, ends: list[int]) -> Tensor:
        dx = grouped_product(dy.to(self.precision.base), self.weight, ends)
        if self.a is None or self.b is None:
            return dx
        v = grouped_product(dy.to(self.b.dtype), self.b, ends)
        return add_grouped_product(dx, v, self.a, ends, self.scale)

    def dot(self, dy: Tensor, dh: Tensor, h: Tensor, ends: list[int]) -> Tensor:
        """Returns for each row the dot product [n, 1] of ``dy`` and the projection of ``h``.

        ``dh`` is what `backward` makes of ``dy``: dy (W h + bias) = dh h + dy bias, so W is not needed again.
        """
        with torch.no_grad():
            wide = torch.promote_types(h.dtype, torch.float32)
            total = (dh.to(wide) * h.to(wide)).sum(1, keepdim=True)
            if self.bias is not None:
                for group, rows in group_rows(ends):
                    total[rows] += dy[rows].to(wide) @ self.bias[group].to(wide)[:, None]
            return total

    def accumulate(self, x: Tensor, dy: Tensor, ends: list[int], d_a: Tensor | None, d_b: Tensor | None) -> None:
        """Adds the rows' shares to the gradients [E, ..] of all experts' A and B."""
        if self.a is None or self.b is None:
            return
        x, dy = x.detach().to(self.a.dtype), dy.to(self.b.dtype)
        u = grouped_product(x, self.a.transpose(1, 2), ends).mul_(self.scale)
        v = grouped_product(dy, self.b, ends).mul_(self.scale)
        for group, rows in group_rows(ends):
            expert = self.experts[group]
            if d_a is not None:
                sum_product(d_a[expert], v[rows].t(), x[rows])
            if d_b is not None:
                sum_product(d_b[expert], dy[rows].t(), u[rows])


def choice(experts: list[int], device: torch.device) -> slice | Tensor:
    """Returns an index that selects these experts: a slice, which copies nothing, if they follow one another."""
    if experts[-1] - experts[0] + 1 == len(experts):
        return slice(experts[0], experts[-1] + 1)
    return torch.tensor(experts, device=device)
