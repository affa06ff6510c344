"""Chooses by a budget in bytes how much of each layer stays on the GPU between its forward and its backward.

A decoder layer is kept in one of four ways, from the fastest to the smallest::

    tier         stays on the GPU              done again in backward      goes to host memory
    keep         everything backward needs     nothing                     nothing
    attention    input, attention output       all but attention           nothing
    checkpoint   input                         the layer                   nothing
    offload      nothing                       the layer                   input

The last layers get the fast tiers: their backward comes first, so what they keep is gone before an earlier layer
is computed again, and the two never need room at the same time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

Tier = Literal["keep", "attention", "checkpoint", "offload"]
TIERS: tuple[Tier, ...] = ("keep", "attention", "checkpoint", "offload")

# Inputs on their way to the host at once: two, so that a slow copy holds nothing up.
LAG = 2
# Inputs fetched ahead of their layer, while the one above it runs backward. One is enough: a copy takes far less time
# than a layer's backward (8B, per token: 8 KiB, 0.7 us at 12 GB/s; 1.3 GFLOP, 2.6 us at 500 TFLOP/s), and the backward
# of a layer is the peak of a long row, where each input more takes a fourteenth of what the row may use.
DEPTH = 1

# The share of a layer's forward that attention takes, unless somebody knows better. It grows with the documents.
ATTENTION_SHARE = 0.1


@dataclass(frozen=True)
class LayerBytes:
    """Holds the bytes of one decoder layer for one packed sequence of T tokens."""

    input: int
    """The hidden states that enter it: T x hidden x itemsize."""
    attention: int
    """What attention keeps of its result: T x heads x (head size x itemsize + 4 for the log-sum-exp)."""
    kept: int
    """All that its backward needs, the input and the attention output included."""
    backward: int
    """Bytes that its backward takes on top of ``kept`` while it runs."""
    recomputed: int | None = None
    """Bytes that stand in place of ``kept`` after recomputation, if they are fewer: an MLP may keep nothing then."""

    def restored(self, tier: Tier) -> int:
        """Returns the bytes that the layer's backward brings back beside what was stored."""
        whole = self.kept if tier == "keep" or self.recomputed is None else self.recomputed
        return whole - self.stored(tier)

    def stored(self, tier: Tier) -> int:
        """Returns the bytes on the GPU from the layer's forward to its backward."""
        on_gpu = {"keep": self.kept, "attention": self.input + self.attention, "checkpoint": self.input, "offload": 0}
        return on_gpu[tier]


@dataclass(frozen=True)
class TierChoice:
    """Holds the tier of every layer, what that takes, and the reason."""

    tiers: tuple[Tier, ...]
    """One per layer, in the order of the forward."""
    gpu_bytes: int
    """Most that activations take at any time."""
    host_bytes: int
    reason: str


def slab_bytes(n_offloaded: int, tokens: int, hidden: int, itemsize: int) -> int:
    """Returns the host memory of the inputs of ``n_offloaded`` layers: no rounding, nothing beside."""
    return n_offloaded * tokens * hidden * itemsize


def peak_bytes(tiers: Sequence[Tier], layer: LayerBytes, loss: int = 0) -> int:
    """Returns the most bytes of activations on the GPU at any time of a step.

    loss: the workspace and the gradient of the loss.

    ::

        end of forward:       sum of stored + LAG inputs still leaving + loss
        backward of layer i:  sum of stored up to i + what layer i restores + its backward + inputs fetched ahead
    """
    return _peak([(tier, len(list(run))) for tier, run in groupby(tiers)], layer, loss)


def _peak(runs: Sequence[tuple[Tier, int]], layer: LayerBytes, loss: int) -> int:
    """Computes `peak_bytes` from runs of equal tiers.

    Within a run the last layer is the worst, because most is stored before it.
    """
    stored = peak = offloaded = 0
    for tier, count in runs:
        if not count:
            continue
        stored += count * layer.stored(tier)
        ahead = offloaded + (count - 1 if tier == "offload" else 0)
        offloaded += count if tier == "offload" else 0
        peak = max(peak, stored + layer.restored(tier) + layer.backward + min(DEPTH, ahead) * layer.input)
    leaving = min(LAG, offloaded) * layer.input
    return max(peak, stored + leaving + loss)


