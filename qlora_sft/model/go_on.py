"""Begin a new run with an existing adapter (``lora.from``), which is checked against base and settings, then loaded.

The new run is one of its own: its optimizer and its learning rate begin anew, and its adapter holds all that both have
learned, so merge and export need nothing of the first run.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_sft.config import Config
from qlora_sft.config_lora import LoraModules
from qlora_sft.errors import ConfigError, first_line
from qlora_sft.json_types import JsonObject
from qlora_sft.lora_from import (
    KEYS,
    adapter_folder,
    adapter_settings,
    base_of_adapter,
    begun_as,
    setting_of_adapter,
)
from qlora_sft.model.base import base_of
from qlora_sft.model.fingerprint import fingerprint
from qlora_sft.model.peft_targets import as_named
from qlora_sft.model.vocabulary import new_rows, trained_rows

if TYPE_CHECKING:
    from peft import PeftModel

# What would be another function than the one that is built here.
OTHER_FORMS = (
    "use_qalora", "use_bdlora", "modules_to_save", "lora_bias", "layers_to_transform", "layers_pattern",
    "layer_replication", "exclude_modules",
    "fan_in_fan_out", "alora_invocation_tokens", "arrow_config", "velora_config", "kasa_config", "monteclora_config",
    "corda_config", "eva_config", "lora_ga_config",
)  # fmt: skip


def check_adapter(config: Config, base: str) -> None:
    """Raises `ConfigError` with everything in which the adapter of ``lora.from`` does not go with base and settings."""
    path = config.lora.from_
    if path is None:
        return
    folder = adapter_folder(path)
    if folder is None:
        raise ConfigError(f"lora.from: {path}: neither a run with an adapter nor an adapter (no adapter_config.json)")
    settings = adapter_settings(folder)
    problems = _of_form(settings) or [*_of_settings(config, folder, settings), *_of_rows(config, base, folder)]
    trained, found = base_of_adapter(folder), fingerprint(base)
    if trained and found and trained != found:
        problems.append(f"was trained on other weights than those of {config.model.path}; name its base as model.path")
    if problems:
        raise ConfigError([f"lora.from: the adapter in {folder} {problem}" for problem in problems])


def _of_form(settings: JsonObject) -> list[str]:
    if settings.get("peft_type") != "LORA":
        return [f"is a {settings.get('peft_type')} adapter; only LoRA adapters can be continued"]
    used = [name for name in OTHER_FORMS if settings.get(name)]
    used += ["bias"] if settings.get("bias", "none") != "none" else []
    return [f"has {', '.join(used)}, which is not supported here"] if used else []


def _of_settings(config: Config, folder: Path, settings: JsonObject) -> list[str]:
    """Returns what is given beside ``from`` and is another. ``all-linear`` is compared when the model is there."""
    found = []
    for ours in KEYS:
        given, value = getattr(config.lora, ours), setting_of_adapter(settings, ours)
        if ours == "modules":
            given, value = _by_match(given), value or []
        elif isinstance(value, list):
            given = sorted(given) if isinstance(given, list) else given
        if given != value and given != "all-linear":
            found.append(f"has {ours} {value}, and lora.{ours} is {given}; leave lora.{ours} out")
    begun, given = begun_as(folder), config.lora.init
    if begun and (begun == "loftq") != (given == "loftq"):
        found.append(f"began as {begun}, and lora.init is {given}; leave lora.init out")
    return found


def _by_match(modules: list[LoraModules]) -> list[JsonObject]:
    """Returns ``lora.modules`` as `setting_of_adapter` has it."""
    trees = [{key: value for key, value in vars(each).items() if value is not None} for each in modules]
    return sorted(trees, key=lambda tree: str(tree["match"]))


def _of_rows(config: Config, base: str, folder: Path) -> list[str]:
    theirs, ours = trained_rows(folder), new_rows(config.model, base)
    if theirs == ours:
        return []
    return [
        f"has rows of its own for {len(theirs)} control tokens, and model.chat_template adds {len(ours)} to this base; "
        "take the chat template that it was trained with"
    ]


def start_from(model: PeftModel, path: str) -> str:
    """Gives a new ``model`` of PEFT the weights of the adapter at ``path``; says what it did.

    Raises `ConfigError` unless each weight of the one is a weight of the other, of the same shape.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    folder = adapter_folder(path)
    assert folder is not None, "check_adapter comes first"
    try:
        weights = load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError) as error:
        raise ConfigError(f"lora.from: {folder}: no readable adapter: {first_line(error)}") from None
    theirs = {(name, tuple(tensor.shape)) for name, tensor in weights.items()}
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    other = {name for name, _ in theirs ^ {(name, tuple(tensor.shape)) for name, tensor in state.items()}}
    if other:
        raise ConfigError(
            f"lora.from: the adapter in {folder} is for other layers than this model with lora.target_modules has "
            f"({len(other)} differ, first: {min(other)}); leave lora.target_modules out, or name its base as model.path"
        )
    with as_named(base_of(model)):
        set_peft_model_state_dict(model, weights)
    known = "checked" if base_of_adapter(folder) else "not known: there is no run around it"
    return f"goes on from {folder} ({len(weights)} tensors; the base that it was trained on is {known})"


def adapter_digest(path: str | None) -> str | None:
    """Returns the sha256 of the weights that a run goes on from; None if it goes on from none."""
    folder = adapter_folder(path) if path else None
    file = folder / "adapter_model.safetensors" if folder else None
    return hashlib.sha256(file.read_bytes()).hexdigest() if file and file.is_file() else None
