"""What was alive on the GPU when a step took most: torch's record of allocations, replayed and grouped by place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch

OURS = ("qlora_sft/", "qlora_kernels/", "benchmarks/")
KNOWN = (*OURS, "peft/", "transformers/", "bitsandbytes/", "unsloth", "torch/optim/", "torch/nn/")


def recorded(step: Callable[[], Any]) -> tuple[int, list[tuple[str, int]]]:
    """Runs ``step`` and returns (most bytes that it added at any time, [(place, bytes alive then)], largest first)."""
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(
        context="alloc", stacks="python", max_entries=2_000_000, clear_history=True
    )
    try:
        step()
        torch.cuda.synchronize()
        events = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    return live_at_peak(events)


def live_at_peak(events: Iterable[dict[str, Any]]) -> tuple[int, list[tuple[str, int]]]:
    """Replays allocations and returns the highest sum of those that began in ``events``, with what was alive then."""
    events = list(events)
    sizes: dict[int, int] = {}
    total = peak = end = 0
    for number, event in enumerate(events):
        if event["action"] == "alloc":
            sizes[event["addr"]] = event["size"]
            total += event["size"]
        elif event["action"] == "free_completed":
            total -= sizes.pop(event["addr"], 0)  # what was there before is not counted
        if total > peak:
            peak, end = total, number + 1
    alive: dict[int, tuple[str, int]] = {}
    for event in events[:end]:
        if event["action"] == "alloc":
            alive[event["addr"]] = (place(event.get("frames", [])), event["size"])
        elif event["action"] == "free_completed":
            alive.pop(event["addr"], None)
    grouped: Counter[str] = Counter()
    for name, size in alive.values():
        grouped[name] += size
    return peak, grouped.most_common()


def place(frames: list[dict[str, Any]]) -> str:
    """Names where a tensor was made: the innermost known places, from the inside out."""
    names = []
    for frame in frames:
        file = frame["filename"].replace("\\", "/")
        known = next((part for part in KNOWN if part in file), None)
        if known is not None and "torch/nn/modules/module.py" not in file:
            names.append(f"{file.rsplit('/', 1)[-1]}:{frame['line']} {frame['name']}")
    return " < ".join(names[:4]) or "autograd"
