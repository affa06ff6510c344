"""Bytes between the forward of the layers and their backward, from shapes alone: last norm, loss, rotation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from qlora_kernels.offload import LayerBytes
from qlora_kernels.packed_ce import HeadShape, backward_bytes, workspace_bytes

from qlora_sft.model.attention import head_size_of
from qlora_sft.model.loss import PathName, logit_transform

BATCH_BYTES = 2 * 8 + 4 * 4


def between_bytes(
    config: Any,
    tokens: int,
    dtype: torch.dtype,
    on_gpu: bool,
    lean_norms: bool = False,
    head: HeadShape | None = None,
    path: PathName | None = None,
) -> int:
    """For a row that is supervised throughout. ``config``: transformers' configuration of the language model.

    lean_norms: the last norm keeps its input in 16 bits. head: default: dense, in ``dtype``. path: of the loss;
    default: Triton on a GPU.
    """
    loss = loss_bytes(config, tokens, dtype, on_gpu, lean_norms, head, path)
    return loss + standing_bytes(config, tokens, dtype)


def standing_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Returns the bytes that are there during the whole step: the batch, and the cosines and sines of all layers.

    Of a batch: ids and positions in int64, and of every supervised position its number, label, weight and document.
    """
    return tokens * BATCH_BYTES + rotation_bytes(config, tokens, dtype)


def with_standing(layer: LayerBytes, standing: int) -> LayerBytes:
    """Returns ``layer`` with what is there during the whole step counted to its backward."""
    return replace(layer, backward=layer.backward + standing)


def loss_bytes(
    config: Any,
    tokens: int,
    dtype: torch.dtype,
    on_gpu: bool,
    lean_norms: bool = False,
    head: HeadShape | None = None,
    path: PathName | None = None,
) -> int:
    """The last norm's input (in float32) and its reciprocal root, the last hidden states, the gradient of the
    supervised rows; and what packed_ce says it needs, or after it the gradient of the hidden states with what the
    trained rows of the head need."""
    hidden, size = int(config.hidden_size), dtype.itemsize
    head = head or HeadShape(int(config.vocab_size), hidden, dtype)
    path = path or ("triton" if on_gpu else "torch")
    norm = (size if lean_norms else 4) * hidden + 4
    kept = tokens * (norm + 2 * hidden * size)
    device = torch.device("cuda" if on_gpu else "cpu")
    forward = workspace_bytes(head, tokens, dtype, path, device, capped="softcap" in logit_transform(config))
    return kept + max(tokens * hidden * size + backward_bytes(head, tokens), forward)


def rotation_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Cosines and sines, one pair for all layers; none without attention."""
    return 2 * tokens * head_size_of(config) * dtype.itemsize
