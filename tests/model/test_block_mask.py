"""The block mask from document bounds is torch's own, and takes the bytes that are counted for it."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from transformers import Gemma2Config, LlamaConfig

from qlora_sft.model.attention_capped import visible_in, whole_blocks
from qlora_sft.model.block_mask import block_mask_bytes, block_mask_of, documents_of

TENSORS = (
    "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
    "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices",
)  # fmt: skip
# Lengths around the edges of blocks, where a rule that is off by one shows.
length = st.one_of(st.integers(1, 400), st.sampled_from([1, 127, 128, 129, 255, 256, 257, 384]))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(length, min_size=1, max_size=6),
    window=st.one_of(st.none(), st.integers(1, 600), st.sampled_from([1, 2, 127, 128, 129, 255, 256, 257])),
)
def test_it_is_what_torch_makes_of_every_pair(lengths: list[int], window: int | None) -> None:
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    whole = whole_blocks(sum(lengths))
    document = documents_of(bounds, whole)
    visible = visible_in(document, window)
    ours = block_mask_of(document, window, visible)
    torchs = create_block_mask(visible, None, None, whole, whole, device="cpu")
    assert (ours.seq_lengths, ours.BLOCK_SIZE) == (torchs.seq_lengths, torchs.BLOCK_SIZE)
    for name in TENSORS:
        assert torch.equal(getattr(ours, name), getattr(torchs, name)), name
        assert getattr(ours, name).dtype == getattr(torchs, name).dtype


@pytest.mark.parametrize("tokens", [1024, 32_768])
def test_its_bytes_are_counted(tokens: int) -> None:
    """Gemma 2 has one mask with a window and one without."""
    config = Gemma2Config(num_hidden_layers=2)
    document = documents_of(torch.tensor([0, 100, tokens], dtype=torch.int32), tokens)
    masks = [block_mask_of(document, window, visible_in(document, window)) for window in (None, config.sliding_window)]
    held = sum(getattr(mask, name).nbytes for mask in masks for name in TENSORS)
    assert block_mask_bytes(config, tokens) == held + 2 * document.nbytes
    assert held < tokens * 128
    assert block_mask_bytes(LlamaConfig(), tokens) == 0
