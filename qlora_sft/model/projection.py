"""Describes a linear layer of a PEFT model for qlora_kernels, or says why it has to compute in its own way."""

from __future__ import annotations

from typing import Any

import torch
from qlora_kernels.nf4_lora import NF4Weight, Projection


def projection_of(layer: torch.nn.Module, training: bool) -> Projection | str:
    """Returns the frozen weight with the one active adapter, read anew from ``layer``; or why it computes something
    else.

    training: whether LoRA dropout would act.
    """
    adapted = hasattr(layer, "base_layer")
    base: Any = layer.base_layer if adapted else layer
    if type(base).__name__ not in ("Linear", "Linear4bit") or not isinstance(base, torch.nn.Linear):
        return f"{type(base).__name__} layers"
    if any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in (layer, base)):
        return "hooks on its layers"
    if base.weight.requires_grad:
        return "a trainable base weight"
    try:
        weight = frozen_weight(base)
    except ValueError as error:
        return str(error)
    factors = active_factors(layer, training) if adapted else None
    if isinstance(factors, str):
        return factors
    A, B, scale = factors or (None, None, 1.0)
    return Projection(weight, A, B, scale, base.bias)


def frozen_weight(base: Any) -> torch.Tensor | NF4Weight:
    """Returns the weight of a layer. Raises ValueError for a 4-bit weight that is not NF4 or not quantised yet."""
    if type(base).__name__ != "Linear4bit":
        return base.weight  # type: ignore[no-any-return]
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        raise ValueError("4-bit weights that are not quantised yet")
    return NF4Weight.from_bitsandbytes(base.weight.data, state)


def active_factors(layer: Any, training: bool) -> tuple[torch.Tensor, torch.Tensor, float] | str | None:
    """Returns (A, B, scale) of a PEFT LoRA layer, or None if it adds nothing now.

    A text names the feature that has no formula here.
    """
    if not hasattr(layer, "lora_A"):
        return f"{type(layer).__name__} adapters"
    if layer.merged:
        return "merged adapters"
    if layer.disable_adapters:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not active:
        return None
    if len(active) > 1:
        return f"{len(active)} active adapters"
    name = active[0]
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__.removesuffix('LinearVariant')} adapters"
    if layer.lora_bias[name]:
        return "lora_bias"
    dropout = float(getattr(layer.lora_dropout[name], "p", 0.0))  # Identity where there is none
    if training and dropout:
        return f"LoRA dropout {dropout:g}"
    if not layer.cast_input_dtype_enabled:
        return "disabled input casts"
    return layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])


def base_dtype(layer: object) -> torch.dtype | None:
    """Returns the type in which bitsandbytes' layer multiplies, whatever its input is; None for other layers."""
    return getattr(getattr(layer, "base_layer", layer), "compute_dtype", None)
