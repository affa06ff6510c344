"""Cases and the textbook loss that the tests of every path share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from qlora_kernels.packed_ce import (
    NF4Head,
    PatchedHead,
    Targets,
    packed_linear_cross_entropy,
    reference_linear_cross_entropy,
)
from torch import Tensor


@dataclass
class Case:
    hidden: Tensor
    head: Tensor
    targets: Targets
    labels: Tensor
    bounds: Tensor
    bias: Tensor | None = None
    weights: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    frozen: Tensor | NF4Head | None = None
    """The head, if only its rows ``trained`` are trained: ``head`` is then their values."""
    trained: tuple[int, ...] = ()

    def dense(self, head: Tensor) -> Tensor:
        if self.frozen is None:
            return head
        assert isinstance(self.frozen, Tensor), "the textbook takes no 4-bit head"
        return self.frozen.to(head.dtype).index_copy(0, torch.tensor(self.trained, device=head.device), head)

    def given(self, head: Tensor) -> Tensor | PatchedHead:
        return head if self.frozen is None else PatchedHead(self.frozen, self.trained, head)


def make(
    lengths: list[int],
    *,
    width: int = 24,
    vocabulary: int = 101,
    share: float = 0.5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    bias: bool = False,
    weights: bool = False,
    trained: tuple[int, ...] = (),
    **options: Any,
) -> Case:
    """``trained``: the rows of the head that are trained, if not all; about a third of the targets are among them."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    hidden = (2 * torch.randn(total, width, generator=generator)).to(dtype)
    head = (torch.randn(vocabulary, width, generator=generator) / 2).to(dtype)
    labels = torch.randint(0, vocabulary, (total,), generator=generator)
    if trained:
        labels[::3] = torch.tensor(trained)[torch.randint(0, len(trained), labels[::3].shape, generator=generator)]
    labels[torch.rand(total, generator=generator) > share] = -100
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    targets = Targets.from_labels(labels, bounds, path="torch")
    offset = torch.randn(vocabulary, generator=generator).to(dtype) if bias else None
    weight = torch.rand(len(targets), generator=generator) if weights else None
    if not trained:
        return Case(hidden, head, targets, labels, bounds, offset, weight, options)
    values = (torch.randn(len(trained), width, generator=generator) / 2).to(dtype)
    return Case(hidden, values, targets, labels, bounds, offset, weight, options, head, trained)


def differentiate(case: Case, loss: Callable[..., Tensor], dtype: torch.dtype, train_head: bool) -> list[Tensor]:
    """[sum over the rows, gradient of hidden, of the head and of the bias if trained], in float64."""
    leaves = [None if t is None else t.detach().to(dtype).clone() for t in (case.hidden, case.head, case.bias)]
    for leaf, wanted in zip(leaves, (True, train_head, train_head), strict=True):
        if leaf is not None:
            leaf.requires_grad_(wanted)
    value = loss(*leaves)
    value.backward()
    grads = [leaf.grad for leaf in leaves if leaf is not None and leaf.requires_grad]
    return [value.detach().double(), *(g.double() for g in grads if g is not None)]


def textbook(case: Case, dtype: torch.dtype, train_head: bool = False) -> list[Tensor]:
    """Full logits and autograd, in ``dtype`` as people write it: float64 is the truth, another is torch's own."""

    def loss(hidden: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
        o, head = case.options, case.dense(head)
        if dtype == torch.float64:
            rows = reference_linear_cross_entropy(hidden, head, case.targets, bias=bias, **o)[0]
        else:
            z = hidden[case.targets.positions.long()] @ head.t()
            z = (z if bias is None else z + bias) * o.get("logit_scale", 1.0)
            cap = o.get("softcap")
            z = (z if cap is None else cap * torch.tanh(z / cap)).float()
            smoothing, ids = o.get("label_smoothing", 0.0), case.targets.labels.long()
            rows = torch.nn.functional.cross_entropy(z, ids, reduction="none", label_smoothing=smoothing)
            rows = rows + o.get("z_loss", 0.0) * z.logsumexp(-1).square()
        return (rows if case.weights is None else rows * case.weights).sum()

    return differentiate(case, loss, dtype, train_head)


def ours(case: Case, train_head: bool = False, **how: Any) -> list[Tensor]:
    def loss(hidden: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
        o = {**case.options, "bias": bias, "token_weights": case.weights, "n_items": 1.0, **how}
        return packed_linear_cross_entropy(hidden, case.given(head), case.targets, **o).loss.sum()

    return differentiate(case, loss, case.hidden.dtype, train_head)


def assert_as_good_as_torch(case: Case, train_head: bool = False, **how: Any) -> None:
    """error <= 2 x torch's own error + 1e-4, each relative to the float64 result, for the loss and every gradient."""
    exact = textbook(case, torch.float64, train_head)
    theirs = textbook(case, case.hidden.dtype, train_head)
    mine = ours(case, train_head, **how)
    assert len(mine) == len(exact)
    for name, a, b, c in zip(("loss", "hidden", "head", "bias"), mine, theirs, exact, strict=False):
        error, allowed = float((a - c).norm()), 2 * float((b - c).norm()) + 1e-4 * float(c.norm())
        assert error <= allowed, f"{name}: error {error:.2e} > {allowed:.2e} with {case.options} {how}"
