"""Attention over a tree of prefixes against attention over every row alone, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trees import paths, trees

from qlora_sft.model.attention import document_attention
from qlora_sft.model.attention_capped import Scores, flex_documents
from qlora_sft.model.attention_tree import CPU, CUDA, Tree, remember_tree, tree_attention

H, HKV, D = 4, 2, 16
PLAIN = Scores()


def textbook(q: Tensor, k: Tensor, v: Tensor, tree: Tree, scale: float, scores: Scores = PLAIN) -> Tensor:
    """Every segment with the keys of its path, masked, in the type of its inputs."""
    outputs = []
    for number, path in enumerate(paths(tree)):
        keys = torch.cat([torch.arange(tree.bounds[n], tree.bounds[n + 1]) for n in path])
        seen_k, seen_v = (x[:, :, keys].repeat_interleave(H // HKV, 1) for x in (k, v))
        logits = q[:, :, tree.bounds[number] : tree.bounds[number + 1]] @ seen_k.transpose(2, 3) * scale
        if scores.softcap is not None:
            logits = scores.softcap * torch.tanh(logits / scores.softcap)
        place, at = torch.arange(len(keys))[-tree.lengths[number] :, None], torch.arange(len(keys))[None, :]
        hidden = (at > place) | (place - at >= (scores.window or len(keys)))
        weights = logits.masked_fill(hidden, -torch.inf).exp()
        sinks = 0 if scores.sinks is None else scores.sinks.to(weights).exp().view(1, -1, 1, 1)
        outputs.append(weights / (weights.sum(-1, keepdim=True) + sinks) @ seen_v)
    return torch.cat(outputs, 2).transpose(1, 2)


def inputs(tokens: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, H, tokens, D), (1, HKV, tokens, D), (1, HKV, tokens, D)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def with_gradients(function: object, tensors: list[Tensor], tree: Tree, *rest: object) -> list[Tensor]:
    out = function(*tensors, tree, 0.3, *rest)  # type: ignore[operator]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), tensors)]


@settings(max_examples=60, deadline=None)
@given(tree=trees(), seed=st.integers(0, 1000))
def test_output_and_gradients_are_those_of_the_rows(tree: Tree, seed: int) -> None:
    tensors = inputs(tree.bounds[-1], seed)
    theirs = with_gradients(textbook, tensors, tree)
    for ours, right in zip(with_gradients(tree_attention, tensors, tree, CPU), theirs, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(tree=trees(), seed=st.integers(0, 1000))
def test_in_float32_and_bfloat16_it_errs_by_rounding(tree: Tree, seed: int) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
        tensors = inputs(tree.bounds[-1], seed, dtype)
        exact = with_gradients(textbook, [x.detach().double().requires_grad_() for x in tensors], tree)
        for ours, right in zip(with_gradients(tree_attention, tensors, tree, CPU), exact, strict=True):
            assert ours.dtype == dtype
            assert float((ours.detach().double() - right).norm()) <= tolerance * (float(right.norm()) + 1)


def attended(flex: bool, tree: Tree, scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a model's layer gets on a CPU, or by the kernel of a GPU, here uncompiled."""
    bounds = torch.tensor(tree.bounds, dtype=torch.int32)
    remember_tree(bounds, tree.lengths, tree.parents)
    if flex:
        return flex_documents(q, k, v, bounds, scores)
    out, _ = document_attention(
        torch.nn.Module(), q, k, v, None, scaling=scores.scaling, cu_seq_lens_q=bounds, max_length_q=1,
        sliding_window=scores.window, softcap=scores.softcap, s_aux=scores.sinks,
    )  # fmt: skip
    return out


