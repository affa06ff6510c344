"""Says how much memory there is for activations, on the device and on the host, and how that is known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch

from qlora_sft.config import Config
from qlora_sft.model.shards import shards_of
from qlora_sft.parallel import processes_here

if TYPE_CHECKING:
    from qlora_sft.model.base import CausalModel

GIB = 2**30
# The share of a card that is left to the allocator's fragments and to what libraries allocate behind torch's back.
CARD_RESERVE = 0.05
# The share of the free memory that a CPU run may use. The rest is for the data loader, other programs and the system's
# file cache.
RAM_SHARE = 0.7
HOST_SHARE = 0.5
# bitsandbytes' 8-bit AdamW: states of smaller tensors stay in float32; one float32 maximum per 256 values and state.
SMALLEST_8BIT, OPTIMIZER_BLOCK = 4096, 256


class MemoryBudget(NamedTuple):
    """Holds a number of bytes, and the reason for it."""

    nbytes: int
    reason: str


def device_budget(model: CausalModel, config: Config) -> MemoryBudget:
    """Returns the memory for activations on the device that the model is on.

    Gradients and optimizer states are taken off, and the room for layers that are fetched whole where the base is cut.
    """
    shards = shards_of(model)
    fetched = 0 if shards is None else shards.missing_bytes
    return budget_on(model.device, config, training_states(model, config), fetched)


def budget_on(device: torch.device, config: Config, states: int, weights: int = 0) -> MemoryBudget:
    """Returns the memory for activations on ``device``.

    states: the bytes of gradients and optimizer states. weights: the bytes of weights that are not loaded yet.
    """
    if device.type != "cuda":
        available = available_ram() // processes_here() - weights
        return MemoryBudget(
            int(available * RAM_SHARE) - states,
            f"{RAM_SHARE:.0%} of the {available / GIB:.1f} GiB of free RAM{_each()}",
        )
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    configured = config.memory.gpu_budget_gib
    if configured is not None:
        return MemoryBudget(
            int(configured * GIB) - allocated - weights - states,
            f"memory.gpu_budget_gib={configured:g}, less the model",
        )
    free += torch.cuda.memory_reserved(device) - allocated - weights  # torch's own, unused
    reserve = int(total * CARD_RESERVE)
    return MemoryBudget(
        free - reserve - states, f"{free / GIB:.1f} GiB are free, less {reserve / GIB:.1f} GiB in reserve"
    )


def host_budget(config: Config) -> MemoryBudget:
    """Returns the host memory for inputs of layers."""
    configured = config.memory.host_budget_gib
    if configured is not None:
        return MemoryBudget(int(configured * GIB), f"memory.host_budget_gib={configured:g}")
    available = available_ram() // processes_here()
    reason = f"{HOST_SHARE:.0%} of the {available / GIB:.1f} GiB of free RAM{_each()}"
    return MemoryBudget(int(available * HOST_SHARE), reason)


def _each() -> str:
    """Says that processes share the memory of this machine, where they do."""
    return f" for each of {processes_here()} processes" if processes_here() > 1 else ""


def training_states(model: CausalModel, config: Config) -> int:
    """Returns the bytes of gradients and optimizer states."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    wanted = config.training.optimizer
    eight_bit = "8bit" in wanted or (wanted == "auto" and model.device.type == "cuda")
    gradients: int = sum(p.nbytes for p in trainable)
    return gradients + optimizer_bytes([p.numel() for p in trainable], eight_bit)


def optimizer_bytes(tensors: list[int], eight_bit: bool) -> int:
    """Returns the bytes of AdamW's states for trained float32 tensors of so many elements.

    In float32 they are two values per parameter, and in torch's own AdamW a float32 step per tensor. In bitsandbytes' 8
    bits they are two bytes per parameter, a maximum per block and state, and two tables of 256 values for all; small
    tensors stay in float32.
    """
    if not eight_bit:
        return sum(8 * count + 4 for count in tensors)
    large = [count for count in tensors if count >= SMALLEST_8BIT]
    small = sum(8 * count for count in tensors if count < SMALLEST_8BIT)
    tables = 2 * 256 * 4 if large else 0
    return small + tables + sum(2 * count + 2 * 4 * -(-count // OPTIMIZER_BLOCK) for count in large)


def available_ram() -> int:
    """Returns the bytes that new allocations can have without swapping.

    The limit of the container counts if there is one.
    """
    available = int(psutil.virtual_memory().available)
    root = Path("/sys/fs/cgroup")
    for limit, used in (
        (root / "memory.max", root / "memory.current"),
        (root / "memory/memory.limit_in_bytes", root / "memory/memory.usage_in_bytes"),
    ):
        try:
            available = min(available, int(limit.read_text()) - int(used.read_text()))
        except (OSError, ValueError):  # no such file, or no limit ("max")
            continue
    return max(0, available)
