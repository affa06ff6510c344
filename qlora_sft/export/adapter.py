"""Reads a PEFT LoRA adapter as the update that it makes to each tensor of the base model."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch

from qlora_sft.errors import RunError, first_line
from qlora_sft.model.tensors import Stored, read_header

# These features are refused, because their merged form is no sum of tensors or because nobody here has checked it.
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


class LoraSettings(TypedDict, total=False):
    """Holds what ``adapter_config.json`` says that decides the merged weights."""

    peft_type: str
    r: int
    rank_pattern: dict[str, int] | None
    lora_alpha: float
    alpha_pattern: dict[str, float] | None
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    trainable_token_indices: list[int] | dict[str, list[int]] | None
    target_parameters: list[str] | None


@dataclass
class TensorUpdate:
    """Holds how one tensor gets its new value.

    The value starts as ``replaced`` or else the base's. Then ``scale * b @ a`` is added, then come DoRA, the rows of
    trained tokens, and ``added``. Shapes: a [r, in], b [out, r], magnitude [out], tokens (indices [n], rows [n, in]),
    added, which is a bias, [out]. The update of a stack of experts has a [E, r, in] and b [E, out, r];
    `stacks.in_files` says what that comes to in the files.
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
        """Says whether the new value does not depend on the base's."""
        return self.replaced is not None and self.a is None and self.tokens is None and self.added is None

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """Returns the new rows [start : start + n) of the tensor in float32. The caller rounds them."""
        total = rows.float()
        stop = start + total.shape[0]
        if self.a is not None and self.b is not None:
            product = self.b[start:stop] @ self.a
            total = total.add(product.reshape(total.shape), alpha=self.scale)
        if self.magnitude is not None:
            norm = torch.linalg.vector_norm(total.flatten(1), dim=1)
            total = total * (self.magnitude[start:stop] / norm).reshape(-1, *[1] * (total.dim() - 1))
        if self.tokens is not None:
            for index, row in zip(*self.tokens, strict=True):
                if start <= int(index) < stop:
                    total[int(index) - start] = row
        return total if self.added is None else total + self.added[start:stop]


def read_adapter(folder: Path) -> dict[str, TensorUpdate]:
    """Returns the update of every tensor that the adapter touches, by the tensor's name in the base model.

    Raises `RunError` for a damaged adapter, one without any weight, and features that cannot be merged.
    """
    config = read_adapter_config(folder)
    try:
        tensors = read_header(folder / "adapter_model.safetensors")
    except RunError as error:
        raise RunError(f"{folder}: not a readable adapter: {error}") from None
    updates: dict[str, TensorUpdate] = {}
    for key in tensors:
        _read_one(key, tensors, config, updates, folder)
    if not updates:
        raise RunError(f"{folder}: the adapter holds no weights; nothing can be merged")
    return updates


def read_adapter_config(folder: Path) -> LoraSettings:
    """Reads the ``adapter_config.json`` of a LoRA adapter. Raises `RunError` for an adapter that cannot be merged."""
    try:
        config: LoraSettings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder}: not a readable adapter ({first_line(error)})") from None
    if config.get("peft_type") != "LORA":
        raise RunError(f"{folder}: a {config.get('peft_type')} adapter; only LoRA adapters can be merged")
    for feature in UNSUPPORTED:
        if config.get(feature):
            raise RunError(f"{folder}: an adapter with {feature} cannot be merged here; use the adapter itself")
    return config


