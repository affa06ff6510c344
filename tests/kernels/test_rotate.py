"""Rotary embedding in place: against the textbook, against transformers' function, and its error beside that one's."""

from __future__ import annotations

import pytest
import torch
from qlora_kernels.rotate import reference_rotate, rotate
from rotate_cases import SHAPES, angles, check
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_forward_and_backward(shape: tuple[int, int, int, int, int], dtype: torch.dtype, error: float) -> None:
    check(shape, dtype, error)
    check(shape, dtype, error, strided=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_less_exact_than_transformers(dtype: torch.dtype) -> None:
    q, k = (torch.randn(1, 50, heads, 16).to(dtype) for heads in (4, 2))
    angle = torch.randn(1, 50, 8).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    theirs = [x.transpose(1, 2) for x in apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)]
    truth = [reference_rotate(x.double(), cos, sin, 16) for x in (q, k)]
    for mine, other, exact in zip(rotate(q, k, cos, sin, 16), theirs, truth, strict=True):
        assert (mine - exact).norm() <= 1.01 * (other - exact).norm() + 1e-7


def test_the_inverse_undoes_it_and_other_documents_do_not_matter() -> None:
    cos, sin = (f[..., :8].repeat(1, 1, 2) for f in angles(12, 16, torch.float64))
    q, k = torch.randn(12, 64, dtype=torch.float64), torch.randn(12, 32, dtype=torch.float64)
    together = rotate(q.clone(), k.clone(), cos, sin, 16)
    alone = rotate(q[5:].clone(), k[5:].clone(), cos[:, 5:], sin[:, 5:], 16)
    back = rotate(*(x.clone() for x in together), cos, -sin, 16)
    for whole, part, before, after in zip(together, alone, (q, k), back, strict=True):
        assert torch.equal(whole[5:], part)
        torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


def test_under_checkpointing_and_with_a_retained_graph() -> None:
    cos, sin = angles(6, 8, torch.float64)
    leaf = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        q, k = rotate(x.sin(), x.cos(), cos, sin, 8)
        return (q * k).sum()

    (plain,) = torch.autograd.grad(layer(leaf), leaf)
    again = checkpoint(layer, leaf, use_reentrant=False)
    for retain in (True, False):
        assert torch.equal(torch.autograd.grad(again, leaf, retain_graph=retain)[0], plain)


def test_a_row_without_tokens() -> None:
    nothing = torch.empty(0, 32), torch.empty(0, 16)
    assert all(a is b for a, b in zip(rotate(*nothing, *angles(0, 8, torch.float32), 8), nothing, strict=True))


def test_refused_by_name() -> None:
    q, k = torch.randn(6, 32), torch.randn(6, 16)
    with pytest.raises(ValueError, match="even w <= 8"):
        rotate(q, k, *angles(6, 16, torch.float32), 8)
    with pytest.raises(ValueError, match=r"expected 5 tokens with heads of 8 values"):
        rotate(q, k, *angles(5, 8, torch.float32), 8)
