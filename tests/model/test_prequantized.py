"""A base that was saved in NF4 is trained as it is, planned to the byte, and merged onto its dequantised weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from peft import PeftModel
from safetensors.torch import load_file
from tests_support import SHORT
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_sft.export.merge import merge_run
from qlora_sft.export.parity import check_parity
from qlora_sft.model.load import disable_inference_repacking, load_model
from qlora_sft.plan.blueprint import read_blueprint
from qlora_sft.plan.weights import residents
from qlora_sft.run.folder import Run
from qlora_sft.train import train

PROBE = torch.arange(20, 60)[None]


def packed(folder: Path, model: Path, **settings: Any) -> Path:
    """``model`` as bitsandbytes saves it in NF4."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **settings)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, quantization_config=quantization)
    loaded.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model / file, folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PROBE).logits


def test_it_is_trained_as_it_is_and_merged_onto_what_it_computes_with(
    make_config: MakeConfig, tiny_model: Path, tmp_path: Path
) -> None:
    base = packed(tmp_path / "nf4", tiny_model, bnb_4bit_use_double_quant=True)
    config = make_config(*SHORT, f"model.path={base}", "model.load_in_4bit=true")
    train(config, say=lambda _: None)
    run = Run.open(config.output)
    assert len(run.quantized_modules) == 14
    result = merge_run(run.path, say=lambda _: None)
    assert (result.onto, result.reason) == ("nf4-dequantized", "the base exists in 4 bits only")
    assert check_parity(run.path, run.merged, say=lambda _: None)["merged"].kl < 1e-6
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    disable_inference_repacking(original)
    merged = AutoModelForCausalLM.from_pretrained(run.merged, dtype=torch.float32)
    adapter = logits(PeftModel.from_pretrained(original, run.adapter))
    torch.testing.assert_close(logits(merged), adapter, rtol=1e-4, atol=1e-4)
    assert "quantization_config" not in json.loads((run.merged / "config.json").read_text())


@pytest.mark.parametrize(
    ("settings", "quantized"),
    [
        ({"bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head", "model.layers.0.mlp"]}, 11),
        ({"bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": torch.bfloat16}, 14),
    ],
    ids=["some layers in full", "scales in full"],
)
def test_its_codes_are_those_of_the_file_and_its_bytes_are_planned(
    make_config: MakeConfig, tiny_model: Path, tmp_path: Path, settings: dict[str, Any], quantized: int
) -> None:
    from bitsandbytes.nn import Linear4bit

    base = packed(tmp_path / "nf4", tiny_model, **settings)
    config = make_config(f"model.path={base}", "model.load_in_4bit=true")
    model = load_model(config, str(base), torch.float32, "transformers").get_base_model()
    files = load_file(base / "model.safetensors")
    layers = {name.removesuffix(".base_layer"): m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    nbytes = 0
    for name, layer in layers.items():
        weight, state = layer.weight, layer.weight.quant_state
        assert torch.equal(weight.data.view(torch.uint8), files[f"{name}.weight"].view(torch.uint8))
        assert layer.compute_dtype == torch.float32
        beside = [state.absmax, state.code]
        beside += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
        nbytes += weight.nbytes + sum(tensor.nbytes for tensor in beside)
    blueprint = read_blueprint(config, str(base))
    assert {linear.name for linear in blueprint.linears if linear.quantized} == set(layers)
    assert len(layers) == quantized
    assert residents(blueprint, config, torch.float32, "adamw_torch_fused").nf4 == nbytes
