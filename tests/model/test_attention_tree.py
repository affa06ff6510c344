"""Attention over a tree of prefixes against attention over every row alone, in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_sft.model.attention_tree import CPU, Tree, tree_attention

H, HKV, D = 4, 2, 16


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Random trees, depth first: the parent of a segment is one of the path to the segment before it, or none."""
    lengths, parents = [], []
    path: list[int] = []
    for number in range(draw(st.integers(1, 9))):
        path = path[: draw(st.integers(0, len(path)))]
        parents.append(path[-1] if path else -1)
        lengths.append(draw(st.integers(1, 9)))
        path = [*path, number]
    return Tree(tuple(lengths), tuple(parents))


def textbook(q: Tensor, k: Tensor, v: Tensor, tree: Tree, scale: float) -> Tensor:
    """Every segment with the keys of its path, masked, in the type of its inputs."""
    outputs = []
    for number, (a, b) in enumerate(zip(tree.bounds, tree.bounds[1:], strict=False)):
        path, at = [number], number
        while tree.parents[at] >= 0:
            at = tree.parents[at]
            path.insert(0, at)
        keys = torch.cat([torch.arange(tree.bounds[n], tree.bounds[n + 1]) for n in path])
        seen_k, seen_v = (x[:, :, keys].repeat_interleave(H // HKV, 1) for x in (k, v))
        logits = q[:, :, a:b] @ seen_k.transpose(2, 3) * scale
        hidden = torch.ones(b - a, len(keys), dtype=torch.bool).triu(len(keys) - (b - a) + 1)
        outputs.append(torch.softmax(logits.masked_fill(hidden, -torch.inf), -1) @ seen_v)
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
