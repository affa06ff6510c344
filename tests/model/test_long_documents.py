"""What changes in long texts changes with a document's own length, as small thresholds show on short ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from qlora_sft.model.attention import plain_attention
from qlora_sft.model.attention_check import LENGTHS, packed_against_separate, some_ids, use_checked_attention
from qlora_sft.model.hidden import alone, one_at_a_time

SHORT, LONG = [1.0] * 8, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": SHORT, "long_factor": LONG}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 8,
        "llama_4_scaling_beta": 0.5}  # fmt: skip
# Family -> settings with thresholds that the documents of the check reach, and the same that none reaches.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama4_text": ({"floor_scale": 4, "attn_scale": 0.5}, {"floor_scale": 8192, "attn_scale": 0.5}),
    "ministral3": ({"rope_parameters": YARN}, {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.0}}),
    "phi3": (
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
        {"rope_parameters": {**LONGROPE, "long_factor": SHORT}, "original_max_position_embeddings": 16},
    ),
    "qwen2_moe": ({"use_sliding_window": True, "max_window_layers": 4}, {}),
    "exaone4": ({"sliding_window_pattern": 2}, {"layer_types": ["full_attention"] * 4}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_packed_document_is_what_it_is_alone(kind: str) -> None:
    reached, beyond = FAMILIES[kind]
    model = tiny_model(kind, **reached)
    use_checked_attention(model, torch.float32, lambda _: None)
    assert not one_at_a_time(model)
    assert packed_against_separate(model, torch.float32) < 1e-5
    other = tiny_model(kind, **beyond)
    ids = some_ids(model, LENGTHS)[None, -LENGTHS[-1] :]
    with torch.no_grad(), plain_attention(model):
        found, without = (alone(each.eval(), ids) for each in (model, other))
    assert (found - without).norm() > 1e-2 * found.norm()  # or the equality above would show nothing
