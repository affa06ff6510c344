"""Keeps the input embedding in host memory (`memory.offload_embeddings`).

It is frozen, and a batch needs only its own rows. A vocabulary of 128,256 tokens 4,096 wide takes 0.98 GiB of a card in
16 bits; its rows for 4,096 tokens take 32 MiB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_sft.errors import ConfigError
from qlora_sft.model.base import base_of

if TYPE_CHECKING:
    from qlora_sft.model.base import CausalModel


class HostEmbedding(torch.nn.Module):
    """Looks the rows up in host memory and copies them to ``device``.

    Asking a GPU for the token ids keeps the host waiting once per forward, before there is anything else to wait for.
    """

    def __init__(self, embedding: torch.nn.Embedding, device: torch.device):
        super().__init__()
        # Neither parameter nor buffer: nothing may move it back, and the model's device stays that of its layers.
        self.weight = embedding.weight.detach().cpu()
        if device.type == "cuda":
            self.weight = self.weight.pin_memory()
        self.num_embeddings, self.embedding_dim = self.weight.shape
        self.device = device

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids.cpu(), self.weight).to(self.device, non_blocking=True)


def use_host_embedding(model: CausalModel) -> str:
    """Moves the input embedding of ``model`` to host memory, and returns what was done, to print.

    Raises `ConfigError` where the rows are trained, scaled, or needed on the device as output head.
    """
    base = base_of(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        raise ConfigError(
            "memory.offload_embeddings: this model's output head is its input embedding, so it has to stay where it "
            "is; remove the setting"
        )
    if type(embedding) is not torch.nn.Embedding or embedding.weight.requires_grad:
        raise ConfigError(
            f"memory.offload_embeddings: {type(embedding).__name__} does more than look rows up (it is trained, or "
            "scales them); remove the setting"
        )
    host = HostEmbedding(embedding, base.device)
    # A hook of the embedding makes its result require a gradient, which checkpointed layers need; it moves along.
    host._forward_hooks.update(embedding._forward_hooks)
    base.set_input_embeddings(host)
    return f"in host memory ({host.weight.nbytes / 2**30:.2f} GiB, as configured)"
