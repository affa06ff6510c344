"""Hybrids, families with names of their own and models that also see: trained by the command's own way, then merged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig, configured
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, write_tiny
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from qlora_sft.errors import ConfigError
from qlora_sft.export.merge import merge_run
from qlora_sft.export.model_card import model_card
from qlora_sft.model.load import load_base, load_for_inference
from qlora_sft.train import train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
# Recurrent layers; names that transformers changes while it loads; a tower, and one beside an embedding that grows.
QUICK = ("nemotron_h", "gemma3", "mistral3")
SLOW = (
    "qwen3_5_text", "qwen3_next", "lfm2", "granitemoehybrid", "falcon_h1", "gemma4_text", "gemma3n_text", "llama4_text",
    "gpt_oss",
)  # fmt: skip
# As they are published: towers beside the language model, which is loaded alone (Llama 4, Qwen3.5) or with them.
SEE = ("gemma4", "internvl", "lfm2_vl", "llama4", "qwen2_5_vl", "qwen3_5", "qwen3_vl")
OWN = {"mistral3": ["model.new_tokens=[<|seen|>]"], "gemma3": ["model.new_tokens=[<|seen|>]"]}
PROBE = torch.arange(20, 60)[None]


def write_base(kind: str, folder: Path, tokenizer: Any) -> Path:
    """A tiny model with a real vocabulary, and its tokenizer."""
    tiny_model(kind, vocab_size=len(tokenizer), vocab_size_per_layer_input=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


def trained_and_merged(kind: str, folder: Path, tokenizer: Any) -> tuple[Path, Path]:
    base = write_base(kind, folder / "base", tokenizer)
    make: MakeConfig = configured(folder, base)
    config = make(
        "model.load_in_4bit=true", "training.max_steps=2", "training.learning_rate=1e-2", "lora.r=4", *OWN.get(kind, [])
    )
    run = Path(train(config, say=lambda _: None).output)
    assert merge_run(run, say=lambda _: None).onto == "nf4-dequantized"
    return base, run


@torch.no_grad()
def log_shares(model: Any) -> torch.Tensor:
    return torch.log_softmax(model(input_ids=PROBE, use_cache=False).logits.float(), dim=-1)


def check(kind: str, folder: Path, tokenizer: Any) -> tuple[Path, Path]:
    base, run = trained_and_merged(kind, folder, tokenizer)
    adapter = log_shares(load_for_inference(run))
    merged = log_shares(load_base(str(run / "merged"), torch.float32, load_in_4bit=False).eval())
    untrained = log_shares(load_base(str(base), torch.float32, load_in_4bit=False).eval())
    assert kl(adapter, merged) < 1e-6
    assert kl(adapter, untrained) > 100 * kl(adapter, merged)
    return base, run


def kl(one: torch.Tensor, other: torch.Tensor) -> float:
    common = min(one.shape[-1], other.shape[-1])  # where a vocabulary has grown
    one, other = one[..., :common], other[..., :common]
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.mark.parametrize("kind", QUICK)
def test_the_merged_model_is_the_adapter(kind: str, tmp_path: Path, short_tokenizer: Any) -> None:
    base, run = check(kind, tmp_path, short_tokenizer)
    assert has_towers(base, run) == (kind != "nemotron_h")
    named = "AutoModelForImageTextToText" if kind == "mistral3" else "AutoModelForCausalLM"
    assert f'model = {named}.from_pretrained("owner/name"' in model_card(run, "owner/name", "merged", [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOW)
def test_the_merged_model_is_the_adapter_in_more_families(kind: str, tmp_path: Path, short_tokenizer: Any) -> None:
    check(kind, tmp_path, short_tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEE)
def test_the_merged_model_still_sees(kind: str, tmp_path: Path, short_tokenizer: Any) -> None:
    assert has_towers(*check(kind, tmp_path, short_tokenizer))


def test_a_tower_may_be_missing_and_the_language_model_may_not(tmp_path: Path) -> None:
    """As in fine-tunes of the language model alone that are saved under the configuration of the whole."""
    file = write_tiny("mistral3", tmp_path) / "model.safetensors"
    whole = load_file(file)
    before = log_shares(load_base(str(tmp_path), torch.float32, load_in_4bit=False).eval())
    text = {name: tensor for name, tensor in whole.items() if not re.search("visi|projector", name)}
    assert len(text) < len(whole)
    save_file(text, file, metadata={"format": "pt"})
    assert torch.equal(log_shares(load_base(str(tmp_path), torch.float32, load_in_4bit=False).eval()), before)
    for part in ("embed_tokens.weight", "layers.1.mlp.up_proj.weight"):
        less = {name: tensor for name, tensor in text.items() if not name.endswith(part)}
        assert len(less) == len(text) - 1
        save_file(less, file, metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=r"lack [12] weights of Mistral3"):  # with a tied head or without
            load_base(str(tmp_path), torch.float32, load_in_4bit=False)


def has_towers(base: Path, run: Path) -> bool:
    """Whether there are towers, which are as they were; the whole of the merged model loads."""
    before, after = (load_file(path / "model.safetensors") for path in (base, run / "merged"))
    assert before.keys() == after.keys()
    assert (run / "merged" / "preprocessor_config.json").is_file()
    towers = [name for name in before if re.search("visi|visual|projector", name)]
    assert all(torch.equal(before[name], after[name]) for name in towers)
    loader = AutoModelForImageTextToText if towers else AutoModelForCausalLM
    _, info = loader.from_pretrained(run / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return bool(towers)
