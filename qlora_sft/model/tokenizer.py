"""Loads the base's tokenizer as a run uses it: with its chat template, new control tokens, and where answers end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_sft.config import ModelConfig
from qlora_sft.data.shipped import SHIPPED, template_text
from qlora_sft.data.written_tokens import written_tokens
from qlora_sft.errors import ConfigError
from qlora_sft.model.base_tokenizer import read_tokenizer
from qlora_sft.model.vocabulary import add_tokens, describe_new, missing_tokens, new_rows, wanted_tokens
from qlora_sft.say import Say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model: ModelConfig, base: str, say: Say = lambda _: None) -> PreTrainedTokenizerBase:
    """Loads the base's tokenizer, with ``model.chat_template`` in place of its own if one is configured.

    Control tokens that this template writes and the base lacks, and ``model.new_tokens``, are added, with a message.
    Raises `ConfigError` if there is no tokenizer, or one without an eos token.
    """
    tokenizer = read_tokenizer(base, say)
    missing = missing_tokens(wanted_tokens(model), tokenizer)
    if model.chat_template:
        tokenizer.chat_template = template_text(model.chat_template)
    if missing:
        add_tokens(tokenizer, missing)
        say(describe_new(missing, model))
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.path: the tokenizer in {base} names no eos token, so no answer could ever end")
    return tokenizer


def stop_token_ids(model: ModelConfig, base: str, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the tokens at which the model stops.

    They are those of its generation config, the eos token, the end of turn of a shipped template or a new one of an own
    template, and ``model.stop_tokens``. Raises `ConfigError` for a stop token that the vocabulary does not have as one
    token.
    """
    ids = _generation_stop_token_ids(base)
    if unknown := sorted(id for id in ids if tokenizer.convert_ids_to_tokens(id) is None):
        raise ConfigError(
            f"model.path: generation_config.json of {base} stops at token {unknown[0]}, which its tokenizer does not "
            "have; take the one that belongs to this tokenizer, or correct its eos_token_id"
        )
    end = _end_of_turn(model, base, tokenizer)
    for token in [*([end] if end else []), *model.stop_tokens]:
        found = tokenizer.get_vocab().get(token)
        if found is None:
            raise ConfigError(
                f"model.stop_tokens: {token!r} is not a token of {base}; name the one that ends turns in the template"
            )
        ids.add(found)
    return {tokenizer.eos_token_id, *ids}


def end_turns(tokenizer: PreTrainedTokenizerBase, model: ModelConfig, base: str, say: Say) -> None:
    """Makes the end of turn of the template the eos token of ``tokenizer``, unless the base stops at it already.

    Runtimes stop where the saved tokenizer says. Call it when all is rendered, because a plain text ends in the base's
    own eos token.
    """
    end = _end_of_turn(model, base, tokenizer)
    if end and tokenizer.convert_tokens_to_ids(end) not in {tokenizer.eos_token_id, *_generation_stop_token_ids(base)}:
        say(f"eos token of the adapter's tokenizer: {end}, which ends turns, instead of {tokenizer.eos_token}")
        tokenizer.eos_token = end


def _end_of_turn(model: ModelConfig, base: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the token that ends turns in a shipped template, or in one of the user's own if it is a new token.

    It is an empty text for any other template. Where an own template ends turns in a token that the base has, the base
    knows what it means, and ``model.stop_tokens`` says whether it stops there.
    """
    name, text = model.chat_template, tokenizer.chat_template
    if not name or name in SHIPPED or not isinstance(text, str):
        return SHIPPED[name].end if name in SHIPPED else ""
    end = written_tokens(text).end
    try:
        new = new_rows(model, base, text)
    except ConfigError:  # a finished run whose base is gone; its tokenizer says where it stops
        return ""
    return end if end and tokenizer.convert_tokens_to_ids(end) in new else ""


def _generation_stop_token_ids(base: str) -> set[int]:
    """Returns the tokens at which the base's generation config stops."""
    from transformers import GenerationConfig

    try:
        configured = GenerationConfig.from_pretrained(base).eos_token_id
    except OSError:  # a base without a generation_config.json
        configured = None
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in listed if token is not None}  # some published lists hold a null
