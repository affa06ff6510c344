"""Summarises the training loss of a run: where it began, where it ended, and whether it rose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qlora_sft.run.report import Course

# The loss of one step may rest on few tokens. A mean over this many depends little on which tokens they are.
ENOUGH_TOKENS = 1000
# A rise by a smaller factor is taken for noise.
RISE = 1.02


class StepLoss(NamedTuple):
    """Holds the loss of one optimizer step and the number of tokens that it is a mean over."""

    loss: float
    """Mean over the supervised tokens of the step, in nats."""
    tokens: int
    """The supervised tokens of the step."""


def summarize_losses(steps: Sequence[StepLoss]) -> Course:
    """Returns the mean loss of the ``first`` and of the ``last`` steps, the number of steps in both means, the loss of
    the ``base`` (the first step, before any update), and whether the loss ``rose``.

    From each end as many steps are taken as hold `ENOUGH_TOKENS` supervised tokens together, but at most half of all
    steps. A loss counts as risen if its last mean is above its first one, or if it was never again as low as at the
    first step: a learning rate that is far too large spoils the model at once, and from there on the loss may well
    fall.
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
    """Returns the first of ``steps`` that hold `ENOUGH_TOKENS` supervised tokens together, at most half of them."""
    most = max(1, len(steps) // 2)
    tokens = 0
    for number, step in enumerate(steps[:most], start=1):
        tokens += step.tokens
        if tokens >= ENOUGH_TOKENS:
            return steps[:number]
    return steps[:most]


def _mean(steps: Sequence[StepLoss]) -> float:
    """Returns the mean loss of ``steps``, in which every supervised token counts the same."""
    return sum(step.loss * step.tokens for step in steps) / sum(step.tokens for step in steps)
