"""What only a GPU can show: real kernels, no waiting of the host, the memory they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ce_cases import assert_as_good_as_torch, make
from qlora_kernels.packed_ce import NF4Head, PatchedHead, Targets, packed_linear_cross_entropy, triton_path, workspace
from waiting import no_waiting

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

ALL = {"softcap": 6.0, "logit_scale": 0.5, "label_smoothing": 0.1, "z_loss": 1e-2, "bias": True, "weights": True}


def on_gpu(case: Any) -> Any:
    for name in ("hidden", "head", "bias", "weights", "labels", "bounds", "frozen"):
        value = getattr(case, name)
        setattr(case, name, None if value is None else value.cuda())
    case.targets = case.targets.to("cuda")
    return case


@pytest.mark.parametrize("tile", [None, 512], ids=["rows", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
@pytest.mark.parametrize("vocabulary", [1003, 50257])
def test_as_good_as_torch(vocabulary: int, options: dict[str, Any], dtype: torch.dtype, tile: int | None) -> None:
    case = on_gpu(make([90, 1, 200, 13], width=64, vocabulary=vocabulary, dtype=dtype, **options))
    assert_as_good_as_torch(case, path="triton", tile=tile)
    if tile is None:
        assert_as_good_as_torch(case, train_head=True, path="triton")
        assert_as_good_as_torch(case, train_head=True, path="triton", reduction="none")


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
def test_a_few_trained_rows(options: dict[str, Any]) -> None:
    case = make([90, 1, 200, 13], width=64, vocabulary=50257, dtype=torch.bfloat16, trained=(50256, 7), **options)
    assert_as_good_as_torch(on_gpu(case), train_head=True, path="triton")


def test_the_selection_equals_the_one_on_the_cpu() -> None:
    case = make([3000, 1, 5, 4000, 777], width=8)
    found = Targets.from_labels(case.labels.cuda(), case.bounds.cuda(), path="triton")
    for name in ("positions", "labels", "documents"):
        assert torch.equal(getattr(found, name).cpu(), getattr(case.targets, name))


def test_the_host_never_waits() -> None:
    case = on_gpu(make([900, 300], width=64, vocabulary=5003, dtype=torch.float16, weights=True))
    hidden = case.hidden.requires_grad_()
    known = len(case.targets)
    patched = PatchedHead(case.head, (5002, 9), case.head[:2].clone().requires_grad_())

    def step() -> None:
        targets = Targets.from_labels(case.labels, case.bounds, n_supervised=known)
        for each in (case.targets, targets):
            for head in (case.head, patched):
                output = packed_linear_cross_entropy(hidden, head, each, token_weights=case.weights, tile=1024)
                output.loss.backward()
            packed_linear_cross_entropy(hidden, case.head, each, token_weights=case.weights).loss.backward()

    step()  # compiles
    with no_waiting():
        step()


def test_two_runs_are_the_same_bit_for_bit() -> None:
    case = on_gpu(make([900, 300], width=64, vocabulary=5003, dtype=torch.bfloat16))
    results = []
    for _ in range(3):
        hidden = case.hidden.detach().clone().requires_grad_()
        output = packed_linear_cross_entropy(hidden, case.head, case.targets)
        output.loss.backward()
        results.append((output.nll, output.per_document, hidden.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_peak_memory_is_the_workspace_and_the_saved_rows() -> None:
    count, width, vocabulary = 4096, 1024, 32064
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(count + 1, width, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
    head = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16, generator=generator) / 32
    rows = torch.arange(count, dtype=torch.int32, device="cuda")
    targets = Targets.from_host(rows, rows, torch.zeros_like(rows), 1)
    packed_linear_cross_entropy(hidden, head, targets)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    packed_linear_cross_entropy(hidden, head, targets)
    torch.cuda.synchronize()
    processors = triton_path.processors_of(hidden.device)
    chunk = workspace.chunk_rows(count, width, vocabulary, workspace.WORKSPACE_BYTES, processors)
    taken = chunk * (4 * workspace.padded(vocabulary) + 2 * width)
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * (taken + 2 * count * width)


def test_a_four_bit_head() -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    case = on_gpu(make([300, 200], width=128, vocabulary=5008, dtype=torch.bfloat16))
    packed, state = quantize_4bit(case.head, blocksize=64, compress_statistics=True, quant_type="nf4")
    dense = packed_linear_cross_entropy(case.hidden, dequantize_4bit(packed, state), case.targets)
    four = packed_linear_cross_entropy(case.hidden, NF4Head.from_bitsandbytes(packed, state), case.targets, tile=1024)
    torch.testing.assert_close(four.nll, dense.nll, rtol=2e-2, atol=2e-2)
