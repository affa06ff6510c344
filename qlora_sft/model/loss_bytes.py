"""Bytes between the forward of the layers and their backward, from shapes alone: last norm, loss, rotation."""

from __future__ import annotations

from typing import Any

import torch
from qlora_kernels.packed_ce.tiled import block_shape


def between_bytes(config: Any, tokens: int, dtype: torch.dtype, on_gpu: bool, lean_norms: bool = False) -> int:
    """For a row that is supervised throughout. ``config``: transformers' configuration of the language model.

    lean_norms: the last norm keeps its input in 16 bits.
    """
    return loss_bytes(config, tokens, dtype, on_gpu, lean_norms) + rotation_bytes(config, tokens, dtype)


def loss_bytes(config: Any, tokens: int, dtype: torch.dtype, on_gpu: bool, lean_norms: bool = False) -> int:
    """The last norm's input (in float32) and its reciprocal root, the last hidden states, the gradient of the
    supervised rows; and packed_ce's workspace by its own rule, or after it the gradient of the hidden states."""
    hidden, size = int(config.hidden_size), dtype.itemsize
    norm = (size if lean_norms else 4) * hidden + 4
    kept = tokens * (norm + 2 * hidden * size)
    return kept + max(tokens * hidden * size, _workspace(hidden, int(config.vocab_size), tokens, dtype, on_gpu))


def rotation_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Cosines and sines, one pair for all layers."""
    size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return 2 * tokens * size * dtype.itemsize


def _workspace(hidden: int, vocabulary: int, tokens: int, dtype: torch.dtype, on_gpu: bool) -> int:
    if on_gpu:
        from qlora_kernels.packed_ce.fused import FEWEST_ROWS, TILE, WORKSPACE_BYTES, padded

        if WORKSPACE_BYTES // (4 * padded(vocabulary)) >= FEWEST_ROWS:
            return min(WORKSPACE_BYTES, 4 * padded(vocabulary) * tokens)
        # Tiles of the vocabulary: their logits, and a float32 sum for each row of a group.
        rows = min(tokens, WORKSPACE_BYTES // (4 * padded(TILE)))
        return rows * (4 * padded(TILE) + 4 * hidden + hidden * dtype.itemsize)
    block, tile = block_shape(hidden)
    # The supervised rows, gathered, their float32 sums, and a tile of logits, in 16 bits a second time.
    logits = min(block, tokens) * tile
    return tokens * (4 + dtype.itemsize) * hidden + logits * (4 if dtype.itemsize == 4 else 4 + dtype.itemsize)
