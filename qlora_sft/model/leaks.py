"""Finds out whether a token's hidden state depends on anything but the tokens up to it in its own document.

The gradient tells: it is exactly zero where there is no way from one token to another. A comparison of results
has to allow for rounding, and a leak may be smaller than that: a short convolution with small weights changes the
hidden states of a tiny model by less than a thousandth.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qlora_sft.model.base import base_of

if TYPE_CHECKING:
    from qlora_sft.model.base import CausalModel


def leak(
    model: CausalModel, run: Callable[[Tensor, tuple[int, ...]], Tensor], ids: Tensor, lengths: tuple[int, ...]
) -> str:
    """Says what the first half of the last packed document depends on and must not; "" if there is nothing.

    run: (ids [T], lengths) -> hidden states [T, D] of ``model``, with their graph.
    """
    start = sum(lengths[:-1])
    end = start + (lengths[-1] + 1) // 2
    embedded: list[Tensor] = []

    def remember(module: nn.Module, args: object, result: Tensor) -> Tensor:
        # A frozen embedding's result is no part of a graph, and one that PEFT has made a leaf may be in use elsewhere.
        embedded.append(result.detach().requires_grad_())
        return embedded[-1]

    hook = base_of(model).get_input_embeddings().register_forward_hook(remember)
    try:
        with torch.enable_grad():
            hidden = run(ids, lengths)
    finally:
        hook.remove()
    if len(embedded) != 1:
        return f"its embedding is looked up {len(embedded)} times in a forward, so what sees what cannot be told"
    # Another weight for every value: a sum over what a norm has divided by its own size would hide a part.
    weights = torch.rand(hidden[start:end].shape, generator=torch.Generator().manual_seed(0)) + 0.5
    asked = (hidden[start:end] * weights.to(hidden)).sum()
    (gradient,) = torch.autograd.grad(asked, embedded, allow_unused=True)
    if gradient is None:
        return "its hidden states do not depend on its embedding"
    reached = gradient.reshape(sum(lengths), -1).ne(0).any(dim=1).tolist()
    if any(reached[:start]):
        first = reached.index(True)
        document = next(i for i, bound in enumerate(accumulate(lengths)) if first < bound)
        return f"packed document {len(lengths)} depends on document {document + 1}"
    if any(reached[end:]):
        return "a token depends on those that follow it"
    return ""