def choose_tiers(
    n_layers: int,
    layer: LayerBytes,
    budget: int,
    host_budget: int,
    *,
    loss: int = 0,
    attention_share: float = ATTENTION_SHARE,
) -> TierChoice:
    """Chooses the split with the least recomputation that fits ``budget`` on the GPU and ``host_budget`` on the host.

    attention_share: the share of a layer's forward that attention takes; it grows with the length of the documents.

    Raises ValueError, with the least that would do, if even offloading every layer does not fit.
    """
    best: tuple[float, int, tuple[Tier, ...]] | None = None
    for keep in reversed(range(n_layers + 1)):
        # Attention that is not among the operators known keeps nothing, and would seem to cost nothing.
        for attention in range(n_layers - keep + 1 if layer.attention else 1):
            recomputed = n_layers - keep - attention * attention_share
            if best is not None and recomputed > best[0]:
                continue
            found = _fewest_offloaded(n_layers, keep, attention, layer, budget, loss)
            if found is None or found.count("offload") * layer.input > host_budget:
                continue
            candidate = (recomputed, found.count("offload"), found)
            if best is None or candidate < best:
                best = candidate
    if best is None:
        raise ValueError(_too_small(n_layers, layer, budget, host_budget, loss))
    tiers = best[2]
    return TierChoice(
        tiers,
        gpu_bytes=peak_bytes(tiers, layer, loss),
        host_bytes=tiers.count("offload") * layer.input,
        reason=_reason(tiers, budget),
    )


def _fewest_offloaded(
    n_layers: int, keep: int, attention: int, layer: LayerBytes, budget: int, loss: int
) -> tuple[Tier, ...] | None:
    """Returns the split with that many fast layers and as few offloaded ones as fit.

    Returns None if it does not fit even with all other layers offloaded.
    """
    rest = n_layers - keep - attention

    def runs(offload: int) -> list[tuple[Tier, int]]:
        return [("offload", offload), ("checkpoint", rest - offload), ("attention", attention), ("keep", keep)]

    def fits(offload: int) -> bool:
        return _peak(runs(offload), layer, loss) <= budget

    # From here on one more offloaded layer takes an input off the GPU and puts none more in flight.
    steady = min(max(LAG, DEPTH + 1), rest)
    found = next((offload for offload in range(steady) if fits(offload)), None)
    if found is None:
        if not fits(rest):
            return None
        found = bisect_left(range(rest), True, lo=steady, key=fits)
    return tuple(tier for tier, count in runs(found) for _ in range(count))


def describe(tiers: Sequence[Tier]) -> str:
    """Describes a split in the order of the forward: ``20 offload, 10 checkpoint, 2 keep``."""
    counts = [(tiers.count(tier), tier) for tier in reversed(TIERS)]
    return ", ".join(f"{count} {tier}" for count, tier in counts if count)


def _reason(tiers: Sequence[Tier], budget: int) -> str:
    if tiers.count("keep") == len(tiers):
        return f"everything fits {gib(budget)}"
    return f"the least recomputation that fits {gib(budget)}"


def _too_small(n_layers: int, layer: LayerBytes, budget: int, host_budget: int, loss: int) -> str:
    least = _peak([("offload", n_layers)], layer, loss)
    host = n_layers * layer.input
    return (
        f"activations do not fit: with every layer offloaded they take {gib(least)} on the GPU and {gib(host)} of host "
        f"memory; there are {gib(budget)} and {gib(host_budget)}"
    )


def gib(count: int) -> str:
    """Writes a number of bytes in GiB."""
    return f"{count / 2**30:.2f} GiB"
