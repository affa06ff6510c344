"""A device with three queues in virtual time, to see what a `Schedule` asks for and when.

Each queue does its work in order, each copy takes as long as it likes, and work starts when its queue is free and the
events it waits for have passed. Every rule is checked as the work is queued:

- a copy in starts only after the copy out into the same slot has ended, a copy out only after all copies in from it;
- a copy out starts only after its source has been computed;
- the compute queue has passed the end of a copy out before the last reference to its source goes;
- at most ``lag`` sources leave and ``depth`` inputs are ahead, and what is fetched ahead comes in descending order.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor


@dataclass
class Slot:
    written: float = 0.0
    """When the last copy out into it ended."""
    read: float = 0.0
    """When the last copy in from it ended."""


@dataclass
class SimulatedEngine:
    """An event is the time at which it passes."""

    random: Random
    compute: float = 0.0
    outward: float = 0.0
    inward: float = 0.0
    slots: dict[int, Slot] = field(default_factory=dict)
    computed: dict[int, float] = field(default_factory=dict)
    """Address of a tensor -> when it has been computed."""
    loads: list[float] = field(default_factory=list)
    """First elements of what was copied in, in order: the number of the layer."""
    arrival: dict[int, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def work(self) -> None:
        """A layer is computed."""
        self.compute += self.random.uniform(0.1, 1)

    def mark(self) -> float:
        return self.compute

    def wait(self, event: float) -> None:
        self.compute = max(self.compute, event)

    def save(self, tensor: Tensor, view: Tensor, after: Iterable[float]) -> float:
        slot = self.slots.setdefault(view.data_ptr(), Slot())
        start = max(self.outward, *after)
        self._check(start >= slot.read, "a slot is written while it is read")
        self._check(start >= slot.written, "a slot is written twice at once")
        self._check(start >= self.computed[tensor.data_ptr()], "an input leaves before it is computed")
        self.outward = slot.written = start + self._copy_time()
        view.copy_(tensor)
        weakref.finalize(tensor, self._source_dropped, slot.written)
        return slot.written

    def new(self, view: Tensor) -> Tensor:
        self.compute += self.random.choice([0.0, 0.1])  # the memory is filled
        return torch.empty_like(view)

    def load(self, view: Tensor, into: Tensor, after: Iterable[float]) -> float:
        slot = self.slots[view.data_ptr()]
        after = list(after)
        start = max(self.inward, *after)
        self._check(start >= slot.written, "a slot is read before it is written")
        self._check(max(after) >= self.compute, "new memory is written while earlier work may still use or fill it")
        self.inward = slot.read = start + self._copy_time()
        into.copy_(view)
        self.loads.append(float(into.flatten()[0]))
        self.arrival[into.data_ptr()] = self.inward
        return self.inward

    def use(self, tensor: Tensor) -> None:
        """A layer is computed again from ``tensor``."""
        self._check(self.compute >= self.arrival.pop(tensor.data_ptr(), 0.0), "an input is used before it arrives")
        self.work()

    def _source_dropped(self, copied: float) -> None:
        self._check(self.compute >= copied, "the memory of an input is given back before it is copied")

    def _copy_time(self) -> float:
        return self.random.choice([0.01, 0.3, 1.0, 5.0])

    def _check(self, good: bool, fault: str) -> None:
        if not good:
            self.faults.append(fault)
