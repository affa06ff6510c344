"""How much memory there is for activations, on the device and on the host, and how that is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from qlora_sft.config import Config

GIB = 2**30
# Of a card: for the allocator's fragments and what libraries allocate behind torch's back.
CARD_RESERVE = 0.05
# Of the memory that a CPU run finds: the rest is for the data loader, other programs and the system's file cache.
RAM_SHARE = 0.7
HOST_SHARE = 0.5


class Room(NamedTuple):
    nbytes: int
    reason: str


def device_room(model: Any, config: Config) -> Room:
    """For activations, on the device that the model is on; gradients and optimizer states are taken off."""
    states = training_states(model, config)
    if model.device.type != "cuda":
        available = available_ram()
        return Room(
            int(available * RAM_SHARE) - states, f"{RAM_SHARE:.0%} of the {available / GIB:.1f} GiB of free RAM"
        )
    free, total = torch.cuda.mem_get_info(model.device)
    allocated = torch.cuda.memory_allocated(model.device)
    budget = config.memory.gpu_budget_gib
    if budget is not None:
        return Room(int(budget * GIB) - allocated - states, f"memory.gpu_budget_gib={budget:g}, less the model")
    free += torch.cuda.memory_reserved(model.device) - allocated  # torch's own, unused
    reserve = int(total * CARD_RESERVE)
    return Room(free - reserve - states, f"{free / GIB:.1f} GiB are free, less {reserve / GIB:.1f} GiB in reserve")


def host_room(config: Config) -> Room:
    """For inputs of layers in host memory."""
    budget = config.memory.host_budget_gib
    if budget is not None:
        return Room(int(budget * GIB), f"memory.host_budget_gib={budget:g}")
    available = available_ram()
    return Room(int(available * HOST_SHARE), f"{HOST_SHARE:.0%} of the {available / GIB:.1f} GiB of free RAM")


def training_states(model: Any, config: Config) -> int:
    """Bytes of gradients and optimizer states: Adam's two, of one byte each in the 8-bit optimizers."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    wanted = config.training.optimizer
    eight_bit = "8bit" in wanted or (wanted == "auto" and model.device.type == "cuda")
    return sum(p.nbytes + 2 * (p.numel() if eight_bit else p.nbytes) for p in trainable)


def available_ram() -> int:
    """What new allocations can have without swapping, within the limit of the container if there is one."""
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
