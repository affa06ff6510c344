"""Computes a run's steps, how they are divided among processes, its checkpoints and its optimizer. It imports nothing
heavy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

from qlora_sft.config import Config
from qlora_sft.errors import ConfigError

T = TypeVar("T")


def settle_accumulation(config: Config, tokens: Sequence[int]) -> tuple[Config, str]:
    """Returns ``config`` with the accumulation that follows from ``training.tokens_per_step``, and a message about it.

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


class Deal(NamedTuple):
    """Says how the packed sequences of an optimizer step are divided among the processes that train together.

    The step is the same whatever their number: `batch_size` x `gradient_accumulation` sequences of all processes
    together.
    """

    per_step: int
    """Packed sequences of a step."""
    size: int
    """Most packed sequences of a micro-batch: ``batch_size``, or fewer where all processes get some only so."""
    rounds: int
    """Micro-batches of every process in a step."""
    processes: int


def deal(config: Config, processes: int) -> Deal:
    """Returns how the steps of ``config``, whose accumulation must be settled, are divided among ``processes``.

    Raises `ConfigError` if some of them would never have anything to do.
    """
    t = config.training
    per_step = t.batch_size * t.gradient_accumulation
    if per_step < processes:
        raise ConfigError(
            f"training.gradient_accumulation: a step has {per_step} packed sequences (batch_size x "
            f"gradient_accumulation, of all processes together) and there are {processes} processes; raise "
            f"gradient_accumulation to {math.ceil(processes / t.batch_size)} or more, or start {per_step} processes"
        )
    rounds = math.ceil(t.gradient_accumulation / processes)
    return Deal(per_step, math.ceil(per_step / (processes * rounds)), rounds, processes)


def describe_deal(dealt: Deal, cards: int) -> str:
    """Says what each process computes of a step, or, for a single process that leaves cards idle, how to start more; ""
    if there is nothing to say.

    cards: how many GPUs this process can see.
    """
    if dealt.processes > 1:
        return (
            f"{dealt.processes}; each takes up to {dealt.rounds} micro-batches of {dealt.size} rows of a step's "
            f"{dealt.per_step}, and their gradients are added up"
        )
    if cards < 2:
        return ""
    return f"1, on one of {cards} GPUs; torchrun --nproc-per-node {cards} -m qlora_sft.train ... trains on all of them"


def micro_batches(sequences: Sequence[list[int]], dealt: Deal) -> list[list[int]]:
    """Returns the documents of every micro-batch, step after step.

    Within a step they go to the processes in turn. Every process gets the same number of them; the last ones may be
    empty.
    """
    result = []
    for start in range(0, len(sequences), dealt.per_step):
        pieces = _cut(sequences[start : start + dealt.per_step], dealt)
        result += [[index for sequence in each for index in sequence] for each in pieces]
        result += [[] for _ in range(-len(pieces) % dealt.processes)]
    return result


def _cut(of_step: Sequence[T], dealt: Deal) -> list[Sequence[T]]:
    """Cuts the sequences of a step into micro-batches, into smaller ones if only so every process gets one."""
    count = len(of_step)
    wanted = min(count, dealt.processes)
    if math.ceil(count / dealt.size) >= wanted:
        return [of_step[i : i + dealt.size] for i in range(0, count, dealt.size)]
    return [of_step[i * count // wanted : (i + 1) * count // wanted] for i in range(wanted)]


def longest_dealt(tokens: Sequence[int], dealt: Deal) -> int:
    """Returns the tokens of the longest micro-batch. tokens: those that are computed for each packed sequence."""
    steps = (tokens[start : start + dealt.per_step] for start in range(0, len(tokens), dealt.per_step))
    return max((sum(piece) for each in steps for piece in _cut(each, dealt)), default=0)


def keeps_best(config: Config) -> bool:
    """Says whether the adapter of the best step is kept instead of the last one."""
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
