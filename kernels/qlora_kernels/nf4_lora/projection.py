"""Computes the products of one linear layer with LoRA: those of its forward and backward on a tile of tokens.

::

    u  = x A^T                                   [t, r]
    y  = x W^T + bias + scale u B^T              [t, out]
    v  = scale dy B                              [t, r]
    dx = dy W + v A                              [t, in]
    dA = v^T x      dB = scale dy^T u      dbias = sum_t dy

Source: LoRA (https://arxiv.org/abs/2106.09685), equation 3. rsLoRA differs in ``scale`` only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kernels.nf4 import NF4Stack, NF4Weight

FrozenWeight = Tensor | NF4Weight
Adapter = tuple[Tensor | None, Tensor | None, Tensor | None]  # A, B, bias


@dataclass(frozen=True)
class Projection:
    """Holds a linear layer with LoRA.

    weight: frozen [out, in]; A: [r, in] and B: [out, r], or neither; bias: [out] or None.
    """

    weight: FrozenWeight
    A: Tensor | None = None
    B: Tensor | None = None
    scale: float = 1.0
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        out, width = self.weight.shape
        if self.weight.requires_grad:
            raise ValueError("weight: it is trainable; these functions compute no gradient for it, so freeze it")
        if (self.A is None) != (self.B is None):
            raise ValueError("A and B: give both or neither")
        if self.A is not None and self.B is not None:
            rank = self.A.shape[0]
            if self.A.shape != (rank, width) or self.B.shape != (out, rank):
                raise ValueError(
                    f"expected A [r, {width}] and B [{out}, r], got {list(self.A.shape)}, {list(self.B.shape)}"
                )
        if self.bias is not None and self.bias.shape != (out,):
            raise ValueError(f"bias: expected [{out}], got {list(self.bias.shape)}")

    @property
    def adapter(self) -> Adapter:
        return self.A, self.B, self.bias


@dataclass(frozen=True)
class Precision:
    """Holds the types of one call, which are fixed in its forward and used again in its backward.

    base: the type of the products with W; lora: that of the products with A and B (None: A's own type); out: that of
    the result.

    ============================  =====================================  ============================
    ..                            autocast is on                         autocast is off
    ============================  =====================================  ============================
    W in NF4                      base: as given, or x's; out: x's       the same
    W dense                       base and out: autocast's               base and out: x's
    A and B (float32 masters)     autocast's                             their own
    ============================  =====================================  ============================

    These are the types in which PEFT's layers compute (bitsandbytes' 4-bit layer takes no notice of autocast, torch's
    linear layers do). The functions read autocast themselves and switch it off inside, in forward and backward,
    in place of `torch.amp.custom_fwd`, which has to be told the device when a module is imported.
    """

    base: torch.dtype
    lora: torch.dtype | None
    out: torch.dtype

    @classmethod
    def of(cls, x: Tensor, weight: FrozenWeight | NF4Stack, base: torch.dtype | None = None) -> Precision:
        """Returns the types for input ``x`` by the table above; ``base`` overrides the type of the products with W.

        Raises ValueError if a dense weight has another type than ``x`` and autocast is off.
        """
        auto = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        if isinstance(weight, NF4Weight | NF4Stack):
            return cls(base or x.dtype, auto, x.dtype)
        if auto is None and x.dtype != weight.dtype:
            raise ValueError(f"x is {x.dtype} but the weight is {weight.dtype}: convert one, or use torch.autocast")
        return cls(base or auto or x.dtype, auto, base or auto or x.dtype)


class InUse:
    """Holds a projection during one pass over tiles.

    Its weight is dequantised once and its factors are in the type they multiply in. In a backward it holds the sums of
    their gradients in float32.
    """

    def __init__(self, p: Projection, precision: Precision, wanted: tuple[bool, bool, bool] = (False, False, False)):
        self.precision, self.scale = precision, p.scale
        self.weight = dense(p.weight, precision.base)
        self.bias = None if p.bias is None else p.bias.to(precision.base)
        self.a = self.b = None
        if p.A is not None and p.B is not None:
            lora = precision.lora or p.A.dtype
            self.a, self.b = p.A.to(lora), p.B.to(lora)
        self.sums = [
            zeros_like(t) if t is not None and want else None for t, want in zip(p.adapter, wanted, strict=True)
        ]

    def down(self, x: Tensor) -> Tensor | None:
        """Returns u."""
        return None if self.a is None else x.to(self.a.dtype) @ self.a.t()

    def forward(self, x: Tensor, u: Tensor | None) -> Tensor:
        """Returns y. x: [t, in], u: what `down` gave for it."""
        base, out = x.to(self.precision.base), self.precision.out
        if self.bias is None:
            y = base @ self.weight.t()
        else:
            y = torch.addmm(self.bias, base, self.weight.t())
        return add_product(y.to(out), u, None if self.b is None else self.b.t(), self.scale)

    def up(self, dy: Tensor) -> Tensor | None:
        """Returns v."""
        return None if self.b is None else (dy.to(self.b.dtype) @ self.b).mul_(self.scale)

    def backward(self, dy: Tensor, v: Tensor | None) -> Tensor:
        """Returns dx in the type of the base products."""
        return add_product(dy.to(self.precision.base) @ self.weight, v, self.a)

    def add_backward(self, dx: Tensor, dy: Tensor, v: Tensor | None) -> None:
        """Adds this projection's share to ``dx``."""
        dy = dy.to(self.precision.base)
        if dx.dtype == dy.dtype:
            dx.addmm_(dy, self.weight)
        else:
            dx += dy @ self.weight
        add_product(dx, v, self.a)

    def accumulate(self, x: Tensor, u: Tensor | None, dy: Tensor, v: Tensor | None) -> None:
        """Adds a tile's dA, dB and dbias to the sums."""
        d_a, d_b, d_bias = self.sums
        if d_a is not None and v is not None:
            sum_product(d_a, v.t(), x.to(v.dtype))
        if d_b is not None and u is not None:
            sum_product(d_b, dy.to(u.dtype).t(), u)
        if d_bias is not None:
            d_bias += dy.sum(0, dtype=d_bias.dtype)

    def gradients(self, p: Projection) -> list[Tensor | None]:
        """Returns dA, dB and dbias in the types of A, B and bias.

        Call it once: the factor ``scale`` of dB is applied here.
        """
        if self.sums[1] is not None:
            self.sums[1].mul_(self.scale)
        return [s if s is None or t is None else s.to(t.dtype) for s, t in zip(self.sums, p.adapter, strict=True)]


def dense(weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
    return weight.dequantize(dtype) if isinstance(weight, NF4Weight) else weight.detach().to(dtype)


def zeros_like(t: Tensor) -> Tensor:
    """Returns zeros in which gradients of ``t`` are added up: at least float32."""
    return torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32), memory_format=torch.contiguous_format)


def add_product(y: Tensor, a: Tensor | None, b: Tensor | None, scale: float = 1.0) -> Tensor:
    """Computes y += scale a b in place, rounded once where all types are equal."""
    if a is None or b is None:
        return y
    if a.dtype == y.dtype:
        return y.addmm_(a, b, alpha=scale)
    return y.add_(a @ b, alpha=scale)


def sum_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Computes total += a b, with at least float32 ``total``.

    On a GPU halves are multiplied without rounding the product.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
