"""Computes the pointwise middle of a gated MLP and its derivative: float32 inside, rounded once.

::

    h = act(gate) up       dup = dh act(gate)       dgate = dh up act'(gate)

    silu(g) = g s(g),  s = 1 / (1 + e^-g)           silu'(g) = s + g s (1 - s)
    gelu(g) = g F(g),  F the normal distribution    gelu'(g) = F + g f(g),  f its density
    gelu_tanh: F(g) ~ (1 + tanh(c (g + 0.044715 g^3))) / 2,  c = sqrt(2 / pi)
"""

from __future__ import annotations

from functools import cache
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kernels.packed_ce.backend import choose_path

Activation = Literal["silu", "gelu", "gelu_tanh"]

# Values of a block: on a CPU its float32 copies stay in the second-level cache between the operations.
BLOCK = 2**16


def check_activation(activation: str) -> None:
    if activation not in get_args(Activation):
        raise ValueError(f"activation: expected one of {', '.join(get_args(Activation))}, got {activation!r}")


def activate(g: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return F.silu(g)
    return F.gelu(g, approximate="tanh" if activation == "gelu_tanh" else "none")


def activate_backward(d: Tensor, g: Tensor, activation: Activation) -> Tensor:
    """Returns d act'(g): the gradient of g, where d is that of act(g)."""
    if activation == "silu":
        return cast(Tensor, torch.ops.aten.silu_backward(d, g))
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return cast(Tensor, torch.ops.aten.gelu_backward(d, g, approximate=approximate))


def gated(gate: Tensor, up: Tensor, activation: Activation, out: Tensor | None = None) -> Tensor:
    """Returns h [t, F] in the type of ``gate``, written to ``out``, which may be ``gate`` or ``up`` itself."""
    out = torch.empty_like(gate) if out is None else out
    if runs_triton(gate.device, gate.dtype):
        from qlora_kernels.nf4_lora import pointwise

        return pointwise.gated(gate, up, activation, out)
    for rows in blocks(gate):
        out[rows] = activate(wide(gate[rows]), activation).mul_(up[rows])
    return out


def gated_backward(
    dh: Tensor, gate: Tensor, up: Tensor, activation: Activation, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns h, dgate and dup, each [t, F], written over ``dh``, ``gate`` and ``up``.

    keep: ``gate`` and ``up`` are left as they are, and only ``dh`` is written over.
    """
    out = (torch.empty_like(gate), torch.empty_like(up)) if keep else (gate, up)
    if runs_triton(gate.device, gate.dtype):
        from qlora_kernels.nf4_lora import pointwise

        return pointwise.gated_backward(dh, gate, up, activation, *out)
    for rows in blocks(gate):
        g, u, d = wide(gate[rows]), wide(up[rows]), wide(dh[rows])
        a = activate(g, activation)
        h, dup = a * u, a.mul_(d)
        dgate = activate_backward(d * u, g, activation)
        dh[rows], out[0][rows], out[1][rows] = h, dgate, dup
    return dh, *out


@cache
def runs_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Says whether the Triton kernels run, which pass over memory once instead of five times.

    The torch version above is their reference.
    """
    return choose_path("auto", device, (dtype,)).name == "triton"


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def blocks(x: Tensor) -> list[slice]:
    count, width = x.shape
    size = max(1, BLOCK // max(1, width)) if x.device.type == "cpu" else max(1, count)
    return [slice(a, min(a + size, count)) for a in range(0, count, size)]
