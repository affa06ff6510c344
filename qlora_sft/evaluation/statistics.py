"""How sure a figure is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
# Of items that changed at all: fewer that all go one way are no proof (sign test: 2 * 0.5^5 = 0.06).
FEWEST_CHANGED = 6


@dataclass(frozen=True)
class Change:
    """``after - before`` of a mean, and the interval that holds it with 95% confidence."""

    before: float
    after: float
    low: float
    high: float
    changed: int = FEWEST_CHANGED
    """Items whose figure is another one."""

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def risen(self) -> bool:
        return self.low > 0 and self.changed >= FEWEST_CHANGED

    @property
    def fallen(self) -> bool:
        return self.high < 0 and self.changed >= FEWEST_CHANGED


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that one of ``k`` answers is right, from ``right`` of ``samples``, without bias.

    ``1 - C(n - c, k) / C(n, k)``, as a product: Chen et al. 2021, arXiv:2107.03374, equation 1.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass_at_k wants 0 <= right <= samples and 1 <= k <= samples, got {right}, {samples}, {k}")
    none_right = 1.0
    for i in range(k):
        none_right *= max(samples - right - i, 0) / (samples - i)
    return 1.0 - none_right


def change(before: Sequence[float], after: Sequence[float], weights: Sequence[float], seed: int = 0) -> Change:
    """The change of a weighted mean over items, with a paired bootstrap over the items.

    The same items are drawn for both, so what makes an item hard cancels out: the interval is that of the change.
    """
    a, b, w = (np.asarray(values, dtype=np.float64) for values in (before, after, weights))
    if not len(a) == len(b) == len(w) > 0:
        raise ValueError(f"change wants as many values before as after, got {len(a)}, {len(b)}, {len(w)}")
    gain = w * (b - a)
    drawn = np.random.default_rng(seed)
    resampled = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        chosen = drawn.integers(len(a), size=len(a))
        resampled[i] = gain[chosen].sum() / w[chosen].sum()
    low, high = np.quantile(resampled, (0.025, 0.975))
    total = w.sum()
    means = (float((w * a).sum() / total), float((w * b).sum() / total))
    return Change(*means, float(low), float(high), int((gain != 0).sum()))
