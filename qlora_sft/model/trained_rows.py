"""Looks the rows of added tokens up beside the frozen input embedding.

PEFT puts them into a copy of the whole embedding at the begin of every forward and forms a gradient as large at the end
of the backward: 0.98 GiB each for 128,256 tokens 4,096 wide, in 16 bits, in which it also sums what the tokens of a
sequence contribute. Here a token that is trained gets its row, every other one the embedding's, and only k rows have a
gradient.

Import this module only after the backend is chosen: it imports peft.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor

from qlora_sft.model.base import base_of

if TYPE_CHECKING:
    from qlora_sft.model.base import CausalModel


class RowsBesideEmbedding(TrainableTokensLayer):  # type: ignore[misc]
    """Replaces PEFT's layer: it has the very same parameters under the same names, and another forward."""

    def __init__(self, layer: TrainableTokensLayer):
        super().__init__(layer.base_layer, layer.active_adapters[0])
        # An output head that is tied to the embedding reads them from these same containers.
        self.trainable_tokens_delta = layer.trainable_tokens_delta
        self.trainable_tokens_original = layer.trainable_tokens_original
        self.token_indices = layer.token_indices

    def forward_adapters(self, x: Tensor, active_adapters: list[str], *args: object, **kwargs: object) -> Tensor:
        """Returns the embeddings of ``x``: a trained row where there is one, else the frozen one."""
        if self.disable_adapters or self.merged or len(active_adapters) != 1:
            result: Tensor = super().forward_adapters(x, active_adapters, *args, **kwargs)
            return result
        name = active_adapters[0]
        frozen: Tensor = self.base_layer(x)  # scaled by the layer itself, where it scales
        ids = torch.tensor(self.token_indices[name], device=x.device)
        places = x[..., None] == ids
        # Rounded to the embedding's type as PEFT rounds them.
        rows = F.embedding(places.int().argmax(-1), self.trainable_tokens_delta[name]).to(frozen.dtype)
        scale = self._get_embed_scale()
        if scale is not None:
            rows = rows * scale.to(rows.dtype)
        return torch.where(places.any(-1, keepdim=True), rows, frozen)


def use_rows_beside_embedding(model: CausalModel) -> bool:
    """Replaces PEFT's layer in the input embedding of ``model``. Returns False if none of its rows are trained."""
    embedding = base_of(model).get_input_embeddings()
    layer: Any = getattr(embedding, "token_adapter", None)
    if type(layer) is not TrainableTokensLayer or len(layer.active_adapters) != 1:
        return False
    embedding.token_adapter = RowsBesideEmbedding(layer)
    return True
