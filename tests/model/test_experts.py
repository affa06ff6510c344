"""Experts of tiny mixtures: loaded in NF4, trained with PEFT's own adapters, computed expert by expert."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from moe_bases import FAMILIES, write_base
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe

from qlora_sft.config import LoraConfig
from qlora_sft.config_lora import LoraModules
from qlora_sft.errors import ConfigError
from qlora_sft.export.logits import expand_4bit
from qlora_sft.lora_from import adapter_settings, setting_of_adapter
from qlora_sft.model import experts_load
from qlora_sft.model.experts import (
    out_of_reach,
    parts_of,
    stack_names,
    stack_shape,
    stacks,
    target_parameters,
    weight_of,
)
from qlora_sft.model.experts_lora import ExpertsLora, use_experts_lora
from qlora_sft.model.experts_scored import ChosenExperts
from qlora_sft.model.linears import peft_settings
from qlora_sft.model.load import disable_inference_repacking, load_base, quantized_modules, with_adapter
from qlora_sft.model.peft_targets import as_named, write_portable_targets

IDS = torch.randint(1, 300, (1, 40), generator=torch.Generator().manual_seed(3))


def in_nf4(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = load_base(str(folder), dtype, load_in_4bit=True)
    disable_inference_repacking(model)
    return model


def adapted(base: Any, experts: bool = True, **more: Any) -> Any:
    """With adapters whose B is not zero, the same for every base of one shape."""
    base.requires_grad_(False)
    lora = LoraConfig(r=4, alpha=8, experts="train" if experts else "frozen", **more)
    parameters = target_parameters(base, lora) or None
    with as_named(base):
        model = get_peft_model(base, PeftLoraConfig(**peft_settings(base, lora), target_parameters=parameters))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


def loss_and_gradients(model: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor]]:
    model.train()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_nearly_all_of_the_blocks_is_in_nf4_and_each_expert_has_the_bits_of_a_layer_of_its_own(
    family: str, tmp_path: Path
) -> None:
    write_base(tmp_path, family)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = in_nf4(tmp_path)
    sizes = {n: (2 if p.dtype == torch.uint8 else 1) * p.numel() for n, p in model.model.layers.named_parameters()}
    quantized = sum(sizes[n] for n, p in model.model.layers.named_parameters() if p.dtype == torch.uint8)
    assert quantized >= 0.95 * sum(sizes.values())
    assert sum(sizes.values()) == sum(p.numel() for p in dense.model.layers.parameters())
    assert out_of_reach(dense)[2] < 0.02
    for path, module, name in list(stacks(model))[:2]:
        assert f"{path}.{name}" in quantized_modules(model)
        whole = getattr(dense.get_submodule(path), name)[1].detach()
        parts = whole.chunk(2) if name == "gate_up_proj" and parts_of(module, name) == 2 else [whole]
        # As rows that are as long as they can be: see `NF4Stack.dequantize`.
        alone = [Params4bit(p.reshape(1, -1), requires_grad=False, quant_type="nf4").to("cpu") for p in parts]
        expected = torch.cat([dequantize_4bit(p.data, p.quant_state).flatten() for p in alone])
        for chosen in (slice(1, 2), slice(0, 2), torch.tensor([3, 1])):
            assert torch.equal(weight_of(module, name).dequantize(chosen)[-1].flatten(), expected)
        reference = weight_of(module, name).dequantize(slice(1, 2), torch.float64)  # by torch alone
        torch.testing.assert_close(reference.flatten(), expected.double(), rtol=0, atol=1e-7)


def test_no_two_stacks_exist_in_full_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_base(tmp_path, "qwen3_moe")
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    quantize = experts_load.quantized_stack

    def watched(weight: Tensor, parts: int) -> Any:
        alive.append(sum(each() is not None for each in seen))
        seen.append(weakref.ref(weight))
        return quantize(weight, parts)

    monkeypatch.setattr(experts_load, "quantized_stack", watched)
    in_nf4(tmp_path)
    assert len(alive) == 4
    assert max(alive) <= 1
    assert not any(each() is not None for each in seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_peft_on_the_dequantised_experts(family: str, tmp_path: Path) -> None:
    write_base(tmp_path, family)
    ours = adapted(in_nf4(tmp_path))
    assert use_experts_lora(ours) == len([1 for _ in stacks(ours)]) / 2
    theirs = adapted(expanded(tmp_path))
    if family == "phimoe":  # draws its experts at random in training
        torch.manual_seed(0)
    found, gradients = loss_and_gradients(ours)
    if family == "phimoe":
        torch.manual_seed(0)
    wanted, expected = loss_and_gradients(theirs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert sum("experts" in name for name in gradients) >= 4
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name


def expanded(folder: Path) -> Any:
    """The base with the very weights that NF4 gives it, dense, in transformers' own arithmetic."""
    model = in_nf4(folder)
    expand_4bit(model)
    model.set_experts_implementation("eager")
    for module in model.modules():
        if isinstance(module, ChosenExperts):
            module.__class__, module.experts.__class__ = Llama4TextMoe, Llama4TextExperts
    return model


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_in_bfloat16_the_gradients_are_as_exact_as_pefts(family: str, tmp_path: Path) -> None:
    """Against float64: what ours loses is at most twice what PEFT's way loses."""
    write_base(tmp_path, family, torch.bfloat16)
    base = load_base(str(tmp_path), torch.bfloat16, load_in_4bit=True)
    expand_4bit(base)
    layers = [module for _, module, name in stacks(base) if name == "down_proj"]
    errors: dict[str, list[float]] = {"ours": [], "peft": []}
    for path in [path for path, _, name in stacks(base) if name == "down_proj"]:
        truth, peft, ours = (experts_alone(base, tmp_path, path, kind) for kind in ("exact", "peft", "ours"))
        for name, exact in truth.items():
            for kind, found in (("peft", peft), ("ours", ours)):
                errors[kind].append(float((found[name].double() - exact).norm() / exact.norm()))
    assert len(layers) == 2
    assert max(errors["ours"]) <= 2 * max(errors["peft"])
    assert sum(errors["ours"]) <= 2 * sum(errors["peft"])
    assert max(errors["ours"]) > 1e-4  # bfloat16 it is


