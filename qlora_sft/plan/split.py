"""Which tier each layer gets, for this run and for cards of common sizes, and the longest row that fits them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_kernels.offload.tiers import Choice, LayerBytes, Tier, choose_tiers, peak_bytes

from qlora_sft.config import Config

CARDS = (8, 12, 16, 24, 48, 80)
"""GiB."""
# Assumptions, not measured: the driver's context with cuBLAS and Triton kernels, and the share of a card that torch's
# allocator cannot use because free blocks do not fit what is asked for.
CONTEXT_BYTES = 640 * 2**20
FRAGMENTATION = 0.05
LONGEST = 2**24

Row = Callable[[int], tuple[LayerBytes, int]]
"""Tokens of a row -> (bytes of a layer, bytes between forward and backward)."""


@dataclass(frozen=True)
class Fit:
    """The longest row on a card, or why there is none."""

    card: int
    """Bytes."""
    tokens: int
    choice: Choice | None
    """The split for that row."""
    limit: str


def activation_budget(card: int, residents: int) -> int:
    """Bytes of ``card`` that activations may take beside ``residents``; negative if not even those fit."""
    return int(card * (1 - FRAGMENTATION)) - CONTEXT_BYTES - residents


def longest_row(n_layers: int, row: Row, budget: int, host_budget: int) -> int:
    """Most tokens whose activations fit, with the split that needs least; 0 if none do. Found by bisection."""

    def fits(tokens: int) -> bool:
        layer, loss = row(tokens)
        most = min(n_layers, host_budget // layer.input)
        # Each layer offloaded saves its input, but two inputs travel: not always the more the better.
        return any(peak_bytes(_first_offloaded(count, n_layers), layer, loss) <= budget for count in {0, most})

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < LONGEST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _first_offloaded(count: int, n_layers: int, rest: Tier = "checkpoint") -> tuple[Tier, ...]:
    """The first layers wait longest for their backward."""
    offloaded: Tier = "offload"
    return (offloaded,) * count + (rest,) * (n_layers - count)


def fit_card(gib: int, n_layers: int, row: Row, residents: int, host_budget: int) -> Fit:
    card = gib * 2**30
    budget = activation_budget(card, residents)
    if budget <= 0:
        return Fit(card, 0, None, f"weights and optimizer leave nothing of {gib} GiB")
    tokens = longest_row(n_layers, row, budget, host_budget)
    if not tokens:
        return Fit(card, 0, None, f"no row at all fits beside weights and optimizer in {gib} GiB")
    layer, loss = row(tokens)
    choice = choose_tiers(n_layers, layer, budget, host_budget, loss=loss)
    full = choice.tiers.count("offload") == n_layers
    return Fit(card, tokens, choice, "GPU memory" if full else "GPU memory and host memory")


# ------------------------------------------------------------------ this run


Policy = Literal["auto", "none", "checkpoint", "offload"]


def policy_of(config: Config) -> Policy:
    """How activations are kept, as configured."""
    memory: Any = getattr(config, "memory", None)
    if memory is not None:
        policy: Policy = memory.policy
        return policy
    return "checkpoint" if getattr(config.model, "gradient_checkpointing", True) else "none"


def split_of_run(config: Config, n_layers: int, layer: LayerBytes, loss: int, budget: int, host_budget: int) -> Choice:
    """The tiers of the run. Raises ValueError, with the least that would do, if ``auto`` finds none that fit."""
    policy = policy_of(config)
    if policy == "auto":
        return choose_tiers(n_layers, layer, budget, host_budget, loss=loss)
    offloaded = min(n_layers, host_budget // layer.input) if policy == "offload" else 0
    rest: Tier = "keep" if policy == "none" else "checkpoint"
    tiers = _first_offloaded(offloaded, n_layers, rest)
    peak = peak_bytes(tiers, layer, loss)
    over = "" if peak <= budget else "; it does not fit"
    return Choice(tiers, peak, offloaded * layer.input, f"as configured ({policy}){over}")


def host_budget(config: Config) -> tuple[int, str]:
    """(bytes of host memory that inputs of layers may take, reason)."""
    configured = getattr(getattr(config, "memory", None), "host_budget_gib", None)
    if configured is not None:
        return int(configured * 2**30), "as configured"
    return available_memory() // 2, "half of what is available here"


def available_memory() -> int:
    """Bytes of host memory that are free or can be freed; half of all where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
