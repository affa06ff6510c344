"""A mixture of experts with LoRA over frozen dense and NF4 weights against the textbook."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qlora_kernels.nf4_lora import Experts, lora_experts
from qlora_kernels.nf4_lora import experts as module
from qlora_kernels.nf4_lora.reference import reference_experts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

COUNT, WIDTH, INNER = 5, 12, 7


def random_experts(out: int, width: int, rank: int | None, transposed: bool, bias: bool, seed: int) -> Experts:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    weight = normal(COUNT, width, out) if transposed else normal(COUNT, out, width)
    if rank is None:
        return Experts(weight, transposed, bias=normal(COUNT, out) if bias else None)
    # B as PEFT keeps it: [out, r * E], experts last.
    A, B = normal(COUNT, rank, width).requires_grad_(), normal(out, rank, COUNT).requires_grad_()
    return Experts(weight, transposed, A, B.permute(2, 0, 1), 0.5, normal(COUNT, out) if bias else None)


def swiglu(z: Tensor) -> Tensor:
    gate, up = z.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def routed(tokens: int, top: int, seed: int, absent: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, WIDTH, generator=draw, dtype=torch.float64, requires_grad=True)
    index = torch.stack([torch.randperm(COUNT + absent, generator=draw)[:top] for _ in range(tokens)])
    weights = torch.rand(tokens, top, generator=draw, dtype=torch.float64, requires_grad=True)
    return x, index, weights


def gradients(y: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, wanted, noise)]


def two(rank_up: int | None, rank_down: int | None, transposed: bool, bias: bool) -> tuple[Experts, Experts]:
    up = random_experts(2 * INNER, WIDTH, rank_up, transposed, bias, 1)
    return up, random_experts(WIDTH, INNER, rank_down, transposed, bias, 2)


def factors(*projections: Experts) -> list[Tensor]:
    return [f for p in projections for f in (p.A, p.B) if f is not None]


@given(
    tokens=st.integers(1, 40),
    top=st.integers(1, 4),
    tile=st.integers(1, 100),
    values=st.sampled_from([1, 500, 2**25]),
    ranks=st.tuples(*[st.sampled_from([None, 1, 3])] * 2),
    transposed=st.booleans(),
    bias=st.booleans(),
    absent=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_experts_equal_the_textbook(
    tokens: int, top: int, tile: int, values: int, ranks: Any, transposed: bool, bias: bool, absent: bool
) -> None:
    up, down = two(*ranks, transposed, bias)
    x, index, weights = routed(tokens, top, tokens, absent)
    wanted = [x, weights, *factors(up, down)]
    before, module.GROUP_VALUES = module.GROUP_VALUES, values
    try:
        found = gradients(lora_experts(x, index, weights, up, down, swiglu, tile=tile), wanted)
    finally:
        module.GROUP_VALUES = before
    for f, w in zip(found, gradients(reference_experts(x, index, weights, up, down, swiglu), wanted), strict=True):
        torch.testing.assert_close(f, w, rtol=1e-9, atol=1e-9)


def test_an_expert_without_a_token_gets_a_gradient_of_zero() -> None:
    up, down = two(2, 2, False, False)
    x, index, weights = routed(6, 1, 0)
    index.fill_(3)
    lora_experts(x, index, weights, up, down, swiglu).sum().backward()
    for p in (up, down):
        assert p.A is not None
        assert p.A.grad is not None
        assert [bool(g.any()) for g in p.A.grad] == [False, False, False, True, False]


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.name().removeprefix("aten::").split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_checkpointing_computes_no_expert_a_second_time_before_its_backward() -> None:
    up, down = two(2, 2, False, False)
    x, index, weights = routed(20, 2, 0)

    def layer(x: Tensor, weights: Tensor) -> Tensor:
        return lora_experts(x, index, weights, up, down, swiglu)

    plain = gradients(layer(x, weights), [x, weights, *factors(up, down)])
    y = checkpoint(layer, x, weights, use_reentrant=False)
    again = gradients(y, [x, weights, *factors(up, down)])
    for f, w in zip(again, plain, strict=True):
        assert torch.equal(f, w)
    with Products() as alone:
        gradients(layer(x, weights), [x, weights])
    with Products() as checkpointed:
        gradients(checkpoint(layer, x, weights, use_reentrant=False), [x, weights])
    assert checkpointed.count["mm"] == alone.count["mm"]


def test_shapes_that_do_not_fit_and_trained_weights_are_refused() -> None:
    up, down = two(2, 2, False, False)
    x, index, weights = routed(4, 2, 0)
    with pytest.raises(ValueError, match=r"do not go with 5 experts 12 -> 14 and 5 experts 7 -> 12"):
        lora_experts(x[:, :5], index, weights, up, down, swiglu)
    with pytest.raises(ValueError, match=r"freeze them"):
        lora_experts(x, index, weights, up, Experts(down.weight.clone().requires_grad_()), swiglu)
    with pytest.raises(ValueError, match=r"expected A \[5, r, 12\]"):
        Experts(up.weight, False, down.A, down.B)
