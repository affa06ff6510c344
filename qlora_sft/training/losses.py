"""The training loss of a run in a few figures: where it began, where it ended, and whether it rose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qlora_sft.run.report import Course

# The loss of one step may rest on a few tokens. The mean over so many no longer hangs on which tokens they were.
ENOUGH_TOKENS = 1000
# A smaller rise is noise.
RISE = 1.02


class StepLoss(NamedTuple):
    loss: float
    """Mean over the supervised tokens of the step, in nats."""
    tokens: int
    """The supervised tokens of the step."""


def summarize_losses(steps: Sequence[StepLoss]) -> Course:
    """Returns the mean loss of the ``first`` and of the ``last`` steps, over how many steps, that of the ``base`` (the
    first step, before any update), and whether it ``rose``.

    As many steps are taken from each end as hold `ENOUGH_TOKENS` supervised tokens together, but at most half of all.
    A loss has risen if its last mean is above its first, or if it was never again as low as at the first step: a rate
    that is far too large spoils the model at once, and from there on the loss may well fall.
    """
    first, last = _enough(steps), _enough(steps[::-1])
    means = _mean(first), _mean(last)
    never_lower = len(steps) > 2 and min(step.loss for step in steps[1:]) > RISE * steps[0].loss
    return Course(
        first=means[0],
        last=means[1],
        first_steps=len(first),
        last_steps=len(last),
        base=steps[0].loss,
        rose=means[1] > RISE * means[0] or never_lower,
    )


def _enough(steps: Sequence[StepLoss]) -> Sequence[StepLoss]:
    most = max(1, len(steps) // 2)
    tokens = 0
    for number, step in enumerate(steps[:most], start=1):
        tokens += step.tokens
        if tokens >= ENOUGH_TOKENS:
            return steps[:number]
    return steps[:most]


def _mean(steps: Sequence[StepLoss]) -> float:
    return sum(step.loss * step.tokens for step in steps) / sum(step.tokens for step in steps)
