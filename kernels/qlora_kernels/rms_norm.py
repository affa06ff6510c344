"""Computes an RMSNorm that keeps its input in the input's own type for its backward, and no copy in float32.

With w of D values, mean over a token's D values, everything in float32::

    r = 1 / sqrt(mean(x^2) + eps),   n = x r

    llama:   y = w round(n)          rounded to x's type before the weight
    gemma:   y = round((1 + w) n)    after it

    backward, with g = w dy or (1 + w) dy:   dx = r (g - n mean(g n)),   dw = sum over tokens of dy round(n) or dy n

Written out in torch operations, as transformers does, autograd keeps the float32 copy of x and r: 4 D + 4 bytes per
token. Here x itself is kept, which the residual or the layer's checkpoint mostly holds anyway, and r: 4 bytes.
The forward takes the same operations in the same order and gives the same bits (`tests/kernels/test_rms_norm.py`).

Both directions work on blocks of tokens, so that what is in float32 is three buffers of a block, whatever the row. On a
GPU the backward of a frozen weight is one kernel (`rms_norm_triton`).
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.packed_ce.backend import choose_path

NormFormula = Literal["llama", "gemma"]

# Values of a block. On a CPU a float32 buffer of 1 MiB stays in the cache from one operation to the next: measured, at
# 4096 x 576 in bfloat16 a forward and backward takes a third of its time in one piece; blocks an eighth as large take
# half as long again, for the calls. A GPU needs enough work to hide the launches, and reads 64 MiB in some tens of
# microseconds (not measured).
CPU_BLOCK = 2**18
GPU_BLOCK = 2**24
# Values of the widest row that a kernel holds in registers.
WIDEST = 16_384


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, form: NormFormula = "llama") -> Tensor:
    """Normalises x [.., D] with weight [D] -> [.., D], with gradients for x and, if it requires one, for the weight.

    The result is of x's type; in the llama form, as in transformers, of the wider one of x's and the weight's.
    Raises ValueError for an unknown form and for a weight that does not fit.
    """
    if form not in ("llama", "gemma"):
        raise ValueError(f"form: expected llama or gemma, got {form!r}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"expected a weight [{x.shape[-1]}] for x {list(x.shape)}, got {list(weight.shape)}")
    if not torch.is_grad_enabled():
        return normalised(x, weight, eps, form)[0]  # generation calls this once per token: less in its way
    return cast(Tensor, _RMSNorm.apply(x, weight, eps, form))


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float, form: NormFormula = "llama") -> Tensor:
    """Computes the textbook norm in x's own type throughout."""
    n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return n * (weight if form == "llama" else 1 + weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, form: NormFormula) -> Tensor:
        y, root = normalised(x, weight, eps, form)
        ctx.save_for_backward(x, root, weight)
        ctx.form = form
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, root, weight = ctx.saved_tensors
        need_x, need_weight, *_ = ctx.needs_input_grad
        rows, dy, root = x.reshape(-1, x.shape[-1]), gradients[0].reshape(-1, x.shape[-1]), root.reshape(-1, 1)
        if need_x and not need_weight and in_triton(rows, dy):
            from qlora_kernels import rms_norm_triton

            return rms_norm_triton.gradient_of(rows, dy, weight, root, ctx.form == "gemma").view(x.shape), *[None] * 3
        factor = weight.float() if ctx.form == "llama" else 1.0 + weight.float()
        dx = torch.empty_like(rows) if need_x else None
        dw = torch.zeros_like(factor) if need_weight else None
        for t in blocks(rows):
            n = rows[t].float() * root[t]
            if dw is not None:
                dw += (dy[t].float() * (n.to(x.dtype) if ctx.form == "llama" else n)).sum(0)
            if dx is not None:
                g = dy[t].float() * factor
                dx[t] = g.addcmul_(n, (g * n).mean(-1, keepdim=True), value=-1.0).mul_(root[t])
        of_x = None if dx is None else dx.view(x.shape)
        return of_x, None if dw is None else dw.to(weight.dtype), None, None


def in_triton(x: Tensor, dy: Tensor) -> bool:
    """Says whether one kernel computes the gradient of x. The forward has transformers' bits, so torch computes it."""
    return x.shape[-1] <= WIDEST and choose_path("auto", x.device, (x.dtype, dy.dtype)).name == "triton"


def normalised(x: Tensor, weight: Tensor, eps: float, form: NormFormula) -> tuple[Tensor, Tensor]:
    """Returns (y [.., D], r [.., 1] in float32)."""
    # The order in which a sum runs may depend on strides: only rows that lie one after another are cut into blocks.
    if x.numel() <= block_values(x) or not x.is_contiguous():
        return one_block(x, weight, eps, form)
    rows = x.view(-1, x.shape[-1])
    # The result is no view, so that whoever gets it may write over it.
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype) if form == "llama" else x.dtype)
    root = rows.new_empty(len(rows), 1, dtype=torch.float32)
    flat_y = y.view(rows.shape)
    for t in blocks(rows):
        flat_y[t], root[t] = one_block(rows[t], weight, eps, form)
    return y, root.view(*x.shape[:-1], 1)


def one_block(x: Tensor, weight: Tensor, eps: float, form: NormFormula) -> tuple[Tensor, Tensor]:
    """Computes one block with transformers' operations, in transformers' order."""
    x32 = x.to(torch.float32)
    root = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    n = x32 * root
    return (weight * n.to(x.dtype) if form == "llama" else (n * (1.0 + weight.float())).to(x.dtype)), root


def blocks(rows: Tensor) -> list[slice]:
    """Cuts ``rows`` [t, D] into equal parts of at most `block_values` (but of one row at least).

    They are as equal as can be, because a GPU sums a mere handful of rows in another order, and a small rest would no
    longer give transformers' bits.
    """
    count, width = rows.shape
    most = max(1, block_values(rows) // max(1, width))
    parts = -(-count // most)
    return [slice(i * count // parts, (i + 1) * count // parts) for i in range(parts)]


def block_values(x: Tensor) -> int:
    return GPU_BLOCK if x.is_cuda else CPU_BLOCK
