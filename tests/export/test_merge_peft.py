"""Every kind of LoRA adapter that can be merged, against PEFT's own merge and against the adapter itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qlora_sft.errors import RunError
from qlora_sft.export.merge import merge_run
from qlora_sft.export.nf4 import ThroughNF4
from qlora_sft.model.tensors import Planned, read_header, write_shard

PROBE = torch.arange(20, 60)[None]
# PEFT warns about tied weights, resized vocabularies and biases, all of which are meant here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
HEAVY = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "patterns": {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 5}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved both": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "saved tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [21, 33]},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "lora bias": {"target_modules": ["q_proj"], "lora_bias": True},
}


def tiny(folder: Path, tied: bool) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def shaken(model: Any) -> None:
    """Every trainable weight away from where it began, so that nothing is merged by doing nothing."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)


def make_run(folder: Path, base: Path, short_tokenizer: Any, resize: int = 0, **lora: Any) -> Path:
    """A run folder as training leaves it: an adapter with a tokenizer, and a manifest."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if resize:
        model.resize_token_embeddings(resize)
    adapted = get_peft_model(model, LoraConfig(**{**HEAVY, "task_type": "CAUSAL_LM", **lora}))
    shaken(adapted)
    adapted.save_pretrained(folder / "adapter")
    short_tokenizer.save_pretrained(folder / "adapter")
    settings = {"model": {"dtype": "float32", "load_in_4bit": False}}
    manifest = {"config": settings, "report": {"base": str(base), "quantized_modules": []}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PROBE).logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weights_are_those_of_peft(tmp_path: Path, short_tokenizer: Any, variant: str, tied: bool) -> None:
    base = tiny(tmp_path / "base", tied)
    run = make_run(tmp_path / "run", base, short_tokenizer, **VARIANTS[variant])
    result = merge_run(run, say=lambda _: None)
    assert result.modules >= 1
    adapter = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run / "adapter"
    )
    ours = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted = logits(adapter)
    assert (wanted - logits(plain)).abs().max() > 1e-2
    torch.testing.assert_close(logits(ours), wanted, rtol=1e-5, atol=2e-5)
    theirs = adapter.merge_and_unload().state_dict()
    for name, weight in ours.state_dict().items():
        if not (tied and name in ("lm_head.weight", "model.embed_tokens.weight")):
            torch.testing.assert_close(weight, theirs[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_resized_vocabulary_is_written_and_configured(tmp_path: Path, short_tokenizer: Any, tied: bool) -> None:
    base = tiny(tmp_path / "base", tied)
    run = make_run(tmp_path / "run", base, short_tokenizer, resize=104, target_modules=["q_proj"])
    merge_run(run, say=lambda _: None)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(104)
    adapter = PeftModel.from_pretrained(model, run / "adapter")
    ours = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    assert ours.config.vocab_size == 104
    assert ours.config.tie_word_embeddings is tied
    torch.testing.assert_close(logits(ours), logits(adapter), rtol=1e-5, atol=2e-5)


def test_adapters_that_cannot_be_merged_or_do_nothing_are_refused(tmp_path: Path, short_tokenizer: Any) -> None:
    base = tiny(tmp_path / "base", True)
    idle = make_run(tmp_path / "idle", base, short_tokenizer, target_modules=["q_proj"], init_lora_weights=True)
    with pytest.raises(RunError, match="every update is zero"):
        merge_run(idle)
    run = make_run(tmp_path / "run", base, short_tokenizer, target_modules=["q_proj"])
    file = run / "adapter" / "adapter_config.json"
    original = json.loads(file.read_text())
    for change, message in (({"peft_type": "IA3"}, "only LoRA"), ({"use_qalora": True}, "use_qalora cannot be merged")):
        file.write_text(json.dumps({**original, **change}))
        with pytest.raises(RunError, match=message):
            merge_run(run)
    file.write_text(json.dumps(original))
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, run / "adapter" / "adapter_model.safetensors")
    with pytest.raises(RunError, match=r"lora_[AB]\.weight has values that are not finite"):
        merge_run(run)
    assert not (run / "merged").exists()
    assert not list(run.glob(".merged*"))


@pytest.mark.parametrize("shape", [(96, 64), (200, 100), (130, 8), (64, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_through_nf4_in_slices_is_bitsandbytes_at_once(
    tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    monkeypatch.setattr("qlora_sft.model.tensors.SLICE", 64 * shape[1])
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    write_shard(tmp_path / "w.safetensors", [Planned("w", dtype, shape, lambda: iter([weight]))])
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    wanted = dequantize_4bit(packed, state).to(dtype)
    ours = ThroughNF4(read_header(tmp_path / "w.safetensors")["w"])
    assert torch.equal(torch.cat([ours.rows(0, 64), ours.rows(64, shape[0])]), wanted)


def test_a_base_that_exists_in_4_bits_only(tmp_path: Path, short_tokenizer: Any) -> None:
    from qlora_sft.model.load import disable_inference_repacking, load_base

    load_base(str(tiny(tmp_path / "base", False)), torch.float32, load_in_4bit=True).save_pretrained(tmp_path / "nf4")
    plain = make_run(tmp_path / "run", tmp_path / "base", short_tokenizer, target_modules=["q_proj", "down_proj"])
    manifest = json.loads((plain / "manifest.json").read_text())
    manifest["report"]["base"] = str(tmp_path / "nf4")
    (plain / "manifest.json").write_text(json.dumps(manifest))
    assert merge_run(plain, say=lambda _: None).onto == "nf4-dequantized"
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32)
    disable_inference_repacking(packed)
    adapter = PeftModel.from_pretrained(packed, plain / "adapter")
    ours = AutoModelForCausalLM.from_pretrained(plain / "merged", dtype=torch.float32)
    assert "quantization_config" not in json.loads((plain / "merged" / "config.json").read_text())
    torch.testing.assert_close(logits(ours), logits(adapter), rtol=1e-4, atol=1e-4)
