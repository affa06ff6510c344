"""Greedy answers to held-out prompts, compared with the reference turn."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_sft.data.render import Rendered
from qlora_sft.evaluation.held_out import autocast
from qlora_sft.model.attention import plain_attention


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


def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    dtype: torch.dtype,
    stops: Collection[int],
    batch_size: int = 16,
) -> list[list[int]]:
    """New tokens for each prompt, up to but without one of ``stops``. The model is left in training mode."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops)
    answers: list[list[int]] = [[] for _ in prompts]
    # Prompts of similar length together: padding costs time.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
    model.eval()
    try:
        with plain_attention(model), torch.no_grad(), autocast(model.device, dtype):
            for start in range(0, len(order), batch_size):
                part = order[start : start + batch_size]
                ids, mask = _left_padded([prompts[i].input_ids for i in part], pad, model.device)
                output = model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
                    use_cache=True, eos_token_id=sorted(stops), pad_token_id=pad,
                )  # fmt: skip
                for i, row in zip(part, output[:, ids.shape[1] :].tolist(), strict=True):
                    answers[i] = _until_stop(row, stops)
    finally:
        model.train()
    return answers


def _left_padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _until_stop(ids: list[int], stops: Collection[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in stops:
            return ids[:position]
    return ids


def judge(
    prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], tokenizer: Any, stops: Collection[int]
) -> list[dict[str, Any]]:
    """One record per prompt: source, prompt, reference and answer as text, and whether the two are the same."""
    records = []
    for prompt, answer in zip(prompts, answers, strict=True):
        reference = tokenizer.decode(_until_stop(prompt.reference_ids, stops)).strip()
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
