"""Says what reinforcement learning can expect of a model on the questions of a task.

It learns from answers that are right, so it needs some. Two rules of thumb: where fewer than 5% of single answers are
right, it will likely fail; where fewer than 20% of the questions are answered rightly in any of k samples, it will
struggle.
"""

from __future__ import annotations

import math

FAILS, STRUGGLES = 0.05, 0.20
# Two-sided 95%.
Z = 1.96
MOST_QUESTIONS = 100_000


def rl_outlook(pass_1: float, pass_k: float, k: int, questions: int) -> str:
    """Returns one sentence for the shares ``pass_1`` and ``pass_k`` of ``questions``.

    If these are too few to tell, it says about how many would.
    """
    low_1, high_1 = wilson(pass_1, questions)
    low_k, high_k = wilson(pass_k, questions)
    if high_1 < FAILS:
        return f"RL will likely fail: pass@1 is {pass_1:.1%}, below {FAILS:.0%}; train more, or on easier questions"
    if high_k < STRUGGLES:
        return f"RL will struggle: pass@{k} is {pass_k:.1%}, below {STRUGGLES:.0%}; train more, or on easier questions"
    if low_1 >= FAILS and low_k >= STRUGGLES:
        return f"RL has enough right answers to learn from (pass@1 {pass_1:.1%}, pass@{k} {pass_k:.1%})"
    needed = max(questions_needed(pass_1, FAILS), questions_needed(pass_k, STRUGGLES))
    more = f"about {needed:,} would tell" if needed < MOST_QUESTIONS else "the figures are at the very edge"
    found = f"pass@1 {pass_1:.1%}, pass@{k} {pass_k:.1%}"
    return f"whether RL can work is open with {questions:,} questions ({found}); {more}"


def wilson(share: float, count: int) -> tuple[float, float]:
    """Returns the 95% interval of a share of ``count`` questions: Wilson 1927, doi:10.2307/2276774.

    For shares of samples within a question it is wider than needed, as those vary less than yes and no.
    """
    spread = Z * Z / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def questions_needed(share: float, threshold: float) -> int:
    """Returns how many questions, doubling step by step, tell ``share`` from ``threshold``."""
    count = 10
    while count < MOST_QUESTIONS:
        low, high = wilson(share, count)
        if high < threshold or low >= threshold:
            return count
        count = math.ceil(count * 1.25)
    return MOST_QUESTIONS
