"""A PEFT LoRA adapter as what it does to each tensor of the base model."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_sft.errors import RunError, first_line
from qlora_sft.export.tensors import Stored, read_header

# Features whose merged form is not a sum of tensors, or that nobody here has checked.
UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
    "velora_config",
    "kasa_config",
    "monteclora_config",
)


# The stacks of a module of experts, in the order in which every family of transformers has them.
STACKS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass
class Change:
    """New value of one tensor: ``replaced`` or the base's, then ``+ scale * b @ a``, then DoRA, then token rows.

    a [r, in], b [out, r], magnitude [out], tokens: (indices [n], rows [n, in]), added (a bias) [out]. Of a stack of
    experts a [E, r, in] and b [E, out, r]; `stacks.in_files` says what that comes to in the files.
    """

    replaced: Stored | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 0.0
    magnitude: torch.Tensor | None = None
    tokens: tuple[torch.Tensor, torch.Tensor] | None = None
    added: torch.Tensor | None = None

    @property
    def only_replaces(self) -> bool:
        return self.replaced is not None and self.a is None and self.tokens is None and self.added is None

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """Rows [start : start + n) of the tensor, in float32, changed. The rounding is left to the caller."""
        total = rows.float()
        stop = start + total.shape[0]
        if self.a is not None and self.b is not None:
            update = self.b[start:stop] @ self.a
            total = total.add(update.reshape(total.shape), alpha=self.scale)
        if self.magnitude is not None:
            norm = torch.linalg.vector_norm(total.flatten(1), dim=1)
            total = total * (self.magnitude[start:stop] / norm).reshape(-1, *[1] * (total.dim() - 1))
        if self.tokens is not None:
            for index, row in zip(*self.tokens, strict=True):
                if start <= int(index) < stop:
                    total[int(index) - start] = row
        return total if self.added is None else total + self.added[start:stop]


def read_adapter(folder: Path) -> dict[str, Change]:
    """Tensor name in the base model -> what the adapter does to it.

    Raises `RunError` for a damaged adapter, one without any weight, and features that cannot be merged.
    """
    config = read_adapter_config(folder)
    try:
        tensors = read_header(folder / "adapter_model.safetensors")
    except RunError as error:
        raise RunError(f"{folder}: not a readable adapter: {error}") from None
    changes: dict[str, Change] = {}
    for key in tensors:
        _read_one(key, tensors, config, changes, folder)
    if not changes:
        raise RunError(f"{folder}: the adapter holds no weights; nothing can be merged")
    return changes


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json`` of a LoRA adapter that can be merged. Raises `RunError` otherwise."""
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder}: not a readable adapter ({first_line(error)})") from None
    if config.get("peft_type") != "LORA":
        raise RunError(f"{folder}: a {config.get('peft_type')} adapter; only LoRA adapters can be merged")
    for feature in UNSUPPORTED:
        if config.get(feature):
            raise RunError(f"{folder}: an adapter with {feature} cannot be merged here; use the adapter itself")
    return config


