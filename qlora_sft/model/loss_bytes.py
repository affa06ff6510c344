"""Counts the bytes between the forward of the layers and their backward, from shapes alone.

They are those of the last norm, of the loss and of the rotation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from qlora_kernels.offload import LayerBytes
from qlora_kernels.packed_ce import HeadShape, PathName, backward_bytes, workspace_bytes

from qlora_sft.model.attention import head_size_of
from qlora_sft.model.loss import logit_transform

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BATCH_BYTES = 2 * 8 + 4 * 4


def between_bytes(
    config: PretrainedConfig,
    tokens: int,
    dtype: torch.dtype,
    on_gpu: bool,
    lean_norms: bool = False,
    head: HeadShape | None = None,
    path: PathName | None = None,
) -> int:
    """Returns the bytes between forward and backward for a sequence that is supervised throughout.

    config: transformers' configuration of the language model. lean_norms: whether the last norm keeps its input in 16
    bits. head: by default dense, in ``dtype``. path: the implementation of the loss; by default Triton on a GPU.
    """
    loss = loss_bytes(config, tokens, dtype, on_gpu, lean_norms, head, path)
    return loss + persistent_bytes(config, tokens, dtype)


def persistent_bytes(config: PretrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Returns the bytes that are there during the whole step: the batch, and the cosines and sines of all layers.

    A batch has ids and positions in int64, and the number, label, weight and document of every supervised position.
    """
    return tokens * BATCH_BYTES + rotation_bytes(config, tokens, dtype)


def with_persistent(layer: LayerBytes, persistent: int) -> LayerBytes:
    """Returns ``layer`` with what is there during the whole step counted to its backward."""
    return replace(layer, backward=layer.backward + persistent)


def loss_bytes(
    config: PretrainedConfig,
    tokens: int,
    dtype: torch.dtype,
    on_gpu: bool,
    lean_norms: bool = False,
    head: HeadShape | None = None,
    path: PathName | None = None,
) -> int:
    """Returns the most bytes that last norm and loss take.

    They are the last norm's input (in float32) and its reciprocal root, the last hidden states, and the gradient of the
    supervised positions. To them comes what packed_ce says it needs or, after it, the gradient of the hidden states
    with what the trained rows of the head need.
    """
    hidden, size = int(config.hidden_size), dtype.itemsize
    head = head or HeadShape(int(config.vocab_size), hidden, dtype)
    path = path or ("triton" if on_gpu else "torch")
    norm = (size if lean_norms else 4) * hidden + 4
    kept = tokens * (norm + 2 * hidden * size)
    device = torch.device("cuda" if on_gpu else "cpu")
    forward = workspace_bytes(head, tokens, dtype, path, device, capped="softcap" in logit_transform(config))
    return kept + max(tokens * hidden * size + backward_bytes(head, tokens), forward)


def rotation_bytes(config: PretrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Returns the bytes of the cosines and sines, one pair for all layers; none without attention."""
    return 2 * tokens * head_size_of(config) * dtype.itemsize
