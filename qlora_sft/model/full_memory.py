"""Tells the errors that mean that a GPU or the host has no memory left, whichever part of torch has raised them."""

from __future__ import annotations

import gc

import torch

# Libraries below torch report a full GPU in words of their own, as a plain RuntimeError.
_GPU_FULL = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
_HOST_FULL = "DefaultCPUAllocator: "


def is_gpu_full(error: BaseException) -> bool:
    """Says whether ``error`` means that the GPU has no room left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _GPU_FULL)


def is_memory_full(error: BaseException) -> bool:
    """Says whether ``error`` means that the GPU or the host has no room left."""
    of_host = isinstance(error, RuntimeError) and _HOST_FULL in str(error)
    return of_host or isinstance(error, MemoryError) or is_gpu_full(error)


def free_memory() -> None:
    """Gives back what nobody needs any more; call it where the error has gone, with all that its traceback held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
