"""The Triton kernel of RMSNorm's backward, run by Triton's interpreter. Started by test_triton_interpreted.py."""

from __future__ import annotations

import sys

import pytest
import torch
from qlora_kernels.rms_norm import NormFormula, in_triton, reference_rms_norm, rms_norm

EPS = 1e-5


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 80), (7, 128), (1, 1), (2, 1000), (0, 8)], ids=str)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("form", ["llama", "gemma"])
def test_the_gradient_is_that_of_the_textbook(
    form: NormFormula, dtype: torch.dtype, error: float, shape: tuple[int, ...], strided: bool
) -> None:
    torch.manual_seed(0)
    x, dy, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    if strided and len(shape) > 2:
        x, dy = x.transpose(0, 1), dy.transpose(0, 1)
    assert in_triton(x, dy)
    exact = x.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(reference_rms_norm(exact, weight.double(), EPS, form), exact, dy.double())
    x.requires_grad_()
    (found,) = torch.autograd.grad(rms_norm(x, weight, EPS, form=form), x, dy)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    # Of one value nothing is left but the rounding of what was subtracted.
    terms = dy.double() * (weight.double() + (form == "gemma")) * (exact.square().mean(-1, keepdim=True) + EPS).rsqrt()
    assert float((found.double() - right).norm()) <= error * float(terms.norm())


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-p", "no:cacheprovider", "-o", "addopts="]))
