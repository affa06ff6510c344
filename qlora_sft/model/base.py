"""Finds the model under its adapters, and its decoder layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    CausalModel: TypeAlias = PreTrainedModel | PeftModel


def base_of(model: CausalModel) -> PreTrainedModel:
    """Returns ``model`` itself, or the transformers model inside PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: CausalModel) -> list[nn.Module]:
    """Returns the decoder layers of ``model``, in the order of the forward."""
    return list(base_of(model).get_decoder().layers)


def has_unsloths_forward(base: PreTrainedModel) -> bool:
    """Returns whether Unsloth's own forward runs the layers, as on a GPU. It calls no function of transformers'."""
    return "unsloth" in getattr(base.get_decoder().forward, "__module__", "")
