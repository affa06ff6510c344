"""Measures how much answers are alike: how many of their pairs of tokens differ, and how well one predicts the others.

distinct-2 is the share of different pairs of neighbouring tokens in all answers to a question (Li et al. 2016,
arXiv:1510.03055). self-BLEU is the BLEU of an answer with the others as references, on tokens (Zhu et al. 2018,
arXiv:1802.01886): 1 where another answer is the same. With several samples the others are those to the same question,
with one they are answers to other questions: a model that was trained on narrow data answers all of them alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

_LONGEST = 4
# Answers to other questions that one is compared with.
_MOST_OTHERS = 32

Grams = list[Counter[tuple[int, ...]]]
"""Holds the n-grams of an answer with their counts, for n from 1 to 4."""


def diversity(answers: Sequence[Sequence[int]], samples: int) -> dict[str, list[float]]:
    """Returns distinct-2 and self-BLEU of every question, which has ``samples`` neighbouring answers."""
    figures: dict[str, list[float]] = {"distinct-2": [], "self-BLEU": []}
    for start in range(0, len(answers), samples):
        own = range(start, start + samples)
        compared = {number: others(number, own, len(answers)) for number in own}
        # The n-grams of all answers at once would take much more memory than the answers.
        used = {*own, *(number for each in compared.values() for number in each)}
        of_each = {number: grams(answers[number]) for number in used}
        pairs = sum((of_each[number][1] for number in own), Counter[tuple[int, ...]]())
        figures["distinct-2"].append(len(pairs) / pairs.total() if pairs else 1.0)
        scores = [bleu(of_each[number], [of_each[i] for i in compared[number]]) for number in own]
        figures["self-BLEU"].append(sum(scores) / samples)
    return figures


def others(number: int, own: range, total: int) -> list[int]:
    """Returns the answers that one is compared with: those to its own question, or some of other questions."""
    if len(own) > 1:
        return [other for other in own if other != number]
    count = min(_MOST_OTHERS, total - 1)
    return [(number + 1 + step * (total - 1) // count) % total for step in range(count)]


def grams(answer: Sequence[int]) -> Grams:
    """Returns the n-grams of an answer."""
    return [Counter(zip(*(answer[i:] for i in range(n)), strict=False)) for n in range(1, _LONGEST + 1)]


def bleu(answer: Grams, references: Sequence[Grams]) -> float:
    """Returns the BLEU of an answer: the geometric mean of its n-gram precisions, times the penalty for being short.

    An n-gram counts as often as the reference has it that has it most often. Where no n-gram of some length is in any,
    it counts as a tenth of one (Chen and Cherry 2014, method 1). An answer of fewer tokens than n has no n-grams.
    """
    length = answer[0].total()
    lengths = [reference[0].total() for reference in references]
    if not references or not length:
        return float(bool(lengths) and min(lengths) == 0)
    logs = []
    for n, counts in enumerate(answer[:length]):
        matched = sum(min(count, max(each[n][gram] for each in references)) for gram, count in counts.items())
        logs.append(math.log((matched or 0.1) / counts.total()))
    closest = min(lengths, key=lambda other: (abs(other - length), other))
    return math.exp(sum(logs) / len(logs) + min(0.0, 1 - closest / length))
