"""Checks whether a base can be trained at all: whether its weights, its tokenizer and the settings fit one another.

Everything is known from config.json, the headers of the weights and the tokenizer, so nothing is loaded for it. Without
these checks a token that has no embedding ends a run in the middle (on a GPU with an assertion that names nothing), and
layers that the files lack would be trained on random numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_sft.config import Config, ModelConfig
from qlora_sft.data.documents import Documents
from qlora_sft.errors import ConfigError, DataError, all_at_once
from qlora_sft.model.base_files import (
    Header,
    check_quantization,
    has_experts,
    read_config,
    text_config,
)
from qlora_sft.model.base_folder import base_headers
from qlora_sft.model.base_tokenizer import read_tokenizer
from qlora_sft.model.go_on import check_adapter
from qlora_sft.model.meta_model import check_layers, meta_model, read_settings
from qlora_sft.model.remote_code import check_code
from qlora_sft.model.rope import check_context
from qlora_sft.model.tokenizer import load_tokenizer, stop_token_ids
from qlora_sft.model.vocabulary import new_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Names of the input embedding and the output head in the files of the families there are.
_EMBEDDINGS = re.compile(r"(.*\.)?(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|lm_head|embed_out)\.weight")
# Placeholders that a processor for images or sound puts in; text never has them.
_PLACEHOLDERS = re.compile(r"(image|video|audio)_token")


def check_base(config: Config, base: str) -> None:
    """Raises `ConfigError` with everything in which settings, weights and tokenizer of ``base`` do not fit."""
    settings = read_config(base)
    check_code(config.model, base)
    checks: list[Callable[[], Any]] = [
        lambda: check_quantization(config.model, base, settings),
        lambda: check_weights(config, base, settings),
        lambda: check_context(config, base),
        lambda: check_layers(config, base),
        lambda: check_tokenizer(config.model, base, settings),
        lambda: check_adapter(config, base),
        lambda: check_ewc(config, settings),
        lambda: check_chat(config.model, base),
    ]
    all_at_once(checks)


def check_weights(config: Config, base: str, settings: dict[str, Any]) -> None:
    """Raises `ConfigError` if the files hold fewer values than config.json asks for, or an embedding of another size.

    What is missing would be made up of random numbers when the model is loaded.
    """
    headers = _headers(base)
    vocabulary = text_config(settings).get("vocab_size")
    for name, header in headers.items():
        rows = _embedding_rows(name, header)
        if rows and vocabulary and rows != vocabulary:
            raise ConfigError(
                f"model.path: config.json of {base} says vocab_size {vocabulary:,}, and {name} has {rows:,} rows; the "
                "two are of different models, so copy the model again"
            )
    if not headers or settings.get("quantization_config"):
        return
    wanted = meta_model(read_settings(config, base)).num_parameters()
    held = sum(_count(header) for header in headers.values())
    if held < wanted:
        raise ConfigError(
            f"model.path: the files in {base} hold {held:,} parameters, {wanted - held:,} fewer than config.json asks "
            "for; is the download incomplete? Copy the model again"
        )


def check_tokenizer(model: ModelConfig, base: str, settings: dict[str, Any]) -> None:
    """Raises `ConfigError`, naming them, for tokens of the base's tokenizer that have no row in its embedding.

    Tokens that a shipped template adds are not among them: they get rows of their own.
    """
    count = _rows_of(base, settings)
    if count is None:
        return
    tokenizer: Any = read_tokenizer(base)
    named = {**tokenizer.init_kwargs, **tokenizer.special_tokens_map}
    placeholders = {str(token) for name, token in named.items() if _PLACEHOLDERS.fullmatch(name)}
    beyond = {id: token for token, id in tokenizer.get_vocab().items() if id >= count and token not in placeholders}
    if beyond:
        shown = ", ".join(f"{beyond[id]!r} ({id})" for id in sorted(beyond)[:5])
        more = f" and {len(beyond) - 5:,} more" if len(beyond) > 5 else ""
        raise ConfigError(
            f"model.path: the tokenizer in {base} has {len(beyond):,} tokens beyond the {count:,} rows of the model's "
            f"embedding: {shown}{more}. Take the tokenizer that belongs to these weights, or give the model rows for "
            "them (model.resize_token_embeddings(len(tokenizer))) and save both"
        )


def check_ids(
    documents: Iterable[Documents], model: ModelConfig, base: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises `DataError` for a rendered token without a row in the embedding, as placeholders for images have none."""
    count = _rows_of(base, read_config(base))
    new = new_rows(model, base)
    for each in documents:
        # Most data needs no more than the one look at its largest id.
        if count is None or not len(each.ids) or int(each.ids.max()) < count:
            continue
        beyond = {int(token) for token in np.unique(each.ids) if token >= count} - set(new)
        if beyond:
            first = min(beyond)
            raise DataError(
                f"data: {each.source} holds {tokenizer.convert_ids_to_tokens(first)!r}, a token for images or sound "
                f"({first}) that the model's embedding of {count:,} rows does not have; take it out of the texts"
            )


def _rows_of(base: str, settings: dict[str, Any]) -> int | None:
    """Returns the rows of the embedding, by the files or else by config.json."""
    rows = {_embedding_rows(name, header) for name, header in _headers(base).items()} - {0}
    count: int | None = min(rows, default=text_config(settings).get("vocab_size"))
    return count


def check_chat(model: ModelConfig, base: str) -> None:
    """Raises `ConfigError` or `DataError` if tokenizer, chat template and stop tokens cannot write a conversation."""
    from qlora_sft.data.template import choose_chat_format

    tokenizer = load_tokenizer(model, base)
    choose_chat_format(tokenizer, stop_token_ids(model, base, tokenizer))


def check_ewc(config: Config, settings: dict[str, Any]) -> None:
    """Raises `ConfigError` where weights cannot be held near to what they were: those of experts are stacks, and no
    layer shows what goes into each."""
    if config.training.ewc is not None and config.lora.experts == "train" and has_experts(settings):
        raise ConfigError(
            "training.ewc: what goes into each expert is not seen, so its weights cannot be held; leave the experts "
            "without adapters (lora.experts=frozen), or take training.replay_kl instead"
        )


def _headers(base: str) -> dict[str, Header]:
    """Returns the headers of all tensors; none for a model whose weights are in files of another kind."""
    try:
        return base_headers(base)
    except ConfigError as error:
        if "no safetensors files" in str(error):
            return {}
        raise


def _embedding_rows(name: str, header: Header) -> int:
    """Returns the rows of an embedding or output head that is not packed into bytes; 0 for any other tensor."""
    fits = _EMBEDDINGS.fullmatch(name) and len(header.shape) == 2 and header.dtype != "U8"
    return header.shape[0] if fits else 0


def _count(header: Header) -> int:
    """Returns the values of a tensor."""
    count = 1
    for size in header.shape:
        count *= size
    return count
