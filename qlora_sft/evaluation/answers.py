"""Greedy answers to held-out prompts, compared with the reference turn."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_sft.data.render import Rendered
from qlora_sft.evaluation.generate import until_stop


@dataclass(frozen=True)
class Prompt:
    """Everything before a supervised turn, and the turn: exactly what training showed the model."""

    source: str
    input_ids: list[int]
    reference_ids: list[int]


def prompts_of(document: Rendered) -> list[Prompt]:
    """One prompt per supervised turn (a run of supervised tokens)."""
    prompts = []
    position, length = 0, len(document.input_ids)
    while position < length:
        if document.weights[position] == 0:
            position += 1
            continue
        end = position
        while end < length and document.weights[end] > 0:
            end += 1
        ids = document.input_ids
        prompts.append(Prompt(document.source, ids[:position], ids[position:end]))
        position = end
    return prompts


def choose_prompts(documents: Mapping[str, Sequence[Rendered]], per_source: int, seed: int) -> list[Prompt]:
    """``per_source`` prompts of every source, drawn with ``seed``; all of them if there are fewer."""
    chosen = []
    for source, rows in documents.items():
        prompts = [prompt for row in rows for prompt in prompts_of(row)]
        random.Random(f"answers {seed} {source}").shuffle(prompts)
        chosen += prompts[:per_source]
    return chosen


def judge(
    prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], tokenizer: Any, stops: Collection[int]
) -> list[dict[str, Any]]:
    """One record per prompt: source, prompt, reference and answer as text, and whether the two are the same."""
    records = []
    for prompt, answer in zip(prompts, answers, strict=True):
        reference = tokenizer.decode(until_stop(prompt.reference_ids, stops)).strip()
        text = tokenizer.decode(list(answer)).strip()
        records.append(
            {
                "source": prompt.source,
                "prompt": tokenizer.decode(prompt.input_ids),
                "prompt_ids": prompt.input_ids,
                "reference": reference,
                "answer": text,
                "exact": text == reference,
            }
        )
    return records


def exact_match(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Source -> share of the answers that equal their reference."""
    by_source: dict[str, list[bool]] = {}
    for record in records:
        by_source.setdefault(record["source"], []).append(record["exact"])
    return {source: sum(hits) / len(hits) for source, hits in by_source.items()}