def _read_one(
    key: str, tensors: dict[str, Stored], config: dict[str, Any], changes: dict[str, Change], folder: Path
) -> None:
    """Enters one tensor of the adapter file into ``changes``; the second of a pair was entered with the first."""
    name = key.removeprefix("base_model.model.").replace(".modules_to_save.", ".")
    match = re.fullmatch(
        r"(.+?)\.(?:(?P<part>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(?P<kind>\.weight|\.bias)?"
        r"|token_adapter\.(?P<tokens>trainable_tokens_delta))",
        name,
    )
    if match is None:
        if "lora_" in name or "token_adapter" in name:
            raise RunError(f"{folder}: what {key} means is not known here; this adapter cannot be merged")
        name = name.replace(".base_layer.", ".")
        changes.setdefault(name, Change()).replaced = tensors[key]
        return
    module, part = match[1], match["part"]
    parameter = _stack_of(module, config)
    if parameter:
        if part == "lora_A":
            other = _partner(key, "lora_A", "lora_B", tensors).whole().float()
            changes[parameter] = _stack_change(key, tensors[key].whole().float(), other, config, folder)
        return
    change = changes.setdefault(f"{module}.bias" if match["kind"] == ".bias" else f"{module}.weight", Change())
    values = tensors[key].whole().float()
    if not values.isfinite().all():
        raise RunError(f"{folder}: {key} has values that are not finite; train again with a lower learning rate")
    if match["tokens"]:
        change.tokens = (torch.tensor(_token_indices(config, module)), values)
    elif match["kind"] == ".bias":
        change.added = values * _scale(module, _partner(key, "lora_B.bias", "lora_A.weight", tensors).shape[0], config)
    elif part == "lora_magnitude_vector":
        if f"{key.rsplit('.lora_', 1)[0]}.lora_A.weight" not in tensors:
            raise RunError(f"{folder}: DoRA on {module} cannot be merged here (it is no linear layer)")
        change.magnitude = values.reshape(-1)
    elif part in ("lora_A", "lora_embedding_A"):
        other = _partner(key, part, part.replace("A", "B"), tensors).whole().float()
        change.scale = _scale(module, values.shape[0], config)
        if part == "lora_A" and not config.get("fan_in_fan_out"):
            change.a, change.b = values.flatten(1), other.flatten(1)
        elif config.get("use_dora"):
            raise RunError(f"{folder}: DoRA on {module} cannot be merged here (its weight is stored transposed)")
        else:
            # Embeddings, and Conv1D as in GPT-2, store the transpose of what B A gives.
            change.a, change.b = other.T.contiguous(), values.T.contiguous()


def _stack_of(module: str, config: dict[str, Any]) -> str:
    """The stack of experts that PEFT's tensors at ``module`` belong to; "" if they belong to a layer.

    PEFT wraps a module once for each of its parameters, in their order, so the innermost wrapper is the first one's.
    """
    bare = re.sub(r"(\.base_layer)+$", "", module)
    depth = module.count(".base_layer", len(bare))
    targets = [f".{name}" for name in config.get("target_parameters") or ()]
    wrapped = [name for name in STACKS if any(f".{bare}.{name}".endswith(target) for target in targets)]
    return f"{bare}.{wrapped[-1 - depth]}" if depth < len(wrapped) else ""


def _stack_change(key: str, a: torch.Tensor, b: torch.Tensor, config: dict[str, Any], folder: Path) -> Change:
    """a [E * r, in] and b [out, r * E] as PEFT keeps them."""
    rank = int(config["r"])
    if config.get("rank_pattern") or len(a) % rank or b.shape[1] != len(a):
        raise RunError(f"{folder}: {key} is no adapter of experts of rank {rank}; this adapter cannot be merged")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise RunError(f"{folder}: {key} has values that are not finite; train again with a lower learning rate")
    by_expert = b.view(len(b), rank, -1).permute(2, 0, 1)
    return Change(a=a.view(-1, rank, a.shape[1]), b=by_expert, scale=_scale(key, rank, config))


def _partner(key: str, part: str, other: str, tensors: dict[str, Stored]) -> Stored:
    partner = key.replace(part, other)
    if partner not in tensors:
        raise RunError(f"the adapter is damaged: it has {key} but no {partner}")
    return tensors[partner]


def _scale(module: str, rank: int, config: dict[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA; alpha may have been set for this module alone."""
    pattern: dict[str, Any] = config.get("alpha_pattern") or {}
    own = [alpha for key, alpha in pattern.items() if re.match(rf"(.*\.)?({key})$", module)]
    alpha = float(own[0] if own else config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _token_indices(config: dict[str, Any], module: str) -> list[int]:
    """PEFT keeps one list, or one per embedding layer named by the end of its path."""
    given = config.get("trainable_token_indices")
    if isinstance(given, dict):
        matching = [indices for name, indices in given.items() if module == name or module.endswith(f".{name}")]
        given = matching[0] if matching else None
    if not given:
        raise RunError(f"{module}: the adapter has trained token rows but its configuration does not say which tokens")
    return [int(index) for index in given]
