"""LoRA over frozen NF4 and dense weights: the linear layer and the tiled MLP against the textbook and against PEFT."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from mlp_cases import NAMES, errors, exact, parameters, peft_block, projection, random_projection
from qlora_kernels.nf4_lora import NF4Weight, Projection, lora_linear, lora_mlp
from qlora_kernels.nf4_lora.reference import reference_linear, reference_mlp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]
WIDTH, INNER, OUT = 12, 20, 8  # all different, so that a product is known by its shape


def three(rank: int | None = 3, bias: bool = False) -> tuple[Projection, Projection, Projection]:
    gate, up = (random_projection(INNER, WIDTH, rank, bias, seed) for seed in (1, 2))
    return gate, up, random_projection(OUT, INNER, rank, bias, 3)


def gradients(function: Callable[[Tensor], Tensor], x: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """[y, then d(sum of y times fixed noise) / d each of ``wanted``]"""
    y = function(x)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, wanted, noise)]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------ against the textbook, in float64


@given(
    tokens=st.integers(1, 150),
    batch=st.integers(1, 2),
    tile=st.integers(1, 160),
    activation=st.sampled_from(ACTIVATIONS),
    recompute=st.booleans(),
    ranks=st.tuples(*[st.sampled_from([None, 1, 3])] * 3),
    bias=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_mlp_equals_the_textbook(
    tokens: int, batch: int, tile: int, activation: Any, recompute: bool, ranks: Any, bias: bool
) -> None:
    shapes = [(INNER, WIDTH), (INNER, WIDTH), (OUT, INNER)]
    layers = [
        random_projection(*shape, rank, bias, seed)
        for seed, (shape, rank) in enumerate(zip(shapes, ranks, strict=True))
    ]
    x = torch.randn(batch, tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    wanted = [x, *parameters(*layers)]
    found = gradients(lambda x: lora_mlp(x, *layers, activation, tile=tile, recompute=recompute), x, wanted)
    assert_same(found, gradients(lambda x: reference_mlp(x, *layers, activation), x, wanted))


@given(tokens=st.integers(1, 40), rank=st.sampled_from([None, 1, 5]), bias=st.booleans())
@settings(max_examples=20, deadline=None)
def test_linear_equals_the_textbook(tokens: int, rank: int | None, bias: bool) -> None:
    p = random_projection(INNER, WIDTH, rank, bias)
    x = torch.randn(2, tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    wanted = [x, *parameters(p)]
    found = gradients(lambda x: lora_linear(x, p.weight, p.A, p.B, p.scale, p.bias), x, wanted)
    assert_same(found, gradients(lambda x: reference_linear(x, p), x, wanted))


@pytest.mark.parametrize("recompute", [True, False])
def test_only_what_requires_a_gradient_gets_one(recompute: bool) -> None:
    gate, up, down = three(bias=True)
    for frozen in (gate.A, up.B, down.bias):
        assert frozen is not None
        frozen.requires_grad_(False)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    layers = (gate, up, down)
    wanted = [t for t in parameters(*layers) if t.requires_grad]
    found = gradients(lambda x: lora_mlp(x, *layers, recompute=recompute), x, wanted)
    assert_same(found, gradients(lambda x: reference_mlp(x, *layers, "silu"), x, wanted))


def test_a_row_without_tokens() -> None:
    layers = three()
    x = torch.empty(0, WIDTH, dtype=torch.float64, requires_grad=True)
    y = lora_mlp(x, *layers)
    y.sum().backward()
    assert y.shape == (0, OUT)
    assert layers[0].A is not None
    assert layers[0].A.grad is not None
    assert not layers[0].A.grad.any()


# ------------------------------------------------------------------ against PEFT


@pytest.mark.parametrize("tile", [64, 1024])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False), (torch.float32, True)],
)
def test_error_within_twice_that_of_peft(
    dtype: torch.dtype, autocast: bool, four_bit: bool, recompute: bool, tile: int
) -> None:
    block = peft_block(64, 192, dtype, four_bit=four_bit)
    layers = [projection(getattr(block, name)) for name in NAMES]
    x = torch.randn(150, 64).to(dtype).requires_grad_()

    def measured(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            y = function(x)
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16).to(y.dtype)
        return [y, *torch.autograd.grad(y, [x, *parameters(*layers)], noise)]

    truth_layers = [exact(p, dtype) for p in layers]
    wide = x.detach().double().requires_grad_()
    y = reference_mlp(wide, *truth_layers, "silu")
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16).double()
    truth = [y, *torch.autograd.grad(y, [wide, *parameters(*truth_layers)], noise)]

    base = dtype if four_bit else None
    own = measured(lambda x: lora_mlp(x, *layers, tile=tile, recompute=recompute, dtype=base))
    theirs = measured(block)
    assert [t.dtype for t in own] == [t.dtype for t in theirs]
    for mine, other in zip(errors(own, truth), errors(theirs, truth), strict=True):
        assert mine <= 2 * other + 1e-7, (mine, other)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_error_within_twice_that_of_peft(dtype: torch.dtype, autocast: bool) -> None:
    layer = peft_block(64, 192, dtype, nested=False).down
    p = projection(layer)
    x = torch.randn(90, 192).to(dtype).requires_grad_()
    wanted = [x, *parameters(p)]
    truth_p, wide = exact(p, dtype), x.detach().double().requires_grad_()
    truth = gradients(lambda x: reference_linear(x, truth_p), wide, [wide, *parameters(truth_p)])

    def within(function: Callable[[Tensor], Tensor]) -> list[float]:
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            return errors(gradients(function, x, wanted), truth)

    own = within(lambda x: lora_linear(x, p.weight, p.A, p.B, p.scale, dtype=dtype))
    # gradients() draws its noise in float64 and rounds it: the same for all three, at an error common to both.
    for mine, other in zip(own, within(layer), strict=True):
        assert mine <= 2 * other + 1e-7, (mine, other)


# ------------------------------------------------------------------ checkpointing


class Products(TorchDispatchMode):
    """Counts the matrix products by (inner, outer) size."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[int, int]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        if name == "aten::mm":
            self.counts[tuple(args[1].shape)] += 1
        elif name in ("aten::addmm", "aten::addmm_"):
            self.counts[tuple(args[2].shape)] += 1
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted() -> Iterator[Counter[tuple[int, int]]]:
    with Products() as products:
        yield products.counts