def experts_alone(base: Any, folder: Path, path: str, kind: str) -> dict[str, Tensor]:
    """Gradients of the adapters, the input and the routing weights of one module of experts, wrapped by PEFT."""
    holder: Any = nn.Module()
    if kind == "ours":
        quantized = load_base(str(folder), torch.bfloat16, load_in_4bit=True)
        holder.experts = quantized.get_submodule(path)
    else:
        import copy

        holder.experts = copy.deepcopy(base.get_submodule(path))
        holder.experts.config._experts_implementation = "eager"
        holder.experts.to(torch.float64 if kind == "exact" else torch.bfloat16)
    holder.requires_grad_(False)
    holder.config = {"model_type": "custom"}
    lora = PeftLoraConfig(r=4, lora_alpha=8, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    model = get_peft_model(holder, lora)
    draw = torch.Generator().manual_seed(1)
    wide = torch.float64 if kind == "exact" else torch.float32
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=draw) * 0.1).to(wide)
    if kind == "ours":
        assert use_experts_lora(model) == 1
    count, _, _ = stack_shape(layer := model.base_model.model.experts.get_base_layer(), "down_proj")
    width = 64
    x = torch.randn(96, width, generator=draw).bfloat16()
    index = torch.stack([torch.randperm(count, generator=draw)[:2] for _ in range(96)])
    weights = torch.rand(96, 2, generator=draw).bfloat16()
    noise = torch.randn(96, width, generator=draw).bfloat16()
    dtype = torch.float64 if kind == "exact" else torch.bfloat16
    x, weights = x.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()
    assert layer is not None
    with torch.autocast("cpu", torch.bfloat16, enabled=kind != "exact"):
        y = model.base_model.model.experts(x, index, weights)
    y.backward(noise.to(y.dtype))
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(found) == 4
    return {**found, "x": x.grad, "weights": weights.grad}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text"])
