"""A small stack of decoder layers over packed documents, and one training step through it by tiers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from qlora_kernels.offload import HostSlab, Schedule, Tier, engine_for, layer_functions, slab_bytes
from torch import Tensor, nn

WIDTH, HEADS = 32, 4


class Block(nn.Module):
    """Norm, attention document by document, dropout, norm, gated MLP, dropout: what a decoder layer does."""

    def __init__(self, dropout: float):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bounds: Sequence[int] = ()) -> Tensor:
        q, k, v = self.qkv(F.rms_norm(x, (WIDTH,))).view(1, -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        edges = bounds or (0, x.shape[1])
        parts = [
            F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True)
            for a, b in pairwise(edges)
        ]
        x = x + self.dropout(self.out(torch.cat(parts, 2).transpose(1, 2).reshape(x.shape)))
        gate, up = self.up(F.rms_norm(x, (WIDTH,))).chunk(2, -1)
        return x + self.dropout(self.down(F.silu(gate) * up))


class Stack(nn.Module):
    def __init__(self, n_layers: int, dropout: float = 0.0, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(dropout) for _ in range(n_layers))
        self.to(dtype)

    def forward(self, x: Tensor, functions: Sequence[Any], bounds: Sequence[int] = ()) -> Tensor:
        for layer, function in zip(self.layers, functions, strict=True):
            # As transformers does it: keywords are bound, the hidden states are positional.
            x = function(lambda h, layer=layer: layer(h, bounds=bounds), x)
        return x.float().pow(2).mean()

    def gradients(self) -> dict[str, Tensor]:
        found = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}
        self.zero_grad()
        return found


def row(tokens: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return (
        torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(seed)).to(device, dtype).requires_grad_()
    )


def schedule_for(
    tiers: Sequence[Tier], tokens: int, itemsize: int, device: str = "cpu", slots: int | None = None, **options: Any
) -> Schedule:
    place = torch.device(device)
    slots = tiers.count("offload") if slots is None else slots
    return Schedule(HostSlab(slots, slab_bytes(1, tokens, WIDTH, itemsize), place), engine_for(place), **options)


def step(stack: Stack, functions: Sequence[Any], rows: Sequence[tuple[Tensor, Sequence[int]]]) -> dict[str, Tensor]:
    """Forward and backward of every row with the same dropout; gradients accumulate. Those of the rows come along."""
    torch.manual_seed(7)
    for x, bounds in rows:
        x.grad = None
        stack(x, functions, bounds).backward()
    return stack.gradients() | {f"row {i}": x.grad.clone() for i, (x, _) in enumerate(rows) if x.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def checkpointed(n_layers: int) -> list[Any]:
    """The reference: torch's own checkpointing of every layer."""
    return layer_functions(["checkpoint"] * n_layers, None)
