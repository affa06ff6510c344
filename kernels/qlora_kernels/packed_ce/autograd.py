"""Makes the loss a differentiable function, and decides what is kept for the backward pass.

The forward computes ``U[M, D] = d l_i / d hidden_i`` next to the losses. The backward only scatters it, each position
times its own float32 factor. So token weights, ``reduction="none"`` and any scaling by the trainer cost nothing, and
1/n is applied after the products, where float16 cannot underflow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.packed_ce import torch_path
from qlora_kernels.packed_ce.backend import PathName
from qlora_kernels.packed_ce.head import Head, PatchedHead
from qlora_kernels.packed_ce.inputs import LossInputs, LossResult
from qlora_kernels.packed_ce.options import Options
from qlora_kernels.packed_ce.patched import values_gradient
from qlora_kernels.packed_ce.targets import Targets


@dataclass(frozen=True)
class LossSettings:
    """Holds what the caller asked for.

    weighed_in_forward: whether the gradient of a trainable head is computed in the forward pass, with the token weights
    as the only factors. Otherwise it is computed in the backward pass, with whatever arrives there.
    """

    path: PathName
    options: Options
    tile: int | None
    workspace_bytes: int | None
    weighed_in_forward: bool


def cross_entropy(
    hidden: Tensor, head: Head, bias: Tensor | None, targets: Targets, weights: Tensor | None, settings: LossSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (total = sum_i w_i * l_i, l [M], nll [M], correct [M]); total and l are differentiable."""
    dense = head if isinstance(head, Tensor) else None
    values = head.values if isinstance(head, PatchedHead) else None
    output: tuple[Tensor, Tensor, Tensor, Tensor] = _CrossEntropy.apply(
        hidden, dense, bias, weights, values, head, targets, settings
    )
    return output


class _CrossEntropy(torch.autograd.Function):
    """Connects `solve` to autograd."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, dense: Tensor | None, bias: Tensor | None, weights: Tensor | None,
                values: Tensor | None, head: Head, targets: Targets, settings: LossSettings) -> Any:  # fmt: skip
        needs_hidden, needs_head, needs_bias = ctx.needs_input_grad[:3]
        trainable = needs_head or needs_bias
        scale = weights
        if weights is None and trainable:
            scale = hidden.new_ones(len(targets), dtype=torch.float32)
        now = settings.weighed_in_forward
        inputs = LossInputs(hidden, head, bias, targets.positions, targets.labels, scale, settings.options,
                          needs_hidden, needs_head and now, needs_bias and now)  # fmt: skip
        result = solve(inputs, settings)
        weighted = result.token_loss if weights is None else result.token_loss * weights.to(result.token_loss.dtype)
        total = weighted.sum()
        ctx.settings, ctx.shape, ctx.n_supervised = settings, hidden.shape, len(targets)
        ctx.save_for_backward(
            result.grad_hidden, targets.positions, weights, result.grad_head, result.grad_bias, result.token_loss
        )
        # A trainable head under reduction="none" needs everything again.
        ctx.again = (inputs, targets) if trainable and not now else None
        # Trained rows: few enough that their logits are simply formed again.
        ctx.patched = (inputs, result.nll) if ctx.needs_input_grad[4] else None
        ctx.dtypes = tuple(t.dtype if t is not None else None for t in (dense, bias))
        ctx.mark_non_differentiable(result.nll, result.correct)
        ctx.set_materialize_grads(False)
        return (
            total,
            result.token_loss if result.token_loss is not result.nll else result.nll.clone(),
            result.nll,
            result.correct,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_tokens: Tensor | None, *_: Any) -> Any:
        grad_supervised, positions, weights, grad_head, grad_bias, token_loss = ctx.saved_tensors
        factors = token_loss.new_zeros(ctx.n_supervised) if grad_tokens is None else grad_tokens
        if grad_total is not None:
            factors = factors + (grad_total if weights is None else grad_total * weights.to(token_loss.dtype))
        if ctx.again is not None:
            inputs, _targets = ctx.again
            _, needs_head, needs_bias = ctx.needs_input_grad[:3]
            again = replace(inputs, weights=factors, need_hidden=False, need_head=needs_head, need_bias=needs_bias)
            result = solve(again, ctx.settings)
            grad_head, grad_bias = result.grad_head, result.grad_bias
        elif grad_total is not None:
            grad_head, grad_bias = (g if g is None else g * grad_total for g in (grad_head, grad_bias))
        grads = [g if g is None else g.to(dtype) for g, dtype in zip((grad_head, grad_bias), ctx.dtypes, strict=True)]
        grad_hidden = None
        if grad_supervised is not None:
            grad_hidden = scatter(grad_supervised, positions, factors, ctx.shape, ctx.settings.path)
        grad_weights = None
        if ctx.needs_input_grad[3] and grad_total is not None:
            grad_weights = (grad_total * token_loss).float()
        grad_values = None
        if ctx.patched is not None:
            inputs, nll = ctx.patched
            grad_values = values_gradient(inputs, nll, factors).to(inputs.head.values.dtype)
        return grad_hidden, grads[0], grads[1], grad_weights, grad_values, None, None, None


def solve(inputs: LossInputs, settings: LossSettings) -> LossResult:
    """Computes the losses and gradients on the path that the settings name."""
    if settings.path == "torch":
        return torch_path.run(inputs, settings.tile)
    from qlora_kernels.packed_ce import triton_path

    return triton_path.run(inputs, settings.tile, settings.workspace_bytes)


def scatter(grad_supervised: Tensor, positions: Tensor, factors: Tensor, shape: torch.Size, path: str) -> Tensor:
    """Returns zeros [T, D] with ``grad_supervised_i * factors_i`` at ``positions_i``.

    The product is taken in float32 and rounded once. The positions are distinct, so this is a copy and not a sum.
    """
    if path == "triton":
        from qlora_kernels.packed_ce.gather_scatter import scatter_rows

        return scatter_rows(grad_supervised, positions, factors, shape)
    out = grad_supervised.new_zeros(shape)
    step = 256
    for start in range(0, len(positions), step):
        part = slice(start, start + step)
        out[positions[part].long()] = (grad_supervised[part].to(factors.dtype) * factors[part, None]).to(out.dtype)
    return out


def document_sums(nll: Tensor, correct: Tensor, targets: Targets, path: str) -> Tensor:
    """Returns the sums of nll, positions and correct of each document, [n_documents, 3].

    They are added in the order of the positions.
    """
    if path == "triton":
        from qlora_kernels.packed_ce.gather_scatter import sum_documents

        return sum_documents(nll, correct, targets.documents, targets.n_documents)
    columns = torch.stack((nll, torch.ones_like(nll), correct.to(nll.dtype)), dim=1)
    return nll.new_zeros(targets.n_documents, 3).index_add_(0, targets.documents.long(), columns)
