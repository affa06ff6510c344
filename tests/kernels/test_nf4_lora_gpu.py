"""What only a GPU can show of nf4_lora: real kernels, the memory they take, no waiting of the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mlp_cases import NAMES, errors, exact, parameters, peft_block, projection
from qlora_kernels.nf4_lora import Projection, lora_mlp
from qlora_kernels.nf4_lora.gated import Activation, activate, gated, gated_backward
from qlora_kernels.nf4_lora.reference import reference_mlp
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from waiting import no_waiting

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_pointwise_kernels(activation: Activation, dtype: torch.dtype) -> None:
    dh, gate, up = (torch.randn(301, 1003, device="cuda").mul_(scale).to(dtype) for scale in (1, 6, 1))
    g, u = gate.double().requires_grad_(), up.double().requires_grad_()
    h = activate(g, activation) * u
    truth = [h, h, *torch.autograd.grad(h, [g, u], dh.double(), retain_graph=True)]
    found = [gated(gate, up, activation), *gated_backward(dh.clone(), gate.clone(), up.clone(), activation)]
    limit = torch.finfo(dtype).eps
    assert max(errors(found, truth)) <= max(limit, 1e-6)


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("tile", [256, 4096])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)]
)
def test_error_within_twice_that_of_peft(dtype: torch.dtype, autocast: bool, tile: int, checkpointed: bool) -> None:
    block = peft_block(256, 768, dtype).cuda()
    layers = [projection(getattr(block, name)) for name in NAMES]
    x = torch.randn(1000, 256, device="cuda").to(dtype).requires_grad_()
    noise = torch.randn(1000, 256, device="cuda").to(torch.bfloat16)

    def measured(function: Any) -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            y = checkpoint(function, x, use_reentrant=False) if checkpointed else function(x)
        return [y, *torch.autograd.grad(y, [x, *parameters(*layers)], noise.to(y.dtype))]

    truth_layers = [exact(p, dtype) for p in layers]
    wide = x.detach().double().requires_grad_()
    y = reference_mlp(wide, *truth_layers, "silu")
    truth = [y, *torch.autograd.grad(y, [wide, *parameters(*truth_layers)], noise.double())]
    own = errors(measured(lambda x: lora_mlp(x, *layers, tile=tile, dtype=dtype)), truth)
    theirs = errors(measured(block), truth)
    for mine, other in zip(own, theirs, strict=True):
        assert mine <= 2 * other + 1e-6, (mine, other)


def big() -> tuple[Tensor, list[Projection]]:
    block = peft_block(1024, 4096, torch.bfloat16, rank=16).cuda()
    x = torch.randn(32768, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return x, [projection(getattr(block, name)) for name in NAMES]


def test_peak_memory_is_a_tile_and_the_weights() -> None:
    x, layers = big()
    tile, width, inner = 1024, 1024, 4096

    def step() -> None:
        y = lora_mlp(x, *layers, tile=tile, dtype=torch.bfloat16)
        torch.autograd.grad(y, [x, *parameters(*layers)], y.detach())

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    outputs = 2 * 2 * x.numel()  # y and dx
    tiles = 2 * tile * (4 * inner + 4 * width)
    weights = 2 * 3 * width * inner + 4 * 3 * width * inner // 64  # dequantised, and one set of scales in float32
    factors = 3 * 3 * 4 * 16 * (width + inner)
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * (outputs + tiles + weights + factors)


def test_the_host_never_waits() -> None:
    x, layers = big()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            y = checkpoint(lambda x: lora_mlp(x, *layers, dtype=torch.bfloat16), x, use_reentrant=False)
        torch.autograd.grad(y, [x, *parameters(*layers)], y.detach())

    step()  # compiles
    with no_waiting():
        step()
