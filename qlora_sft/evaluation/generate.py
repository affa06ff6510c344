"""Answers of a model to prompts: greedy, or sampled."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from qlora_sft.errors import RunError
from qlora_sft.evaluation.held_out import autocast
from qlora_sft.model.attention import plain_attention
from qlora_sft.model.base import base_of

# Of a batch, prompts and answers together: 4 GiB of keys and values for a Llama-3.1-8B.
TOKENS = 32768
ROWS = 64
# How many times as long as its shortest row a batch may be.
PADDING = 1.5


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
    """An answer for each prompt; greedy, or with a ``temperature`` drawn from the whole distribution, by torch's random
    numbers. The generation config that the model came with has no say: many bring a penalty or a top-k, which would be
    graded along. The model is left as it was.

    A batch for which the GPU has no room is halved; raises `RunError` if there is none for a single prompt.
    """
    pad = pad_id(tokenizer, stops)
    how: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}

    def answer(ids: Tensor, mask: Tensor) -> list[Generated]:
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **how,
            use_cache=True, eos_token_id=sorted(stops), pad_token_id=pad,
        )  # fmt: skip
        new = [(row, until_stop(row, stops)) for row in output[:, ids.shape[1] :].tolist()]
        return [Generated(kept, len(kept) < len(row)) for row, kept in new]

    was_training = model.training
    model.eval()
    try:
        with neutral(model), plain_attention(model), torch.no_grad(), autocast(model.device, dtype):
            return in_batches(prompts, max_new_tokens, pad, model.device, answer)
    finally:
        model.train(was_training)


@contextmanager
def neutral(model: Any) -> Iterator[None]:
    """Within it, the model's generation config is transformers' own."""
    from transformers import GenerationConfig

    base = base_of(model)
    before = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = before


Result = TypeVar("Result")


def in_batches(
    prompts: Sequence[list[int]],
    new_tokens: int,
    pad: int,
    device: torch.device,
    run: Callable[[Tensor, Tensor], list[Result]],
) -> list[Result]:
    """What ``run`` gives for every prompt, in their order. It gets batches of ids and masks, both [rows, tokens] and
    padded on the left. One that finds the GPU full is halved; raises `RunError` when a single prompt does."""
    results: dict[int, Result] = {}
    pending = batches(prompts, new_tokens)
    while pending:
        part = pending.pop(0)
        ids, mask = left_padded([prompts[i] for i in part], pad, device)
        try:
            given = run(ids, mask)
        except torch.OutOfMemoryError:
            pending[:0] = halves(part, ids.shape[1] + new_tokens)
            continue
        results.update(zip(part, given, strict=True))
    return [results[i] for i in range(len(prompts))]


def batches(prompts: Sequence[list[int]], new_tokens: int = 0) -> list[list[int]]:
    """Numbers of prompts of similar length together, as padding costs time; the longest first, as they show at once
    whether there is room."""
    result: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        longest = len(prompts[result[-1][0]]) + new_tokens if result else 0
        full = not result or len(result[-1]) == ROWS or (len(result[-1]) + 1) * longest > TOKENS
        if full or longest > PADDING * (len(prompts[i]) + new_tokens):
            result.append([])
        result[-1].append(i)
    return result


def halves(part: list[int], tokens: int) -> list[list[int]]:
    if len(part) == 1:
        raise RunError(
            f"the GPU has no room for {tokens:,} tokens of one question and its answer; lower max_new_tokens"
        )
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
