"""Writes an adapter as llama.cpp's converter understands it: one alpha for all layers, and alpha / r as scale."""

from __future__ import annotations

import json
from pathlib import Path

from qlora_sft.errors import RunError
from qlora_sft.export.adapter import read_adapter_config, scale_of
from qlora_sft.model.tensors import read_header

A, B = "lora_A.weight", "lora_B.weight"


def require_plain(adapter: Path) -> None:
    """Raises `RunError` for an adapter of more than linear layers and their low-rank updates."""
    config = read_adapter_config(adapter)
    if config.get("target_parameters"):
        raise RunError(
            f"{adapter}: llama.cpp's converter knows no adapters of experts; export the merged model, without --adapter"
        )
    if config.get("use_dora"):
        raise RunError(
            f"{adapter}: llama.cpp's adapters have no magnitudes, which DoRA trains; export the merged model, without "
            "--adapter"
        )


def write_plain_lora(adapter: Path, target: Path) -> Path:
    """Returns the folder to convert: ``adapter`` itself, or an equal one in ``target``.

    llama.cpp takes alpha / r for the scale of every layer, whatever the adapter's configuration says: neither rsLoRA's
    square root nor an alpha for some layers. One factor for all layers becomes another alpha; else each layer's B takes
    its own.
    """
    from safetensors.torch import save_file

    config = read_adapter_config(adapter)
    tensors = read_header(adapter / "adapter_model.safetensors")
    ranks = {key: tensor.shape[0] for key, tensor in tensors.items() if key.endswith(A)}
    alpha = float(config["lora_alpha"])
    modules = {key: key.removeprefix("base_model.model.").removesuffix(f".{A}") for key in ranks}
    factors = {key: scale_of(modules[key], rank, config) * rank / alpha for key, rank in ranks.items()}
    if all(factor == 1.0 for factor in factors.values()):
        return adapter
    common = next(iter(factors.values())) if len({*factors.values()}) == 1 else None
    values = {name: tensor.whole().float().contiguous() for name, tensor in tensors.items()}
    for key, factor in factors.items() if common is None else ():
        values[key.removesuffix(A) + B].mul_(factor)
    target.mkdir()
    save_file(values, target / "adapter_model.safetensors", {"format": "pt"})
    plain = {"lora_alpha": alpha * (common or 1.0), "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    (target / "adapter_config.json").write_text(json.dumps({**config, **plain}), encoding="utf-8")
    return target