DOWN, GATE_OR_UP = (INNER, OUT), (WIDTH, INNER)


@pytest.mark.parametrize("recompute", [True, False])
def test_a_checkpointed_layer_computes_down_once_and_gate_and_up_twice(recompute: bool) -> None:
    layers = three()
    skip = torch.randn(OUT, WIDTH, dtype=torch.float64)

    def layer(x: Tensor) -> Tensor:
        return x @ skip.t() + lora_mlp(x.sin(), *layers, tile=7, recompute=recompute)

    x = torch.randn(14, WIDTH, dtype=torch.float64, requires_grad=True)
    wanted = [x, *parameters(*layers)]
    tiles = 2
    with counted() as plain:
        expected = gradients(layer, x, wanted)
    with counted() as counts:
        found = gradients(lambda x: checkpoint(layer, x, use_reentrant=False), x, wanted)
    assert_same(found, expected)
    assert counts[DOWN] == tiles
    # Kept ones are computed for all tokens at once, in the forward and in the recomputation.
    assert counts[GATE_OR_UP] == 2 * 2 * (tiles if recompute else 1)
    assert plain[GATE_OR_UP] == (2 * 2 * tiles if recompute else 2)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_with_something_behind_that_saves(reentrant: bool, recompute: bool) -> None:
    layers = three()
    norm = torch.nn.RMSNorm(OUT, dtype=torch.float64)
    x = torch.randn(9, WIDTH, dtype=torch.float64, requires_grad=True)
    wanted = [x, *parameters(*layers)]

    def layer(x: Tensor) -> Tensor:
        return norm(lora_mlp(x.sin(), *layers, tile=4, recompute=recompute)).exp()

    def grads() -> list[Tensor]:
        result = [t.grad for t in wanted]
        for t in wanted:
            t.grad = None
        return [g for g in result if g is not None]

    layer(x).square().sum().backward()
    expected = grads()
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert_same(grads(), expected)


