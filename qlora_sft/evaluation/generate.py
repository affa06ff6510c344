"""Generates the answers of a model to prompts, greedily or by sampling."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict, TypeVar

import torch
from torch import Tensor

from qlora_sft.errors import RunError
from qlora_sft.evaluation.held_out import autocast
from qlora_sft.model.attention import plain_attention
from qlora_sft.model.base import base_of
from qlora_sft.say import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The most tokens of a batch, prompts and answers together: 4 GiB of keys and values for a Llama-3.1-8B.
TOKENS = 32768
PROMPTS = 64
# How many times as long as its shortest prompt a batch may be.
PADDING = 1.5


@dataclass(frozen=True)
class Generated:
    """Holds one generated answer."""

    ids: list[int]
    """The new tokens, without the stop token."""
    ended: bool
    """Whether there was a stop token."""


class Sampling(TypedDict, total=False):
    """Holds the arguments of transformers' ``generate`` that choose between greedy decoding and sampling."""

    do_sample: bool
    temperature: float
    top_k: int
    top_p: float


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    dtype: torch.dtype,
    stop_token_ids: Collection[int],
    temperature: float | None = None,
) -> list[Generated]:
    """Generates an answer for each prompt.

    Decoding is greedy. With a ``temperature`` the answer is drawn from the whole distribution, by torch's random
    numbers. The model's own generation config is not used: many models bring a penalty or a top-k, which would then be
    graded, too. The model is left as it was. A batch that does not fit into GPU memory is halved; raises `RunError` if
    a single prompt does not fit.
    """
    pad = pad_id(tokenizer, stop_token_ids)
    sampling: Sampling = {"do_sample": False}
    if temperature is not None:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}

    bar = progress(len(prompts) * max_new_tokens, f"{len(prompts)} answers", "token")

    def count(ids: Tensor, scores: object, **_: object) -> Tensor:
        """Is asked by ``generate`` after every token whether to stop; it only counts."""
        bar.update(len(ids))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def answer(ids: Tensor, mask: Tensor) -> list[Generated]:
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **sampling,
            use_cache=True, eos_token_id=sorted(stop_token_ids), pad_token_id=pad, stopping_criteria=[count],
        )  # fmt: skip
        new = [(row, until_stop(row, stop_token_ids)) for row in output[:, ids.shape[1] :].tolist()]
        return [Generated(kept, len(kept) < len(row)) for row, kept in new]

    was_training = model.training
    model.eval()
    try:
        with neutral(model), plain_attention(model), torch.no_grad(), autocast(model.device, dtype):
            return in_batches(prompts, max_new_tokens, pad, model.device, answer)
    finally:
        bar.close()
        model.train(was_training)


@contextmanager
def neutral(model: PreTrainedModel) -> Iterator[None]:
    """Replaces the model's generation config by transformers' default, and restores it at the end."""
    from transformers import GenerationConfig

    base = base_of(model)
    original = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = original


Answer = TypeVar("Answer")


def in_batches(
    prompts: Sequence[list[int]],
    new_tokens: int,
    pad: int,
    device: torch.device,
    run: Callable[[Tensor, Tensor], list[Answer]],
) -> list[Answer]:
    """Returns what ``run`` gives for every prompt, in the order of the prompts.

    ``run`` gets batches of ids and attention masks, both [prompts, tokens] and padded on the left. A batch for which
    GPU memory does not suffice is halved; raises `RunError` if it does not suffice for a single prompt.
    """
    results: dict[int, Answer] = {}
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
    """Groups the indices of prompts into batches of similar length, because padding costs time.

    The longest prompts come first, because they show at once whether memory suffices.
    """
    result: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        longest = len(prompts[result[-1][0]]) + new_tokens if result else 0
        full = not result or len(result[-1]) == PROMPTS or (len(result[-1]) + 1) * longest > TOKENS
        if full or longest > PADDING * (len(prompts[i]) + new_tokens):
            result.append([])
        result[-1].append(i)
    return result


def halves(part: list[int], tokens: int) -> list[list[int]]:
    """Cuts a batch in two. Raises `RunError` for a batch of one prompt, which has ``tokens``."""
    if len(part) == 1:
        raise RunError(
            f"the GPU has no room for {tokens:,} tokens of one question and its answer; lower max_new_tokens"
        )
    torch.cuda.empty_cache()
    return [part[: len(part) // 2], part[len(part) // 2 :]]


def pad_id(tokenizer: PreTrainedTokenizerBase, stop_token_ids: Collection[int]) -> int:
    """Returns the token that fills up shorter rows of a batch: the tokenizer's, or a stop token."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stop_token_ids)


def left_padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids and attention mask, each [rows, longest]. Every row ends in the last column."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def until_stop(ids: list[int], stop_token_ids: Collection[int]) -> list[int]:
    """Cuts ``ids`` before the first stop token."""
    for position, token in enumerate(ids):
        if token in stop_token_ids:
            return ids[:position]
    return ids
