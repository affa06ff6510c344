"""Saves tensors for the backward of a function that has not run yet.

`torch.utils.checkpoint` (non-reentrant) stops its recomputation as soon as the last tensor that the region saved is
there again. What a custom function saves counts only after its forward, so one that saves its own input is computed
in vain before the stop. `hold` saves first; the function that follows saves nothing, and reads `held_tensors`::

    held = hold(x, a, b)           recomputation stops here
    y = Work.apply(held, ...)      runs once in all; ctx.hold = held.grad_fn

Autograd frees what was held only after the backward of ``Work``, which comes first.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


class _Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, *others)
        ctx.count = len(others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return gradients[0], *(None,) * ctx.count


def hold(x: Tensor, *others: Tensor | None) -> Tensor:
    """Returns ``x`` itself, and saves all tensors. If any requires a gradient, so does the result."""
    return cast(Tensor, _Hold.apply(x, *others))


def held_tensors(node: Any) -> tuple[Any, ...]:
    """Returns what ``hold`` saved, given the ``grad_fn`` of its result.

    Read it once per backward: checkpointing insists.
    """
    return cast(tuple[Any, ...], node.saved_tensors)
