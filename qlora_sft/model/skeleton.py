"""A model without its weights: built by transformers on the meta device, from config.json alone."""

from __future__ import annotations

from typing import Any

import torch

from qlora_sft.config import Config
from qlora_sft.errors import ConfigError, first_line


def skeleton(settings: Any) -> Any:
    """``settings``: transformers' configuration object. Raises `ConfigError` for a model that is not known."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(settings)
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"model.path: {type(settings).__name__} is not understood here: {first_line(error)}"
        ) from None


def read_settings(config: Config, base: str) -> Any:
    """transformers' configuration object of the base, scaled as configured. Raises `ConfigError`."""
    from qlora_sft.model.rope import scaled_config

    try:
        return scaled_config(base, config.model.rope_scaling)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model.path: cannot read the configuration of {base}: {first_line(error)}") from None


def check_layers(config: Config, base: str) -> None:
    """Raises `ConfigError` for settings that name layers which the model has not, or has in another form.

    Loading would find that out too, after all data is prepared and all weights are read.
    """
    from qlora_sft.model.head import check_frozen_head, check_head
    from qlora_sft.model.load import target_modules
    from qlora_sft.model.vocabulary import new_rows

    if config.lora.target_modules == "all-linear" and not config.model.head_in_4bit:
        return
    model = skeleton(read_settings(config, base))
    target_modules(model, config.lora)
    if config.model.head_in_4bit:
        check_frozen_head(config.model, new_rows(config.model, base))
        check_head(model)
