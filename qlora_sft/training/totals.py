"""Sums up what an optimizer step has seen: its loss, in all and by source, and its tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from qlora_kernels.packed_ce import CEOutput
from torch import Tensor

from qlora_sft.data.batch import Batch


@dataclass
class StepTotals:
    """Sums up what one optimizer step has seen so far.

    Tensors stay on the device until somebody asks for a value.
    """

    weighted_nll: Tensor | float = 0.0
    correct: Tensor | float = 0.0
    weight: float = 0.0
    supervised: int = 0
    tokens: int = 0
    pairs: float = 0.0
    """Pairs of a token with one of the same document that is not behind it."""
    by_source: dict[str, tuple[Tensor | float, float]] = field(default_factory=dict)
    """The weighted loss and the weight of every source."""
    divergence: Tensor | float = 0.0
    """The weighted divergence from the base on replay, where training.replay_kl measures it."""
    leashed: float = 0.0
    """The weight of the tokens at which it was measured."""
    penalty: Tensor | float = 0.0
    """What training.ewc adds to the loss of the step."""

    def add(self, output: CEOutput, batch: Batch) -> None:
        """Adds the results of one micro-batch."""
        weighted = output.nll * batch["position_weights"]
        total = weighted.sum()
        self.weighted_nll = self.weighted_nll + total
        self.correct = self.correct + (output.correct * batch["position_counts"]).sum()
        self.weight += batch["weight_sum"]
        self.supervised += batch["n_supervised"]
        self.tokens += batch["input_ids"].numel()
        self.pairs += sum(length * (length + 1) / 2 for length in batch["lengths"])
        alone = len(batch["sources"]) == 1
        for number, (source, weight) in enumerate(zip(batch["sources"], batch["source_weights"], strict=True)):
            # Not weighted[...], which would wait for the device to learn how many positions these are.
            own = total if alone else torch.where(batch["position_sources"] == number, weighted, 0.0).sum()
            before = self.by_source.get(source, (0.0, 0.0))
            self.by_source[source] = before[0] + own, before[1] + weight

    def in_numbers(self) -> StepTotals:
        """Returns the same with plain numbers, which another process can take. A device is waited for only once."""
        nll, correct, divergence, penalty, *of_sources = self._values()
        weights = [weight for _, weight in self.by_source.values()]
        by_source: dict[str, tuple[Tensor | float, float]] = {}
        for name, own, weight in zip(self.by_source, of_sources, weights, strict=True):
            by_source[name] = own, weight
        return replace(
            self, weighted_nll=nll, correct=correct, by_source=by_source, divergence=divergence, penalty=penalty
        )

    def _values(self) -> list[float]:
        """Returns loss, right ones, divergence, penalty and the losses of the sources as plain numbers."""
        sums = [self.weighted_nll, self.correct, self.divergence, self.penalty]
        sums += [nll for nll, _ in self.by_source.values()]
        device = next((each.device for each in sums if isinstance(each, Tensor)), None)
        same = [torch.as_tensor(each, dtype=torch.float32, device=device) for each in sums]
        values: list[float] = torch.stack(same).tolist()
        return values

    @cached_property
    def losses(self) -> StepLosses:
        """Returns what the step has come to, once all its micro-batches are done. A device is waited for only once."""
        nll, correct, divergence, penalty, *of_sources = self._values()
        weights = [weight for _, weight in self.by_source.values()]
        return StepLosses(
            nll / self.weight if self.weight else math.nan,
            correct / self.supervised if self.supervised else math.nan,
            {name: own / weight for name, own, weight in zip(self.by_source, of_sources, weights, strict=True)},
            divergence / self.leashed if self.leashed else math.nan,
            penalty,
        )


class StepLosses(NamedTuple):
    """Holds the mean losses of one optimizer step."""

    loss: float
    """Weighted mean of the token losses, in nats; NaN if no token was supervised."""
    accuracy: float
    """Share of the supervised tokens that the model ranked first; NaN if no token was supervised."""
    of_sources: dict[str, float]
    """The loss of every source that has supervised tokens in the step."""
    divergence: float
    """Mean divergence from the base on replay, in nats; NaN where it was not measured."""
    penalty: float
    """What training.ewc adds to the loss."""


def all_together(parts: Sequence[StepTotals]) -> StepTotals:
    """Returns what several processes have seen together of one optimizer step."""
    result = StepTotals()
    for part in parts:
        result.weighted_nll += part.weighted_nll
        result.correct += part.correct
        result.weight += part.weight
        result.supervised += part.supervised
        result.tokens += part.tokens
        result.pairs += part.pairs
        result.divergence += part.divergence
        result.leashed += part.leashed
        result.penalty += part.penalty
        for source, (nll, weight) in part.by_source.items():
            before = result.by_source.get(source, (0.0, 0.0))
            result.by_source[source] = before[0] + nll, before[1] + weight
    return result
