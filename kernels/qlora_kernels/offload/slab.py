"""Allocates one block of host memory of exactly the needed size, cut into equal slots."""

from __future__ import annotations

from contextlib import suppress
from math import prod

import torch
from torch import Tensor


class HostSlab:
    """Holds ``slots * slot_bytes`` bytes of host memory, page-locked as a whole if ``device`` is a GPU.

    torch's own pinned allocator rounds every block up to a power of two; registering one block that is ours does not.
    Where the system refuses to lock the pages (WSL, a memory limit) the slab works unlocked: copies then keep the host
    waiting. ``warning`` says so, to be printed.
    """

    def __init__(self, slots: int, slot_bytes: int, device: torch.device):
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.memory = torch.empty(slots * slot_bytes, dtype=torch.uint8)
        self.pinned = False
        self.warning: str | None = None
        # Last in, first out: a short run touches few pages.
        self._free = list(reversed(range(slots)))
        if device.type == "cuda" and self.memory.numel():
            self._pin(device)

    @property
    def nbytes(self) -> int:
        return self.memory.numel()

    @property
    def taken(self) -> int:
        """Returns the slots that somebody owns."""
        return self.slots - len(self._free)

    def take(self) -> int | None:
        """Returns a slot, which is the caller's until `give_back`; None if there is none."""
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        """Makes a slot free again."""
        assert slot not in self._free, f"slot {slot} was given back twice"
        if slot < self.slots:  # of a slab closed meanwhile
            self._free.append(slot)

    def holds(self, tensor: Tensor) -> bool:
        """Returns whether `view` can be had of any slot."""
        return (
            tensor.nbytes <= self.slot_bytes
            and self.slot_bytes % tensor.element_size() == 0
            and tensor.is_contiguous()
        )  # fmt: skip

    def view(self, slot: int, like: Tensor) -> Tensor:
        """Returns the beginning of a slot, in the shape and type of ``like``."""
        start = slot * self.slot_bytes
        size = prod(like.shape) * like.element_size()
        return self.memory[start : start + size].view(like.dtype).view(like.shape)

    def close(self) -> None:
        """Unlocks and frees the memory.

        What is still in a slot stays readable as long as somebody holds its view.
        """
        if self.pinned:
            torch.cuda.synchronize()  # no copy may be under way
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())
            self.pinned = False
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.slots, self._free = 0, []

    def __del__(self) -> None:
        with suppress(Exception):  # at the end of the process torch may be gone
            self.close()

    def _pin(self, device: torch.device) -> None:
        """Locks the pages of the memory, or sets ``warning`` if the system refuses."""
        with torch.cuda.device(device):
            error = int(torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), self.nbytes, 0))
        self.pinned = error == 0
        if error:
            self.warning = (
                f"{self.nbytes / 2**30:.2f} GiB of host memory could not be page-locked (CUDA error {error}); "
                "offloading works but keeps the host waiting. Under WSL offload less, elsewhere raise ulimit -l"
            )
            # The runtime remembers the error and would blame the next kernel for it.
            with suppress(RuntimeError):
                torch.zeros(1, device=device)
