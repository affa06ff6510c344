"""Decides when an input leaves for the host, when it comes back, and who owns its slot meanwhile.

Forward, one `Schedule.pack` per offloaded layer::

    copy out starts -> the tensor is held until it is copied -> at most LAG are held; the oldest is waited for

Backward, layers in descending order: at the start of each (`Schedule.unpack` if it is offloaded, else
`Schedule.fetch_before`) the copies in of the DEPTH offloaded layers before it are started, so that they run while this
layer computes. An input still held from the forward is used as it is.

A tensor is let go only after the compute queue has been told to wait for its copy: its memory then comes back in the
order of that queue, and the peak does not depend on how fast the copies are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from qlora_kernels.offload.engine import Engine, Event
from qlora_kernels.offload.slab import HostSlab
from qlora_kernels.offload.tiers import DEPTH, LAG


class Held:
    """Holds a tensor on the device whose copy out, or in, may still be running."""

    def __init__(self, tensor: Tensor, copied: Event):
        self.tensor: Tensor | None = tensor
        self.copied = copied
        self.version = tensor._version


class Ticket:
    """Holds one input in host memory and owns its slot there.

    The autograd graph holds the ticket. So however the graph ends (used, dropped, or broken by an exception), the slot
    is free again.
    """

    def __init__(self, schedule: Schedule, slot: int, view: Tensor, held: Held, previous: weakref.ref[Ticket] | None):
        self._schedule = schedule
        self.slot = slot
        self.view = view
        self.saved = held.copied
        self.held: Held | None = held
        self.previous = previous

    def on_device(self) -> Held | None:
        """Returns its tensor with its copy, if that is on the device."""
        return self.held if self.held is not None and self.held.tensor is not None else None

    def __del__(self) -> None:
        with suppress(Exception):  # at the end of the process torch may be gone
            self._schedule._release(self)


TicketRef = weakref.ref[Ticket]


class Schedule:
    """Moves the inputs of layers out and in.

    Args:
        slab: where they go.
        engine: what copies.
        lag: inputs that may be on their way out at once.
        depth: inputs that may be fetched ahead of their layer.
        warn: called once, when the first tensor has to stay on the device.
    """

    def __init__(
        self,
        slab: HostSlab,
        engine: Engine,
        lag: int = LAG,
        depth: int = DEPTH,
        warn: Callable[[str], None] = lambda text: None,
    ):
        self.slab = slab
        self.engine = engine
        self.lag = lag
        self.depth = depth
        self.stayed = 0
        """Tensors that stayed on the device for want of a slot that holds them."""
        self._warn = warn
        self._leaving: list[Held] = []
        self._ahead: list[Held] = []
        self._newest: TicketRef | None = None
        # Last copy in from each slot: the next copy out into it must not overtake it.
        self._read: dict[int, Event] = {}

    def begin(self) -> None:
        """Starts a new forward, whose first layer fetches nothing of an earlier graph.

        A graph that failed gives its slots back.
        """
        self._newest = None
        if self.slab.taken:
            drop_failed_graphs()

    @property
    def newest(self) -> TicketRef | None:
        """Returns the last offloaded layer so far in this forward."""
        return self._newest

    def pack(self, tensor: Tensor) -> Ticket | Tensor:
        """Sends ``tensor`` to the host. Returns what `unpack` takes."""
        tensor = tensor.detach()
        if not tensor.numel():
            # Before torch 2.13 checkpointing saves an empty tensor beside its inputs. It needs no slot.
            return tensor
        slot = self.slab.take() if self.slab.holds(tensor) else None
        if slot is None:
            self._count_stayed(tensor)
            return tensor
        view = self.slab.view(slot, tensor)
        after = [self.engine.mark()]
        if slot in self._read:
            after.append(self._read.pop(slot))
        held = Held(tensor, self.engine.save(tensor, view, after))
        ticket = Ticket(self, slot, view, held, self._newest)
        self._newest = weakref.ref(ticket)
        self._leaving.append(held)
        while len(self._leaving) > self.lag:
            self._let_go(self._leaving[0])
        return ticket

    def unpack(self, packed: Ticket | Tensor) -> Tensor:
        """Returns the tensor again, on the device. It may be called more than once."""
        if isinstance(packed, Tensor):
            return packed
        held = packed.on_device() or self._load(packed)  # first in the queue: it is needed first
        packed.held = None
        self._forget(held)
        self.fetch_before(packed.previous)
        tensor = held.tensor
        assert tensor is not None
        self._let_go(held)
        return tensor

    def fetch_before(self, newest: TicketRef | None) -> None:
        """Starts the copies in of the ``depth`` tickets up to ``newest``, the newest first.

        It is called when the backward begins above ``newest``.
        """
        wanted = self._chain(newest)
        kept = [ticket.on_device() for ticket in wanted]
        for held in [*self._leaving, *self._ahead]:
            if held not in kept:
                self._let_go(held)
        for ticket in wanted:
            if ticket.on_device() is None:
                ticket.held = self._load(ticket)
                self._ahead.append(ticket.held)

    def _chain(self, newest: TicketRef | None) -> list[Ticket]:
        """Returns the ``depth`` tickets up to ``newest``, as far as their graphs are alive."""
        chain: list[Ticket] = []
        while newest is not None and len(chain) < self.depth and (ticket := newest()) is not None:
            chain.append(ticket)
            newest = ticket.previous
        return chain

    def _load(self, ticket: Ticket) -> Held:
        """Starts the copy of a ticket's input to the device."""
        tensor = self.engine.new(ticket.view)
        # The mark comes after: under torch.use_deterministic_algorithms the new memory is filled with NaN by a kernel
        # of the compute queue, and the copy would be overwritten.
        event = self.engine.load(ticket.view, tensor, [ticket.saved, self.engine.mark()])
        self._read[ticket.slot] = event
        return Held(tensor, event)

    def _let_go(self, held: Held) -> None:
        """Makes compute wait for the copy; then nothing of ours holds the tensor."""
        self._forget(held)
        if held.tensor is None:
            return
        self.engine.wait(held.copied)
        changed = held.tensor._version != held.version
        held.tensor = None
        if changed:
            raise RuntimeError(
                "the input of an offloaded layer was changed in place while it was being copied, so its backward would "
                "be wrong; use the checkpoint tier for this model"
            )

    def _forget(self, held: Held) -> None:
        """Drops ``held`` from the lists of what is on its way."""
        for place in (self._leaving, self._ahead):
            if held in place:
                place.remove(held)

    def _release(self, ticket: Ticket) -> None:
        """Gives the slot of a ticket back."""
        try:
            if ticket.held is not None:
                self._let_go(ticket.held)
        finally:
            self.slab.give_back(ticket.slot)

    def _count_stayed(self, tensor: Tensor) -> None:
        """Counts an input that stays on the device, and warns about the first one."""
        self.stayed += 1
        if self.stayed == 1:
            slab = self.slab
            why = f"all {slab.slots} slots are taken" if slab.holds(tensor) else "no slot has its size and layout"
            self._warn(
                f"offload: the input of a layer ({tensor.nbytes:,} bytes) stays on the device: {why} "
                f"(of {slab.slot_bytes:,} bytes each); all is computed as before, in more memory"
            )


def drop_failed_graphs() -> None:
    """Frees the graphs of backwards that ended in an exception.

    Autograd keeps the tasks that were left, with the graph and its tickets, until the same thread's next backward (seen
    with torch 2.13 on a CPU). This runs an empty one.
    """
    with torch.enable_grad():
        torch.zeros((), requires_grad=True).mul(1).backward()
