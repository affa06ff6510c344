"""Queries, keys and angles for the tests of `rotate`, and the check that both of its paths share."""

from __future__ import annotations

import torch
from qlora_kernels.rotate import reference_rotate, rotate
from torch import Tensor

# tokens, query heads, key heads, size of a head, values that turn
SHAPES = [(7, 4, 2, 16, 16), (5, 3, 3, 24, 8), (1, 1, 1, 2, 2), (120, 9, 3, 64, 64), (3, 40, 8, 96, 48)]


def angles(tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [1, T, w], of which the halves differ, which the formulas allow."""
    angle = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def check(shape: tuple[int, int, int, int, int], dtype: torch.dtype, error: float, strided: bool = False) -> None:
    """Results, in place, and gradients against the textbook in float64. strided: gradients come head by head."""
    tokens, heads, groups, size, width = shape
    generator = torch.Generator().manual_seed(0)
    cos, sin = angles(tokens, width, dtype)
    start = [torch.randn(tokens, n * size, generator=generator).to(dtype) for n in (heads, groups)]
    noise = [torch.randn(x.shape, generator=generator).to(dtype) for x in start]
    leaves = [x.clone().requires_grad_() for x in start]
    inside = [leaf * 1.0 for leaf in leaves]
    turned = rotate(*inside, cos, sin, size)
    assert all(a is b for a, b in zip(turned, inside, strict=True))

    def grad_of(noise: Tensor) -> Tensor:
        return noise.view(tokens, -1, size).transpose(0, 1).contiguous().transpose(0, 1) if strided else noise

    results = [x.view(tokens, -1, size) if strided else x for x in turned]
    found = torch.autograd.grad(results, leaves, [grad_of(n) for n in noise])
    exact = [x.double().requires_grad_() for x in start]
    truth = [reference_rotate(x, cos, sin, size) for x in exact]
    wanted = torch.autograd.grad(truth, exact, [n.double() for n in noise])
    for f, w in zip([*turned, *found], [*truth, *wanted], strict=True):
        torch.testing.assert_close(f.double(), w, rtol=error, atol=error)
