"""Cuts held-out documents into prompts, and compares greedy answers with the reference turns."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from qlora_sft.data.render import Rendered
from qlora_sft.evaluation.generate import until_stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """Holds the tokens before a supervised turn and those of the turn, exactly as training showed them to the model."""

    source: str
    input_ids: list[int]
    reference_ids: list[int]


class HeldOutAnswer(TypedDict):
    """Holds one answer to a held-out prompt, as a line of ``samples.jsonl`` and ``before.json`` have it."""

    source: str
    prompt: str
    prompt_ids: list[int]
    reference: str
    answer: str
    exact: bool


def prompts_of(document: Rendered) -> list[Prompt]:
    """Returns one prompt for each supervised turn of the document. A turn is a stretch of supervised tokens."""
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
    """Draws ``per_source`` prompts of every source with ``seed``. A source that has fewer gives all of its prompts."""
    chosen = []
    for source, rows in documents.items():
        prompts = [prompt for row in rows for prompt in prompts_of(row)]
        random.Random(f"answers {seed} {source}").shuffle(prompts)
        chosen += prompts[:per_source]
    return chosen


def judge(
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Collection[int],
) -> list[HeldOutAnswer]:
    """Decodes every answer and its reference, and notes whether the two texts are equal."""
    records: list[HeldOutAnswer] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        reference = tokenizer.decode(until_stop(prompt.reference_ids, stop_token_ids)).strip()
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


def exact_match(records: Sequence[HeldOutAnswer]) -> dict[str, float]:
    """Returns, by source, the share of the answers that equal their reference."""
    by_source: dict[str, list[bool]] = {}
    for record in records:
        by_source.setdefault(record["source"], []).append(record["exact"])
    return {source: sum(correct) / len(correct) for source, correct in by_source.items()}
