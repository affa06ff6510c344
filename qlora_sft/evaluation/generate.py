"""Answers of a model to prompts: greedy, or sampled."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_sft.errors import RunError
from qlora_sft.evaluation.held_out import autocast
from qlora_sft.model.attention import plain_attention

# Of a batch, prompts and answers together: 4 GiB of keys and values for a Llama-3.1-8B.
TOKENS = 32768
ROWS = 64


@dataclass(frozen=True)
class Generated:
    """New tokens up to but without the one that ends the turn, and whether there was one."""

    ids: list[int]
    ended: bool


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    dtype: torch.dtype,
    stops: Collection[int],
    temperature: float | None = None,
) -> list[Generated]:
    """An answer for each prompt; greedy, or with a ``temperature`` drawn from the whole distribution (no top-k, no
    top-p), by torch's random numbers. The model is left in the mode it was in.

    A batch for which the GPU has no room is halved; raises `RunError` if there is none for a single prompt.
    """
    pad = pad_id(tokenizer, stops)
    how: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    answers: dict[int, Generated] = {}
    was_training = model.training
    model.eval()
    try:
        with plain_attention(model), torch.no_grad(), autocast(model.device, dtype):
            pending = batches(prompts, max_new_tokens)
            while pending:
                part = pending.pop(0)
                ids, mask = left_padded([prompts[i] for i in part], pad, model.device)
                try:
                    output = model.generate(
                        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **how,
                        use_cache=True, eos_token_id=sorted(stops), pad_token_id=pad,
                    )  # fmt: skip
                except torch.OutOfMemoryError:
                    pending[:0] = halves(part, ids.shape[1] + max_new_tokens)
                    continue
                for i, row in zip(part, output[:, ids.shape[1] :].tolist(), strict=True):
                    new = until_stop(row, stops)
                    answers[i] = Generated(new, len(new) < len(row))
    finally:
        model.train(was_training)
    return [answers[i] for i in range(len(prompts))]


def batches(prompts: Sequence[list[int]], new_tokens: int = 0) -> list[list[int]]:
    """Numbers of prompts of similar length together, as padding costs time; the longest first, as they show at once
    whether there is room."""
    result: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        longest = len(prompts[result[-1][0]]) + new_tokens if result else 0
        if not result or len(result[-1]) == ROWS or (len(result[-1]) + 1) * longest > TOKENS:
            result.append([])
        result[-1].append(i)
    return result


def halves(part: list[int], tokens: int) -> list[list[int]]:
    if len(part) == 1:
        raise RunError(f"the GPU has no room for one answer of {tokens:,} tokens with its prompt; lower max_new_tokens")
    torch.cuda.empty_cache()
    return [part[: len(part) // 2], part[len(part) // 2 :]]


def pad_id(tokenizer: Any, stops: Collection[int]) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops)


def left_padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), each [rows, longest]: every row ends in the last column."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def until_stop(ids: list[int], stops: Collection[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in stops:
            return ids[:position]
    return ids
