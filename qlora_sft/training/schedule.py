"""Computes the learning rate of every step, as a share of the highest one. It imports nothing heavy.

No step has a rate of zero: it would be computed for nothing.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from qlora_sft.config import TrainingConfig
from qlora_sft.errors import ConfigError

Kind = Literal["linear", "cosine", "constant", "wsd"]
DECAY_RATIO = 0.2


class Schedule(NamedTuple):
    """Holds the numbers that decide the rate of every step of a run."""

    kind: Kind
    steps: int
    """All steps of the run."""
    warmup: int
    """Steps before the first one at the highest rate."""
    initial: float
    """Share of the highest rate that the first step of the warm-up has."""
    decay: int
    """Steps at the end in which the rate falls (wsd)."""


def schedule_of(training: TrainingConfig, steps: int) -> Schedule:
    """Returns the schedule of a run of so many steps. Raises `ConfigError` if its warm-up would be longer than it."""
    t = training
    warmup = int(steps * t.warmup_ratio) if t.warmup_steps is None else t.warmup_steps
    if warmup >= steps:
        raise ConfigError(
            f"training.warmup_steps: a warm-up of {warmup} steps would never reach the learning rate in a run of "
            f"{steps}; take fewer"
        )
    initial = 1 / (warmup + 1) if t.initial_rate_fraction is None else t.initial_rate_fraction
    decay = max(1, round(steps * (DECAY_RATIO if t.decay_ratio is None else t.decay_ratio)))
    return Schedule(t.schedule, steps, warmup, initial, min(decay, steps - warmup))


def rate_factor(schedule: Schedule, step: int) -> float:
    """Returns the share of the highest learning rate at ``step``, counted from 0; 0 behind the last step.

    It rises from ``initial`` over the warm-up, and then is, with ``n`` steps left of the ``m`` behind the warm-up::

        linear    n / m
        cosine    (1 - cos(pi n / m)) / 2
        constant  1
        wsd       1, and n / (decay + 1) over the last ``decay`` steps
    """
    kind, steps, warmup, initial, decay = schedule
    if step < warmup:
        return initial + (1 - initial) * step / warmup
    left, whole = steps - step, steps - warmup
    if left <= 0:
        return 0.0
    if kind == "linear":
        return left / whole
    if kind == "cosine":
        return (1 - math.cos(math.pi * left / whole)) / 2
    if kind == "wsd":
        return min(1.0, left / (decay + 1))
    return 1.0


def describe_schedule(schedule: Schedule) -> str:
    """Describes the learning rate over the run in a few words."""
    kind, _, warmup, initial, decay = schedule
    rises = f"rises over {warmup} steps from {initial:.0%}" if warmup else "begins at its highest"
    goes_on = {
        "linear": "falls linearly to zero", "cosine": "falls along a cosine to zero", "constant": "stays",
        "wsd": f"stays, and falls linearly to zero over the last {decay} steps",
    }  # fmt: skip
    return f"{rises}, then {goes_on[kind]}"
