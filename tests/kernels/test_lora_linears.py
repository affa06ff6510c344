"""Several linear layers of one input: against the textbook, against PEFT, and what they save and dequantise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlp_cases import errors, exact, parameters, peft_block, projection, random_projection
from qlora_kernels.nf4_lora import NF4Weight, Projection, lora_linears
from qlora_kernels.nf4_lora.reference import reference_linear
from torch import Tensor
from torch.utils.checkpoint import checkpoint

WIDTH, OUTS = 12, (20, 8, 6)


def three(rank: int | None = 3, bias: bool = False) -> list[Projection]:
    return [random_projection(out, WIDTH, rank, bias, seed) for seed, out in enumerate(OUTS)]


def gradients(function: Callable[[Tensor], Sequence[Tensor]], x: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """[all results side by side, then d(their sum times fixed noise) / d each of ``wanted``]"""
    y = torch.cat([result.reshape(-1, result.shape[-1]) for result in function(x)], 1)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, wanted, noise)]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-9, atol=1e-9)


@given(
    tokens=st.integers(0, 40),
    ranks=st.lists(st.sampled_from([None, 1, 3]), min_size=1, max_size=3),
    bias=st.booleans(),
    first=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_equals_the_textbook(tokens: int, ranks: list[Any], bias: bool, first: bool) -> None:
    """first: whether the input wants a gradient; in the first layer of a model it does not."""
    layers = [random_projection(out, WIDTH, rank, bias, out) for out, rank in zip(OUTS, ranks, strict=False)]
    x = torch.randn(2, tokens, WIDTH, dtype=torch.float64, requires_grad=not first)
    wanted = [*([] if first else [x]), *parameters(*layers)]
    if wanted:
        truth = gradients(lambda x: [reference_linear(x, p) for p in layers], x, wanted)
        assert_same(gradients(lambda x: lora_linears(x, layers), x, wanted), truth)


def test_only_what_requires_a_gradient_gets_one() -> None:
    layers = three(bias=True)
    for frozen in (layers[0].A, layers[1].B, layers[2].bias):
        assert frozen is not None
        frozen.requires_grad_(False)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    wanted = [t for t in parameters(*layers) if t.requires_grad]
    truth = gradients(lambda x: [reference_linear(x, p) for p in layers], x, wanted)
    assert_same(gradients(lambda x: lora_linears(x, layers), x, wanted), truth)


@pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False), (torch.float32, True)],
)
def test_error_within_twice_that_of_peft(dtype: torch.dtype, autocast: bool, four_bit: bool) -> None:
    block = peft_block(64, 192, dtype, four_bit=four_bit)
    modules = [block.gate, block.up]
    layers = [projection(module) for module in modules]
    x = torch.randn(150, 64).to(dtype).requires_grad_()
    truth_layers = [exact(p, dtype) for p in layers]
    wide = x.detach().double().requires_grad_()
    truth = gradients(
        lambda x: [reference_linear(x, p) for p in truth_layers], wide, [wide, *parameters(*truth_layers)]
    )

    def measured(function: Callable[[Tensor], Sequence[Tensor]]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            return gradients(function, x, [x, *parameters(*layers)])

    own = measured(lambda x: lora_linears(x, layers, dtype=dtype if four_bit else None))
    theirs = measured(lambda x: [module(x) for module in modules])
    assert [t.dtype for t in own] == [t.dtype for t in theirs]
    for mine, other in zip(errors(own, truth), errors(theirs, truth), strict=True):
        assert mine <= 2 * other + 1e-7, (mine, other)


@pytest.mark.parametrize(("rank", "values"), [(3, WIDTH + 9), (None, 0)])
def test_saved_is_the_input_once_and_what_a_makes_of_it(rank: int | None, values: int) -> None:
    layers = three(rank)
    own = {t.data_ptr() for t in parameters(*layers)}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.data_ptr()] = t.numel()
        return t

    x = torch.randn(50, WIDTH, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_linears(x, layers)
    assert sum(n for pointer, n in saved.items() if pointer not in own) == 50 * values


def test_one_weight_is_dense_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a forward and in a backward each is dequantised once, when the one before is gone."""
    import weakref

    block = peft_block(64, 192, torch.float32)
    layers = [projection(block.gate), projection(block.up)]
    alive: list[Any] = []
    original = NF4Weight.dequantize

    def counting(self: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
        assert all(reference() is None for reference in alive)
        dense = original(self, dtype)
        alive.append(weakref.ref(dense))
        return dense

    monkeypatch.setattr(NF4Weight, "dequantize", counting)
    x = torch.randn(50, 64, requires_grad=True)
    results = lora_linears(x, layers)
    assert len(alive) == 2
    torch.cat(results, 1).sum().backward()
    assert len(alive) == 4


def test_results_may_be_written_over_also_when_checkpointed() -> None:
    layers = three()
    x = torch.randn(9, WIDTH, dtype=torch.float64, requires_grad=True)
    wanted = [x, *parameters(*layers)]

    def layer(x: Tensor) -> list[Tensor]:
        return [result.mul_(2.0).exp() for result in lora_linears(x.sin(), layers)]

    truth = gradients(lambda x: [(2 * reference_linear(x.sin(), p)).exp() for p in layers], x, wanted)
    assert_same(gradients(layer, x, wanted), truth)
    assert_same(gradients(lambda x: checkpoint(layer, x, use_reentrant=False), x, wanted), truth)


def test_refused_by_name() -> None:
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"expected weights \[out, 12\], got \[\[12, 20\]\]"):
        lora_linears(x, [random_projection(WIDTH, 20)])
    with pytest.raises(ValueError, match="expected weights"):
        lora_linears(x, [])
    four_bit = projection(peft_block(64, 192, torch.float32).gate)
    with pytest.raises(ValueError, match="some weights are in NF4 and some are not"):
        lora_linears(torch.randn(3, 64), [four_bit, Projection(torch.randn(5, 64))])
