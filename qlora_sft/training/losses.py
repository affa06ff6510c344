"""Summarises the training loss of a run: where it began, where it ended, and whether it rose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from qlora_sft.run.report import Course

# The loss of one step may rest on few tokens. A mean over this many depends little on which tokens they are.
ENOUGH_TOKENS = 1000
# A rise by a smaller factor is not worth a word.
RISE = 1.02
# A rise by fewer standard errors is taken for noise between steps. Three are passed by chance once in 700 runs.
STANDARD_ERRORS = 3.0
# Of the square of a normally distributed number with variance 1.
MEDIAN_SQUARE = 0.455


class StepLoss(NamedTuple):
    """Holds the loss of one optimizer step and the number of tokens that it is a mean over."""

    loss: float
    """Mean over the supervised tokens of the step, in nats."""
    tokens: int
    """The supervised tokens of the step."""


def summarize_losses(steps: Sequence[StepLoss]) -> Course:
    """Returns the mean loss of the ``first`` and of the ``last`` steps, the number of steps in both means, the loss of
    the ``base`` (the first step, before any update), and whether the loss ``rose``.

    From each end as many steps are taken as together have `ENOUGH_TOKENS` supervised tokens, but at most half of all
    steps. A loss counts as risen if, by more than the noise between steps, its last mean is above its first one, or it
    was never again as low as at the first step: a learning rate that is far too large spoils the model at once, and
    after that the loss may well fall.
    """
    first, last = _enough(steps), _enough(steps[::-1])
    means = _mean(first), _mean(last)
    noise = noise_of_a_token(steps)
    lowest = min(steps[1:], key=lambda step: step.loss, default=steps[0])
    never_lower = len(steps) > 2 and _above([lowest], steps[:1], noise)
    return Course(
        first=means[0],
        last=means[1],
        first_steps=len(first),
        last_steps=len(last),
        base=steps[0].loss,
        rose=_above(last, first, noise) or never_lower,
    )


def noise_of_a_token(steps: Sequence[StepLoss]) -> float:
    """Returns the standard deviation of the logarithm of a loss over one token, estimated from the steps; 0 for fewer
    than three steps.

    It is estimated from the distance of each step from the line between its neighbours, so that neither a fall nor a
    rise counts as noise, and by the median, so that a single jump does not. Most of the noise is that some documents
    are harder than others; more tokens in a step make it smaller.
    """
    squares = []
    for before, here, after in zip(steps, steps[1:], steps[2:], strict=False):
        distance = _log(before.loss) - 2 * _log(here.loss) + _log(after.loss)
        squares.append(distance**2 / (1 / before.tokens + 4 / here.tokens + 1 / after.tokens))
    return math.sqrt(median(squares) / MEDIAN_SQUARE) if squares else 0.0


def _above(later: Sequence[StepLoss], earlier: Sequence[StepLoss], noise: float) -> bool:
    """Tells whether the mean loss of ``later`` is above that of ``earlier`` by more than noise explains."""
    standard_error = noise * math.sqrt(sum(1 / sum(step.tokens for step in each) for each in (later, earlier)))
    rise = _log(_mean(later)) - _log(_mean(earlier))
    return rise > max(math.log(RISE), STANDARD_ERRORS * standard_error)


def _log(loss: float) -> float:
    """Returns the logarithm of a loss, which may be zero."""
    return math.log(max(loss, 1e-12))


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
