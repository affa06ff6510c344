"""The pointwise Triton kernels of nf4_lora, run by Triton's interpreter. Started by test_triton_interpreted.py."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from qlora_kernels.nf4_lora import Activation, pointwise
from qlora_kernels.nf4_lora.gated import activate, gated_backward, runs_triton


def wide_inputs(dtype: torch.dtype, shape: tuple[int, int]) -> list[torch.Tensor]:
    """dh, gate and up; gate reaches far into both tails."""
    generator = torch.Generator().manual_seed(0)
    dh, gate, up = (torch.randn(shape, generator=generator) for _ in range(3))
    return [t.to(dtype) for t in (dh, gate * 6, up)]


SHAPES = [(7, 301), (1, 1), (0, 5), (4, 1024)]
ROUNDED = [(torch.float16, 1e-3, SHAPES[0]), (torch.bfloat16, 8e-3, SHAPES[0])]


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize(("dtype", "error", "shape"), [*((torch.float32, 2e-6, s) for s in SHAPES), *ROUNDED], ids=str)
def test_forward_and_backward(dtype: torch.dtype, error: float, activation: Any, shape: tuple[int, int]) -> None:
    assert runs_triton(torch.device("cpu"), dtype)
    dh, gate, up = wide_inputs(dtype, shape)
    g, u = gate.double().requires_grad_(), up.double().requires_grad_()
    h = activate(g, activation) * u
    wanted = [h.detach(), *torch.autograd.grad(h, [g, u], dh.double())]
    forward = pointwise.gated(gate, up, activation, torch.empty_like(gate))
    over = [t.clone() for t in (gate, up)]
    backward = pointwise.gated_backward(dh.clone(), *over, activation, *over)
    beside = gated_backward(dh.clone(), gate, up, activation, keep=True)
    for found, truth in zip([forward, *backward, *beside], [wanted[0], *wanted, *wanted], strict=True):
        torch.testing.assert_close(
            found.double(), truth, rtol=error, atol=max(1e-6, error / 10)
        )  # 1 + erf cancels far left
