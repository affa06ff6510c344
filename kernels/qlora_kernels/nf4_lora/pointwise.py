"""Runs the pointwise middle of a gated MLP in Triton; the formulas and the plain version are in `gated`.

Every value is read once and written once. The backward writes over what it has read.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
WARPS = 4


@triton.jit
def slope_and_share(g, ACTIVATION: tl.constexpr):
    """Returns act'(g) and act(g) / g in float32."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(g)
        return s + g * s * (1.0 - s), s
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))  # the normal distribution
        return share + g * 0.3989422804014327 * tl.exp(-0.5 * g * g), share  # g times its density
    else:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        share = tl.sigmoid(2.0 * inner)  # (1 + tanh(inner)) / 2
        d_inner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * g * g)
        return share + g * 2.0 * share * (1.0 - share) * d_inner, share


@triton.jit
def gated_kernel(G, U, H, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Computes H = act(G) U."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = o < n
    g = tl.load(G + o, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(U + o, mask=inside, other=0.0).to(tl.float32)
    _, share = slope_and_share(g, ACTIVATION)
    tl.store(H + o, (g * share * u).to(H.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward_kernel(D, G, U, DG, DU, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Computes DG = D U act'(G), DU = D act(G) and D = act(G) U, each from the values before the call.

    DG and DU may be G and U.
    """
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = o < n
    d = tl.load(D + o, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(G + o, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(U + o, mask=inside, other=0.0).to(tl.float32)
    slope, share = slope_and_share(g, ACTIVATION)
    tl.store(D + o, (g * share * u).to(D.dtype.element_ty), mask=inside)
    tl.store(DG + o, (d * u * slope).to(DG.dtype.element_ty), mask=inside)
    tl.store(DU + o, (d * g * share).to(DU.dtype.element_ty), mask=inside)


def gated(gate: Tensor, up: Tensor, activation: str, out: Tensor) -> Tensor:
    check(gate, up, out)
    if n := gate.numel():
        gated_kernel[(triton.cdiv(n, BLOCK),)](gate, up, out, n, ACTIVATION=activation, BLOCK=BLOCK, num_warps=WARPS)
    return out


def gated_backward(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str, dgate: Tensor, dup: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    check(dh, gate, up, dgate, dup)
    if n := gate.numel():
        grid = (triton.cdiv(n, BLOCK),)
        gated_backward_kernel[grid](dh, gate, up, dgate, dup, n, ACTIVATION=activation, BLOCK=BLOCK, num_warps=WARPS)
    return dh, dgate, dup


def check(*tensors: Tensor) -> None:
    """Asserts that all tensors have one shape and are contiguous, because the kernels count values in memory."""
    shape = tensors[0].shape
    for t in tensors:
        assert t.shape == shape, f"expected {list(shape)}, got {list(t.shape)}"
        assert t.is_contiguous(), f"expected a contiguous tensor, got strides {t.stride()}"
