"""The loss as a differentiable function: what is kept for the backward pass, and what it costs.

Forward computes ``U[M, D] = d l_i / d hidden_i`` next to the losses; backward only scatters it, each row times its
own float32 factor. So row weights, ``reduction="none"`` and any scaling by the trainer cost nothing, and 1/n is
applied after the products, where float16 cannot underflow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.packed_ce import torch_path
from qlora_kernels.packed_ce.head import Head, PatchedHead
from qlora_kernels.packed_ce.options import Options
from qlora_kernels.packed_ce.patched import values_gradient
from qlora_kernels.packed_ce.problem import Problem, Result
from qlora_kernels.packed_ce.targets import Targets


@dataclass(frozen=True)
class Plan:
    """What the caller asked for. weighed_in_forward: the gradient of a trainable head is computed in the forward
    pass, with the row weights as the only factors; else in the backward pass, with whatever arrives there."""

    path: Literal["triton", "torch"]
    options: Options
    tile: int | None
    workspace_bytes: int | None
    weighed_in_forward: bool


def cross_entropy(
    hidden: Tensor, head: Head, bias: Tensor | None, targets: Targets, weights: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total = sum_i w_i * l_i, l [M], nll [M], hit [M]); total and l are differentiable."""
    dense = head if isinstance(head, Tensor) else None
    values = head.values if isinstance(head, PatchedHead) else None
    output: tuple[Tensor, Tensor, Tensor, Tensor] = _CrossEntropy.apply(
        hidden, dense, bias, weights, values, head, targets, plan
    )
    return output


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, dense: Tensor | None, bias: Tensor | None, weights: Tensor | None,
                values: Tensor | None, head: Head, targets: Targets, plan: Plan) -> Any:  # fmt: skip
        needs_hidden, needs_head, needs_bias = ctx.needs_input_grad[:3]
        trainable = needs_head or needs_bias
        scale = weights
        if weights is None and trainable:
            scale = hidden.new_ones(len(targets), dtype=torch.float32)
        now = plan.weighed_in_forward
        problem = Problem(hidden, head, bias, targets.rows, targets.ids, scale, plan.options,
                          needs_hidden, needs_head and now, needs_bias and now)  # fmt: skip
        result = solve(problem, plan)
        weighted = result.objective if weights is None else result.objective * weights.to(result.objective.dtype)
        total = weighted.sum()
        ctx.plan, ctx.shape, ctx.n_rows = plan, hidden.shape, len(targets)
        ctx.save_for_backward(result.unscaled, targets.rows, weights, result.head, result.bias, result.objective)
        # A trainable head under reduction="none" needs everything again.
        ctx.again = (problem, targets) if trainable and not now else None
        # Trained rows: few enough that their logits are simply formed again.
        ctx.patched = (problem, result.nll) if ctx.needs_input_grad[4] else None
        ctx.dtypes = tuple(t.dtype if t is not None else None for t in (dense, bias))
        ctx.mark_non_differentiable(result.nll, result.hit)
        ctx.set_materialize_grads(False)
        return (
            total,
            result.objective if result.objective is not result.nll else result.nll.clone(),
            result.nll,
            result.hit,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_rows: Tensor | None, *_: Any) -> Any:
        unscaled, rows, weights, head_gradient, bias_gradient, objective = ctx.saved_tensors
        factors = objective.new_zeros(ctx.n_rows) if grad_rows is None else grad_rows
        if grad_total is not None:
            factors = factors + (grad_total if weights is None else grad_total * weights.to(objective.dtype))
        if ctx.again is not None:
            problem, _targets = ctx.again
            _, needs_head, needs_bias = ctx.needs_input_grad[:3]
            again = replace(problem, weights=factors, need_hidden=False, need_head=needs_head, need_bias=needs_bias)
            result = solve(again, ctx.plan)
            head_gradient, bias_gradient = result.head, result.bias
        elif grad_total is not None:
            head_gradient, bias_gradient = (g if g is None else g * grad_total for g in (head_gradient, bias_gradient))
        grads = [
            g if g is None else g.to(dtype) for g, dtype in zip((head_gradient, bias_gradient), ctx.dtypes, strict=True)
        ]
        grad_hidden = None if unscaled is None else scatter(unscaled, rows, factors, ctx.shape, ctx.plan.path)
        grad_weights = None
        if ctx.needs_input_grad[3] and grad_total is not None:
            grad_weights = (grad_total * objective).float()
        grad_values = None
        if ctx.patched is not None:
            problem, nll = ctx.patched
            grad_values = values_gradient(problem, nll, factors).to(problem.head.values.dtype)
        return grad_hidden, grads[0], grads[1], grad_weights, grad_values, None, None, None


def solve(problem: Problem, plan: Plan) -> Result:
    if plan.path == "torch":
        return torch_path.run(problem, plan.tile)
    from qlora_kernels.packed_ce import triton_path

    return triton_path.run(problem, plan.tile, plan.workspace_bytes)


def scatter(unscaled: Tensor, rows: Tensor, factors: Tensor, shape: torch.Size, path: str) -> Tensor:
    """zeros [T, D] with ``unscaled_i * factors_i`` at ``rows_i``: scaled in float32, rounded once. The rows are
    distinct, so this is a copy and not a sum."""
    if path == "triton":
        from qlora_kernels.packed_ce.move import scatter_rows

        return scatter_rows(unscaled, rows, factors, shape)
    out = unscaled.new_zeros(shape)
    step = 256
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        out[rows[part].long()] = (unscaled[part].to(factors.dtype) * factors[part, None]).to(out.dtype)
    return out


def document_sums(nll: Tensor, hit: Tensor, targets: Targets, path: str) -> Tensor:
    """[n_documents, 3]: sum of nll, rows, hits of each document, added in the order of the rows."""
    if path == "triton":
        from qlora_kernels.packed_ce.move import sum_documents

        return sum_documents(nll, hit, targets.docs, targets.n_documents)
    columns = torch.stack((nll, torch.ones_like(nll), hit.to(nll.dtype)), dim=1)
    return nll.new_zeros(targets.n_documents, 3).index_add_(0, targets.docs.long(), columns)
