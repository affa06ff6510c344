"""Sets how torch's GPU allocator cuts its memory, before CUDA starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"


def obstacle() -> str | None:
    """Returns why segments cannot grow here; None if they can.

    The driver of Windows, which WSL has too, and that of Tegra (Jetson) refuse the memory at the first allocation.
    """
    if not sys.platform.startswith("linux"):
        return f"this is {sys.platform}"
    if "microsoft" in os.uname().release.lower() or "WSL_DISTRO_NAME" in os.environ:
        return "this is WSL"
    return "this is a Tegra" if Path("/etc/nv_tegra_release").exists() else None


def use_expandable_segments() -> None:
    """Lets segments grow where the system can and the user has not set the allocator.

    Packed sequences differ in length, so their tensors differ in size from step to step. In segments of a fixed size
    they leave gaps that no later tensor fits, and a run ends out of memory with memory to spare. Call it before
    anything uses CUDA: torch reads the variable once.
    """
    if obstacle() is None and not any(variable in os.environ for variable in VARIABLES):
        os.environ[VARIABLES[0]] = EXPANDABLE


def describe_allocator() -> str:
    """Returns the allocator's settings that are in force, with the reason, to print."""
    if os.environ.get(VARIABLES[0]) == EXPANDABLE:
        return f"{EXPANDABLE} (sequences differ in length from step to step; fixed segments would leave gaps)"
    for variable in VARIABLES:
        if variable in os.environ:
            return f"{variable}={os.environ[variable]} (as the environment says)"
    return f"torch's own settings (segments cannot grow here: {obstacle() or 'they were not asked for'})"
