"""A sharded model of any size and an adapter for it, written without ever holding more than one matrix.

Run as a script it merges that run and prints the peak of its resident memory before and after, in bytes.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from qlora_sft.model.tensors import Planned, read_model, write_index, write_shard

WIDTH = 2048


def write_run(folder: Path, matrices: int, rows: int, tokenizer_from: Path, quantized: bool = True) -> Path:
    """``matrices`` weights [rows, WIDTH] in bf16, four to a shard, and a rank-8 adapter on each of them."""
    base, adapter = folder / "base", folder / "run" / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir(parents=True)
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(matrices)]
    planned = [Planned(f"{name}.weight", torch.bfloat16, (rows, WIDTH), lambda: _random(rows)) for name in names]
    shards = {
        f"model-{i // 4 + 1:05d}-of-{-(-matrices // 4):05d}.safetensors": planned[i : i + 4]
        for i in range(0, matrices, 4)
    }
    if len(shards) == 1:
        shards = {"model.safetensors": planned}
    for file, tensors in shards.items():
        write_shard(base / file, tensors)
    write_index(base, dict(shards))
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    lora = {}
    for name in names:
        lora[f"base_model.model.{name}.lora_A.weight"] = torch.randn(8, WIDTH)
        lora[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 8)
    save_file(lora, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16}))
    for file in tokenizer_from.glob("*token*"):
        (adapter / file.name).write_bytes(file.read_bytes())
    report = {"base": str(base), "quantized_modules": names if quantized else []}
    manifest = {"config": {"model": {}}, "report": report}
    (folder / "run" / "manifest.json").write_text(json.dumps(manifest))
    return folder / "run"


def _random(rows: int) -> Iterator[torch.Tensor]:
    torch.manual_seed(0)
    for start in range(0, rows, 4096):
        yield torch.randn(min(4096, rows - start), WIDTH).to(torch.bfloat16)


def main(run: str, onto: str) -> None:
    # What a merge imports anyway is part of the process at the start, not of the merge.
    import bitsandbytes  # noqa: F401
    import transformers
    from bitsandbytes.functional import quantize_4bit

    from qlora_sft.export.merge import merge_run

    _ = transformers.AutoTokenizer
    quantize_4bit(torch.randn(64, 64), quant_type="nf4")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = merge_run(run, onto=onto, say=lambda _: None)  # type: ignore[arg-type]
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    largest = max(stored.nbytes for stored in read_model(Path(result.merged)).values())
    print(json.dumps({"before": before, "after": after, "largest": largest, **result.to_json()}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
