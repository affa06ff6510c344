"""Says how sure a figure is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
# The least number of items that must have changed: even if fewer all change in one direction, that proves nothing
# (sign test: 2 * 0.5^5 = 0.06).
FEWEST_CHANGED = 6


@dataclass(frozen=True)
class PairedChange:
    """Holds the change of a mean from the base to the tuned model, and the interval of 95% confidence around it."""

    base: float
    tuned: float
    low: float
    high: float
    changed: int = FEWEST_CHANGED
    """How many items have different figures in the two."""

    @property
    def difference(self) -> float:
        """Returns how much higher the mean of the tuned model is."""
        return self.tuned - self.base

    @property
    def risen(self) -> bool:
        """Says whether the mean has risen by more than chance."""
        return self.low > 0 and self.changed >= FEWEST_CHANGED

    @property
    def fallen(self) -> bool:
        """Says whether the mean has fallen by more than chance."""
        return self.high < 0 and self.changed >= FEWEST_CHANGED


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Estimates without bias the probability that at least one of ``k`` answers is correct.

    ``correct`` of ``samples`` answers were. Computes ``1 - C(n - c, k) / C(n, k)`` as a product: Chen et al. 2021,
    arXiv:2107.03374, equation 1.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"pass_at_k wants 0 <= correct <= samples and 1 <= k <= samples, got {correct}, {samples}, {k}"
        )
    none_correct = 1.0
    for i in range(k):
        none_correct *= max(samples - correct - i, 0) / (samples - i)
    return 1.0 - none_correct


def paired_change(
    base: Sequence[float], tuned: Sequence[float], weights: Sequence[float], seed: int = 0
) -> PairedChange:
    """Measures the change of a weighted mean over items, with a paired bootstrap over the items.

    The same items are drawn for both models, so that the difficulty of an item cancels out and the interval is that of
    the change.
    """
    a, b, w = (np.asarray(values, dtype=np.float64) for values in (base, tuned, weights))
    if not len(a) == len(b) == len(w) > 0:
        raise ValueError(f"paired_change wants equally many values of each, got {len(a)}, {len(b)}, {len(w)}")
    gain = w * (b - a)
    drawn = np.random.default_rng(seed)
    resampled = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        chosen = drawn.integers(len(a), size=len(a))
        resampled[i] = gain[chosen].sum() / w[chosen].sum()
    low, high = np.quantile(resampled, (0.025, 0.975))
    total = w.sum()
    means = (float((w * a).sum() / total), float((w * b).sum() / total))
    return PairedChange(*means, float(low), float(high), int((gain != 0).sum()))
