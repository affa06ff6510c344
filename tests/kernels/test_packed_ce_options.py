"""Options of the plain torch path, each alone and all together, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from ce_cases import assert_as_good_as_torch, make, ours, textbook
from qlora_kernels.packed_ce import NF4Head, PatchedHead, Targets, choose_path, packed_linear_cross_entropy, workspace

ALL = {"softcap": 6.0, "logit_scale": 0.5, "label_smoothing": 0.1, "z_loss": 1e-2, "bias": True, "weights": True}
OPTIONS: list[dict[str, Any]] = [{}, {"weights": True}, *({key: value} for key, value in ALL.items()), ALL]


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_as_good_as_torch(options: dict[str, Any], dtype: torch.dtype, train_head: bool) -> None:
    case = make([37, 1, 20, 2], dtype=dtype, **options)
    assert_as_good_as_torch(case, train_head, path="torch", tile=40)
    assert_as_good_as_torch(case, train_head, path="torch", reduction="none")


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trained"])
def test_a_logit_far_above_the_targets(train_head: bool) -> None:
    """exp(z_j - z_y) overflows float32 for these rows: they have to be rescaled on the way."""
    case = make([60], share=1.0)
    case.hidden *= 40
    assert float(textbook(case, torch.float64)[0]) / len(case.targets) > 200
    assert_as_good_as_torch(case, train_head, path="torch", tile=16)
    # In bfloat16 such a difference of logits is itself rounded to 2^-9 of its size, and the loss with it.
    case.hidden, case.head = case.hidden.bfloat16(), case.head.bfloat16()
    exact, theirs = textbook(case, torch.float64, train_head), textbook(case, torch.bfloat16, train_head)
    mine = ours(case, train_head, path="torch", tile=16)
    assert (mine[0] - exact[0]).abs() <= 2**-9 * exact[0]
    for a, b, c in zip(mine[1:], theirs[1:], exact[1:], strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm() + 1e-4 * c.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_few_trained_rows_of_a_frozen_head(options: dict[str, Any], dtype: torch.dtype) -> None:
    case = make([37, 1, 20, 2], dtype=dtype, trained=(100, 7, 39), **options)
    for how in ({"tile": 40}, {"reduction": "none"}):
        assert_as_good_as_torch(case, train_head=True, path="torch", **how)


def test_trained_rows_of_a_confident_model() -> None:
    """Where p is near 1 or a logit far above the target's, p - 1 and exp(z) would lose everything."""
    for scale in (15.0, 40.0):
        case = make([60], share=1.0, trained=(3, 50))
        case.hidden *= scale
        assert_as_good_as_torch(case, train_head=True, path="torch", tile=16)


