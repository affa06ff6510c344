"""Builds a model without its weights: transformers makes it on the meta device, from config.json alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qlora_sft.config import Config
from qlora_sft.errors import ConfigError, first_line
from qlora_sft.model.base_files import has_experts, read_config
from qlora_sft.model.remote_code import is_foreign

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass


def meta_model(settings: PretrainedConfig) -> PreTrainedModel:
    """Builds the model without its weights.

    settings: transformers' configuration object. Raises `ConfigError` for a model that is not known.
    """
    try:
        with torch.device("meta"):
            return auto_class(settings).from_config(settings, trust_remote_code=is_foreign(settings))
    # Whatever a family's code raises for a configuration that it cannot make a model of.
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, ImportError, RuntimeError) as error:
        raise ConfigError(
            f"model.path: {type(settings).__name__} is not understood here: {first_line(error)}"
        ) from None


def auto_class(settings: PretrainedConfig) -> type[_BaseAutoModelClass]:
    """Returns the class of transformers that loads a model with this configuration as one that writes text.

    It is that for language models, which makes of some checkpoints with towers the language model alone. Where it has
    none, the whole model is loaded, with its towers for images and sound.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
    )

    known = {
        AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForMultimodalLM: MODEL_FOR_MULTIMODAL_LM_MAPPING,
    }
    able = [loader for loader, kinds in known.items() if type(settings) in kinds]
    chosen: type[_BaseAutoModelClass] = able[0] if able else AutoModelForCausalLM
    return chosen


def read_settings(config: Config, base: str) -> PretrainedConfig:
    """Returns transformers' configuration object of the base, scaled as configured.

    Raises `ConfigError` if it cannot be read.
    """
    from qlora_sft.model.rope import scaled_config

    try:
        return scaled_config(base, config.model.rope_scaling, config.model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model.path: cannot read the configuration of {base}: {first_line(error)}") from None


def check_layers(config: Config, base: str) -> None:
    """Raises `ConfigError` for settings that name layers which the model has not, or has in another form.

    Loading would find that out too, after all data is prepared and all weights are read.
    """
    from qlora_sft.model.experts import check_blocks, target_parameters
    from qlora_sft.model.head import check_frozen_head, check_head
    from qlora_sft.model.linears import shapes
    from qlora_sft.model.vocabulary import new_rows

    demanded, experts = config.memory.tiled_mlp == "on", has_experts(read_config(base))
    named = config.lora.target_modules != "all-linear" or config.lora.modules
    if not (named or config.model.head_in_4bit or demanded or experts):
        return
    model = meta_model(read_settings(config, base))
    shapes(model, config.lora)
    target_parameters(model, config.lora)
    if config.model.load_in_4bit:
        check_blocks(model)
    if config.model.head_in_4bit:
        check_frozen_head(config.model, new_rows(config.model, base))
        check_head(model)
    if demanded:
        why_parts_stay(model, config)


def why_parts_stay(model: PreTrainedModel, config: Config) -> tuple[str, str]:
    """Says why the MLPs of a model without weights would not be tiled, and why its q, k, v and o would be left to PEFT;
    "" for what would be ours.

    Goes by the rules of the run, which look at layers with their adapters, so ``model`` is given some. Raises
    `ConfigError` where tiles are demanded and cannot be.
    """
    from peft import LoraConfig, inject_adapter_in_model

    from qlora_sft.model.base import decoder_layers
    from qlora_sft.model.linears import peft_settings
    from qlora_sft.model.mlp import why_not_tiled
    from qlora_sft.model.peft_targets import as_named
    from qlora_sft.model.qkv import why_not_lean

    model.requires_grad_(False)
    lora = LoraConfig(**peft_settings(model, config.lora))
    with torch.device("meta"), as_named(model):
        inject_adapter_in_model(lora, model)
    blocks = decoder_layers(model)
    return why_not_tiled(blocks, config.memory.tiled_mlp), why_not_lean(blocks)