def _read_one(
    key: str, tensors: dict[str, Stored], config: LoraSettings, updates: dict[str, TensorUpdate], folder: Path
) -> None:
    """Enters one tensor of the adapter file into ``updates``. The B of a pair is entered together with its A."""
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
        updates.setdefault(name, TensorUpdate()).replaced = tensors[key]
        return
    module, part = match[1], match["part"]
    parameter = _stack_of(module, config)
    if parameter:
        if part == "lora_A":
            other = _partner(key, "lora_A", "lora_B", tensors).whole().float()
            updates[parameter] = _stack_update(key, tensors[key].whole().float(), other, config, folder)
        return
    update = updates.setdefault(f"{module}.bias" if match["kind"] == ".bias" else f"{module}.weight", TensorUpdate())
    values = tensors[key].whole().float()
    if not values.isfinite().all():
        raise RunError(f"{folder}: {key} has values that are not finite; train again with a lower learning rate")
    if match["tokens"]:
        update.tokens = (torch.tensor(_token_indices(config, module)), values)
    elif match["kind"] == ".bias":
        update.added = values * scale_of(
            module, _partner(key, "lora_B.bias", "lora_A.weight", tensors).shape[0], config
        )
    elif part == "lora_magnitude_vector":
        if f"{key.rsplit('.lora_', 1)[0]}.lora_A.weight" not in tensors:
            raise RunError(f"{folder}: DoRA on {module} cannot be merged here (it is no linear layer)")
        update.magnitude = values.reshape(-1)
    elif part in ("lora_A", "lora_embedding_A"):
        other = _partner(key, part, part.replace("A", "B"), tensors).whole().float()
        update.scale = scale_of(module, values.shape[0], config)
        if part == "lora_A" and not config.get("fan_in_fan_out"):
            update.a, update.b = values.flatten(1), other.flatten(1)
        elif config.get("use_dora"):
            raise RunError(f"{folder}: DoRA on {module} cannot be merged here (its weight is stored transposed)")
        else:
            # Embeddings, and layers of the type Conv1D as in GPT-2, store the transpose of the product B A.
            update.a, update.b = other.T.contiguous(), values.T.contiguous()


def _stack_of(module: str, config: LoraSettings) -> str:
    """Returns the stack of experts that PEFT's tensors at ``module`` belong to; "" if they belong to a linear layer.

    PEFT wraps a module once for each of its adapted parameters, in their order. So the innermost wrapper belongs to the
    first of them.
    """
    bare = re.sub(r"(\.base_layer)+$", "", module)
    depth = module.count(".base_layer", len(bare))
    targets = [f".{name}" for name in config.get("target_parameters") or ()]
    wrapped = [name for name in STACKS if any(f".{bare}.{name}".endswith(target) for target in targets)]
    return f"{bare}.{wrapped[-1 - depth]}" if depth < len(wrapped) else ""


def _stack_update(key: str, a: torch.Tensor, b: torch.Tensor, config: LoraSettings, folder: Path) -> TensorUpdate:
    """Returns the update of a stack of experts from the factors that PEFT keeps: a [E * r, in] and b [out, r * E].

    ``key`` is the name of one of them, for messages. Raises `RunError` for factors of another shape, or with values
    that are not finite.
    """
    rank = int(config["r"])
    if len(a) % rank or b.shape[1] != len(a):
        raise RunError(f"{folder}: {key} is no adapter of experts of rank {rank}; this adapter cannot be merged")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise RunError(f"{folder}: {key} has values that are not finite; train again with a lower learning rate")
    by_expert = b.view(len(b), rank, -1).permute(2, 0, 1)
    return TensorUpdate(a=a.view(-1, rank, a.shape[1]), b=by_expert, scale=scale_of(key, rank, config))


def _partner(key: str, part: str, other: str, tensors: dict[str, Stored]) -> Stored:
    """Returns the tensor whose name has ``other`` in place of ``part``. Raises `RunError` if there is none."""
    partner = key.replace(part, other)
    if partner not in tensors:
        raise RunError(f"the adapter is damaged: it has {key} but no {partner}")
    return tensors[partner]


def scale_of(module: str, rank: int, config: LoraSettings) -> float:
    """Returns alpha / r, or alpha / sqrt(r) with rsLoRA. The configuration may set alpha for this module alone."""
    pattern = config.get("alpha_pattern") or {}
    own = [alpha for key, alpha in pattern.items() if re.match(rf"(.*\.)?({key})$", module)]
    alpha = float(own[0] if own else config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _token_indices(config: LoraSettings, module: str) -> list[int]:
    """Returns the indices of the trained tokens of an embedding.

    PEFT keeps one list for all, or one list per embedding layer, which is named by the end of its path. Raises
    `RunError` if there is none.
    """
    given = config.get("trainable_token_indices")
    if isinstance(given, dict):
        matching = [indices for name, indices in given.items() if module == name or module.endswith(f".{name}")]
        given = matching[0] if matching else None
    if not given:
        raise RunError(f"{module}: the adapter has trained token rows but its configuration does not say which tokens")
    return [int(index) for index in given]
