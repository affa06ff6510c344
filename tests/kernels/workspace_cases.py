"""What packed_ce takes, counted while it runs, for every kind of head; both paths' tests share it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from bitsandbytes.functional import quantize_4bit
from qlora_kernels.packed_ce import (
    HeadShape,
    NF4Head,
    PatchedHead,
    Targets,
    backward_bytes,
    packed_linear_cross_entropy,
    workspace_bytes,
)

from qlora_sft.model.layer_bytes import memory_use

KINDS = ("dense", "nf4", "patched", "patched nf4")
CPU = torch.device("cpu")


def head_of(kind: str, vocabulary: int, width: int, dtype: torch.dtype) -> Any:
    """Trained rows are in the first, the second and the last tile."""
    torch.manual_seed(0)
    base: Any = (torch.randn(vocabulary, width) / 10).to(dtype)
    if "nf4" in kind:
        packed, state = quantize_4bit(base, blocksize=64, compress_statistics=True, quant_type="nf4")
        base = NF4Head.from_bitsandbytes(packed, state)
    if "patched" not in kind:
        return base
    return PatchedHead(base, (5, vocabulary // 2, vocabulary - 1), torch.randn(3, width, requires_grad=True))


def check_bytes(
    kind: str, sizes: tuple[int, int, int], dtype: torch.dtype, path: Literal["torch", "triton"], **options: Any
) -> None:
    """``sizes``: rows, width, vocabulary. Forward and backward take what packed_ce says, within 5%, and no more."""
    count, width, vocabulary = sizes
    head = head_of(kind, vocabulary, width, dtype)
    hidden = torch.randn(count, width).to(dtype).requires_grad_()
    rows = torch.arange(count, dtype=torch.int32)
    targets = Targets.from_host(rows, torch.randint(0, vocabulary, (count,)).int(), torch.zeros_like(rows), 1)
    # The gradient of the rows, then that of the hidden states. Triton's interpreter looks at what it is given through
    # an alias, which is counted once more.
    beside = hidden.nbytes * (2 if path == "triton" else 1)
    with memory_use(CPU) as use:
        loss = packed_linear_cross_entropy(hidden, head, targets, path=path, **options).loss
        forward = use.peak() - beside
    with memory_use(CPU) as use:
        loss.backward()
        backward = use.peak() - beside
    shape = HeadShape.of(head)
    said = workspace_bytes(shape, count, dtype, path, CPU, capped="softcap" in options)
    scales = vocabulary * width // 64 * 4 if "nf4" in kind else 0  # made with the head, before the loss
    assert 0.95 * (said - scales) <= forward <= 1.02 * (said - scales), (forward, said - scales)
    if "patched" in kind:
        said = backward_bytes(shape, count)
        assert 0.85 * said <= backward <= 1.02 * said, (backward, said)
