"""Refuses a base whose files lack weights that texts go through; a tower that no text reaches may be missing."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from qlora_sft.errors import ConfigError
from qlora_sft.model.base import decoder_of
from qlora_sft.model.base_files import has_towers, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_missing(missing: Collection[str], model: PreTrainedModel, base: str) -> None:
    """Raises `ConfigError` if one of the weights that were ``missing`` in the folder ``base`` is needed."""
    if needed := _needed(missing, model, base) if missing else []:
        raise ConfigError(
            f"model.path: the files in {base} lack {len(needed)} weights of {type(model).__name__} (first: "
            f"{needed[0]}), which would be random numbers; they are of another kind of model, or not all here"
        )


def _needed(missing: Collection[str], model: PreTrainedModel, base: str) -> list[str]:
    """Returns the missing weights without which no text can be written.

    Text-only fine-tunes are saved under the configuration of the model with towers, but without these. No text goes
    through them, and a merge writes only the weights that the base's files have.
    """
    if not has_towers(read_config(base)):
        return sorted(missing)
    parts = [decoder_of(model), model.get_input_embeddings(), model.get_output_embeddings()]
    prefixes = tuple(f"{name}." if name else "" for name, module in model.named_modules() if module in parts)
    return sorted(name for name in missing if name.startswith(prefixes))
