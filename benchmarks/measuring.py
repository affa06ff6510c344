"""Provides what the benchmarks share: the clock, the peak of a process, and the machine of a measurement."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from cell import Cell


def clock() -> float:
    """Reads the wall clock. With one thread on a CPU it reads the process's own time, which others do not lengthen."""
    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def peak_growth(work: Callable[[], object]) -> int | None:
    """Returns the most bytes by which the resident set grew during ``work``, or None where the system does not say."""
    status = Path("/proc/self/status")
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(
            0
        )  # memory that earlier work has freed would serve this one without being counted
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return None
    before = _kilobytes(status.read_text(), "VmRSS")
    work()
    return 1024 * (_kilobytes(status.read_text(), "VmHWM") - before)


def _kilobytes(status: str, key: str) -> int:
    return int(status.split(f"{key}:")[1].split()[0])


def measured_on(benchmark: str) -> Cell:
    """Returns commit, versions, device and load, with which every measurement begins."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here).stdout
    cpu = next(
        (s.split(":")[1].strip() for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s), "CPU"
    )
    on_gpu = torch.cuda.is_available()
    return {
        "benchmark": benchmark,
        "commit": commit.strip() or "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if on_gpu else f"{cpu}, {torch.get_num_threads()} threads",
        "load": round(os.getloadavg()[0], 1),
    }
