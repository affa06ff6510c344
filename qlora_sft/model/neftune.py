"""Adds noise to the embeddings in training (NEFTune), by the length of each document and not by that of its row.

Every value of a document of L tokens, D wide, gets a number drawn evenly from -m to m, with m = alpha / sqrt(L D). The
numbers come from torch's own generator, whose state checkpoints hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qlora_sft.model.base import base_of

if TYPE_CHECKING:
    from qlora_sft.model.base import CausalModel


class EmbeddingNoise:
    """Adds noise to what the input embedding of a model returns, inside `over` and nowhere else."""

    def __init__(self, model: CausalModel, alpha: float):
        self.alpha = alpha
        self._left: list[int] | None = None
        base_of(model).get_input_embeddings().register_forward_hook(self._add)

    @contextmanager
    def over(self, lengths: Sequence[int]) -> Iterator[None]:
        """Adds noise to the embeddings of packed documents of these lengths, which may be run at once or one by one.

        Raises `RuntimeError` if others were embedded.
        """
        self._left = list(lengths)
        try:
            yield
            if self._left:
                raise RuntimeError(f"{len(self._left)} documents were embedded without noise; training.neftune_alpha")
        finally:
            self._left = None

    def _add(self, module: nn.Module, args: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        if self._left is None:
            return embedded
        here: list[int] = []
        while self._left and sum(here) < embedded.shape[-2]:
            here.append(self._left.pop(0))
        if sum(here) != embedded.shape[-2] or embedded.numel() != sum(here) * embedded.shape[-1]:
            raise RuntimeError(f"{embedded.shape[-2]} tokens were embedded that are no whole documents")
        lengths = torch.tensor(here, device=embedded.device)
        most = self.alpha / (lengths * embedded.shape[-1]).float().sqrt()
        noise = torch.empty(embedded.shape, device=embedded.device).uniform_(-1, 1)
        return embedded + (noise * most.repeat_interleave(lengths)[:, None]).to(embedded.dtype)
