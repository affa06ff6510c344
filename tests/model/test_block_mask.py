"""The block mask from document bounds is torch's own, that of a tree hides nothing, and both take what is counted."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import Gemma2Config, LlamaConfig
from trees import paths, trees

from qlora_sft.model.attention_capped import visible_in, whole_blocks
from qlora_sft.model.attention_tree import Tree, remember_tree
from qlora_sft.model.block_mask import BLOCK, WITH_SINKS, block_mask_bytes, block_mask_of, reach_of

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
    reach = reach_of(bounds, whole)
    visible = visible_in(reach, window)
    ours = block_mask_of(reach, window, visible)
    torchs = create_block_mask(visible, None, None, whole, whole, device="cpu")
    assert (ours.seq_lengths, ours.BLOCK_SIZE) == (torchs.seq_lengths, torchs.BLOCK_SIZE)
    for name in TENSORS:
        assert torch.equal(getattr(ours, name), getattr(torchs, name)), name
        assert getattr(ours, name).dtype == getattr(torchs, name).dtype


@settings(max_examples=30, deadline=None)
@given(tree=trees(300), window=st.one_of(st.none(), st.integers(1, 600), st.sampled_from([1, 128, 129])))
def test_a_tree_is_seen_along_its_rows_and_nowhere_else(tree: Tree, window: int | None) -> None:
    total = tree.bounds[-1]
    bounds = torch.tensor(tree.bounds, dtype=torch.int32)
    remember_tree(bounds, tree.lengths, tree.parents)
    whole = whole_blocks(total)
    reach = reach_of(bounds, whole)
    visible = visible_in(reach, window)
    each = torch.arange(whole)
    pairs = visible(None, None, each[:, None], each[None, :])
    for number, path in enumerate(paths(tree)):
        keys = torch.cat([torch.arange(tree.bounds[n], tree.bounds[n + 1]) for n in path])
        for place in (0, tree.lengths[number] - 1):  # the first and the last query of every segment
            before = len(keys) - tree.lengths[number] + place + 1
            right = torch.zeros(whole, dtype=torch.bool)
            right[keys[max(0, before - (window or whole)) : before]] = True
            assert torch.equal(pairs[tree.bounds[number] + place], right)
    # What is skipped is hidden, and what is taken whole is seen.
    mask = block_mask_of(reach, window, visible)
    blocks = whole // BLOCK
    by_block = pairs.view(blocks, BLOCK, blocks, BLOCK).transpose(1, 2)
    taken, all_of = _listed(mask.kv_num_blocks, mask.kv_indices), _listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not by_block[~(taken | all_of)].any()
    assert by_block[all_of].all()


def _listed(counts: Tensor, indices: Tensor) -> Tensor:
    """Returns bool [blocks, blocks]: which blocks of keys are in the list of a block of queries."""
    found = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, (count, listed) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
        found[row, listed[:count].long()] = True
    return found


@pytest.mark.parametrize("tokens", [1024, 32_768])
def test_its_bytes_are_counted(tokens: int) -> None:
    """Gemma 2 has one mask with a window and one without."""
    config = Gemma2Config(num_hidden_layers=2)
    reach = reach_of(torch.tensor([0, 100, tokens], dtype=torch.int32), tokens)
    masks = [block_mask_of(reach, window, visible_in(reach, window)) for window in (None, config.sliding_window)]
    held = sum(getattr(mask, name).nbytes for mask in masks for name in TENSORS)
    # Both know the ends, and the one with a window the places, too.
    assert block_mask_bytes(config, tokens) == held + 3 * 4 * tokens
    assert held < tokens * 128
    assert block_mask_bytes(LlamaConfig(), tokens) == 0


def test_every_family_with_sinks_is_known() -> None:
    """Of those that generate text, by the source of transformers: a plan has no model to look at."""
    folder = Path(transformers.__file__).parent / "models"
    sources = {path.parent.name: path.read_text(encoding="utf-8") for path in folder.glob("*/modeling_*.py")}
    found = {name for name, text in sources.items() if "s_aux=self.sinks" in text and "ForCausalLM" in text}
    # Some came with a later transformers than the oldest that is tested.
    assert found == WITH_SINKS & set(sources)
