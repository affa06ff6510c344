"""The model under its adapters, and its decoder layers."""

from __future__ import annotations

from typing import Any

from torch import nn


def base_of(model: Any) -> Any:
    """``model`` itself, or the transformers model inside PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: Any) -> list[nn.Module]:
    return list(base_of(model).get_decoder().layers)


def has_unsloths_forward(base: Any) -> bool:
    """Returns whether Unsloth's own forward runs the layers, as on a GPU. It calls no function of transformers'."""
    return "unsloth" in getattr(base.get_decoder().forward, "__module__", "")
