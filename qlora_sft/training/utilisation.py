"""Counts the floating-point operations of a training step, and knows the peak rates of GPUs.

Their ratio is the model FLOPs utilisation (MFU). Recomputation is not counted, because it is not work of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlora_sft.model.base import base_of, decoder_layers
from qlora_sft.model.base_files import has_experts

if TYPE_CHECKING:
    from qlora_sft.model.base import CausalModel

# Dense products of 16-bit matrices that add up in float32, in 10^12 operations a second, as NVIDIA's data sheets have
# them without sparsity, by what torch calls the card. Of two that fit, the longer name counts.
PEAKS = {
    "B200": 2250.0, "H200": 989.4, "H100 80GB HBM3": 989.4, "H100 PCIe": 756.0, "H100 NVL": 835.0, "GH200": 989.4,
    "A100": 312.0, "A10": 125.0, "L40S": 362.0, "L4": 121.0, "Tesla T4": 65.0, "V100-SXM2": 125.0,
    "RTX 3090": 71.0, "RTX 4090": 165.2, "RTX 5090": 209.5,
}  # fmt: skip


@dataclass(frozen=True)
class StepWork:
    """Holds what a training step computes, in floating-point operations."""

    per_token: float
    """Of all linear layers, for a token."""
    per_supervised: float
    """Of the output head, for a supervised token."""
    per_pair: float
    """Of attention, for a token and one that it attends to."""

    def of(self, tokens: int, supervised: int, pairs: float) -> float:
        """Returns the operations of a step."""
        return self.per_token * tokens + self.per_supervised * supervised + self.per_pair * pairs


def step_work(model: CausalModel) -> StepWork | None:
    """Returns what a step of ``model`` computes; None for a mixture of experts, where every token uses only some
    experts.

    A product with a frozen weight takes 2 operations per value in the forward and 2 in the backward, for the gradient
    of its input; one with a trained weight takes 2 more. Attention takes 4 per pair and channel in the forward and
    twice as many in the backward; windows are not considered.
    """
    base = base_of(model)
    config = base.config.get_text_config()
    if has_experts(config.to_dict()):
        return None
    linears = [module for layer in decoder_layers(model) for module in layer.modules() if isinstance(module, nn.Linear)]
    per_token = sum((6 if _is_trained(each) else 4) * each.in_features * each.out_features for each in linears)
    heads = config.num_attention_heads
    channels = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    attending = sum("attention" in each and "linear" not in each for each in types)
    return StepWork(per_token, 4.0 * config.vocab_size * config.hidden_size, 12.0 * channels * attending)


def _is_trained(module: nn.Linear) -> bool:
    return module.weight.requires_grad


def peak_of(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns the operations that a GPU can do in a second at most in ``dtype``; None where that is not known."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return peak_of_card(name) if torch.cuda.get_device_capability(device) >= (8, 0) or dtype == torch.float16 else None


def peak_of_card(name: str) -> float | None:
    """Returns the operations a second of the card that torch calls ``name``, in 16 bits; None for one not known."""
    words = f" {name.replace('-', ' ')} "
    known = [card for card in PEAKS if f" {card.replace('-', ' ')} " in words and "Laptop" not in words]
    return PEAKS[max(known, key=len)] * 1e12 if known else None
