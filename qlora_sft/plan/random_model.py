"""Builds a model of a given shape with random weights, as it would be loaded for training: NF4 base and LoRA.

Measurements use it that need no trained model. One tensor is made at a time, so that never more than the largest exists
in full precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qlora_sft.config import Config

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig


def random_model(settings: PretrainedConfig, config: Config, dtype: torch.dtype, device: torch.device) -> PeftModel:
    """Returns a PeftModel in training mode that attends by document.

    settings: transformers' configuration object.
    """
    from accelerate import init_empty_weights
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from qlora_sft.model.attention import use_document_attention
    from qlora_sft.model.head import quantize_head
    from qlora_sft.model.load import disable_inference_repacking, target_modules

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    model.tie_weights()
    targets = target_modules(model, config.lora)
    if config.model.load_in_4bit:
        _quantize(model.get_decoder().layers, dtype, device)
        # As a loader leaves it. Without this PEFT would take its adapters for those of 16-bit layers, which cast their
        # inputs to float32.
        model.is_loaded_in_4bit = True
    _fill(model, dtype, device)
    model.tie_weights()
    if config.model.head_in_4bit:
        quantize_head(model, dtype)
    model.requires_grad_(False)
    disable_inference_repacking(model)
    lora = config.lora
    adapters = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
    peft = get_peft_model(model, adapters).train()
    use_document_attention(peft)
    return peft


def _quantize(layers: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces every linear layer by one with random NF4 weights, doubly quantised."""
    from qlora_sft.model.head import nf4_linear

    for parent in list(layers.modules()):
        for name, old in list(parent.named_children()):
            if type(old) is nn.Linear:
                setattr(parent, name, nf4_linear(old, _random(old.weight, dtype, device), dtype))


def _fill(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Gives every parameter that has no values yet random ones, on ``device``."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                filled = nn.Parameter(_random(parameter, dtype, device), requires_grad=False)
                setattr(module, name, filled)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def _random(like: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns small random values for a matrix, as trained ones are, and ones for a norm or a bias."""
    if like.dim() < 2:
        return torch.ones(like.shape, dtype=dtype, device=device)
    return torch.empty(like.shape, dtype=dtype, device=device).normal_(std=0.02)
