"""Linear layers with LoRA over frozen NF4 or dense weights: one, several of one input, or a gated MLP in tiles."""

from __future__ import annotations

from qlora_kernels.nf4 import NF4Weight
from qlora_kernels.nf4_lora.gated import Activation
from qlora_kernels.nf4_lora.linear import lora_linear
from qlora_kernels.nf4_lora.linears import lora_linears
from qlora_kernels.nf4_lora.mlp import default_tile, lora_mlp
from qlora_kernels.nf4_lora.projection import Projection

__all__ = ["Activation", "NF4Weight", "Projection", "default_tile", "lora_linear", "lora_linears", "lora_mlp"]
