"""Finds the model under its adapters, and its decoder layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from torch import nn

from qlora_sft.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    CausalModel: TypeAlias = PreTrainedModel | PeftModel


def base_of(model: CausalModel) -> PreTrainedModel:
    """Returns ``model`` itself, or the transformers model inside PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model: CausalModel) -> PreTrainedModel:
    """Returns the part of ``model`` that turns token ids into hidden states, without the output head.

    transformers' ``get_decoder`` gives the whole model, or its head, where a family names its parts in another way.
    """
    from transformers import PreTrainedModel

    base = base_of(model)
    for found in (base.get_decoder(), getattr(base, "model", None), base.base_model):
        if isinstance(found, PreTrainedModel) and found is not base:
            return found
    raise ConfigError(f"model.path: {type(base).__name__} has no decoder that could be told from its output head")


def layer_list(model: CausalModel) -> nn.ModuleList:
    """Returns the list of ``model``'s decoder layers as it stands in the model.

    Raises `ConfigError` where there is none, or several: what runs one layer after the other would miss the rest.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = decoder_of(model)
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList):
        _check_reached(model, layers)
        return layers
    lists = [
        module
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(each, GradientCheckpointingLayer) for each in module)
    ]
    if len(lists) != 1:
        raise ConfigError(
            f"model.path: {type(base_of(model)).__name__} has {len(lists) or 'no'} lists of decoder layers, where one "
            "is needed; models of this kind cannot be trained here"
        )
    return lists[0]


def _check_reached(model: CausalModel, layers: nn.ModuleList) -> None:
    """Raises `ConfigError` for a model with layers that attend to images only, as Llama 3.2 Vision has.

    Texts pass them by, so they could not learn anything, and what they keep could not be measured.
    """
    kinds = {type(each).__name__ for each in layers}
    by = sorted(kind for kind in kinds if "CrossAttention" in kind)
    if by and len(kinds) > 1:
        raise ConfigError(
            f"model.path: {type(base_of(model)).__name__} has layers for images that texts pass by ({', '.join(by)}), "
            "which cannot be trained here; name the language model that it was made from (of Llama 3.2 Vision: Llama "
            "3.1 in the same size)"
        )


def decoder_layers(model: CausalModel) -> list[nn.Module]:
    """Returns the decoder layers of ``model`` in their order. Raises `ConfigError` as `layer_list` does."""
    return list(layer_list(model))


def has_unsloths_forward(base: PreTrainedModel) -> bool:
    """Returns whether Unsloth's own forward runs the layers, as on a GPU. It calls no function of transformers'."""
    return "unsloth" in getattr(decoder_of(base).forward, "__module__", "")
