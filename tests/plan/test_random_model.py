"""Random weights take exactly the bytes that the plan states, and train."""

from copy import deepcopy

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config

from qlora_sft.config import load_config
from qlora_sft.data.batch import flatten
from qlora_sft.data.render import Rendered
from qlora_sft.model.loss import batch_loss
from qlora_sft.plan.blueprint import blueprint_of
from qlora_sft.plan.random_model import random_model
from qlora_sft.plan.weights import residents

SHAPE = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "settings",
    [
        LlamaConfig(**SHAPE, **HEADS, tie_word_embeddings=True),
        Qwen2Config(**SHAPE, **HEADS),
        Gemma3TextConfig(**SHAPE, **HEADS, head_dim=16),
    ],
)
def test_its_bytes_are_planned_and_its_gradients_are_finite(settings: object) -> None:
    config = load_config("demo", ["lora.r=4"])
    model = random_model(deepcopy(settings), config, torch.bfloat16, torch.device("cpu"))
    held = residents(blueprint_of(deepcopy(settings), config), config, torch.bfloat16, "adamw_torch")
    frozen = [p for p in model.parameters() if not p.requires_grad]
    states = [p.quant_state for p in frozen if getattr(p, "quant_state", None) is not None]
    beside = sum(
        t.nbytes for s in states for t in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)
    )  # fmt: skip
    assert sum(p.nbytes for p in frozen) + beside == held.nf4 + held.full
    adapters = {type(layer).__name__ for layer in model.modules() if hasattr(layer, "lora_A")}
    assert adapters == {"Linear4bit"}  # as in a loaded model; PEFT's plain layer casts its inputs to float32
    loss = batch_loss(model, flatten([Rendered(list(range(20)), [1.0] * 20, "s")])).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)
