"""Finds the longest sequence that fits on cards of common sizes, and the tier that each layer gets for it."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_kernels.offload.tiers import Tier, TierChoice, choose_tiers, peak_bytes

from qlora_sft.model.memory_budget import CARD_RESERVE
from qlora_sft.plan.activations import SequenceBytes

CARDS = (8, 12, 16, 24, 48, 80)
"""The sizes of common cards in GiB."""
# An assumption, not measured: the driver's context with cuBLAS and Triton kernels.
CONTEXT_BYTES = 640 * 2**20
# What cuBLAS and cuBLASLt keep of torch's memory once they have multiplied: 32 MiB each on an H200 (measured, torch
# 2.11), less on older cards.
WORKSPACE_BYTES = 64 * 2**20
LONGEST = 2**24


@dataclass(frozen=True)
class CardFit:
    """Holds the longest sequence on a card, or why there is none."""

    card: int
    """The memory of the card in bytes."""
    tokens: int
    choice: TierChoice | None
    """The split for that row."""
    limit: str


def activation_budget(card: int, residents: int) -> int:
    """Returns the bytes of ``card`` left for activations beside ``residents``; negative if not even those fit."""
    return int(card * (1 - CARD_RESERVE)) - CONTEXT_BYTES - WORKSPACE_BYTES - residents


def longest_sequence(n_layers: int, bytes_for: SequenceBytes, budget: int, host_budget: int) -> int:
    """Returns the most tokens whose activations fit with the split that needs least; 0 if none do.

    It is found by bisection.
    """

    def fits(tokens: int) -> bool:
        layer, loss = bytes_for(tokens)
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
    """Returns a split that offloads the first ``count`` layers: they wait longest for their backward."""
    offloaded: Tier = "offload"
    return (offloaded,) * count + (rest,) * (n_layers - count)


def fit_card(gib: int, n_layers: int, bytes_for: SequenceBytes, residents: int, host_budget: int) -> CardFit:
    """Returns the longest sequence on a card of ``gib`` GiB whose weights and optimizer take ``residents`` bytes."""
    card = gib * 2**30
    budget = activation_budget(card, residents)
    if budget <= 0:
        return CardFit(card, 0, None, f"weights and optimizer leave nothing of {gib} GiB")
    tokens = longest_sequence(n_layers, bytes_for, budget, host_budget)
    if not tokens:
        return CardFit(card, 0, None, f"no row at all fits beside weights and optimizer in {gib} GiB")
    layer, loss = bytes_for(tokens)
    choice = choose_tiers(n_layers, layer, budget, host_budget, loss=loss)
    full = choice.tiers.count("offload") == n_layers
    return CardFit(card, tokens, choice, "GPU memory" if full else "GPU memory and host memory")
