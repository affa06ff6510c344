"""Runs the copies between device and host: in two streams of a GPU, or within memory on a CPU.

An engine has three queues: compute, out (device to host) and in (host to device). Each works in order; between them
only events give an order. The host never waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

Event = Any
"""A point in one of the queues. Only its engine knows what it is."""


class Engine(Protocol):
    """Describes what a schedule needs of an engine."""

    def mark(self) -> Event:
        """Returns an event at this point of the compute queue."""
        ...

    def save(self, tensor: Tensor, view: Tensor, after: Iterable[Event]) -> Event:
        """Copies ``tensor`` into host memory, in the out queue, once all of ``after`` have passed."""
        ...

    def new(self, view: Tensor) -> Tensor:
        """Makes a tensor of the shape and type of ``view``, in the compute queue.

        Its memory may be in use by what was computed so far, and torch fills it where it is told to be deterministic.
        """
        ...

    def load(self, view: Tensor, into: Tensor, after: Iterable[Event]) -> Event:
        """Copies host memory into ``into``, in the in queue, once all of ``after`` have passed.

        Among them is a `mark` that was made after `new`.
        """
        ...

    def wait(self, event: Event) -> None:
        """Makes the compute queue go on only when ``event`` has passed."""
        ...


class CpuEngine:
    """Copies within host memory: device and host are the same, and every copy is done when its call returns."""

    def mark(self) -> Event:
        return None

    def save(self, tensor: Tensor, view: Tensor, after: Iterable[Event]) -> Event:
        view.copy_(tensor)

    def new(self, view: Tensor) -> Tensor:
        return torch.empty_like(view)

    def load(self, view: Tensor, into: Tensor, after: Iterable[Event]) -> Event:
        into.copy_(view)

    def wait(self, event: Event) -> None:
        pass


class CudaEngine:
    """Copies in two streams of a GPU.

    The compute queue is the current stream of whoever calls: in a backward, autograd makes it that of the forward.
    """

    def __init__(self, device: torch.device):
        self.device = device
        # Each direction has a copy engine of its own on the card; one stream for both would let only one work.
        self.outward = torch.cuda.Stream(device)
        self.inward = torch.cuda.Stream(device)

    def mark(self) -> Event:
        return torch.cuda.current_stream(self.device).record_event()

    def save(self, tensor: Tensor, view: Tensor, after: Iterable[Event]) -> Event:
        with torch.cuda.stream(self.outward):
            for event in after:
                self.outward.wait_event(event)
            view.copy_(tensor, non_blocking=True)
            return self.outward.record_event()

    def new(self, view: Tensor) -> Tensor:
        # Allocated under the compute stream, so that it goes back to that stream's memory: no record_stream, which
        # would return it at a time that depends on the host.
        return torch.empty(view.shape, dtype=view.dtype, device=self.device)

    def load(self, view: Tensor, into: Tensor, after: Iterable[Event]) -> Event:
        with torch.cuda.stream(self.inward):
            for event in after:
                self.inward.wait_event(event)
            into.copy_(view, non_blocking=True)
            return self.inward.record_event()

    def wait(self, event: Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)


def engine_for(device: torch.device) -> Engine:
    """Returns the engine for a device."""
    return CudaEngine(device) if device.type == "cuda" else CpuEngine()
