"""Adds, initialises and trains the control tokens that a shipped template writes and a base's vocabulary lacks.

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
from typing import TYPE_CHECKING, Any

import torch

from qlora_sft.config import ModelConfig
from qlora_sft.data.shipped import SHIPPED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def missing_tokens(template: str | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the control tokens of a shipped template that ``tokenizer`` lacks; none for any other template."""
    shipped = SHIPPED.get(template or "")
    vocabulary = tokenizer.get_vocab() if shipped else {}
    return [token for token in shipped.control if token not in vocabulary] if shipped else []


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Adds control tokens behind the last token. They are never part of a word and swallow nothing around them."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)


def new_rows(model: ModelConfig, base: str) -> list[int]:
    """Returns the ids that ``load_tokenizer`` has added to the base's own; most bases need none."""
    return list(_new_rows(model.chat_template, base, _written(base))) if model.chat_template in SHIPPED else []


def _written(base: str) -> tuple[tuple[str, int, int], ...]:
    """Returns name, time of writing and size of the base's small files, among which are those of its tokenizer."""
    files = [file for file in Path(base).glob("*") if file.suffix in (".json", ".model", ".txt")]
    return tuple(sorted((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@lru_cache(maxsize=4)
def _new_rows(template: str | None, base: str, written: tuple[tuple[str, int, int], ...]) -> tuple[int, ...]:
    """Returns the ids of the new tokens, read once per state of the base's files."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    missing = missing_tokens(template, tokenizer)
    if not missing:
        return ()
    add_tokens(tokenizer, missing)
    return tuple(sorted(tokenizer.convert_tokens_to_ids(missing)))


def describe_new(tokens: Sequence[str], template: str) -> str:
    """Says which tokens were added, and why, to print."""
    return (
        f"vocabulary: {', '.join(tokens)} added, because chat_template={template} writes them and this base has not; "
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
