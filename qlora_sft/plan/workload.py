"""Counts how much a run will compute (steps, sequences, tokens), from its data and the cache of that data."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_sft.config import Config
from qlora_sft.config_data import source_name
from qlora_sft.data.batch import longest_micro_batch
from qlora_sft.data.documents import sizes
from qlora_sft.data.sequences import segment_lengths
from qlora_sft.plan.report import DataPlan
from qlora_sft.run_data import RunData
from qlora_sft.training.schedule import schedule_of
from qlora_sft.training.steps import count_steps, settle_accumulation


@dataclass(frozen=True)
class Workload:
    """Holds the counts of what a run will compute."""

    steps: int
    sequences: int
    """Packed sequences that are trained on; fewer than there are if ``max_steps`` ends the run before."""
    tokens: int
    supervised: int
    per_step: int
    """Packed sequences of an optimizer step."""
    micro_batches: int
    """Micro-batches of an optimizer step."""
    longest_sequence: int
    """Tokens of the longest micro-batch, which is one flat sequence."""
    documents: list[int]
    """Lengths of the documents of a typical sequence, for the measurement."""
    lengths: list[int]
    """The tokens of every document of the run, by which the way to attend is chosen."""
    replayed: int
    """Tokens of replay among those that are trained on."""
    prepared_tokens: int
    """Tokens of all documents, held-out ones included: what memory and the cache hold."""


def workload_of(data: RunData, config: Config) -> Workload:
    """Counts what the run that begins with ``data`` will compute. Raises `ConfigError` where its schedule does not go
    with its number of steps, as training does."""
    config, _ = settle_accumulation(config, data.packed.tokens)
    of_each = sizes(data.documents)
    lengths = of_each.tokens
    t = config.training
    steps = count_steps(len(data.sequences), config)
    schedule_of(t, steps)
    trained = data.sequences[: steps * t.batch_size * t.gradient_accumulation]
    if data.packed.shares_prefixes:
        attended, per_batch = segment_lengths(data.documents, trained, t.batch_size), 1
    else:
        attended, per_batch = [[lengths[index] for index in each] for each in trained], t.batch_size
    tokens_of_each = [sum(each) for each in attended]
    typical = sorted(range(len(attended)), key=tokens_of_each.__getitem__)[len(attended) // 2]
    replay = source_name(config.data.replay) if config.data.replay else None
    return Workload(
        steps=steps,
        sequences=len(trained),
        tokens=sum(tokens_of_each),
        supervised=sum(of_each.supervised[index] for each in trained for index in each),
        per_step=t.batch_size * t.gradient_accumulation,
        micro_batches=t.gradient_accumulation,
        longest_sequence=longest_micro_batch(tokens_of_each, per_batch),
        documents=attended[typical],
        lengths=list(lengths),
        replayed=sum(lengths[index] for each in trained for index in each if of_each.source[index] == replay),
        prepared_tokens=sum(lengths) + sum(sizes(data.held_out.all_documents).tokens),
    )


def describe(workload: Workload) -> DataPlan:
    """Returns the counts as the report has them."""
    return DataPlan(
        steps=workload.steps,
        rows=workload.sequences,
        tokens=workload.tokens,
        supervised_tokens=workload.supervised,
        longest_row=workload.longest_sequence,
        rows_per_step=workload.per_step,
        micro_batches=workload.micro_batches,
    )
