"""Moves rows of hidden states in Triton kernels: gather the supervised ones, scatter their gradient, add up documents.

Plain references: ``hidden[positions]``, ``out[positions] = grad_hidden * factors[:, None]``, and ``index_add_`` by
document.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def gather_kernel(X, stride_row, stride_column, positions, out, T, D, BLOCK: tl.constexpr):
    """Computes out[i] = X[positions[i]] for any strides. A position outside of X becomes NaN, not a wild read."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(positions + i).to(tl.int64)
    # Where the row ends, or 0. Triton 3.9's interpreter takes no mask that is a vector & a scalar.
    end = tl.where((row >= 0) & (row < T), D, 0)
    for start in range(0, D, BLOCK):
        o = start + tl.arange(0, BLOCK)
        x = tl.load(X + row * stride_row + o.to(tl.int64) * stride_column, mask=o < end, other=float("nan"))
        tl.store(out + i * D + o, x, mask=o < D)


@triton.jit
def scatter_kernel(U, positions, factors, out, T, D, BLOCK: tl.constexpr):
    """Computes out[positions[i]] = U[i] * factors[i], multiplied in float32 and rounded once.

    The positions are distinct, so no atomics are needed.
    """
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(positions + i).to(tl.int64)
    end = tl.where((row >= 0) & (row < T), D, 0)
    factor = tl.load(factors + i)
    for start in range(0, D, BLOCK):
        o = start + tl.arange(0, BLOCK)
        u = tl.load(U + i * D + o, mask=o < D, other=0.0).to(tl.float32)
        tl.store(out + row * D + o, (u * factor).to(out.dtype.element_ty), mask=o < end)


@triton.jit
def document_kernel(nll, correct, bounds, out, BLOCK: tl.constexpr):
    """Computes out[d] = (sum of nll, positions, correct) over the supervised positions bounds[d] .. bounds[d + 1].

    They are always added in the same order.
    """
    d = tl.program_id(0)
    first = tl.load(bounds + d)
    last = tl.load(bounds + d + 1)
    loss = tl.zeros((BLOCK,), tl.float32)
    n_correct = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        o = start + tl.arange(0, BLOCK)
        loss += tl.load(nll + o, mask=o < last, other=0.0)
        n_correct += tl.load(correct + o, mask=o < last, other=0).to(tl.float32)
    tl.store(out + d * 3, tl.sum(loss, 0))
    tl.store(out + d * 3 + 1, (last - first).to(tl.float32))
    tl.store(out + d * 3 + 2, tl.sum(n_correct, 0))


def block_for(columns: int, largest: int = 1024) -> int:
    """Returns the block size for that many columns: the next power of two, at most ``largest``."""
    return min(largest, 1 << (columns - 1).bit_length())


def gather_rows(source: Tensor, positions: Tensor) -> Tensor:
    """Gathers rows: source [T, D] of any strides, positions int [M] -> contiguous [M, D]."""
    out = source.new_empty(len(positions), source.shape[1])
    T, D = source.shape
    gather_kernel[(len(positions),)](source, *source.stride(), positions, out, T, D, BLOCK=block_for(D))
    return out


def scatter_rows(grad_hidden: Tensor, positions: Tensor, factors: Tensor, shape: torch.Size) -> Tensor:
    """Scatters rows: grad_hidden [M, D], factors float32 [M] -> [T, D], zero where there is no position."""
    out = grad_hidden.new_zeros(shape)
    D = shape[1]
    scatter_kernel[(len(positions),)](
        grad_hidden, positions, factors.contiguous(), out, shape[0], D, BLOCK=block_for(D)
    )
    return out


def sum_documents(nll: Tensor, correct: Tensor, documents: Tensor, n_documents: int) -> Tensor:
    """Returns [n_documents, 3]: the sum of nll, positions and correct of every document.

    Positions ascend by document, so each document is a range of them.
    """
    out = nll.new_empty(n_documents, 3)
    bounds = torch.searchsorted(
        documents.contiguous(), torch.arange(n_documents + 1, device=documents.device, dtype=documents.dtype)
    )
    if n_documents:
        document_kernel[(n_documents,)](nll, correct.to(torch.int8), bounds.int(), out, BLOCK=256)
    return out
