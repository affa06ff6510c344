"""A sharded 16-bit base becomes NF4 layer by layer: never is there more than the result and one of its shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHILD = Path(__file__).with_name("load_peak_child.py")


def save(folder: Path, width: int, layers: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu").to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.02)
    model.save_pretrained(folder, max_shard_size="55MB")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's account of the process")
def test_loading_takes_no_more_than_the_result_and_a_shard(tmp_path: Path) -> None:
    model, warm = save(tmp_path / "model", 512, 16), save(tmp_path / "warm", 64, 1)
    shards = [file.stat().st_size for file in model.glob("*.safetensors")]
    assert len(shards) >= 2
    # Every tensor gets pages of its own and gives them back. In the heap of glibc the same loading takes 45 to 150 MB,
    # as small tensors that stay happen to lie behind larger ones that are gone.
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, str(CHILD), str(model), str(warm)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=settings)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["held"] < sum(shards) / 3
    assert seen["held"] / 2 < seen["peak"] <= seen["held"] + max(shards), (seen, shards)
