"""Applies the rotary position embedding to queries and keys in place: float32 inside, rounded once.

The first w of the d values of a head turn, in pairs (a, b) of which b stands w / 2 behind a. The others stay::

    a' = a cos1 - b sin1           da = da' cos1 + db' sin2          cos = [cos1, cos2], each w / 2 wide
    b' = b cos2 + a sin2           db = db' cos2 - da' sin1

Source: RoFormer (https://arxiv.org/abs/2104.09864), equation 34, in the order of GPT-NeoX and of transformers' Llama.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.packed_ce.backend import choose_path

# Values of a block: on a CPU its float32 copies stay in the second-level cache between the operations.
BLOCK = 2**16


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Writes q and k, rotated, over what they were, and returns them. Gradients for both; none for cos and sin.

    Args:
        q: contiguous, T tokens of H heads of ``size`` values in that order, however they are cut into dimensions; it
            must not be a view. k: the same of G heads.
        cos, sin: [.., T, w] for w <= size; as transformers makes them, cos1 = cos2.

    Raises ValueError for shapes that do not fit.
    """
    tokens, width = cos.numel() // cos.shape[-1], cos.shape[-1]
    if width > size or width % 2 or sin.shape != cos.shape:
        raise ValueError(f"cos and sin: expected [.., T, w] with an even w <= {size}, got {list(cos.shape)}")
    if any(x.numel() % (size * max(1, tokens)) or (x.numel() and not tokens) for x in (q, k)):
        raise ValueError(f"expected {tokens} tokens with heads of {size} values, got {list(q.shape)}, {list(k.shape)}")
    if not tokens:
        return q, k
    return cast("tuple[Tensor, Tensor]", _Rotate.apply(q, k, cos, sin, size))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, size: int) -> tuple[Tensor, Tensor]:
        cos, sin = (x.reshape(-1, x.shape[-1]) for x in (cos, sin))
        ctx.mark_dirty(q, k)
        ctx.save_for_backward(cos, sin)
        ctx.size = size
        each = [x.view(len(cos), -1, size) for x in (q, k)]
        turn(each, cos, sin, inverse=False, out=each)
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        each = [x.reshape(len(cos), -1, ctx.size) for x in gradients]
        # The gradients that come from attention may belong to others as well, so they are not written over.
        out = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in each]
        turn(each, cos, sin, inverse=True, out=out)
        return *(x.view(gradient.shape) for x, gradient in zip(out, gradients, strict=True)), None, None, None


def turn(each: list[Tensor], cos: Tensor, sin: Tensor, inverse: bool, out: list[Tensor]) -> None:
    """Rotates ``each``, which is q and k [T, H, d], by cos and sin [T, w] into ``out``, which may be ``each`` itself.

    inverse: rotates back, by the transposed rotation.
    """
    width = cos.shape[-1]
    for x, y in zip(each, out, strict=True):
        if y is not x and width < x.shape[-1]:
            y[..., width:] = x[..., width:]
    if choose_path("auto", cos.device, tuple(x.dtype for x in each)).name == "triton":
        from qlora_kernels import rotate_triton

        rotate_triton.turn(each, cos, sin, inverse, out)
        return
    for x, y in zip(each, out, strict=True):
        turn_in_torch(x, cos, sin, inverse, y)


def turn_in_torch(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, out: Tensor) -> None:
    """Rotates q or k in plain torch, as the kernel in `rotate_triton` does."""
    tokens, heads, _ = x.shape
    half = cos.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    step = max(1, BLOCK // max(1, 2 * heads * half)) if x.device.type == "cpu" else max(1, tokens)
    for start in range(0, tokens, step):
        t = slice(start, min(start + step, tokens))
        (cos1, cos2), (sin1, sin2) = (f[t, None].to(wide).split(half, -1) for f in (cos, sin))
        of_b, of_a = (sin2, -sin1) if inverse else (-sin1, sin2)
        a, b = x[t, :, :half].to(wide), x[t, :, half : 2 * half].to(wide)
        first, second = (a * cos1).addcmul_(b, of_b), (b * cos2).addcmul_(a, of_a)
        out[t, :, :half], out[t, :, half : 2 * half] = first, second


def reference_rotate(x: Tensor, cos: Tensor, sin: Tensor, size: int) -> Tensor:
    """Rotates ``x``, which is q or k, as a textbook would: in its own type, and autograd differentiates it."""
    cos, sin = (f.reshape(-1, 1, f.shape[-1]).to(x.dtype) for f in (cos, sin))
    heads, width = x.reshape(len(cos), -1, size), cos.shape[-1]
    turning, rest = heads[..., :width], heads[..., width:]
    a, b = turning.chunk(2, -1)
    return torch.cat([turning * cos + torch.cat([-b, a], -1) * sin, rest], -1).reshape(x.shape)