def test_trained_rows_of_a_four_bit_head() -> None:
    case = make([30, 20], width=64, vocabulary=96, trained=(95, 2))
    assert isinstance(case.frozen, torch.Tensor)
    packed, state = quantize_4bit(case.frozen, blocksize=64, compress_statistics=True, quant_type="nf4")
    case.frozen = dequantize_4bit(packed, state)
    wanted = textbook(case, torch.float64, train_head=True)
    case.frozen = NF4Head.from_bitsandbytes(packed, state)
    for found, exact in zip(ours(case, train_head=True), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_trained_rows_are_rounded_to_the_heads_type() -> None:
    """As PEFT does it wherever else the model is computed; else what is trained is not what answers."""
    case = make([30], share=1.0, trained=(100, 7))
    head, values = case.frozen.bfloat16(), case.head.clone().requires_grad_()
    ours = packed_linear_cross_entropy(case.hidden, PatchedHead(head, case.trained, values), case.targets)
    dense = head.index_copy(0, torch.tensor(case.trained), case.head.bfloat16()).requires_grad_()
    theirs = packed_linear_cross_entropy(case.hidden, dense, case.targets)
    torch.testing.assert_close(ours.nll, theirs.nll, rtol=1e-6, atol=1e-6)
    ours.loss.backward()
    theirs.loss.backward()
    assert values.grad is not None
    assert dense.grad is not None
    torch.testing.assert_close(values.grad, dense.grad[[100, 7]].float(), rtol=2**-8, atol=1e-5)


def test_no_supervised_row_leaves_trained_rows_a_zero_gradient() -> None:
    case = make([10], share=0.0, trained=(3,))
    _, _, gradient = ours(case, train_head=True)
    assert gradient.tolist() == [[0.0] * 24]


def test_wrong_trained_rows_are_named() -> None:
    case = make([10])
    for base, ids, shape, message in (
        (case.head, (3, 3), (2, 24), r"head\.token_ids: expected distinct rows of a head of 101, got \[3, 3\]"),
        (case.head, (101,), (1, 24), r"head\.token_ids: .* got \[101\]"),
        (case.head, (1, 2), (1, 24), r"head\.values: expected floating \[2, 24\], got torch.float32 \[1, 24\]"),
        (case.head.clone().requires_grad_(), (1,), (1, 24), r"head\.base: it is trained as a whole"),
    ):
        with pytest.raises(ValueError, match=message):
            packed_linear_cross_entropy(case.hidden, PatchedHead(base, ids, torch.zeros(shape)), case.targets)


def test_a_tied_head_gets_both_gradients() -> None:
    case = make([40])
    tokens = torch.arange(40)

    def gradient(ours_too: bool) -> torch.Tensor:
        table = case.head.clone().requires_grad_()
        hidden = torch.tanh(table[tokens])
        if ours_too:
            loss = packed_linear_cross_entropy(hidden, table, case.targets).loss
        else:
            rows, ids = case.targets.positions.long(), case.targets.labels.long()
            loss = torch.nn.functional.cross_entropy(hidden[rows] @ table.t(), ids)
        return torch.autograd.grad(loss, table)[0]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("nested", [False, True])
def test_a_four_bit_head_equals_the_dense_one(nested: bool) -> None:
    case = make([30, 20], width=64, vocabulary=96)
    packed, state = quantize_4bit(case.head, blocksize=64, compress_statistics=nested, quant_type="nf4")
    case.head = dequantize_4bit(packed, state)
    head = NF4Head.from_bitsandbytes(packed, state)
    torch.testing.assert_close(head.rows(slice(3, 40)), case.head[3:40], rtol=1e-6, atol=1e-6)
    wanted = packed_linear_cross_entropy(case.hidden, case.head, case.targets)
    for tile in (None, 40):
        found = packed_linear_cross_entropy(case.hidden, head, case.targets, tile=tile)
        torch.testing.assert_close(found.nll, wanted.nll, rtol=1e-5, atol=1e-5)


def test_sums_by_document_and_by_source() -> None:
    case = make([20, 1, 15, 9], share=0.7)
    output = packed_linear_cross_entropy(case.hidden, case.head, case.targets)
    documents = case.targets.documents.long()
    for document in range(4):
        mine = documents == document
        sums = [output.nll[mine].sum(), mine.sum(), output.correct[mine].sum()]
        torch.testing.assert_close(output.per_document[document], torch.stack([s.float() for s in sums]))
    by_source = output.per_source(torch.tensor([1, 0, 1, 0]), 3)
    torch.testing.assert_close(by_source[1], (output.per_document[0] + output.per_document[2]).double())
    assert by_source[2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_supervised_row(reduction: str) -> None:
    case = make([5, 1], share=0.0)
    hidden, head = case.hidden.fill_(float("nan")).requires_grad_(), case.head.requires_grad_()
    output = packed_linear_cross_entropy(hidden, head, case.targets, reduction=reduction)
    output.loss.sum().backward()
    assert float(output.loss.sum()) == 0
    assert hidden.grad is not None
    assert (hidden.grad == 0).all()
    assert output.per_document.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_strides_and_integer_types_change_nothing() -> None:
    case = make([30])
    wanted = ours(case)
    case.hidden = case.hidden.t().contiguous().t()
    case.targets = Targets.from_host(
        case.targets.positions.long(), case.targets.labels.long(), case.targets.documents.long(), 1
    )
    for a, b in zip(ours(case), wanted, strict=True):
        assert torch.equal(a, b)


def test_positions_say_the_same_as_bounds() -> None:
    case = make([4, 1, 7])
    positions = torch.cat([torch.arange(n) for n in (4, 1, 7)])
    found = Targets.from_labels(case.labels, position_ids=positions, n_supervised=len(case.targets))
    assert torch.equal(found.positions, case.targets.positions)
    assert torch.equal(found.documents, case.targets.documents)


def test_a_workspace_full_of_nan_shows_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "BLOCK_ROWS", 16)
    case = make([37, 20], dtype=torch.bfloat16)
    clean = ours(case, tile=40)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: new_empty(self, *a, **k).fill_(float("nan")))
    for a, b in zip(clean, ours(case, tile=40), strict=True):
        assert torch.equal(a, b)


def test_wrong_options_are_named_with_their_value() -> None:
    case = make([10])
    cpu = torch.device("cpu")
    for options, message in (
        ({"softcap": -1.0}, "softcap: .*-1.0"),
        ({"label_smoothing": 1.5}, "label_smoothing: .*1.5"),
        ({"z_loss": -0.1}, "z_loss: .*-0.1"),
        ({"logit_scale": float("nan")}, "logit_scale: .*nan"),
        ({"reduction": "sum"}, "reduction: .*'sum'"),
        ({"bias": torch.zeros(3)}, r"bias: expected floating \[101\], got torch.float32 \[3\]"),
        ({"path": "cuda"}, "path: .*'cuda'"),
        ({"path": "triton"}, "path: triton cannot run here: cpu device"),
    ):
        with pytest.raises(ValueError, match=message):
            packed_linear_cross_entropy(case.hidden, case.head, case.targets, **options)
    assert choose_path("auto", cpu) == ("torch", "cpu device")
    with pytest.raises(ValueError, match="n_supervised: 99"):
        Targets.from_labels(case.labels, case.bounds, n_supervised=99)
    with pytest.raises(ValueError, match="documents: expected 0 to 0 in ascending order"):
        Targets.from_host(torch.tensor([0, 1]), torch.tensor([1, 1]), torch.tensor([1, 0]), 1)
