"""What the benchmarks share: the clock, the peak of a process, and on what a row was measured."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def clock() -> float:
    """Wall time; with one thread on a CPU the time that the process ran, which other processes do not lengthen."""
    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def peak_of_child(work: Callable[[], Any]) -> int | None:
    """Growth of the resident set while a forked child does ``work``. One thread: OpenMP does not survive a fork."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            base = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            work()
            status = Path("/proc/self/status").read_text()
            high = int(status.split("VmHWM:")[1].split()[0]) * 1024
            os.write(writer, str(high - base).encode())
        finally:
            os._exit(0)
    os.close(writer)
    answer = os.read(reader, 64).decode()
    os.close(reader)
    os.waitpid(child, 0)
    return int(answer) if answer else None


def measured_on(benchmark: str) -> dict[str, Any]:
    """Commit, versions, device and load, for a row."""
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
