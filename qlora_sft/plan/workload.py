"""How much a run will compute: steps, rows, tokens. From the data as training would read it, and its cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_sft.config import Config
from qlora_sft.data.batch import longest_row
from qlora_sft.data.documents import sizes
from qlora_sft.data.plan import plan_data
from qlora_sft.data.splits import read_data
from qlora_sft.data.template import chat_format
from qlora_sft.faults import every_fault
from qlora_sft.say import Say
from qlora_sft.training.steps import count_steps


@dataclass(frozen=True)
class Workload:
    steps: int
    rows: int
    """Packed rows that are trained on; fewer than there are if ``max_steps`` ends the run before."""
    tokens: int
    supervised: int
    longest_row: int
    """Tokens of the longest micro-batch, which is one row."""
    documents: list[int]
    """Lengths of the documents of a typical row, for the measurement."""
    prepared_tokens: int
    """Of all documents, held-out ones included: what memory and the cache hold."""


def read_workload(config: Config, base: str, say: Say) -> Workload:
    """Reads, renders and packs (or takes from the cache) what training would. Raises `DataError` or `ConfigError`."""
    from qlora_sft.model.tokenizer import load_tokenizer, stop_ids

    with every_fault(config):
        train_sources, held_out_sources, _ = read_data(config, say)
    tokenizer = load_tokenizer(config.model, base)
    style = chat_format(tokenizer, stop_ids(config.model, base, tokenizer), config.model.chat_template)
    prepared, held_out, bins = plan_data(config, train_sources, held_out_sources, tokenizer, style, say)
    of_each = sizes(prepared.all_documents)
    lengths = of_each.tokens
    t = config.training
    steps = count_steps(len(bins), config)
    trained = bins[: steps * t.batch_size * t.gradient_accumulation]
    rows = [sum(lengths[index] for index in each) for each in trained]
    typical = sorted(range(len(trained)), key=rows.__getitem__)[len(trained) // 2]
    return Workload(
        steps=steps,
        rows=len(trained),
        tokens=sum(rows),
        supervised=sum(of_each.supervised[index] for each in trained for index in each),
        longest_row=longest_row(lengths, trained, t.batch_size),
        documents=[lengths[index] for index in trained[typical]],
        prepared_tokens=sum(lengths) + sum(sizes(held_out.all_documents).tokens),
    )


def describe(workload: Workload) -> dict[str, Any]:
    return {
        "steps": workload.steps,
        "rows": workload.rows,
        "tokens": workload.tokens,
        "supervised_tokens": workload.supervised,
        "longest_row": workload.longest_row,
    }
