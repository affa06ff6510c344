"""What llama.cpp makes of an adapter, alpha / r times B A for every layer, is what PEFT makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_sft.errors import RunError
from qlora_sft.export.plain_lora import require_plain, write_plain_lora

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ranks": {"rank_pattern": {"down_proj": 3}},
    "rslora": {"use_rslora": True},
    "rslora and ranks": {"use_rslora": True, "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    "alphas": {"alpha_pattern": {"q_proj": 5}},
}


def saved(folder: Path, **form: Any) -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    )
    lora = LoraConfig(r=8, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **form)
    model = get_peft_model(base, lora)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_every_layer_keeps_its_scale(tmp_path: Path, form: str) -> None:
    model = saved(tmp_path / "adapter", **FORMS[form])
    folder = write_plain_lora(tmp_path / "adapter", tmp_path / "plain")
    assert (folder.name == "adapter") == (form in ("plain", "ranks"))
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    if form == "rslora":
        assert config["lora_alpha"] == pytest.approx(12 * 8**0.5)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert len(layers) == 4
    for name, layer in layers.items():
        A, B = (tensors[f"{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(config["lora_alpha"] / len(A) * B @ A, layer.get_delta_weight("default"))


def test_magnitudes_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "adapter", use_dora=True)
    with pytest.raises(RunError, match=r"llama\.cpp's adapters have no magnitudes"):
        require_plain(tmp_path / "adapter")
