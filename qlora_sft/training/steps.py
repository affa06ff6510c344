"""Computes a run's steps, its checkpoints and its optimizer from the configuration alone. It imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from qlora_sft.config import Config


def settle_accumulation(config: Config, tokens: Sequence[int]) -> tuple[Config, str]:
    """Returns ``config`` with the accumulation that ``training.tokens_per_step`` comes to, and what to say about it.

    tokens: number of tokens that are computed for each packed sequence.
    """
    t = config.training
    if t.tokens_per_step is None:
        return config, ""
    of_batch = sum(tokens) / max(1, math.ceil(len(tokens) / t.batch_size))
    accumulation = t.accumulated(tokens)
    told = (
        f"accumulation: {accumulation} micro-batches of {of_batch:,.0f} tokens on average, the nearest to "
        f"training.tokens_per_step={t.tokens_per_step:,}"
    )
    return replace(config, training=replace(t, gradient_accumulation=accumulation)), told


def count_steps(n_sequences: int, config: Config) -> int:
    """Returns the optimizer steps of a run over ``n_sequences`` packed sequences. The last group may be smaller."""
    t = config.training
    steps = math.ceil(math.ceil(n_sequences / t.batch_size) / t.gradient_accumulation)
    return min(steps, t.max_steps) if t.max_steps else steps


def keeps_best(config: Config) -> bool:
    """Says whether the adapter of the best step is kept, and not that of the last."""
    keep, e = config.training.keep, config.evaluation
    every = e.tasks_every_steps if config.training.best_metric.startswith("tasks/") else e.every_steps
    return keep == "best" or (keep == "auto" and every is not None)


def most_checkpoints(config: Config) -> int:
    """Returns how many checkpoints are on disk at once: those that are kept, the best, and one being written."""
    kept = config.training.save_total_limit if config.training.save_steps else 1
    return kept + keeps_best(config) + 1


def choose_optimizer(config: Config, on_gpu: bool) -> tuple[str, str]:
    """Returns the optimizer's name, as transformers knows it, and the reason for it."""
    if config.training.optimizer != "auto":
        return config.training.optimizer, "as configured"
    if on_gpu:
        return "adamw_8bit", "its states take 2 bytes per parameter"
    return "adamw_torch_fused", "bitsandbytes has no 8-bit optimizer for a CPU"
