"""Helpers that several test files use."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_sft.config import Config
from qlora_sft.data.prepare import render_sources
from qlora_sft.data.render import Rendered
from qlora_sft.data.sources import read_sources
from qlora_sft.model.backend import unsloth_fault
from qlora_sft.model.tokenizer import load_tokenizer

# A short run, with dropout, so that the random numbers have to go on as well.
SHORT = ["training.max_steps=6", "training.save_steps=2", "lora.dropout=0.2", "data.packing=none",
         "training.gradient_accumulation=2", "training.learning_rate=1e-2"]  # fmt: skip


# Unsloth names the newest versions of what it patches, and other tests run with later ones, too.
with_unsloth = pytest.mark.skipif(bool(unsloth_fault()), reason=f"Unsloth: {unsloth_fault()}")

REAL_DATA = Path(os.environ.get("QLORA_SFT_DATA") or Path(__file__).parents[2] / "shared" / "data")


def real_data(name: str) -> Path:
    """A real data file; without it the test is skipped."""
    if not (REAL_DATA / name).is_file():
        pytest.skip(f"no {REAL_DATA / name}; set QLORA_SFT_DATA")
    return REAL_DATA / name


def keep_code_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has transformers keep the code that a base brings along in ``folder``, and forget that of other tests."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)


def documents_of(config: Config) -> list[Rendered]:
    """The rendered training documents of a configuration."""
    tokenizer = load_tokenizer(config.model, config.model.path)
    return render_sources(read_sources(config.data.train, config.seed), config.data, tokenizer).all_documents


def vocabulary_without(byte: str, unknown: str | None = None) -> Any:
    """A tokenizer of single bytes that lacks one of them, spelt as byte-level vocabularies spell it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c != byte]
    vocabulary = {c: i for i, c in enumerate([*alphabet, "<|end|>", *([unknown] if unknown else [])])}
    raw = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", unk_token=unknown)


def bare_base(folder: Path, tokenizer: Any, tied: bool, room: int) -> Path:
    """A tiny Llama whose tokenizer has no chat template, with ``room`` unused rows in its embedding."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + room, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# What is measured of a step that is another each time.
OF_THE_MOMENT = ("seconds", "tokens_per_second", "resident_bytes", "gpu_peak_bytes", "mfu", "time")


def result(run: Path) -> tuple[bytes, list[Any]]:
    """The adapter, bit for bit, and what was measured of each step but time and memory."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return (run / "adapter" / "adapter_model.safetensors").read_bytes(), [
        {key: value for key, value in row.items() if key not in OF_THE_MOMENT} for row in rows
    ]


def killed(config: Config, step: int) -> None:
    """Trains until ``step`` steps are done, and is killed."""
    from qlora_sft.train import train
    from qlora_sft.training.trainer import PackedSFTTrainer

    take = PackedSFTTrainer.get_batch_samples

    def taken(self: Any, *arguments: Any) -> Any:
        if self.state.global_step == step:
            raise KeyError("killed")
        return take(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedSFTTrainer, "get_batch_samples", taken)
        with pytest.raises(KeyError, match="killed"):
            train(config, say=lambda _: None)
