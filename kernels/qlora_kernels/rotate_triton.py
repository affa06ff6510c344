"""Rotates queries and keys in Triton; formulas and plain version are in `rotate`. Values are read and written once."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# A program takes as many heads of one token as have about so many pairs, so that cosines and sines are read once.
PAIRS = 512
WARPS = 4


@triton.jit
def rotate_kernel(
    Q, K, OUT_Q, OUT_K, COS, SIN, q_token, q_head, k_token, k_head, H, G, size, half,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rotates HEADS of the H + G heads of one token; OUT_Q [T, H, size] and OUT_K [T, G, size] are contiguous."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    c = tl.arange(0, HALF)[None, :]
    of_q, of_k = (h < H) & (c < half), (h >= H) & (h < H + G) & (c < half)
    angle = t * 2 * half + c
    cos1 = tl.load(COS + angle, mask=c < half, other=0.0).to(tl.float32)
    cos2 = tl.load(COS + angle + half, mask=c < half, other=0.0).to(tl.float32)
    sin1 = tl.load(SIN + angle, mask=c < half, other=0.0).to(tl.float32)
    sin2 = tl.load(SIN + angle + half, mask=c < half, other=0.0).to(tl.float32)
    q, k = Q + t * q_token + h * q_head + c, K + t * k_token + (h - H) * k_head + c
    a = tl.load(q, mask=of_q, other=0.0).to(tl.float32) + tl.load(k, mask=of_k, other=0.0).to(tl.float32)
    b = tl.load(q + half, mask=of_q, other=0.0).to(tl.float32) + tl.load(k + half, mask=of_k, other=0.0).to(tl.float32)
    if INVERSE:
        first, second = a * cos1 + b * sin2, b * cos2 - a * sin1
    else:
        first, second = a * cos1 - b * sin1, b * cos2 + a * sin2
    q, k = OUT_Q + (t * H + h) * size + c, OUT_K + (t * G + h - H) * size + c
    tl.store(q, first.to(OUT_Q.dtype.element_ty), mask=of_q)
    tl.store(q + half, second.to(OUT_Q.dtype.element_ty), mask=of_q)
    tl.store(k, first.to(OUT_K.dtype.element_ty), mask=of_k)
    tl.store(k + half, second.to(OUT_K.dtype.element_ty), mask=of_k)


def turn(each: list[Tensor], cos: Tensor, sin: Tensor, inverse: bool, out: list[Tensor]) -> None:
    """Rotates as `rotate.turn` does, but leaves out the values that do not turn."""
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in each)
    (tokens, heads, size), groups, half = q.shape, k.shape[1], cos.shape[-1] // 2
    assert all(y.is_contiguous() for y in out), "results are written as contiguous [T, H, d]"
    if not tokens:
        return
    columns = triton.next_power_of_2(half)
    per_program = min(max(1, PAIRS // columns), triton.next_power_of_2(heads + groups))
    rotate_kernel[(tokens, triton.cdiv(heads + groups, per_program))](
        q, k, *out, cos.contiguous(), sin.contiguous(), q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        heads, groups, size, half, INVERSE=inverse, HEADS=per_program, HALF=columns, num_warps=WARPS,
    )  # fmt: skip
