"""Adds, initialises and trains the control tokens that a template writes and a base's vocabulary lacks.

A base that never saw a chat has no token for the beginning and the end of a turn. Spelled in several tokens they would
be text that anybody can type, and no turn could end. So they become tokens of their own. Their rows in embedding and
output head begin as the mean of all others and are trained, and only they are (PEFT's ``trainable_token_indices``: k
rows instead of a second embedding). Where the embedding has rows beyond the tokenizer's last token, as many bases have,
those are taken; else it grows. The adapter holds the rows whole, so base and adapter together lack nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from qlora_sft.config import ModelConfig
from qlora_sft.data.shipped import SHIPPED, template_text
from qlora_sft.data.written_tokens import written_tokens
from qlora_sft.model.base_tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class WantedTokens(NamedTuple):
    """Holds the control tokens that have to be in the vocabulary."""

    always: tuple[str, ...]
    """Those of a shipped template, and ``model.new_tokens``."""
    own: tuple[str, ...] = ()
    """Those that a template of the user's own writes."""


def wanted_tokens(model: ModelConfig, template: str | None = None) -> WantedTokens:
    """Returns the control tokens that the configured template writes, and ``model.new_tokens``.

    template: the text of the configured template, where it is known already. Raises `ConfigError` if there is no such
    template.
    """
    name, new = model.chat_template, model.new_tokens
    if name and name not in SHIPPED:
        return WantedTokens(tuple(new), written_tokens(template or template_text(name)).control)
    return WantedTokens(tuple(dict.fromkeys((*(SHIPPED[name].control if name else ()), *new))))


def missing_tokens(wanted: WantedTokens, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns those of ``wanted`` that the base's ``tokenizer`` lacks, which has its own chat template still.

    What the base's own template writes, and its vocabulary lacks, the base has learned as text (``[INST]`` of Llama 2).
    So it stays text in a template of the user's own: a new token would say nothing to the base.
    """
    if not (wanted.always or wanted.own):
        return []
    vocabulary, spelled = tokenizer.get_vocab(), _spelled(tokenizer) - set(wanted.always)
    tokens = dict.fromkeys((*(token for token in wanted.own if token not in spelled), *wanted.always))
    return [token for token in tokens if token not in vocabulary]


def _spelled(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Returns the control tokens that the tokenizer's own chat template writes."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return set(written_tokens(template).control) if isinstance(template, str) else set()


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Adds control tokens behind the last token. They are never part of a word and swallow nothing around them."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)


def new_rows(model: ModelConfig, base: str, template: str | None = None) -> list[int]:
    """Returns the ids that ``load_tokenizer`` has added to the base's own; most bases need none.

    template: as in `wanted_tokens`.
    """
    wanted = wanted_tokens(model, template)
    return list(_new_rows(wanted, base, _written(base))) if wanted.always or wanted.own else []


def _written(base: str) -> tuple[tuple[str, int, int], ...]:
    """Returns name, time of writing and size of the base's small files, among which are those of its tokenizer."""
    files = [file for file in Path(base).glob("*") if file.suffix in (".json", ".model", ".txt", ".jinja")]
    return tuple(sorted((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@lru_cache(maxsize=4)
def _new_rows(wanted: WantedTokens, base: str, written: tuple[tuple[str, int, int], ...]) -> tuple[int, ...]:
    """Returns the ids of the new tokens, read once per state of the base's files."""
    tokenizer: Any = read_tokenizer(base)
    missing = missing_tokens(wanted, tokenizer)
    if not missing:
        return ()
    add_tokens(tokenizer, missing)
    return tuple(sorted(tokenizer.convert_tokens_to_ids(missing)))


def describe_new(tokens: Sequence[str], model: ModelConfig) -> str:
    """Says which tokens were added, and why, to print."""
    asked = set(tokens) <= set(model.new_tokens)
    why = "as model.new_tokens asks" if asked else f"because chat_template={model.chat_template} writes them"
    return (
        f"vocabulary: {', '.join(tokens)} added, {why} and this base has {'them ' if asked else ''}not; "
        "their rows begin as the mean of all others and are trained"
    )


@torch.no_grad()
def grow(model: PreTrainedModel, rows: Sequence[int], *, initialise: bool) -> None:
    """Gives embedding and head these rows, in place, where they have too few. Tied ones stay tied.

    initialise: whether the rows begin as the mean of all before them; else an adapter has to bring them.
    """
    if not rows:
        return
    if max(rows) >= model.get_input_embeddings().weight.shape[0]:
        # transformers would draw the new rows around the mean, and print three lines about it.
        model.resize_token_embeddings(max(rows) + 1, mean_resizing=False)
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    for weight in {layer.weight.data_ptr(): layer.weight for layer in layers if initialise}.values():
        weight[list(rows)] = torch.mean(weight[: min(rows)], 0, dtype=torch.float32).to(weight.dtype)


def trainable_rows(model: PreTrainedModel, rows: Sequence[int]) -> dict[str, list[int]] | None:
    """Returns PEFT's ``trainable_token_indices``.

    They name rows of the embedding, and of the head where that is a matrix of its own.
    """
    if not rows:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    return {name: list(rows) for name, module in model.named_modules() for layer in layers if module is layer}


def trained_rows(adapter: Path) -> list[int]:
    """Returns the token ids whose rows the adapter in this folder brings along."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    given = config.get("trainable_token_indices") or []
    return sorted({row for rows in given.values() for row in rows} if isinstance(given, dict) else given)
