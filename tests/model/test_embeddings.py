"""An input embedding in host memory changes nothing but where it lies."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from qlora_sft.config import load_config
from qlora_sft.errors import ConfigError
from qlora_sft.model.embeddings import use_host_embedding
from qlora_sft.plan.blueprint import blueprint_of
from qlora_sft.plan.weights import residents

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def build(tied: bool = False, kind: Any = LlamaConfig) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(kind(**SHAPE, tie_word_embeddings=tied))
    return get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))


def loss_and_gradients(model: Any) -> list[torch.Tensor]:
    model.train()
    model.zero_grad()
    ids = torch.arange(40).reshape(2, 20) % 97
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_loss_and_gradients_are_the_same_bits(checkpointed: bool) -> None:
    model = build()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    before = loss_and_gradients(model)
    keys = {name for name in model.state_dict() if "lora" in name}
    assert "in host memory" in use_host_embedding(model)
    after = loss_and_gradients(model)
    assert len(before) == len(after) > 5
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any("embed_tokens" in name for name, _ in model.named_parameters())
    assert {name for name in model.state_dict() if "lora" in name} == keys


def test_what_cannot_be_moved_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="output head is its input embedding"):
        use_host_embedding(build(tied=True))
    with pytest.raises(ConfigError, match="Gemma3TextScaledWordEmbedding does more than look rows up"):
        use_host_embedding(build(kind=Gemma3TextConfig))
    trained = build()
    trained.get_base_model().get_input_embeddings().weight.requires_grad_()
    with pytest.raises(ConfigError, match="it is trained"):
        use_host_embedding(trained)


@pytest.mark.parametrize(("tied", "spared"), [(False, 97 * 32 * 2), (True, 0)])
def test_the_plan_takes_it_off_the_card(tied: bool, spared: int) -> None:
    settings = LlamaConfig(**SHAPE, tie_word_embeddings=tied)
    held = []
    for wanted in ("false", "true"):
        config = load_config("demo", [f"memory.offload_embeddings={wanted}"])
        held.append(residents(blueprint_of(settings, config), config, torch.bfloat16, "adamw_8bit", on_gpu=True))
    assert held[0].full - held[1].full == spared
    assert held[0].total - held[1].total == spared
