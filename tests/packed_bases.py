"""Tiny bases as they are published in MXFP4 and FP8, made of random weights, and what transformers reads in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from moe_bases import SHAPE, write_base
from safetensors.torch import load_file, save_file

BLOCK = 32
KEPT = ("embed_tokens", "norm", "lm_head", "bias", "router", "mlp.gate.", "sinks")


def fp8(weight: torch.Tensor, block: tuple[int, int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as codes and scales, which are of blocks or of the whole of it."""
    high, wide = block or weight.shape
    rows, columns = weight.shape
    grid = torch.zeros(-(-rows // high), -(-columns // wide))
    codes = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            here = (slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide))
            grid[i, j] = weight[here].float().abs().max() / 448
            codes[here] = (weight[here].float() / grid[i, j]).to(torch.float8_e4m3fn)
    return codes, grid if block else grid.reshape(())


def mxfp4(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes and scales of experts [experts, inputs, outputs]."""
    experts, inputs, outputs = shape
    groups = inputs // 32
    codes = torch.randint(0, 256, (experts, outputs, groups, 16), dtype=torch.uint8)
    return codes, torch.randint(119, 124, (experts, outputs, groups), dtype=torch.uint8)


def write_qwen3(folder: Path, tokenizer: Any, block: tuple[int, int] | None = (BLOCK, BLOCK)) -> Path:
    """A Qwen3 whose linear layers are in FP8, in two files."""
    config = transformers.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=False, dtype="bfloat16")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = {}
    for name, weight in model.state_dict().items():
        if any(part in name for part in KEPT):
            tensors[name] = weight
            continue
        codes, scales = fp8(torch.randn_like(weight) * 0.12, block)
        tensors[name], tensors[f"{name}_scale_inv"] = codes, scales
        if block is None:
            tensors[name.replace("weight", "activation_scale")] = torch.tensor(0.5)
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block or []) or None,
    }
    return _write(folder, config, tensors, quantization, tokenizer)


def write_gpt_oss(folder: Path, tokenizer: Any) -> Path:
    """A gpt-oss whose experts are in MXFP4, in two files."""
    torch.manual_seed(0)
    write_base(folder, "gpt_oss", torch.bfloat16)
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.dim() < 3:
            tensors[name] = weight
            continue
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4(tuple(weight.shape))
    (folder / "model.safetensors").unlink()
    config = transformers.AutoConfig.from_pretrained(folder)
    return _write(folder, config, tensors, {"quant_method": "mxfp4"}, tokenizer)


def _write(folder: Path, config: Any, tensors: dict[str, Any], quantization: dict[str, Any], tokenizer: Any) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {**json.loads(config.to_json_string(use_diff=False)), "quantization_config": quantization}
    settings["architectures"] = [f"{'GptOss' if 'sinks' in str(tensors.keys()) else 'Qwen3'}ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(settings))
    files = {
        "model-00001-of-00002.safetensors": list(tensors)[::2],
        "model-00002-of-00002.safetensors": list(tensors)[1::2],
    }
    for file, names in files.items():
        save_file({name: tensors[name].contiguous() for name in names}, folder / file, {"format": "pt"})
    places = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    tokenizer.save_pretrained(folder)
    return folder


def read_by_transformers(base: Path) -> dict[str, torch.Tensor]:
    """The weights in 16 bits, as transformers dequantises them."""
    method = json.loads((base / "config.json").read_text())["quantization_config"]["quant_method"]
    kind = transformers.Mxfp4Config if method == "mxfp4" else transformers.FineGrainedFP8Config
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=kind(dequantize=True)
    )
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def write_in_16_bits(folder: Path, base: Path) -> Path:
    """``base`` as transformers dequantises it."""
    folder.mkdir()
    save_file(read_by_transformers(base), folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((base / "config.json").read_text())
    del settings["quantization_config"]
    (folder / "config.json").write_text(json.dumps(settings))
    for file in base.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder
