"""Computes the backward of an RMSNorm in Triton; formulas and plain version are in `rms_norm`.

Each value of x and dy is read once and each of dx written once: 6 bytes in 16 bits, where torch's operations move 70.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def norm_backward_kernel(X, DY, W, ROOT, DX, D, GEMMA: tl.constexpr, BLOCK: tl.constexpr):
    """Computes dx = r (g - n mean(g n)) of one row of D values, with n = x r and g = w dy, or (1 + w) dy."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < D
    r = tl.load(ROOT + t)
    w = tl.load(W + c, mask=inside, other=0.0).to(tl.float32)
    if GEMMA:
        w = w + 1.0
    n = tl.load(X + t * D + c, mask=inside, other=0.0).to(tl.float32) * r
    g = tl.load(DY + t * D + c, mask=inside, other=0.0).to(tl.float32) * w
    mean = tl.sum(g * n, axis=0) / D
    tl.store(DX + t * D + c, (r * (g - n * mean)).to(DX.dtype.element_ty), mask=inside)


def gradient_of(x: Tensor, dy: Tensor, weight: Tensor, root: Tensor, gemma: bool) -> Tensor:
    """Returns the gradient of x [T, D], given dy [T, D], weight [D] and the reciprocal roots [T, 1] in float32.

    A program holds a row in registers.
    """
    x, dy, weight, root = (y.contiguous() for y in (x, dy, weight, root))
    dx, (rows, width) = x.new_empty(x.shape), x.shape
    block = triton.next_power_of_2(width)
    if rows:
        norm_backward_kernel[(rows,)](
            x, dy, weight, root, dx, width, GEMMA=gemma, BLOCK=block, num_warps=warps_for(block)
        )
    return dx


def warps_for(block: int) -> int:
    """Returns so many warps that a thread has 16 columns, from one (the heads of query and key norms) up to 32."""
    return min(32, max(1, block // 512))
