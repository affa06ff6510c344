"""Attention by document on a GPU, each of its ways against the plain products in float32."""

import pytest
import torch
from torch import Tensor

from qlora_sft.model.attention import choose_path, document_attention
from qlora_sft.model.attention_capped import Scores, plain_documents
from qlora_sft.model.attention_tree import CPU, CUDA, Tree, remember_tree, tree_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

LENGTHS = (700, 1, 300, 23)


def inputs(lengths: tuple[int, ...], size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [1, 8, T, size], k and v [1, 2, T, size], bounds"""
    torch.manual_seed(0)
    total = sum(lengths)
    q, k, v = (torch.randn(1, heads, total, size, device="cuda").to(dtype).requires_grad_() for heads in (8, 2, 2))
    return q, k, v, torch.tensor([0, *lengths], device="cuda").cumsum(0).int()


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(
    ("dtype", "size", "softcap", "sinks", "path"),
    [
        (torch.bfloat16, 128, None, False, "varlen"),
        (torch.float16, 64, None, False, "varlen"),
        (torch.float32, 64, None, False, "sdpa"),
        (torch.bfloat16, 64, 3.0, False, "flex"),
        (torch.bfloat16, 64, 3.0, True, "flex"),
    ],
)
def test_output_and_gradients_are_those_of_plain_products(
    dtype: torch.dtype, size: int, softcap: float | None, sinks: bool, path: str, window: int | None
) -> None:
    q, k, v, bounds = inputs(LENGTHS, size, dtype)
    extra = torch.linspace(-1, 2, 8, device="cuda") if sinks else None
    assert choose_path(q.device, dtype, size, softcap is not None or sinks).name == path
    ours, _ = document_attention(
        torch.nn.Module(), q, k, v, None, cu_seq_lens_q=bounds, max_length_q=max(LENGTHS), sliding_window=window,
        softcap=softcap, s_aux=extra,
    )  # fmt: skip
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    theirs = plain_documents(*exact, bounds, Scores(None, window, softcap, None if extra is None else extra.double()))
    gradient = torch.randn_like(theirs)
    theirs.backward(gradient)
    ours.backward(gradient.to(dtype))
    bound = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-3}[dtype]
    assert (ours.double() - theirs).norm() <= bound * theirs.norm()
    for own, other in zip((q, k, v), exact, strict=True):
        assert own.grad is not None
        assert other.grad is not None
        assert (own.grad.double() - other.grad).norm() <= bound * other.grad.norm()


def test_shared_keys_do_not_bring_the_square_of_a_document() -> None:
    """Where there is no FlashAttention (here: float32, as on a T4)."""
    q, k, v, bounds = inputs((8192,), 64, torch.float32)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _ = document_attention(torch.nn.Module(), q, k, v, None, cu_seq_lens_q=bounds, max_length_q=8192)
    out.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 8 * 8192 * 8192  # a quarter of the weights of all heads


def test_capped_layers_of_two_kinds_train_on_sequences_of_many_lengths() -> None:
    """As Gemma 2: a layer with a window and one without, trained and evaluated in turn, with one cap."""
    torch._dynamo.reset()
    for number, total in enumerate((1024, 700, 901, 1300, 64)):
        lengths = (total // 3, total - total // 3)
        for window in (40, None):
            q, k, v, bounds = inputs(lengths, 64, torch.bfloat16)
            said = {"cu_seq_lens_q": bounds, "max_length_q": max(lengths), "sliding_window": window, "softcap": 3.0}
            ours, _ = document_attention(torch.nn.Module(), q, k, v, None, **said)
            exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
            theirs = plain_documents(*exact, bounds, Scores(None, window, 3.0))
            theirs.sum().backward()
            ours.sum().backward()
            for own, other in zip((q, k, v), exact, strict=True):
                assert own.grad is not None
                assert other.grad is not None
                assert (own.grad.double() - other.grad).norm() <= 2e-2 * other.grad.norm(), (number, window)
            with torch.no_grad():
                again, _ = document_attention(torch.nn.Module(), q, k, v, None, **said)
            assert (again.double() - theirs).norm() <= 2e-2 * theirs.norm()


def assert_equal(ours: Tensor, theirs: Tensor, given: tuple[Tensor, ...], exact: list[Tensor]) -> None:
    """Outputs in bfloat16 on the GPU, and the gradients of their inputs, are those in float64 on the CPU."""
    gradient = torch.randn(theirs.shape, dtype=torch.float64)
    theirs.backward(gradient)
    ours.backward(gradient.to("cuda", torch.bfloat16))
    assert float((ours.double().cpu() - theirs).norm()) <= 2e-2 * float(theirs.norm())
    for own, other in zip(given, exact, strict=True):
        assert own.grad is not None
        assert other.grad is not None
        assert float((own.grad.double().cpu() - other.grad).norm()) <= 2e-2 * float(other.grad.norm())


def test_a_tree_of_documents_is_each_path_alone() -> None:
    """FlashAttention level by level, joined, forward and backward, against the same sums on the CPU in float64."""
    tree = Tree((300, 40, 17, 128, 65, 1), (-1, 0, 1, 1, 0, -1))
    q, k, v, _ = inputs((tree.bounds[-1],), 64, torch.bfloat16)
    ours = tree_attention(q, k, v, tree, None, CUDA)
    exact = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    theirs = tree_attention(*exact, tree, None, CPU)
    assert_equal(ours, theirs, (q, k, v), exact)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_window_over_a_tree_is_that_of_each_path_alone(softcap: float | None) -> None:
    """FlexAttention with the tree as its mask, forward and backward; the window ends inside of the prefix."""
    tree = Tree((300, 40, 17, 128, 65, 1), (-1, 0, 1, 1, 0, -1))
    q, k, v, _ = inputs((tree.bounds[-1],), 64, torch.bfloat16)
    on_gpu, on_cpu = (torch.tensor(tree.bounds, dtype=torch.int32, device=device) for device in ("cuda", "cpu"))
    for bounds in (on_gpu, on_cpu):
        remember_tree(bounds, tree.lengths, tree.parents)
    ours, _ = document_attention(
        torch.nn.Module(), q, k, v, None, cu_seq_lens_q=on_gpu, sliding_window=200, softcap=softcap
    )
    exact = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    theirs = plain_documents(*exact, on_cpu, Scores(None, 200, softcap))
    assert_equal(ours, theirs, (q, k, v), exact)
