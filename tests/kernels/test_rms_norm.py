"""RMSNorm that keeps only its input: transformers' bits forward, no larger an error backward, and what it keeps."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qlora_kernels import rms_norm as module
from qlora_kernels.rms_norm import NormFormula, blocks, reference_rms_norm, rms_norm
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

CLASSES: dict[str, NormFormula] = {
    "llama.LlamaRMSNorm": "llama", "qwen2.Qwen2RMSNorm": "llama", "qwen3.Qwen3RMSNorm": "llama",
    "mistral.MistralRMSNorm": "llama", "smollm3.SmolLM3RMSNorm": "llama", "phi3.Phi3RMSNorm": "llama",
    "gemma.GemmaRMSNorm": "gemma", "gemma2.Gemma2RMSNorm": "gemma", "gemma3.Gemma3RMSNorm": "gemma",
}  # fmt: skip
ONE_OF_EACH = ["llama.LlamaRMSNorm", "gemma2.Gemma2RMSNorm"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 1e-5


def theirs(path: str, width: int, dtype: torch.dtype) -> Any:
    """transformers' module with a random weight, frozen."""
    family, name = path.split(".")
    kind = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    norm = kind(width, EPS).to(dtype).requires_grad_(False)
    norm.weight.copy_(torch.randn(width, generator=torch.Generator().manual_seed(3)))
    return norm


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(function(x), x, dy)
    return dx


def small_blocks(monkeypatch: pytest.MonkeyPatch, values: int = 1000) -> None:
    monkeypatch.setattr(module, "CPU_BLOCK", values)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", CLASSES)
def test_the_forward_has_the_bits_of_transformers(path: str, dtype: torch.dtype, autocast: bool) -> None:
    norm = theirs(path, 80, dtype)
    for scale in (1e-4, 1.0, 300.0):
        x = random(3, 17, 80, dtype=dtype, scale=scale).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            wanted, found = norm(x), rms_norm(x, norm.weight, EPS, form=CLASSES[path])
            with torch.no_grad():
                without = rms_norm(x, norm.weight, EPS, form=CLASSES[path])
        assert found.dtype == without.dtype == wanted.dtype
        assert torch.equal(found, wanted)
        assert torch.equal(without, wanted)


@pytest.mark.parametrize("path", ONE_OF_EACH)
def test_a_wider_weight_widens_the_result_as_in_transformers(path: str) -> None:
    norm, x = theirs(path, 24, torch.float32), random(5, 24, dtype=torch.bfloat16)
    wanted, found = norm(x), rms_norm(x, norm.weight, EPS, form=CLASSES[path])
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    width=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    path=st.sampled_from(ONE_OF_EACH),
    transposed=st.booleans(),
    block=st.integers(1, 3000),
)
def test_any_shape_in_any_blocks(
    shape: list[int], width: int, dtype: torch.dtype, path: str, transposed: bool, block: int
) -> None:
    norm, x, dy = theirs(path, width, dtype), random(*shape, width, dtype=dtype), random(*shape, width, seed=1)
    if transposed and len(shape) > 1:
        x, dy = x.transpose(0, 1), dy.transpose(0, 1)
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, block)
        ours = partial(rms_norm, weight=norm.weight, eps=EPS, form=CLASSES[path])
        assert torch.equal(ours(x), norm(x))
        found = gradient(ours, x, dy.to(dtype))
    truth = gradient(lambda x: reference_rms_norm(x, norm.weight.double(), EPS, CLASSES[path]), x.double(), dy.double())
    assert found.dtype == dtype
    # Where dx is a small difference (of one value it is none at all), its error is that of what was subtracted.
    terms = (dy * (norm.weight.abs() + 1)).abs().max() * (x.double().square().mean(-1) + EPS).rsqrt().max()
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=0.02 * float(terms))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", CLASSES)
def test_the_gradient_is_as_exact_as_that_of_transformers(path: str, dtype: torch.dtype) -> None:
    norm, x, dy = theirs(path, 96, dtype), random(70, 96, dtype=dtype), random(70, 96, dtype=dtype, seed=1)
    truth = gradient(lambda x: reference_rms_norm(x, norm.weight.double(), EPS, CLASSES[path]), x.double(), dy.double())
    their_error = (gradient(norm, x, dy).double() - truth).norm()
    our_error = (gradient(lambda x: rms_norm(x, norm.weight, EPS, form=CLASSES[path]), x, dy).double() - truth).norm()
    assert 0 < our_error <= 2 * their_error
    assert our_error < 0.01 * truth.norm()


