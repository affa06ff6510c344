"""How torch's GPU allocator cuts its memory, set before CUDA starts."""

from __future__ import annotations

import os
import sys

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"


def use_expandable_segments() -> None:
    """Lets segments grow where the system can and the user has not set the allocator.

    Packed sequences differ in length, so their tensors differ in size from step to step. In segments of a fixed size
    they leave gaps that no later tensor fits, and a run ends out of memory with memory to spare. Call it before
    anything uses CUDA: torch reads the variable once.
    """
    if sys.platform.startswith("linux") and not any(variable in os.environ for variable in VARIABLES):
        os.environ[VARIABLES[0]] = EXPANDABLE


def describe_allocator() -> str:
    """Returns what is in force, with the reason, to print."""
    if os.environ.get(VARIABLES[0]) == EXPANDABLE:
        return f"{EXPANDABLE} (sequences differ in length from step to step; fixed segments would leave gaps)"
    for variable in VARIABLES:
        if variable in os.environ:
            return f"{variable}={os.environ[variable]} (as the environment says)"
    return f"torch's own settings (segments that grow are for Linux, this is {sys.platform})"
