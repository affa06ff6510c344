"""Attends over the tree of prefixes that rows share (`qlora_sft.data.prefix_tree`), exactly as over the rows alone.

A flat row holds the segments of the tree depth first, so whatever continues a segment stands behind it in one stretch.
A token sees its own segment up to itself, and every segment above it whole. These parts are computed one by one, each
by a flash kernel that returns its outputs ``o_i`` and the logarithms ``l_i`` of its sums of exponents, and joined::

    l = log(sum_i exp(l_i))        o = sum_i exp(l_i - l) o_i

The flash backward of a part needs ``exp(q k - l)``, which is the weight in the joined softmax if it is given the joined
``l``, and ``sum(dO * o)``, which is right if it is given the joined ``o``. So the gradient of every part is exact, and
the gradients of a key add up over the parts that see it (as in ring attention: Liu et al., "Ring Attention with
Blockwise Transformers", 2023).

The parts of one depth of the tree are one call: every token that continues a segment of this depth sees the whole of
that segment. Memory: outputs and gradients in float32, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class Tree:
    """Describes the segments of a packed sequence, which stand in it depth first."""

    lengths: tuple[int, ...]
    """Tokens of every segment."""
    parents: tuple[int, ...]
    """Number of the segment above each, -1 for none."""

    @cached_property
    def bounds(self) -> list[int]:
        return list(accumulate(self.lengths, initial=0))

    @cached_property
    def starts(self) -> list[int]:
        """Returns for every segment how many tokens stand before it in its rows."""
        starts: list[int] = []
        for parent in self.parents:
            starts.append(starts[parent] + self.lengths[parent] if parent >= 0 else 0)
        return starts

    @cached_property
    def longest(self) -> int:
        """Returns the tokens of the longest row."""
        return max(start + length for start, length in zip(self.starts, self.lengths, strict=True))

    @cached_property
    def ends(self) -> list[int]:
        """Returns for every segment where it and all that continues it end: the position behind its last descendant."""
        ends = self.bounds[1:]
        for number in reversed(range(len(self.parents))):
            parent = self.parents[number]
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[number])
        return ends

    @cached_property
    def levels(self) -> list[Level]:
        """Returns the parts that are computed together: one level for every depth at which a segment is continued."""
        depths: list[int] = []
        by_depth: dict[int, list[int]] = {}
        for number, parent in enumerate(self.parents):
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
            if self.ends[number] > self.bounds[number + 1]:
                by_depth.setdefault(depths[number], []).append(number)
        return [self._level(numbers) for _, numbers in sorted(by_depth.items())]

    def _level(self, numbers: Sequence[int]) -> Level:
        keys = [(self.bounds[n], self.bounds[n + 1]) for n in numbers]
        return Level([(end, self.ends[n]) for n, (_, end) in zip(numbers, keys, strict=True)], keys)

    @cached_property
    def own(self) -> Cut:
        """Returns what every segment sees of itself."""
        return Cut(self.bounds, self.bounds, True)


@dataclass(frozen=True)
class Level:
    """Holds stretches of queries and of keys, as (begin, end); queries number i see the whole of keys number i."""

    queries: list[tuple[int, int]]
    keys: list[tuple[int, int]]
    _placed: dict[torch.device, tuple[slice | Tensor, slice | Tensor]] = field(default_factory=dict)

    @cached_property
    def cut(self) -> Cut:
        return Cut(_bounds(self.queries), _bounds(self.keys), False)

    def indices(self, device: torch.device) -> tuple[slice | Tensor, slice | Tensor]:
        """Returns where the queries are and where the keys are; made once for all layers."""
        if device not in self._placed:
            self._placed[device] = _index(self.queries, device), _index(self.keys, device)
        return self._placed[device]


@dataclass(frozen=True)
class Cut:
    """Says which stretch of queries sees which stretch of keys: those between the same pair of bounds."""

    q_bounds: Sequence[int]
    k_bounds: Sequence[int]
    causal: bool
    scale: float = 1.0
    _placed: dict[torch.device, tuple[Tensor, Tensor, int, int]] = field(default_factory=dict)

    def scaled(self, scale: float) -> Cut:
        """Returns the same stretches with another scale."""
        return replace(self, scale=scale)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
        """Returns both bounds as int32 on the device, and the longest stretch of queries and of keys; made once for
        all layers."""
        if device not in self._placed:
            both = [torch.tensor(each, dtype=torch.int32) for each in (self.q_bounds, self.k_bounds)]
            longest_q, longest_k = (int((each[1:] - each[:-1]).max()) for each in both)
            q_bounds, k_bounds = (each.to(device, non_blocking=True) for each in both)
            self._placed[device] = q_bounds, k_bounds, longest_q, longest_k
        return self._placed[device]

    def stretches(self) -> Iterator[tuple[int, int, int, int]]:
        """Yields begin and end of every stretch of queries, and of the stretch of keys that it sees."""
        for (a, b), (c, d) in zip(pairwise(self.q_bounds), pairwise(self.k_bounds), strict=True):
            yield a, b, c, d


class Flash(NamedTuple):
    """Holds a kernel that attends in stretches: query [1, H, T, d], key and value [1, Hkv, S, d]."""

    forward: Callable[[Tensor, Tensor, Tensor, Cut], tuple[Tensor, Tensor]]
    """Takes q, k, v. Returns the output [1, H, T, d] and the logarithm of the sum of exponents, float32 [1, H, T]."""
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Cut], tuple[Tensor, Tensor, Tensor]]
    """Takes the gradient of the output, q, k, v, and output and logarithm of the whole softmax. Returns the gradients
    of q, k and v."""


def tree_attention(q: Tensor, k: Tensor, v: Tensor, tree: Tree, scale: float | None, flash: Flash) -> Tensor:
    """Attends to query [1, H, T, d], key and value [1, Hkv, T, d] -> [1, T, H, d]."""
    out = _TreeAttention.apply(q, k, v, tree, q.shape[-1] ** -0.5 if scale is None else scale, flash)
    joined: Tensor = out.transpose(1, 2)
    return joined


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tree: Tree, scale: float, flash: Flash) -> Tensor:
        own, lse = flash.forward(q, k, v, tree.own.scaled(scale))
        out = own
        if tree.levels:
            out, lse = own.to(_sum_type(q), copy=True), lse.clone()
            for level in tree.levels:
                some, seen = level.indices(q.device)
                part, part_lse = flash.forward(q[:, :, some], k[:, :, seen], v[:, :, seen], level.cut.scaled(scale))
                before = lse[:, :, some]
                joined = torch.logaddexp(before, part_lse)
                out[:, :, some] = (
                    out[:, :, some] * (before - joined).exp()[..., None] + part * (part_lse - joined).exp()[..., None]
                )
                lse[:, :, some] = joined
            out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tree, ctx.scale, ctx.flash = tree, scale, flash
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        tree, flash = ctx.tree, ctx.flash
        own = flash.backward(grad, q, k, v, out, lse, tree.own.scaled(ctx.scale))
        if not tree.levels:
            return *own, None, None, None
        # Added up in float32: a prefix that hundreds of rows share gets as many gradients, too many for bfloat16.
        gradients = [x.to(_sum_type(q)) for x in own]
        for level in tree.levels:
            some, seen = level.indices(q.device)
            cut = level.cut.scaled(ctx.scale)
            of_grad, of_q, of_out, of_lse = (x[:, :, some] for x in (grad, q, out, lse))
            part = flash.backward(of_grad, of_q, k[:, :, seen], v[:, :, seen], of_out, of_lse, cut)
            # The stretches of one level do not overlap, so nothing is added to one place twice at once.
            for whole, index, some_of_it in zip(gradients, (some, seen, seen), part, strict=True):
                whole[:, :, index] += some_of_it
        return *(x.to(q.dtype) for x in gradients), None, None, None


def _sum_type(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _bounds(stretches: Sequence[tuple[int, int]]) -> list[int]:
    return list(accumulate((b - a for a, b in stretches), initial=0))


def _index(stretches: Sequence[tuple[int, int]], device: torch.device) -> slice | Tensor:
    if len(stretches) == 1:
        return slice(*stretches[0])
    return torch.cat([torch.arange(a, b) for a, b in stretches]).to(device, non_blocking=True)


# ------------------------------------------------------------------ kernels


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    parts = [
        kernel(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], 0.0, cut.causal, scale=cut.scale)
        for a, b, c, d in cut.stretches()
    ]
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cut: Cut
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    parts = []
    for a, b, c, d in cut.stretches():
        of_grad, of_q, of_out, of_lse = (x[:, :, a:b] for x in (grad, q, out, lse))
        parts.append(
            kernel(of_grad, of_q, k[:, :, c:d], v[:, :, c:d], of_out, of_lse, 0.0, cut.causal, scale=cut.scale)
        )
    dq, dk, dv = (torch.cat(gradients, dim=2) for gradients in zip(*parts, strict=True))
    return dq, dk, dv


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
    kernel = torch.ops.aten._flash_attention_forward
    out, lse, *_ = kernel(*map(_tokens_first, (q, k, v)), *cut.on(q.device), 0.0, cut.causal, False, scale=cut.scale)
    return out.transpose(0, 1).unsqueeze(0), lse.unsqueeze(0)


def _cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cut: Cut
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = torch.ops.aten._flash_attention_backward
    # Only dropout reads the state of the random numbers, and there is none.
    states = (torch.empty(size, dtype=torch.uint64, device=q.device) for size in (2, 0))
    gradients = kernel(
        *map(_tokens_first, (grad, q, k, v, out)), lse.squeeze(0).contiguous(), *cut.on(q.device),
        0.0, cut.causal, *states, scale=cut.scale,
    )  # fmt: skip
    dq, dk, dv = (x.transpose(0, 1).unsqueeze(0) for x in gradients)
    return dq, dk, dv


# torch's flash kernel of the CPU, one call per stretch.
CPU = Flash(_cpu_forward, _cpu_backward)
# torch's variable-length FlashAttention: all stretches in one launch.
CUDA = Flash(_cuda_forward, _cuda_backward)


def _tokens_first(x: Tensor) -> Tensor:
    """Moves the tokens to the front: [1, H, T, d] -> [T, H, d]."""
    return x.squeeze(0).transpose(0, 1).contiguous()


# ------------------------------------------------------------------ what attention is told

# All layers of a forward, and of its recomputation, come with the same tensor of bounds.
_trees: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def remember_tree(bounds: Tensor, lengths: Sequence[int], parents: Sequence[int]) -> None:
    """Tells attention that what ``bounds`` separates are the segments of a tree with these parents."""
    _trees[bounds] = Tree(tuple(lengths), tuple(parents))


def tree_of(bounds: Tensor) -> Tree | None:
    """Returns the tree whose segments ``bounds`` separates; None if they are documents that share nothing."""
    tree: Tree | None = _trees.get(bounds)
    return tree
