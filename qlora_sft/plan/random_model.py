"""Builds a model of a given shape with random weights, as it would be loaded for training: NF4 base and LoRA.

Measurements use it that need no trained model. One tensor is made at a time, so that never more than the largest exists
in full precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qlora_sft.config import Config
from qlora_sft.model.remote_code import is_foreign

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

    from qlora_sft.model.attention import Way


def random_model(
    settings: PretrainedConfig, config: Config, dtype: torch.dtype, device: torch.device, way: Way = "varlen"
) -> PeftModel:
    """Returns a PeftModel in training mode that attends by document.

    settings: transformers' configuration object. way: as in `use_document_attention`.
    """
    from accelerate import init_empty_weights
    from peft import LoraConfig, get_peft_model

    from qlora_sft.model.attention import use_document_attention
    from qlora_sft.model.experts import target_parameters
    from qlora_sft.model.experts_lora import use_experts_lora
    from qlora_sft.model.experts_scored import use_our_experts
    from qlora_sft.model.head import quantize_head
    from qlora_sft.model.linears import peft_settings
    from qlora_sft.model.load import disable_inference_repacking
    from qlora_sft.model.meta_model import auto_class
    from qlora_sft.model.peft_targets import as_named

    with init_empty_weights(include_buffers=False):
        model = auto_class(settings).from_config(settings, dtype=dtype, trust_remote_code=is_foreign(settings))
    model.tie_weights()
    told, experts = peft_settings(model, config.lora), target_parameters(model, config.lora)
    if config.model.load_in_4bit:
        _quantize(model, dtype, device)
        # As a loader leaves it. Without this PEFT would take its adapters for those of 16-bit layers, which cast their
        # inputs to float32.
        model.is_loaded_in_4bit = True
    _fill(model, dtype, device, config.model.load_in_4bit)
    model.tie_weights()
    use_our_experts(model)
    if config.model.head_in_4bit:
        quantize_head(model, dtype)
    model.requires_grad_(False)
    disable_inference_repacking(model)
    adapters = LoraConfig(**told, target_parameters=experts or None)
    with as_named(model):
        peft = get_peft_model(model, adapters).train()
    use_experts_lora(peft)
    use_document_attention(peft, way)
    return peft


def _quantize(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces every linear layer but those that stay in full by one with random NF4 weights, doubly quantised."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    from qlora_sft.model.base import layer_list
    from qlora_sft.model.head import nf4_linear
    from qlora_sft.model.linears import layers_prefix, not_quantized

    prefix, kept = layers_prefix(model), not_quantized(model)
    for path, parent in list(layer_list(model).named_modules()):
        for name, old in list(parent.named_children()):
            if type(old) is nn.Linear and should_convert_module(f"{prefix}{path}.{name}", kept):
                setattr(parent, name, nf4_linear(old, _random(old.weight, dtype, device), dtype))


def _fill(model: nn.Module, dtype: torch.dtype, device: torch.device, in_4bit: bool) -> None:
    """Gives every parameter that has no values yet random ones, on ``device``; experts become NF4 if ``in_4bit``."""
    from qlora_sft.model.experts import stack_names
    from qlora_sft.model.experts_load import quantize_experts

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                filled = nn.Parameter(_random(parameter, dtype, device), requires_grad=False)
                setattr(module, name, filled)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
        if in_4bit and stack_names(module):
            quantize_experts(module)


def _random(like: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns small random values for a matrix, as trained ones are, and ones for a norm or a bias."""
    if like.dim() < 2:
        return torch.ones(like.shape, dtype=dtype, device=device)
    return torch.empty(like.shape, dtype=dtype, device=device).normal_(std=0.02)
