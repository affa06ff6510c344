"""Computes linear layers with LoRA over frozen NF4 or dense weights: one, several of one input, an MLP, experts."""

from __future__ import annotations

from qlora_kernels.nf4 import NestedScales, NF4Stack, NF4Weight
from qlora_kernels.nf4_lora.experts import Experts, lora_experts
from qlora_kernels.nf4_lora.gated import Activation
from qlora_kernels.nf4_lora.linear import lora_linear
from qlora_kernels.nf4_lora.linears import lora_linears
from qlora_kernels.nf4_lora.mlp import default_tile, lora_mlp
from qlora_kernels.nf4_lora.projection import Projection

__all__ = [
    "Activation", "Experts", "NF4Stack", "NF4Weight", "NestedScales", "Projection", "default_tile", "lora_experts",
    "lora_linear", "lora_linears", "lora_mlp",
]  # fmt: skip