def test_a_checkpointed_layer_that_ends_with_a_linear_computes_its_product_once() -> None:
    p = random_projection(OUT, WIDTH)
    x = torch.randn(9, WIDTH, dtype=torch.float64, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        return lora_linear(x.sin(), p.weight, p.A, p.B, p.scale)

    wanted = [x, *parameters(p)]
    expected = gradients(layer, x, wanted)
    with counted() as counts:
        assert_same(gradients(lambda x: checkpoint(layer, x, use_reentrant=False), x, wanted), expected)
    assert counts[WIDTH, OUT] == 1


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_a_retained_graph_gives_the_same_gradients_again(recompute: bool, checkpointed: bool) -> None:
    layers = three()
    x = torch.randn(9, WIDTH, dtype=torch.float64, requires_grad=True)
    wanted = [x, *parameters(*layers)]

    def layer(x: Tensor) -> Tensor:
        return lora_mlp(x.sin(), *layers, tile=4, recompute=recompute)

    y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
    first = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    second = torch.autograd.grad(y.sum(), wanted)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match=r"second time|already unpacked"):
        torch.autograd.grad(y.sum(), wanted)


def test_an_input_changed_before_the_backward_is_noticed() -> None:
    layers = three()
    x = torch.randn(9, WIDTH, dtype=torch.float64, requires_grad=True)
    inside = x.sin()
    y = lora_mlp(inside, *layers)
    with torch.no_grad():
        inside.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize(("recompute", "values"), [(True, WIDTH), (False, WIDTH + 2 * INNER)])
def test_saved_is_the_input_and_what_is_kept(recompute: bool, values: int) -> None:
    layers = three()
    own = {t.data_ptr() for t in parameters(*layers)}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.data_ptr()] = t.numel()
        return t

    x = torch.randn(50, WIDTH, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_mlp(x, *layers, tile=8, recompute=recompute)
    assert sum(n for pointer, n in saved.items() if pointer not in own) == 50 * values


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, Tensor):
                self.size = max(self.size, t.numel())
        return result


def test_no_intermediate_is_larger_than_a_tile_or_the_input() -> None:
    layers = three()
    x = torch.randn(4096, WIDTH, dtype=torch.float64, requires_grad=True)
    with Largest() as largest:
        lora_mlp(x, *layers, tile=64).sum().backward()
    assert largest.size == x.numel() < 4096 * INNER


def test_each_weight_is_dequantised_once_in_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    block = peft_block(64, 192, torch.float32)
    layers = [projection(getattr(block, name)) for name in NAMES]
    x = torch.randn(50, 64, requires_grad=True)
    y = lora_mlp(x, *layers, tile=8)
    shapes: list[tuple[int, int]] = []
    original = NF4Weight.dequantize

    def counting(self: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
        shapes.append(self.shape)
        return original(self, dtype)

    monkeypatch.setattr(NF4Weight, "dequantize", counting)
    y.sum().backward()
    assert sorted(shapes) == [(64, 192), (192, 64), (192, 64)]


# ------------------------------------------------------------------ NF4 itself, and what is refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(192, 64), (33, 50)])
def test_dequantised_as_bitsandbytes_does(shape: tuple[int, int], nested: bool, dtype: torch.dtype) -> None:
    packed, state = quantize_4bit(torch.randn(shape, dtype=dtype), compress_statistics=nested, quant_type="nf4")
    weight = NF4Weight.from_bitsandbytes(packed, state)
    wanted = dequantize_4bit(packed, state)
    assert torch.equal(weight.dequantize(), wanted)
    assert torch.equal(weight.dequantize_in_torch(dtype), wanted)
    assert torch.equal(weight.dequantize(torch.float64).to(dtype), wanted)


def test_refused_by_name() -> None:
    gate, up, down = three()
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match="trainable"):
        Projection(torch.zeros(4, 4, requires_grad=True))
    with pytest.raises(ValueError, match="both or neither"):
        Projection(torch.zeros(4, 4), torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"expected A \[r, 4\]"):
        Projection(torch.zeros(4, 4), torch.zeros(1, 5), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="expected gate and up"):
        lora_mlp(x, gate, down, up)
    with pytest.raises(ValueError, match="expected one of silu"):
        lora_mlp(x, gate, up, down, "relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one token"):
        lora_mlp(x, gate, up, down, tile=0)
    with pytest.raises(ValueError, match=r"x is torch.float32 but the weight is torch.float64"):
        lora_mlp(x.float(), gate, up, down)
    packed, state = quantize_4bit(torch.randn(64, 64), quant_type="fp4")
    with pytest.raises(ValueError, match="fp4"):
        NF4Weight.from_bitsandbytes(packed, state)