@pytest.mark.parametrize(("capped", "flex"), [(False, False), (True, False), (False, True), (True, True)])
@settings(max_examples=15, deadline=None)
@given(tree=trees(), seed=st.integers(0, 1000), window=st.one_of(st.none(), st.integers(1, 30)))
def test_windows_caps_and_sinks_are_those_of_the_rows(
    capped: bool, flex: bool, tree: Tree, seed: int, window: int | None
) -> None:
    sinks = torch.randn(H, generator=torch.Generator().manual_seed(seed)) if capped else None
    scores = Scores(0.3, window, 2.0 if capped else None, sinks)
    tensors = inputs(tree.bounds[-1], seed, torch.float32)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    right = textbook(*exact, tree, 0.3, scores)
    if flex:  # on a CPU torch has no backward of it
        with torch.no_grad():
            ours = attended(flex, tree, scores, *tensors)
        torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-5)
        return
    gradient = torch.randn(1, tree.bounds[-1], H, D, generator=torch.Generator().manual_seed(7))
    ours = attended(flex, tree, scores, *tensors)
    found = [ours, *torch.autograd.grad(ours, tensors, gradient)]
    theirs = [right, *torch.autograd.grad(right, exact, gradient.double())]
    for own, other in zip(found, theirs, strict=True):
        torch.testing.assert_close(own.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scores", [Scores(None, 6), Scores(None, 6, 2.0), Scores(None, None, 2.0)])
def test_a_window_or_cap_shows_a_branch_nothing_of_its_siblings(scores: Scores) -> None:
    tree = Tree((20, 7, 5, 9), (-1, 0, 1, 0))
    q, k, v = inputs(41, 3, torch.float32)
    before = attended(False, tree, scores, q, k, v)
    with torch.no_grad():
        for x in (q, k, v):
            x[:, :, 27:32] += 1  # the third segment
    after = attended(False, tree, scores, q, k, v)
    assert not torch.equal(before[:, 27:32], after[:, 27:32])
    for untouched in (slice(0, 27), slice(32, 41)):
        assert torch.equal(before[:, untouched], after[:, untouched])


def test_a_token_of_one_branch_changes_nothing_in_its_siblings() -> None:
    tree = Tree((20, 7, 5, 9), (-1, 0, 1, 0))
    tensors = inputs(41, 3, torch.float32)
    before = with_gradients(tree_attention, tensors, tree, CPU)
    with torch.no_grad():
        for x in tensors:
            x[:, :, 27:32] += 1  # the third segment
    after = with_gradients(tree_attention, tensors, tree, CPU)
    for untouched in (slice(0, 27), slice(32, 41)):
        assert torch.equal(before[0][:, untouched], after[0][:, untouched])
    # The gradient of a query, which depends on what it saw alone.
    assert torch.equal(before[1][:, :, 32:], after[1][:, :, 32:])


def test_hundreds_of_rows_add_up_in_bfloat16() -> None:
    """Added one after the other in bfloat16, the gradient of a shared key would stop growing."""
    rows = 300
    tree = Tree((8, *[2] * rows), (-1, *[0] * rows))
    tensors = inputs(tree.bounds[-1], 5, torch.bfloat16)
    out = tree_attention(*tensors, tree, 0.3, CPU)
    ours = torch.autograd.grad(out.float().square().sum(), tensors[2])[0]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    right = torch.autograd.grad(textbook(*exact, tree, 0.3).square().sum(), exact[2])[0]
    assert float((ours.double() - right)[:, :, :8].norm() / right[:, :, :8].norm()) < 1e-2


def test_torch_takes_what_its_flash_kernels_of_a_gpu_are_given() -> None:
    """Names, order and shapes of the arguments, with tensors that have no values: no GPU is needed."""
    tree = Tree((20, 7, 5, 9), (-1, 0, 1, 0))
    tensors = [
        torch.empty(1, heads, 41, D, device="meta", dtype=torch.bfloat16, requires_grad=True) for heads in (H, HKV, HKV)
    ]
    out = tree_attention(*tensors, tree, None, CUDA)
    assert out.shape == (1, 41, H, D)
    found = torch.autograd.grad(out.sum(), tensors)
    assert [x.shape for x in found] == [x.shape for x in tensors]
