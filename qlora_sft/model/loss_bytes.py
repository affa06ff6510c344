"""Bytes between the forward of the layers and their backward, from shapes alone: last norm, loss, rotation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from qlora_kernels.offload import LayerBytes
from qlora_kernels.packed_ce.tiled import block_shape, compute_dtype

BATCH_BYTES = 2 * 8 + 4 * 4


def between_bytes(
    config: Any, tokens: int, dtype: torch.dtype, on_gpu: bool, lean_norms: bool = False, head_in_4bit: bool = False
) -> int:
    """For a row that is supervised throughout. ``config``: transformers' configuration of the language model.

    lean_norms: the last norm keeps its input in 16 bits.
    """
    loss = loss_bytes(config, tokens, dtype, on_gpu, lean_norms, head_in_4bit)
    return loss + standing_bytes(config, tokens, dtype)


def standing_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that are there during the whole step: the batch, and the cosines and sines of all layers.

    Of a batch: ids and positions in int64, and of every supervised position its number, label, weight and document.
    """
    return tokens * BATCH_BYTES + rotation_bytes(config, tokens, dtype)


def with_standing(layer: LayerBytes, standing: int) -> LayerBytes:
    """Returns ``layer`` with what is there during the whole step counted to its backward."""
    return replace(layer, backward=layer.backward + standing)


def loss_bytes(
    config: Any, tokens: int, dtype: torch.dtype, on_gpu: bool, lean_norms: bool = False, head_in_4bit: bool = False
) -> int:
    """The last norm's input (in float32) and its reciprocal root, the last hidden states, the gradient of the
    supervised rows; and packed_ce's workspace by its own rule, or after it the gradient of the hidden states."""
    hidden, size = int(config.hidden_size), dtype.itemsize
    norm = (size if lean_norms else 4) * hidden + 4
    kept = tokens * (norm + 2 * hidden * size)
    workspace = _workspace(hidden, int(config.vocab_size), tokens, dtype, on_gpu, head_in_4bit)
    return kept + max(tokens * hidden * size, workspace)


def rotation_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Cosines and sines, one pair for all layers."""
    size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return 2 * tokens * size * dtype.itemsize


def _workspace(hidden: int, vocabulary: int, tokens: int, dtype: torch.dtype, on_gpu: bool, head_in_4bit: bool) -> int:
    if on_gpu:
        from qlora_kernels.packed_ce.fused import FEWEST_ROWS, TILE, WORKSPACE_BYTES, padded

        if not head_in_4bit and WORKSPACE_BYTES // (4 * padded(vocabulary)) >= FEWEST_ROWS:
            return min(WORKSPACE_BYTES, 4 * padded(vocabulary) * tokens)
        # Tiles of the vocabulary: their logits, and for each row of a group its state, its target's and a float32 sum.
        rows = min(tokens, WORKSPACE_BYTES // (4 * padded(TILE)))
        logits = rows * (4 * padded(TILE) + 4 * hidden + 2 * hidden * dtype.itemsize)
        return logits + (_tile_of_head(hidden, vocabulary, TILE, dtype, True) if head_in_4bit else 0)
    # The supervised rows, gathered, their float32 sums, and a tile of logits, in bfloat16 a second time; and a tile of
    # the head where it is not multiplied as it is stored.
    product = compute_dtype(dtype, dtype, torch.device("cpu"))
    block, tile = block_shape(hidden, product)
    logits = min(block, tokens) * tile * (4 if product == torch.float32 else 4 + product.itemsize)
    head = _tile_of_head(hidden, vocabulary, tile, product, head_in_4bit) if head_in_4bit or product != dtype else 0
    return tokens * (4 + product.itemsize) * hidden + logits + head


def _tile_of_head(hidden: int, vocabulary: int, tile: int, dtype: torch.dtype, in_4bit: bool) -> int:
    """A tile of the head in full, and an NF4 head's scales in float32, one for 64 weights."""
    scales = vocabulary * hidden // 64 * 4 if in_4bit else 0
    return scales + min(tile, vocabulary) * hidden * dtype.itemsize
