"""Finds what was alive on the GPU at the peak of a step, from torch's record of allocations, grouped by place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypedDict

import torch

OURS = ("qlora_sft/", "qlora_kernels/", "benchmarks/")
KNOWN = (*OURS, "peft/", "transformers/", "bitsandbytes/", "unsloth", "torch/optim/", "torch/nn/")


class Frame(TypedDict):
    """Holds a frame of the stack on which an allocation was made."""

    filename: str
    line: int
    name: str


class Event(TypedDict, total=False):
    """Holds an entry of torch's record of allocations."""

    action: str
    addr: int
    size: int
    frames: list[Frame]


def recorded(step: Callable[[], object]) -> tuple[int, list[tuple[str, int]]]:
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


def live_at_peak(events: Iterable[Event]) -> tuple[int, list[tuple[str, int]]]:
    """Replays allocations and returns the highest sum of those that began in ``events``, with what was alive then."""
    events = list(events)
    sizes: dict[int, int] = {}
    total = peak = end = 0
    for number, event in enumerate(events):
        if event["action"] == "alloc":
            sizes[event["addr"]] = event["size"]
            total += event["size"]
        elif event["action"] == "free_completed":
            total -= sizes.pop(event["addr"], 0)  # allocations from before the record are not counted
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


def place(frames: list[Frame]) -> str:
    """Names the place where a tensor was made, by the innermost known frames of the stack, from the inside out."""
    names = []
    for frame in frames:
        file = frame["filename"].replace("\\", "/")
        known = next((part for part in KNOWN if part in file), None)
        if known is not None and "torch/nn/modules/module.py" not in file:
            names.append(f"{file.rsplit('/', 1)[-1]}:{frame['line']} {frame['name']}")
    return " < ".join(names[:4]) or "autograd"
