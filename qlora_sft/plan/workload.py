"""How much a run will compute: steps, rows, tokens. From the data as training would read it, and its cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_sft.config import Config
from qlora_sft.data.plan import plan_data
from qlora_sft.data.splits import read_data
from qlora_sft.data.template import chat_format
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
    from qlora_sft.model.load import load_tokenizer, stop_ids

    train_sources, held_out_sources, _ = read_data(config, say)
    tokenizer = load_tokenizer(config.model, base)
    style = chat_format(tokenizer, stop_ids(config.model, base, tokenizer))
    prepared, held_out, bins = plan_data(config, train_sources, held_out_sources, tokenizer, style, say)
    documents = prepared.all_documents
    lengths = [len(document.input_ids) for document in documents]
    t = config.training
    steps = count_steps(len(bins), config)
    trained = bins[: steps * t.batch_size * t.gradient_accumulation]
    sizes = [sum(lengths[index] for index in each) for each in trained]
    batches = [sum(sizes[a : a + t.batch_size]) for a in range(0, len(sizes), t.batch_size)]
    typical = sorted(range(len(trained)), key=sizes.__getitem__)[len(trained) // 2]
    return Workload(
        steps=steps,
        rows=len(trained),
        tokens=sum(sizes),
        supervised=sum(documents[index].n_supervised for each in trained for index in each),
        longest_row=max(batches),
        documents=[lengths[index] for index in trained[typical]],
        prepared_tokens=sum(lengths) + sum(len(document.input_ids) for document in held_out.all_documents),
    )


def describe(workload: Workload) -> dict[str, Any]:
    return {
        "steps": workload.steps,
        "rows": workload.rows,
        "tokens": workload.tokens,
        "supervised_tokens": workload.supervised,
        "longest_row": workload.longest_row,
    }
