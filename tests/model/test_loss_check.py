"""The logits of the loss are the model's own, or the run is refused; a scale that the whole model lacks is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from qlora_sft.errors import ConfigError
from qlora_sft.model.base import layer_list
from qlora_sft.model.loss_check import check_logits, difference_of, logits_of


def test_the_scale_of_a_language_model_that_the_whole_model_leaves_out_is_kept() -> None:
    model = tiny_model("cohere2_vision")
    said: list[str] = []
    check_logits(model, torch.float32, said.append)
    assert "leaves out the logit_scale of its language model (0.0625)" in said[0]
    own, ours, _ = logits_of(model, torch.float32)
    torch.testing.assert_close(ours, own * 0.0625)
    alone = tiny_model("cohere2")
    check_logits(alone, torch.float32, said.append)
    assert len(said) == 1


@pytest.mark.parametrize("kind", ["granite", "muse_glimmer"])
def test_scales_and_caps_behind_the_head_are_known(kind: str) -> None:
    own, ours, unscaled = logits_of(tiny_model(kind), torch.float32)
    assert difference_of(own, ours) < 1e-6
    if kind == "muse_glimmer":
        assert difference_of(own, unscaled) > 0.1


def test_a_head_that_does_more_is_refused() -> None:
    model = tiny_model("llama")
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        output.logits = output.logits + output.logits.roll(1, dims=-1)
        return output

    model.forward = forward
    with pytest.raises(ConfigError, match="does more behind its last hidden states"):
        check_logits(model, torch.float32)


def test_layers_that_texts_pass_by_are_named() -> None:
    with pytest.raises(ConfigError, match=r"MllamaCrossAttentionDecoderLayer.*name the language model"):
        layer_list(tiny_model("mllama"))
