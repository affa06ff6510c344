"""The loss against the textbook in float64."""

from __future__ import annotations

import pytest
import torch
from ce_cases import make
from hypothesis import given, settings
from hypothesis import strategies as st
from qlora_kernels.packed_ce import Targets, packed_linear_cross_entropy, reference_linear_cross_entropy, workspace
from torch import Tensor


def make_case(
    lengths: list[int],
    width: int = 24,
    vocabulary: int = 101,
    share: float = 0.5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Targets]:
    case = make(lengths, width=width, vocabulary=vocabulary, share=share, dtype=dtype, seed=seed)
    return case.hidden.requires_grad_(), case.head, case.labels, case.targets


def textbook(
    hidden: Tensor, head: Tensor, labels: Tensor, lengths: list[int], **options: float
) -> tuple[Tensor, Tensor, int]:
    """Each document on its own, shifted the way everybody writes it; float64. (sum of nll, gradient, rows)"""
    hidden = hidden.detach().double().requires_grad_()
    total, rows, start = hidden.sum() * 0, 0, 0
    for length in lengths:
        logits = hidden[start : start + length - 1] @ head.double().t() * options.get("logit_scale", 1.0)
        cap = options.get("softcap")
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        targets = labels[start + 1 : start + length]
        total = total + torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        rows += int((targets != -100).sum())
        start += length
    total.backward()
    assert hidden.grad is not None
    return total.detach(), hidden.grad, rows


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 5.0}, {"logit_scale": 0.25}, {"softcap": 5.0, "logit_scale": 0.5}], ids=str
)
@pytest.mark.parametrize("lengths", [[37, 1, 20, 6, 1], [1], [2], [64]], ids=str)
def test_loss_and_gradient_equal_the_textbook(
    lengths: list[int], options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "BLOCK_ROWS", 7)
    monkeypatch.setattr(workspace, "TORCH_TILE", 16)
    hidden, head, labels, targets = make_case(lengths)
    wanted, gradient, rows = textbook(hidden, head, labels, lengths, **options)
    output = packed_linear_cross_entropy(hidden, head, targets, n_items=3.0, **options)
    output.loss.backward()
    assert len(targets) == rows
    torch.testing.assert_close(output.loss.double(), wanted / 3, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double() * 3, gradient, rtol=1e-4, atol=1e-6)
    unsupervised = torch.ones(len(hidden), dtype=torch.bool)
    unsupervised[targets.positions.long()] = False
    assert (hidden.grad[unsupervised] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_worse_than_twice_torchs_own_error(dtype: torch.dtype) -> None:
    lengths = [40, 3, 57]
    hidden, head, labels, targets = make_case(lengths, dtype=dtype)
    wanted, gradient, _ = textbook(hidden, head, labels, lengths)
    output = packed_linear_cross_entropy(hidden, head, targets, n_items=1.0)
    output.loss.backward()
    ours = (hidden.grad.double() - gradient).norm() / gradient.norm()
    theirs_hidden = hidden.detach().clone().requires_grad_()
    logits = theirs_hidden[targets.positions.long()] @ head.t()
    torch.nn.functional.cross_entropy(logits, targets.labels.long(), reduction="sum").backward()
    theirs = (theirs_hidden.grad.double() - gradient).norm() / gradient.norm()
    assert ours <= 2 * theirs + 1e-4
    # float16 is multiplied in float32; bfloat16 natively, but rounded only after the target's logit is taken off.
    torch.testing.assert_close(output.loss.double(), wanted, rtol=1e-6 if dtype == torch.float16 else 1e-3, atol=1e-6)


def test_confident_tokens_keep_their_loss_and_gradient() -> None:
    """Near p = 1, logsumexp - z and p - 1 cancel to zero in float32; the loss and its gradient must not."""
    head = torch.eye(6)
    hidden = torch.zeros(3, 6)
    hidden[0, 2], hidden[1, 3] = 25.0, 40.0
    hidden.requires_grad_()
    targets = Targets.from_labels(torch.tensor([0, 2, 3]), torch.tensor([0, 3]))
    output = packed_linear_cross_entropy(hidden, head, targets, n_items=1.0)
    output.loss.backward()
    exact = torch.tensor([25.0, 40.0], dtype=torch.float64).neg().exp().mul(5).log1p()
    torch.testing.assert_close(output.nll.double(), exact, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(hidden.grad[[0, 1], [2, 3]].double(), -exact, rtol=1e-5, atol=0.0)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 9),
)
def test_any_shape_any_mask(lengths: list[int], share: float, seed: int) -> None:
    hidden, head, labels, targets = make_case(lengths, share=share, seed=seed)
    wanted, gradient, rows = textbook(hidden, head, labels, lengths)
    output = packed_linear_cross_entropy(hidden, head, targets)
    output.loss.backward()
    divisor = max(rows, 1)
    torch.testing.assert_close(output.loss.double(), wanted / divisor, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), gradient / divisor, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.per_document[:, 0].sum(), output.nll.sum())
    assert output.per_document[:, 1].sum() == rows
    assert output.per_document.shape == (len(lengths), 3)


