"""The Triton kernel of rotary embedding, run by Triton's interpreter. Started by test_triton_interpreted.py."""

from __future__ import annotations

import pytest
import torch
from qlora_kernels.packed_ce.backend import choose_path
from rotate_cases import SHAPES, check


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_forward_and_backward(
    dtype: torch.dtype, error: float, strided: bool, shape: tuple[int, int, int, int, int]
) -> None:
    assert choose_path("auto", torch.device("cpu"), (dtype,)).name == "triton"
    if shape[0] < 100 or (dtype == torch.float32 and not strided):  # the interpreter is slow
        check(shape, dtype, error, strided)