def test_the_derivative_is_that_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 only, because the norm computes in nothing wider; with and without blocks."""
    x, weight, dy = random(40, 16), random(16, seed=1), random(40, 16, seed=2)
    for form in ("llama", "gemma"):
        wanted = gradient(lambda x, form=form: reference_rms_norm(x, weight, EPS, form), x, dy)
        found = gradient(lambda x, form=form: rms_norm(x, weight, EPS, form=form), x, dy)
        torch.testing.assert_close(found, wanted)
    small_blocks(monkeypatch, 50)
    assert torch.equal(gradient(lambda x: rms_norm(x, weight, EPS, form="gemma"), x, dy), found)


@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ONE_OF_EACH)
def test_a_trained_weight_gets_its_gradient(
    monkeypatch: pytest.MonkeyPatch, path: str, dtype: torch.dtype, need_x: bool
) -> None:
    small_blocks(monkeypatch)
    norm = theirs(path, 48, dtype).requires_grad_()
    x, dy = random(2, 60, 48, dtype=dtype).requires_grad_(need_x), random(2, 60, 48, dtype=dtype, seed=1)
    norm(x).backward(dy)
    their_x, their_w, x.grad = x.grad, norm.weight.grad, None
    exact = [t.detach().double().requires_grad_() for t in (x, norm.weight)]
    reference_rms_norm(*exact, EPS, CLASSES[path]).backward(dy.double())
    norm.zero_grad()
    rms_norm(x, norm.weight, EPS, form=CLASSES[path]).backward(dy)
    for found, their, truth in ((x.grad, their_x, exact[0].grad), (norm.weight.grad, their_w, exact[1].grad)):
        assert (found is None) == (their is None)
        if found is not None and their is not None and truth is not None:
            assert found.dtype == their.dtype
            assert (found.double() - truth).norm() <= 2 * (their.double() - truth).norm() + 1e-7 * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ONE_OF_EACH)
def test_kept_are_the_input_itself_and_four_bytes_per_token(path: str, dtype: torch.dtype) -> None:
    norm, x = theirs(path, 32, dtype), random(2, 600, 32, dtype=dtype).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        rms_norm(x, norm.weight, EPS, form=CLASSES[path])
    places = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert places.pop(norm.weight.untyped_storage().data_ptr())
    assert places.pop(x.untyped_storage().data_ptr()) == x.nbytes
    assert sum(places.values()) == 4 * 2 * 600


@pytest.mark.parametrize("path", ONE_OF_EACH)
def test_what_is_in_float32_is_bounded_by_the_block(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor) and t.dtype == torch.float32]
            largest = max([largest, *sizes])
            return result

    small_blocks(monkeypatch, 32 * 100)
    norm, x = theirs(path, 32, torch.bfloat16), random(2500, 32, dtype=torch.bfloat16).requires_grad_()
    with Watch():
        rms_norm(x, norm.weight, EPS, form=CLASSES[path]).backward(x.detach())
    assert 2500 <= largest <= 32 * 100  # the reciprocal roots, and no more than a block


@settings(max_examples=50, deadline=None)
@given(count=st.integers(0, 1000), width=st.integers(1, 5000), values=st.integers(1, 2**18))
def test_blocks_are_equal_and_cover_all_rows(count: int, width: int, values: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, values)
        parts = blocks(torch.empty(1).expand(count, width))
    assert [i for t in parts for i in range(t.start, t.stop)] == list(range(count))
    sizes = [t.stop - t.start for t in parts]
    assert all(size * width <= values or size == 1 for size in sizes)
    assert not sizes or max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_offloaded_and_asked_twice(monkeypatch: pytest.MonkeyPatch, reentrant: bool) -> None:
    small_blocks(monkeypatch)
    weight, x, dy = (
        random(48, seed=1, dtype=torch.bfloat16),
        random(90, 48, dtype=torch.bfloat16),
        random(90, 48).bfloat16(),
    )

    def twice(x: torch.Tensor) -> torch.Tensor:
        return rms_norm(rms_norm(x, weight, EPS), weight, EPS, form="gemma")

    wanted = gradient(twice, x, dy)
    leaf = x.requires_grad_()
    checkpoint(twice, leaf, use_reentrant=reentrant).backward(dy)
    assert torch.equal(leaf.grad, wanted)  # type: ignore[arg-type]
    with torch.autograd.graph.save_on_cpu():
        y = twice(leaf)
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(y, leaf, dy, retain_graph=True)[0], wanted)


def test_what_changed_since_the_forward_is_noticed() -> None:
    x = random(4, 8).requires_grad_()
    inner = x * 1.0
    y = rms_norm(inner, torch.ones(8), EPS)
    inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_no_rows_at_all() -> None:
    x = torch.empty(2, 0, 8).requires_grad_()
    y = rms_norm(x, torch.ones(8), EPS)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected a weight \[8\] for x \[3, 8\], got \[1\]"):
        rms_norm(random(3, 8), torch.ones(1), EPS)
    with pytest.raises(ValueError, match="expected llama or gemma, got 'olmo'"):
        rms_norm(random(3, 8), torch.ones(8), EPS, form="olmo")  # type: ignore[arg-type]
