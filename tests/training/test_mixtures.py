"""Mixtures of experts from configuration to merged model: trained in NF4 with adapters on every expert, or on none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import configured
from moe_bases import settings_of, write_base
from safetensors.torch import load_file
from tests_support import result
from transformers import AutoModelForCausalLM

from qlora_sft.config import Config
from qlora_sft.data.batch import flatten
from qlora_sft.data.render import Rendered
from qlora_sft.errors import ConfigError
from qlora_sft.export.merge import merge_run
from qlora_sft.export.parity import check_parity
from qlora_sft.model.attention import use_document_attention
from qlora_sft.model.backend import choose_backend
from qlora_sft.model.base_check import check_quantization
from qlora_sft.model.loss import batch_loss
from qlora_sft.model.meta_model import check_layers
from qlora_sft.prepare import why_not_unsloth
from qlora_sft.train import train

SETTINGS = (
    "model.chat_template=chatml", "model.load_in_4bit=true", "training.learning_rate=1e-2", "lora.r=4",
    "training.max_steps=3", "data.packing=none",
)  # fmt: skip


def config_for(folder: Path, family: str, tokenizer: Any, *overrides: str) -> Config:
    base = write_base(folder / "base", family, tokenizer=tokenizer)
    return configured(folder, base)(*SETTINGS, f"output={folder / 'run'}", *overrides)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "granite_moe"])
def test_a_trained_mixture_is_the_model_that_is_merged(family: str, tmp_path: Path, small_tokenizer: Any) -> None:
    config = config_for(tmp_path, family, small_tokenizer, "data.packing=bfd")
    said: list[str] = []
    report = train(config, say=said.append)
    line = next(line for line in said if line.startswith("experts: "))
    assert "in NF4" in line
    assert "trainable parameters; routers in full and frozen; load-balance loss: none" in line
    assert any(line.startswith("attention check: ") for line in said)
    assert report.train_loss.last < report.train_loss.first
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(bool(t.any()) for name, t in adapter.items() if ".experts." in name)
    assert sum(".experts." in name for name in adapter) >= 4
    written = merge_run(tmp_path / "run", onto="nf4-dequantized")
    figures = check_parity(tmp_path / "run", Path(written.merged))["merged"]
    assert figures.kl <= 1e-6
    stored = {name for file in (tmp_path / "base").glob("*.safetensors") for name in load_file(file)}
    merged = load_file(tmp_path / "run" / "merged" / "model.safetensors")
    assert set(merged) == stored
    other = merge_run(tmp_path / "run", tmp_path / "other", onto="bf16")
    assert other.modules == written.modules


@pytest.mark.parametrize("experts", ["train", "frozen"])
def test_a_run_goes_on_from_the_adapter_of_a_mixture(experts: str, tmp_path: Path, small_tokenizer: Any) -> None:
    """Of one with stacks, shared experts and a dense layer, whose names are those of experts too."""
    config = config_for(tmp_path, "deepseek_v3", small_tokenizer, f"lora.experts={experts}", "evaluation.loss=false")
    train(config, say=lambda _: None)
    first = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    still = [*SETTINGS[:2], "data.packing=none", "training.max_steps=1", "training.learning_rate=1e-10"]
    still += [f"lora.from={tmp_path / 'run'}", f"output={tmp_path / 'next'}", "evaluation.loss=false"]
    again = configured(tmp_path, tmp_path / "base")(*still)
    assert (again.lora.experts, again.lora.r) == (experts, 4)
    train(again, say=lambda _: None)
    after = load_file(tmp_path / "next" / "adapter" / "adapter_model.safetensors")
    assert after.keys() == first.keys()
    assert any(".experts." in name for name in after) == (experts == "train")
    for name, tensor in first.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-8)


def test_every_tier_trains_the_same_adapter(tmp_path: Path, small_tokenizer: Any) -> None:
    adapters = []
    for policy in ("none", "checkpoint", "offload"):
        config = config_for(tmp_path, "qwen3_moe", small_tokenizer, f"memory.policy={policy}", "evaluation.loss=false")
        train(config, say=lambda _: None, overwrite=True)
        adapters.append(load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors"))
    for other in adapters[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in adapters[0].items())


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_run_goes_on_to_the_same_adapter(family: str, tmp_path: Path, small_tokenizer: Any) -> None:
    config = config_for(tmp_path, family, small_tokenizer, "training.save_steps=1", "training.save_total_limit=9")
    train(config, say=lambda _: None)
    run = tmp_path / "run"
    whole = result(run)
    for name in ("manifest.json", "adapter", "checkpoints/step-000002", "checkpoints/step-000003"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    assert train(config, say=lambda _: None, resume=True).resumed_at == 1
    assert result(run) == whole


def test_frozen_experts_are_left_out_with_a_count(tmp_path: Path, small_tokenizer: Any) -> None:
    config = config_for(tmp_path, "qwen3_moe", small_tokenizer, "lora.experts=frozen", "lora.dropout=0.1")
    said: list[str] = []
    train(config, say=said.append)
    line = next(line for line in said if line.startswith("experts: "))
    assert "16 in 2 layers, in NF4, without adapters, 98,304 weights left out (lora.experts=frozen)" in line
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert not any("experts" in name for name in adapter)
    merged = merge_run(tmp_path / "run", onto="nf4-dequantized")
    assert check_parity(tmp_path / "run", Path(merged.merged))["merged"].kl <= 1e-6


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_the_load_balance_loss_is_added_where_the_config_asks_for_it(family: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", family)
    batch = flatten([Rendered(list(range(20, 60)), [1.0] * 40, "s")])
    settings = settings_of(family)
    settings.output_router_logits, settings.router_aux_loss_coef = True, 0.3
    plain = AutoModelForCausalLM.from_pretrained(base)
    asked = AutoModelForCausalLM.from_pretrained(base, config=settings)
    with torch.no_grad():
        wanted = 0.3 * asked.eval()(batch["input_ids"]).aux_loss
    for model in (plain, asked):
        use_document_attention(model.train())
    without, found = batch_loss(plain, batch).loss, batch_loss(asked, batch).loss
    torch.testing.assert_close(found - without, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(batch_loss(asked, batch, n_items=2 * batch["weight_sum"]).loss, found / 2)
    torch.testing.assert_close(batch_loss(asked.eval(), batch).loss, without)


def test_what_cannot_be_had_is_refused_before_the_data_is_read(tmp_path: Path, small_tokenizer: Any) -> None:
    config = config_for(tmp_path, "qwen3_moe", small_tokenizer, "lora.dropout=0.1")
    with pytest.raises(ConfigError, match=r"lora\.dropout: 0\.1 cannot be had for experts.*lora\.experts=frozen"):
        check_layers(config, str(tmp_path / "base"))
    config = config_for(tmp_path, "qwen3_moe", small_tokenizer, "lora.target_modules=[q_proj, gate_up_proj]")
    check_layers(config, str(tmp_path / "base"))
    config = config_for(tmp_path, "qwen3_moe", small_tokenizer, "lora.target_modules=[q_proj, w1]")
    with pytest.raises(ConfigError, match=r"no linear layer is named \['w1'\]; this model has .*gate_up_proj"):
        check_layers(config, str(tmp_path / "base"))
    settings = json.loads((tmp_path / "base" / "config.json").read_text())
    settings |= {"moe_intermediate_size": 7, "hidden_size": 4}
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"cannot be cut into NF4's blocks of 64"):
        check_layers(config_for_base(tmp_path), str(tmp_path / "base"))


def config_for_base(folder: Path) -> Config:
    return configured(folder, folder / "base")("model.load_in_4bit=true")


def test_experts_of_an_unknown_form_are_refused_by_name(tmp_path: Path) -> None:
    from transformers import JetMoeConfig

    folder = tmp_path / "base"
    sizes = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    JetMoeConfig(**sizes, num_key_value_heads=2, kv_channels=32, intermediate_size=64).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"lora\.experts: JetMoeParallelExperts keeps .*lora\.experts=frozen"):
        check_layers(config_for_base(tmp_path), str(folder))
    check_layers(configured(tmp_path, folder)("lora.experts=frozen"), str(folder))


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "mistral3", "text_config": {"model_type": "mistral"}},
        {"model_type": "qwen2_5_vl", "hidden_size": 64, "vision_config": {"depth": 2}},
        {"model_type": "qwen2_5_omni", "thinker_config": {"text_config": {}}},
    ],
    ids=lambda settings: str(settings["model_type"]),
)
def test_a_model_that_also_sees_is_loaded_without_unsloth(tmp_path: Path, settings: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert why_not_unsloth(configured(tmp_path, tmp_path)()).startswith("the base is multimodal")


def test_a_mixture_is_loaded_without_unsloth(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", "mixtral")
    obstacle = why_not_unsloth(configured(tmp_path, folder)())
    assert not why_not_unsloth(configured(tmp_path, tmp_path / "nothing")())
    chosen = choose_backend("auto", obstacle)
    assert chosen.name == "transformers"
    assert "mixture of experts" in chosen.reason
    with pytest.raises(ConfigError, match=r"model\.backend=unsloth: the base is a mixture of experts.*backend=auto"):
        choose_backend("unsloth", obstacle)


def test_experts_that_are_stored_in_4_bits_are_refused(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", "mixtral")
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    }
    with pytest.raises(ConfigError, match=r"the experts in .* are stored in 4 bits one by one"):
        check_quantization(configured(tmp_path, folder)().model, str(folder), settings)
