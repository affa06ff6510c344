"""Chooses which of the two implementations runs, and says why."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, NamedTuple

import torch

Requested = Literal["auto", "triton", "torch"]
PathName = Literal["triton", "torch"]


class PathChoice(NamedTuple):
    """Names the implementation that runs, with the reason."""

    name: PathName
    reason: str


def choose_path(requested: Requested, device: torch.device, dtypes: tuple[torch.dtype, ...] = ()) -> PathChoice:
    """Chooses the implementation for tensors on ``device``.

    ``auto`` takes Triton on an NVIDIA GPU where it is installed, and plain torch elsewhere. Raises ValueError for an
    unknown name, and for ``triton`` where it cannot run.
    """
    if requested not in ("auto", "triton", "torch"):
        raise ValueError(f"path: expected auto, triton or torch, got {requested!r}")
    if requested == "torch":
        return PathChoice("torch", "requested")
    obstacle = _triton_obstacle(device, dtypes)
    if obstacle is None:
        return PathChoice("triton", "requested" if requested == "triton" else f"{device.type} device")
    if requested == "triton":
        raise ValueError(f"path: triton cannot run here: {obstacle}")
    return PathChoice("torch", obstacle)


def _triton_obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Returns why Triton cannot run on ``device``; None if it can."""
    # Triton's own switch: its kernels then run on the CPU, slowly, which is how they are tested without a GPU.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"{device.type} device"
    # Last, because it may look through all of sys.path.
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.float64 in dtypes:
        return "float64"
    return None
