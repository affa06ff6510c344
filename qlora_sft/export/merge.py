"""The adapter of a run, added into its base model: a folder that plain transformers loads.

Shard by shard from safetensors: no model is built, and memory holds one shard. By default the adapter is added to
the weights it was trained on, which for a 4-bit run are the dequantised NF4 weights, not the 16-bit originals.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_sft.atomic import written_folder
from qlora_sft.errors import ConfigError, RunError

Onto = Literal["nf4-dequantized", "16bit"]
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class LoraUpdate:
    """One layer's update: ``W + scale * B @ A`` with A [r, in], B [out, r]."""

    a: Any
    b: Any
    scale: float


def merge_run(run: str | Path, out: str | Path | None = None, onto: Onto | None = None) -> dict[str, Any]:
    """Writes the merged model of a run folder (default: RUN/merged) and says what was done.

    Raises `ConfigError` if ``run`` is no finished run, `RunError` if adapter and base do not fit together; then
    nothing is written.
    """
    run = Path(run)
    manifest = read_manifest(run)
    target = Path(out) if out else run / "merged"
    base = base_folder(manifest["report"]["base"])
    quantized = set(manifest["report"]["quantized_modules"])
    onto = onto or ("nf4-dequantized" if quantized else "16bit")
    updates = read_adapter(run / "adapter")
    with written_folder(target) as beside:
        merged = _merge_shards(base, beside, updates, quantized if onto == "nf4-dequantized" else set())
        missing = sorted(set(updates) - merged)
        if missing:
            raise RunError(
                f"{run / 'adapter'}: {len(missing)} of {len(updates)} adapter modules have no weight in {base} "
                f"(first: {missing[0]}); is it the adapter of another base model?"
            )
        _write_config(base, beside)
        _write_tokenizer(run / "adapter", beside)
    return {"merged": str(target), "onto": onto, "modules": len(merged)}


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest of a finished run. Raises `ConfigError` if there is none."""
    file = run / "manifest.json"
    if not file.is_file():
        raise ConfigError(f"{run}: not the folder of a finished run (it has no manifest.json); train one first")
    manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return manifest


def base_folder(base: str) -> Path:
    """Local folder of the base; a Hub id is looked up in, or fetched into, the Hub's own cache."""
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"the base model {base} is neither a folder here nor to be had from the Hub: {reason}") from None


def read_adapter(folder: Path) -> dict[str, LoraUpdate]:
    """Module path -> update. Raises `RunError` for an adapter that plain addition cannot merge."""
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except Exception as error:
        raise RunError(f"{folder}: not a readable adapter ({str(error).splitlines()[0]})") from None
    for feature in (
        "use_dora",
        "modules_to_save",
        "fan_in_fan_out",
        "rank_pattern",
        "alpha_pattern",
        "trainable_token_indices",
    ):
        if config.get(feature):
            raise RunError(f"{folder}: an adapter with {feature} cannot be merged yet")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    updates = {}
    for key, a in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key)
        if match:
            updates[match[1]] = LoraUpdate(a.float(), tensors[key.replace("lora_A", "lora_B")].float(), scale)
    if not updates or 2 * len(updates) != len(tensors):
        raise RunError(f"{folder}: expected LoRA pairs only, found {len(updates)} pairs in {len(tensors)} tensors")
    return updates


def _merge_shards(base: Path, target: Path, updates: dict[str, LoraUpdate], quantized: set[str]) -> set[str]:
    """Writes every shard of ``base`` with its updates; returns the merged modules."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    merged = set()
    for shard in _shards(base):
        tensors = {}
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is not iterable
                weight = file.get_tensor(name)
                module = name.removesuffix(".weight")
                if module in quantized:
                    weight = _through_nf4(weight)
                if module in updates:
                    update = updates[module]
                    if (update.b.shape[0], update.a.shape[1]) != tuple(weight.shape):
                        shape = (update.b.shape[0], update.a.shape[1])
                        raise RunError(
                            f"{module}: the adapter is for a weight {shape}, the base has {tuple(weight.shape)}"
                        )
                    # One rounding, at the very end.
                    total = weight.float().addmm_(update.b, update.a, alpha=update.scale)
                    if not total.isfinite().all():
                        raise RunError(f"{module}: the merged weight is not finite; the adapter is damaged")
                    weight = total.to(weight.dtype)
                    merged.add(module)
                tensors[name] = weight
        save_file(tensors, target / shard.name, metadata={"format": "pt"})
    if (base / INDEX).is_file():
        shutil.copyfile(base / INDEX, target / INDEX)
    return merged


def _shards(base: Path) -> Iterator[Path]:
    if (base / INDEX).is_file():
        names = sorted(set(json.loads((base / INDEX).read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (base / name).is_file():
            raise RunError(f"{base}: {name} is missing; the base model is incomplete")
        yield base / name


def _through_nf4(weight: Any) -> Any:
    """What the model computed with while it trained: quantised to NF4 (blocks of 64, double quantisation) and back."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state).to(weight.dtype)


def _write_config(base: Path, target: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        if (base / name).is_file():
            shutil.copyfile(base / name, target / name)


def _write_tokenizer(adapter: Path, target: Path) -> None:
    """The tokenizer as trained. Its template loses the ``{% generation %}`` marks, which only training needs and
    not every runtime knows; ``{% if true %}`` in their place keeps the blocks and so the white space."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(adapter)
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = without_generation_marks(tokenizer.chat_template)
    tokenizer.save_pretrained(target)


def without_generation_marks(template: str) -> str:
    """The same template for inference."""
    template = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", template)