def test_nothing_crosses_a_document_boundary() -> None:
    hidden, head, labels, _ = make_case([5, 4], share=1.0)
    bounds = torch.tensor([0, 5, 9])
    first = packed_linear_cross_entropy(hidden, head, Targets.from_labels(labels, bounds))
    changed = labels.clone()
    changed[5] = (labels[5] + 1) % 101
    second = packed_linear_cross_entropy(hidden, head, Targets.from_labels(changed, bounds))
    assert torch.equal(first.nll, second.nll)
    assert torch.equal(*(torch.autograd.grad(o.loss, hidden)[0] for o in (first, second)))


def test_the_chunk_size_changes_no_row_and_a_second_run_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, _, targets = make_case([50, 30])
    whole = packed_linear_cross_entropy(hidden, head, targets)
    again = packed_linear_cross_entropy(hidden, head, targets)
    assert torch.equal(whole.nll, again.nll)
    monkeypatch.setattr(workspace, "BLOCK_ROWS", 5)
    monkeypatch.setattr(workspace, "TORCH_TILE", 40)
    parts = packed_linear_cross_entropy(hidden, head, targets)
    torch.testing.assert_close(parts.nll, whole.nll, rtol=1e-6, atol=1e-6)
    assert torch.equal(parts.correct, whole.correct)


def test_token_weights_and_accumulation() -> None:
    hidden, head, _, targets = make_case([30, 30])
    weights = torch.rand(len(targets))
    output = packed_linear_cross_entropy(hidden, head, targets, token_weights=weights)
    torch.testing.assert_close(output.loss, (output.nll * weights).sum() / weights.sum())
    # Two halves with the common divisor add up to the whole.
    whole = packed_linear_cross_entropy(hidden, head, targets, n_items=len(targets)).loss
    half = len(targets) // 2
    parts = [
        Targets.from_host(targets.positions[part], targets.labels[part], targets.documents[part], 2)
        for part in (slice(0, half), slice(half, None))
    ]
    summed = sum(packed_linear_cross_entropy(hidden, head, part, n_items=len(targets)).loss for part in parts)
    torch.testing.assert_close(summed, whole)


def test_a_trainable_head_gets_its_gradient() -> None:
    hidden, head, _, targets = make_case([20])
    head.requires_grad_()
    output = packed_linear_cross_entropy(hidden, head, targets)
    output.loss.backward()
    nll, _, _ = reference_linear_cross_entropy(hidden, head, targets)
    expected = torch.autograd.grad(nll.mean(), head)[0]
    torch.testing.assert_close(head.grad, expected)


def test_autocast_does_not_lower_its_precision() -> None:
    hidden, head, _, targets = make_case([40])
    plain = packed_linear_cross_entropy(hidden, head, targets)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = packed_linear_cross_entropy(hidden, head, targets)
    assert torch.equal(plain.nll, under_autocast.nll)


def test_wrong_arguments_are_named() -> None:
    hidden, head, labels, targets = make_case([10])
    with pytest.raises(ValueError, match=r"hidden: expected floating \[T, D\]"):
        packed_linear_cross_entropy(hidden[None], head, targets)
    with pytest.raises(ValueError, match=r"head: expected floating \[V, 24\]"):
        packed_linear_cross_entropy(hidden, head[:, 1:], targets)
    with pytest.raises(ValueError, match="token_weights: expected"):
        packed_linear_cross_entropy(hidden, head, targets, token_weights=torch.ones(1))
    with pytest.raises(ValueError, match=r"targets\.labels: .*100 is outside of the 50 tokens"):
        high = Targets.from_host(torch.tensor([0]), torch.tensor([100]), torch.tensor([0]), 1)
        packed_linear_cross_entropy(hidden, head[:50], high)
    with pytest.raises(ValueError, match=r"targets\.positions: 10 is outside"):
        packed_linear_cross_entropy(
            hidden, head, Targets.from_host(torch.tensor([10]), torch.tensor([1]), torch.tensor([0]), 1)
        )
    with pytest.raises(ValueError, match="cu_seqlens must run from 0 to T=10"):
        Targets.from_labels(labels, torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="labels has 2 entries but positions has 1"):
        Targets.from_host(torch.tensor([1]), torch.tensor([1, 2]), torch.tensor([0]), 1)
