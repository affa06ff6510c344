"""The Triton kernels themselves, run by Triton's interpreter on the CPU. Started by test_triton_interpreted.py in a
process of its own, because the switch has to be set before anything imports triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ce_cases import Case, assert_as_good_as_torch, make
from hypothesis import given, settings
from hypothesis import strategies as st
from qlora_kernels.packed_ce import (
    NF4Head,
    Targets,
    gather_scatter,
    packed_linear_cross_entropy,
    triton_path,
    workspace,
)
from workspace_cases import KINDS, check_bytes

OPTIONS: list[dict[str, Any]] = [
    {},
    {"softcap": 6.0},
    {"logit_scale": 0.25},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"bias": True},
    {"weights": True},
    {"softcap": 6.0, "logit_scale": 0.5, "label_smoothing": 0.1, "z_loss": 1e-2, "bias": True, "weights": True},
]
LENGTHS = [11, 1, 8, 2]


def call(case: Case, hidden: torch.Tensor | None = None, targets: Targets | None = None, **how: Any) -> Any:
    hidden = case.hidden.clone().requires_grad_() if hidden is None else hidden
    output = packed_linear_cross_entropy(hidden, case.head, targets or case.targets, path="triton", **how)
    return output, torch.autograd.grad(output.loss.sum(), hidden)[0]


HALF = [(torch.float16, options) for options in (OPTIONS[0], OPTIONS[-1])]


@pytest.mark.parametrize("tile", [None, 40], ids=["rows", "tiles"])
@pytest.mark.parametrize(("dtype", "options"), [*((torch.float32, each) for each in OPTIONS), *HALF], ids=str)
def test_each_option_and_all_together(dtype: torch.dtype, options: dict[str, Any], tile: int | None) -> None:
    assert_as_good_as_torch(make(LENGTHS, dtype=dtype, **options), path="triton", tile=tile)


def test_bfloat16_within_the_truncation_of_the_interpreter() -> None:
    # The interpreter cuts float32 to bfloat16 instead of rounding: twice the error of one rounding, 2^-8.
    case = make(LENGTHS, dtype=torch.bfloat16)
    _, gradient = call(case, n_items=1.0)
    truth = make(LENGTHS, dtype=torch.bfloat16)
    truth.hidden, truth.head = truth.hidden.double(), truth.head.double()
    hidden = truth.hidden.requires_grad_()
    packed_linear_cross_entropy(hidden, truth.head, case.targets, n_items=1.0).loss.backward()
    assert hidden.grad is not None
    assert (gradient.double() - hidden.grad).norm() <= 2e-2 * hidden.grad.norm()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [{}, OPTIONS[-1]], ids=["plain", "all"])
def test_trainable_head_and_bias(options: dict[str, Any], reduction: str) -> None:
    assert_as_good_as_torch(make(LENGTHS, **options), train_head=True, path="triton", reduction=reduction)


@pytest.mark.parametrize("options", [{}, OPTIONS[-1]], ids=["plain", "all"])
@pytest.mark.parametrize("vocabulary", [101, 60])
def test_a_few_trained_rows(vocabulary: int, options: dict[str, Any]) -> None:
    case = make(LENGTHS, vocabulary=vocabulary, trained=(50, 3), **options)
    case.bias = case.bias if case.bias is None else case.bias.detach()
    for how in ({"tile": 40}, {}, {"reduction": "none"}):
        assert_as_good_as_torch(case, train_head=True, path="triton", **how)


def test_a_block_smaller_than_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_path, "BLOCK", 32)
    monkeypatch.setattr(triton_path, "TILE_BLOCK", 32)
    for dtype in (torch.float32, torch.float16):
        assert_as_good_as_torch(make(LENGTHS, dtype=dtype, softcap=6.0), path="triton")
        assert_as_good_as_torch(make(LENGTHS, dtype=dtype, softcap=6.0), path="triton", tile=40)


def test_the_size_of_the_chunks_changes_no_row() -> None:
    case = make([20, 12], vocabulary=64, share=1.0)
    whole, gradient = call(case, n_items=1.0)
    again, gradient_again = call(case, n_items=1.0)
    parts, gradient_parts = call(case, n_items=1.0, workspace_bytes=4 * 64 * 7)
    assert torch.equal(whole.nll, again.nll)
    assert torch.equal(gradient, gradient_again)
    torch.testing.assert_close(parts.nll, whole.nll, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient_parts, gradient, rtol=1e-5, atol=1e-6)
    assert torch.equal(whole.per_document, again.per_document)


def test_nothing_crosses_a_document_boundary() -> None:
    case = make([9, 7], share=1.0)
    changed = case.labels.clone()
    changed[9] = (changed[9] + 1) % 101
    first, second = (
        call(case, targets=Targets.from_labels(labels, case.bounds, path="triton")) for labels in (case.labels, changed)
    )
    assert torch.equal(first[0].nll, second[0].nll)
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("tile", [None, 40])
def test_a_workspace_full_of_nan_shows_nowhere(monkeypatch: pytest.MonkeyPatch, tile: int | None) -> None:
    case = make(LENGTHS, dtype=torch.float16, vocabulary=101)
    clean, gradient = call(case, tile=tile)
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(99)

    monkeypatch.setattr(torch, "empty", poisoned)
    dirty, gradient_dirty = call(case, tile=tile)
    assert torch.equal(clean.nll, dirty.nll)
    assert torch.equal(gradient, gradient_dirty)
    assert torch.equal(clean.per_document, dirty.per_document)


def test_a_target_outside_of_the_vocabulary_reads_nothing_and_gives_nan() -> None:
    # On a GPU the host does not look; here it would, so the kernels are called below the checks.
    from qlora_kernels.packed_ce.inputs import LossInputs
    from qlora_kernels.packed_ce.options import Options

    case = make([4], share=1.0)
    ids = torch.tensor([5, 101, -1], dtype=torch.int32)
    inputs = LossInputs(case.hidden, case.head, None, case.targets.positions, ids, None, Options(), True, False, False)
    for tile in (None, 40):
        result = triton_path.run(inputs, tile, None)
        assert result.nll.isnan().tolist() == [False, True, True]
        assert result.grad_hidden is not None
        assert not result.grad_hidden[0].isnan().any()


def test_confident_tokens_keep_their_loss_and_gradient() -> None:
    head = torch.eye(6)
    hidden = torch.zeros(3, 6)
    hidden[0, 2], hidden[1, 3] = 25.0, 40.0
    targets = Targets.from_labels(torch.tensor([0, 2, 3]), torch.tensor([0, 3]))
    exact = torch.tensor([25.0, 40.0], dtype=torch.float64).neg().exp().mul(5).log1p()
    for tile in (None, 4):
        leaf = hidden.clone().requires_grad_()
        output = packed_linear_cross_entropy(leaf, head, targets, n_items=1.0, path="triton", tile=tile)
        output.loss.backward()
        assert leaf.grad is not None
        torch.testing.assert_close(output.nll.double(), exact, rtol=1e-5, atol=0.0)
        torch.testing.assert_close(leaf.grad[[0, 1], [2, 3]].double(), -exact, rtol=1e-5, atol=0.0)


def test_strides_and_offsets_past_two_to_the_31() -> None:
    # 4 GiB are reserved and two pages of them touched.
    far = 2**31 + 8
    storage = torch.empty(far + 4, dtype=torch.float16)
    hidden = storage.as_strided((2, 4), (far, 1))
    hidden.copy_(torch.arange(8.0).view(2, 4))
    assert gather_scatter.gather_rows(hidden, torch.tensor([1, 0], dtype=torch.int32)).tolist() == [
        [4, 5, 6, 7],
        [0, 1, 2, 3],
    ]
    out = storage[: 4 * (far // 4)].view(-1, 4)
    rows, factors = torch.tensor([len(out) - 1], dtype=torch.int32), torch.tensor([2.0])
    gather_scatter.scatter_kernel[(1,)](torch.ones(1, 4, dtype=torch.float16), rows, factors, out, len(out), 4, BLOCK=4)
    assert out[-1].tolist() == [2, 2, 2, 2]
    case = make(LENGTHS)
    _, gradient = call(case)
    strided = case.hidden.t().contiguous().t().requires_grad_()
    assert torch.equal(call(case, hidden=strided)[1], gradient)


def test_a_four_bit_head() -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    case = make(LENGTHS, width=64, vocabulary=96)
    packed, state = quantize_4bit(case.head, blocksize=64, compress_statistics=True, quant_type="nf4")
    dense = dequantize_4bit(packed, state)
    case.head = dense
    wanted, gradient = call(case)
    case.head = NF4Head.from_bitsandbytes(packed, state)  # type: ignore[assignment]
    output, gradient_4bit = call(case, tile=40)
    torch.testing.assert_close(output.nll, wanted.nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient_4bit, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_the_bytes_that_it_says(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, because of half precision the interpreter makes copies that a GPU does not; and one chunk or group,
    because it holds on to what it was given last."""
    monkeypatch.setattr(workspace, "TRITON_TILE", 128)
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 4 * 500 * 120)
    for sizes in ((48, 128, 500), (44, 1024, 500), (30, 64, 75)):
        check_bytes(kind, sizes, torch.float32, "triton")


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    share=st.sampled_from([0.0, 0.4, 1.0]),
    vocabulary=st.sampled_from([2, 17, 64]),
    tile=st.sampled_from([None, 16]),
    by_position=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_shape_mask_and_documents(
    lengths: list[int], share: float, vocabulary: int, tile: int | None, by_position: bool, seed: int
) -> None:
    case = make(lengths, width=8, vocabulary=vocabulary, share=share, seed=seed)
    positions = torch.cat([torch.arange(n) for n in lengths])
    documents: dict[str, Any] = {"position_ids": positions} if by_position else {"cu_seqlens": case.bounds}
    found = Targets.from_labels(case.labels, path="triton", **documents)
    for name in ("positions", "labels", "documents"):
        assert torch.equal(getattr(found, name), getattr(case.targets, name)), name
    assert found.n_documents == len(lengths)
    leaf = case.hidden.clone().requires_grad_()
    output = packed_linear_cross_entropy(leaf, case.head, found, path="triton", tile=tile)
    other = case.hidden.clone().requires_grad_()
    plain = packed_linear_cross_entropy(other, case.head, found, path="torch")
    output.loss.backward()
    plain.loss.backward()
    torch.testing.assert_close(output.loss, plain.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.per_document, plain.per_document, rtol=1e-5, atol=1e-5)


def test_selection_over_many_blocks() -> None:
    from qlora_kernels.packed_ce.select import select_positions
    from qlora_kernels.packed_ce.targets import _documents, _select_in_torch

    case = make([30, 1, 2, 67, 5], share=0.3)
    docs, _ = _documents(case.labels, case.bounds, None)
    wanted = _select_in_torch(case.labels, docs, -100)
    for known in (None, len(wanted[0])):
        for a, b in zip(select_positions(case.labels, docs, -100, known, block=16), wanted, strict=True):
            assert torch.equal(a, b)
