"""The MLPs of real model classes, replaced by tiled ones: same results, same names, same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora_sft.errors import ConfigError
from qlora_sft.model.mlp import TiledMLP, use_tiled_mlp

TARGETS = ["q_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES = {
    "llama": ("LlamaConfig", {"mlp_bias": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {}),
    "smollm3": ("SmolLM3Config", {}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16}),
}


def build(family: str = "llama", *, dtype: torch.dtype = torch.float32, checkpointed: bool = False, **lora: Any) -> Any:
    """A PEFT model of two layers in training mode, no LoRA factor zero."""
    import transformers
    from peft import LoraConfig, get_peft_model

    name, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(
        vocab_size=97, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, **options,
    )  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False)
    if checkpointed:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    settings: dict[str, Any] = {"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | lora
    model = get_peft_model(base, LoraConfig(**settings))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def blocks_of(model: Any) -> Any:
    return model.get_base_model().get_decoder().layers


IDS = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(0))


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """(logits, gradients by parameter)"""
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[0, :-1].float(), IDS[0, 1:]).backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def tile_of(model: Any, tile: int) -> None:
    for block in blocks_of(model):
        assert isinstance(block.mlp, TiledMLP)
        block.mlp.tile = tile


@pytest.mark.parametrize("tokens", [40, 5000], ids=["short rows", "long rows"])
@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits_and_gradients(family: str, checkpointed: bool, tokens: int) -> None:
    model = build(family, checkpointed=checkpointed)
    logits, wanted = step(model)
    assert use_tiled_mlp(model, "on", tokens).startswith("on, 1,024 tokens at a time")
    tile_of(model, 17)
    found_logits, found = step(model)
    torch.testing.assert_close(found_logits, logits, rtol=1e-4, atol=1e-4)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


def test_adapters_are_saved_and_loaded_under_the_same_names(tmp_path: Path) -> None:
    from peft import PeftModel

    plain, model = build(), build()
    use_tiled_mlp(model, "on", 40)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "tiled")
    one, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", "tiled"))
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    fresh = build()
    base = fresh.unload()
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "tiled"))
    with torch.no_grad():
        wanted = model.eval()(input_ids=IDS).logits
        torch.testing.assert_close(loaded.eval()(input_ids=IDS).logits, wanted)


def test_merging_disabling_and_generating_still_work() -> None:
    plain, model = build(), build()
    use_tiled_mlp(model, "on", 40)
    tile_of(model, 8)  # rows are longer than a tile, so that evaluation is tiled as well
    prompt = IDS[:, :9]
    for each in (plain, model):
        each.eval()
    with torch.no_grad():
        one, other = (m(input_ids=IDS).logits for m in (plain, model))
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
        with plain.disable_adapter(), model.disable_adapter():
            without, other = (m(input_ids=IDS).logits for m in (plain, model))
        torch.testing.assert_close(other, without, rtol=1e-4, atol=1e-4)
        assert (one - without).abs().max() > 0.1
        answers = [m.generate(input_ids=prompt, max_new_tokens=8, do_sample=False) for m in (plain, model)]
        assert torch.equal(*answers)
        merged = model.merge_and_unload()(input_ids=IDS).logits
    torch.testing.assert_close(merged, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lora_dropout": 0.1}, "LoRA dropout 0.1"),
        ({"use_dora": True}, "Dora adapters"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_what_has_no_formula_is_named(change: dict[str, Any], reason: str) -> None:
    model = build(**change)
    before = [block.mlp for block in blocks_of(model)]
    model.eval()  # as it is loaded; it is training that counts
    assert use_tiled_mlp(model, "auto", 5000) == f"off ({reason})"
    with pytest.raises(ConfigError, match=f"tiled_mlp: on is not possible here: {reason}"):
        use_tiled_mlp(model, "on", 40)
    assert [block.mlp for block in blocks_of(model)] == before


def test_rank_stabilised_lora_is_a_scale() -> None:
    model = build(use_rslora=True, lora_alpha=6)
    _, wanted = step(model)
    use_tiled_mlp(model, "on", 40)
    _, found = step(model)
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


def test_a_layer_without_adapter_is_only_frozen() -> None:
    model = build(target_modules=["up_proj", "q_proj"])
    _, wanted = step(model)
    use_tiled_mlp(model, "on", 40)
    _, found = step(model)
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


def test_other_families_are_left_alone() -> None:
    import transformers

    config = transformers.Phi3Config(
        vocab_size=97, hidden_size=64, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert use_tiled_mlp(model, "auto", 5000) == "off (no formula here for Phi3MLP)"


def test_a_second_adapter_falls_back_to_peft() -> None:
    from peft import LoraConfig

    plain, model = build(), build()
    use_tiled_mlp(model, "on", 40)
    for each in (plain, model):
        torch.manual_seed(1)
        each.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
        each.base_model.set_adapter(["default", "second"])
    (one, wanted), (other, found) = step(plain), step(model)
    assert torch.equal(one, other)
    for name, gradient in found.items():
        assert torch.equal(gradient, wanted[name])


def test_the_choice_and_its_reason() -> None:
    assert use_tiled_mlp(build(), "off", 5000) == "off (as configured)"
    model = build()
    assert use_tiled_mlp(model, "auto", 5000) == "on, 1,024 tokens at a time (its formula is known)"
    assert use_tiled_mlp(model, "auto", 100) == "off (its MLPs are tiled already)"


@pytest.mark.parametrize(
    ("family", "checkpointed", "tokens", "recompute"),
    [
        ("llama", False, 5000, False),
        ("llama", True, 100, True),
        # Gemma 2 normalises what the MLP returns.
        ("gemma2", True, 100, False),
        ("gemma2", True, 5000, True),
    ],
)
def test_gate_and_up_are_computed_again_where_that_saves(
    family: str, checkpointed: bool, tokens: int, recompute: bool
) -> None:
    model = build(family, checkpointed=checkpointed)
    use_tiled_mlp(model, "on", tokens)
    assert {block.mlp.recompute for block in model.get_decoder().layers} == {recompute}
