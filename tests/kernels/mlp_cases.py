"""MLPs for the tests of nf4_lora: as PEFT and bitsandbytes compute them, as `Projection`s, and in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from qlora_kernels.nf4_lora import NF4Weight, Projection
from torch import Tensor

NAMES = ("gate", "up", "down")


def random_projection(out: int, width: int, rank: int | None = 3, bias: bool = False, seed: int = 0) -> Projection:
    """Dense, in float64; factors and bias require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    weight = new(out, width) / width**0.5
    A = None if rank is None else (new(rank, width) / width**0.5).requires_grad_()
    B = None if rank is None else new(out, rank).requires_grad_()
    return Projection(weight, A, B, 0.75, new(out).requires_grad_() if bias else None)


def parameters(*projections: Projection) -> list[Tensor]:
    return [t for p in projections for t in p.adapter if t is not None]


class Block(nn.Module):
    """down(silu(gate(x)) * up(x)) with PEFT's layers."""

    def __init__(self, width: int, inner: int, **_: Any):
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def peft_block(
    width: int, inner: int, dtype: torch.dtype, *, four_bit: bool = True, nested: bool = True, rank: int = 4
) -> Any:
    """A `Block` in NF4 (or dense, in ``dtype``) with float32 LoRA factors, none of them zero, as PEFT makes it."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    block = Block(width, inner).to(dtype)
    for name in NAMES if four_bit else ():
        linear = getattr(block, name)
        four = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype)
        four.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=nested
        )
        setattr(block, name, four.to("cpu"))
        four.support_avx512bf16_for_cpu = False
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(NAMES))
    model = get_peft_model(block, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train().base_model.model


def projection(layer: Any) -> Projection:
    """Of PEFT's layer: the same tensors."""
    weight = layer.base_layer.weight
    if hasattr(weight, "quant_state"):
        weight = NF4Weight.from_bitsandbytes(weight.data, weight.quant_state)
    return Projection(
        weight,
        layer.lora_A.default.weight,
        layer.lora_B.default.weight,
        layer.scaling["default"],
        layer.base_layer.bias,
    )


def exact(p: Projection, dtype: torch.dtype) -> Projection:
    """In float64, with the weight as it is dequantised to ``dtype``."""
    weight = p.weight.dequantize(dtype) if isinstance(p.weight, NF4Weight) else p.weight.detach()
    A, B = (None if t is None else t.detach().double().requires_grad_() for t in (p.A, p.B))
    return Projection(weight.double(), A, B, p.scale, None if p.bias is None else p.bias.detach().double())


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Relative errors, tensor by tensor."""
    return [
        float((f.detach().double() - t.detach()).norm() / t.detach().norm()) for f, t in zip(found, truth, strict=True)
    ]
