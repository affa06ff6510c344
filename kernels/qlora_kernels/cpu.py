"""Tells what a CPU is good at from what it says of itself: the answer is the same in every run, so results repeat."""

from __future__ import annotations

from pathlib import Path

import torch


def bfloat16_products() -> tuple[bool, str]:
    """Returns (whether bfloat16 matrix products are faster than float32 here, reason).

    Measured with oneDNN: an AMD Zen 4 multiplies bfloat16 at twice float32's rate; an Intel Xeon (Emerald Rapids) whose
    AMX is switched off, as in many virtual machines, at half of it. Without an instruction bfloat16 is emulated, which
    is slower than both.
    """
    can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else capabilities_before_211()
    if can.get("amx_bf16"):
        return True, "this CPU has AMX"
    if not can.get("avx512_bf16"):
        return False, "this CPU has no bfloat16 instructions"
    if "Intel" in str(can.get("cpu_name", "")):
        return False, "an Intel CPU without AMX multiplies float32 faster"
    return True, "this CPU computes in bfloat16"


def capabilities_before_211() -> dict[str, bool | str]:
    """Returns what is asked of ``torch.cpu.get_capabilities`` above, where torch (2.10) has no such function."""
    info = Path("/proc/cpuinfo")
    return {
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "cpu_name": "Intel" if info.exists() and "GenuineIntel" in info.read_text() else "",
    }