def test_the_saved_adapter_is_pefts_own(family: str, tmp_path: Path) -> None:
    """Plain PEFT loads it onto the dense base, and it gives the same model."""
    write_base(tmp_path / "base", family)
    ours = adapted(in_nf4(tmp_path / "base"))
    use_experts_lora(ours)
    ours.eval().save_pretrained(tmp_path / "adapter")
    write_portable_targets(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(expanded(tmp_path / "base"), str(tmp_path / "adapter")).eval()
    again = with_adapter(in_nf4(tmp_path / "base"), tmp_path / "adapter")
    assert any(isinstance(module, ExpertsLora) for module in again.modules())
    assert not any(isinstance(module, ExpertsLora) for module in theirs.modules())
    with torch.no_grad():
        wanted = theirs(IDS).logits
        assert (wanted - expanded(tmp_path / "base")(IDS).logits).abs().max() > 0.1
        torch.testing.assert_close(ours(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
        with ours.disable_adapter():
            torch.testing.assert_close(ours(IDS).logits, expanded(tmp_path / "base")(IDS).logits, rtol=1e-4, atol=1e-4)


def test_plain_peft_loads_dora_beside_frozen_experts_and_what_it_could_not_load_is_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "base", "deepseek_v3")
    with pytest.raises(ConfigError, match=r"lora\.dora: PEFT could not load.* takes down_proj, gate_proj, up_proj for"):
        adapted(in_nf4(tmp_path / "base"), experts=False, dora=True)
    ours = adapted(in_nf4(tmp_path / "base"), experts=False, dora=True, target_modules=["q_b_proj", "o_proj"]).eval()
    ours.save_pretrained(tmp_path / "adapter")
    write_portable_targets(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(expanded(tmp_path / "base"), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert (theirs(IDS).logits - expanded(tmp_path / "base")(IDS).logits).abs().max() > 0.1
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)


def assert_the_saved_adapter_is(ours: Any, folder: Path) -> None:
    """Saves the adapter of a model made from ``folder``/base, and has it read by plain PEFT and by us."""
    ours.save_pretrained(folder / "adapter")
    write_portable_targets(ours, folder / "adapter")
    theirs = PeftModel.from_pretrained(expanded(folder / "base"), str(folder / "adapter")).eval()
    again = with_adapter(in_nf4(folder / "base"), folder / "adapter")
    with torch.no_grad():
        for each in (theirs, again):
            torch.testing.assert_close(ours(IDS).logits, each(IDS).logits, rtol=1e-4, atol=1e-4)


def test_plain_peft_finds_the_rank_and_the_alpha_of_every_layer_beside_the_experts(tmp_path: Path) -> None:
    """Shared experts are named as parameters, whose names end otherwise than those of layers."""
    write_base(tmp_path / "base", "deepseek_v3")
    modules = [LoraModules("shared_experts.*", alpha=64), LoraModules(r"layers\.0\..*(up|o)_proj", r=2)]
    ours = adapted(in_nf4(tmp_path / "base"), experts=False, modules=modules, dropout=0.1).eval()
    assert_the_saved_adapter_is(ours, tmp_path)
    read = setting_of_adapter(adapter_settings(tmp_path / "adapter"), "modules")
    assert read == [{"match": r"layers\.0\..*(up|o)_proj", "r": 2}, {"match": "shared_experts.*", "alpha": 64}]


def test_experts_with_a_norm_of_their_own_behind_them_are_in_no_form_that_is_known() -> None:
    """As Muse Spark's. Computed as the others are, they would lose it without a word."""
    module: Any = torch.nn.Module()
    module.has_gate, module.has_bias, module.is_transposed, module.is_concatenated = True, False, False, True
    module.gate_up_proj, module.down_proj = (torch.nn.Parameter(torch.zeros(2, 64, 64)) for _ in range(2))
    assert stack_names(module) == ("gate_up_proj", "down_proj")
    module.has_post_expert_norm = True
    assert stack_names(module) == ()


def test_a_mixture_whose_layers_are_all_dense_has_adapters_on_all_of_them(tmp_path: Path) -> None:
    """PEFT takes such a family's MLPs for experts, which this model does not have."""
    write_base(tmp_path / "base", "deepseek_v3", first_k_dense_replace=99)
    ours = adapted(in_nf4(tmp_path / "base")).eval()
    with_lora = {name.split(".lora_A")[0] for name, _ in ours.named_parameters() if ".lora_A." in name}
    wanted = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.rsplit(".", 1)[-1] for name in with_lora} == wanted
    assert len(with_lora) == len(ours.get_base_model().model.layers) * len(wanted)
    assert_the_saved_adapter_is(ours, tmp_path)
