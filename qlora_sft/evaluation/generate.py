"""Generates the answers of a model to prompts, greedily or by sampling."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor

from qlora_sft.errors import RunError
from qlora_sft.evaluation.evaluated_model import EvaluatedModel
from qlora_sft.evaluation.held_out import autocast
from qlora_sft.evaluation.kept import Generated, KeptAnswers
from qlora_sft.evaluation.no_numbers import no_numbers
from qlora_sft.model.attention import plain_attention
from qlora_sft.model.base import base_of
from qlora_sft.model.full_memory import free_memory, is_memory_full
from qlora_sft.say import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The most tokens of a batch, prompts and answers together: 4 GiB of keys and values for a Llama-3.1-8B.
TOKENS = 32768
PROMPTS = 64
# How many times as long as its shortest prompt a batch may be.
PADDING = 1.5


class Sampling(TypedDict, total=False):
    """Holds the arguments of transformers' ``generate`` that choose between greedy decoding and sampling."""

    do_sample: bool
    temperature: float
    top_k: int
    top_p: float


class Drawn(NamedTuple):
    """Says that answers are drawn, and how. Every batch has random numbers of its own, so that it can be done alone."""

    temperature: float
    seed: int


def generate(
    evaluated: EvaluatedModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    drawn: Drawn | None = None,
    kept: KeptAnswers | None = None,
) -> list[Generated]:
    """Generates an answer for each prompt.

    Decoding is greedy, or draws from the whole distribution. The model's own generation config is not used: many models
    bring a penalty or a top-k, which would then be graded, too. The model is left as it was. A batch that does not fit
    into memory is halved; raises `RunError` if a single prompt does not fit.

    kept: the file that new answers are written to, batch by batch; batches that are in it are not generated again.
    """
    model, stop_token_ids = evaluated.model, evaluated.chat_format.stop_token_ids
    pad = pad_id(evaluated.tokenizer, stop_token_ids)
    sampling: Sampling = {"do_sample": False}
    if drawn is not None:
        sampling = {"do_sample": True, "temperature": drawn.temperature, "top_k": 0, "top_p": 1.0}

    bar = progress(len(prompts) * max_new_tokens, f"{len(prompts)} answers", "token")

    def count(ids: Tensor, scores: object, **_: object) -> Tensor:
        """Is asked by ``generate`` after every token whether to stop; it only counts."""
        bar.update(len(ids))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    entropies: list[Tensor] = []

    def measure(ids: Tensor, scores: Tensor) -> Tensor:
        """Is given the logits of every next token, before a temperature changes them; it only looks at them."""
        entropies.append(torch.special.entr(scores.softmax(-1)).sum(-1))
        return scores

    def answer(part: list[int], ids: Tensor, mask: Tensor) -> list[Generated]:
        if drawn is not None:
            torch.manual_seed(seed_of(drawn.seed, part[0]))
        entropies.clear()
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **sampling, use_cache=True,
            eos_token_id=sorted(stop_token_ids), pad_token_id=pad, stopping_criteria=[count],
            logits_processor=[measure],
        )  # fmt: skip
        new, of_each = output[:, ids.shape[1] :].tolist(), torch.stack(entropies, 1).tolist()
        answers = [generated(row, each, stop_token_ids) for row, each in zip(new, of_each, strict=True)]
        if any(math.isnan(each.entropy) for each in answers):
            raise no_numbers()
        if kept is not None:
            kept.add(part, answers)
        return answers

    was_training = model.training
    model.eval()
    computed = autocast(model.device, evaluated.dtype)
    try:
        # A training that goes on afterwards keeps its own random numbers.
        with neutral(model), plain_attention(model), torch.no_grad(), computed, torch.random.fork_rng():
            return in_batches(prompts, max_new_tokens, pad, model.device, answer, kept.read() if kept else {})
    finally:
        bar.close()
        model.train(was_training)


def generated(row: list[int], entropies: list[float], stop_token_ids: Collection[int]) -> Generated:
    """Returns the answer that a row of new tokens is, given the entropy before each of them."""
    ids = until_stop(row, stop_token_ids)
    ended = len(ids) < len(row)
    counted = entropies[: len(ids) + ended]
    return Generated(ids, ended, sum(counted) / len(counted))


def seed_of(seed: int, prompt: int) -> int:
    """Returns the seed of the batch that begins with this prompt."""
    return int.from_bytes(hashlib.sha256(f"answers {seed} {prompt}".encode()).digest()[:8]) >> 1


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
    run: Callable[[list[int], Tensor, Tensor], list[Answer]],
    known: Mapping[int, Answer],
) -> list[Answer]:
    """Returns what ``run`` gives for every prompt, in the order of the prompts.

    ``run`` gets batches: the numbers of the prompts, and ids and attention masks, both [prompts, tokens] and padded on
    the left. A batch for which memory does not suffice is halved; raises `RunError` if it does not suffice for a
    single prompt. A batch whose results are all ``known`` is not run; the others are those that they would be without.
    """
    results = dict(known)
    pending = [part for part in batches(prompts, new_tokens) if not results.keys() >= set(part)]
    while pending:
        part = pending.pop(0)
        ids, mask = left_padded([prompts[i] for i in part], pad, device)
        try:
            given = run(part, ids, mask)
        except Exception as error:
            if not is_memory_full(error):
                raise
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
            f"there is not enough memory for the {tokens:,} tokens of one question and its answer; lower max_new_tokens"
        )
    free_memory()
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
