"""Reads the tokenizer of a base as it is, with its chat template, wherever the base keeps that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_sft.errors import ConfigError, first_line
from qlora_sft.json_types import read_object
from qlora_sft.model.base_files import check_tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_tokenizer(base: str) -> PreTrainedTokenizerBase:
    """Reads the tokenizer in the folder ``base`` as it is. Raises `ConfigError` if there is none, or a damaged one."""
    from transformers import AutoTokenizer

    if Path(base).is_dir():
        check_tokenizer_files(Path(base))
    try:
        # False, trusted or not: a tokenizer's own code is refused before, and without it transformers would ask on
        # stdin whether to run the model's.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: no tokenizer in {base}: {first_line(error)}") from None
    if not tokenizer.chat_template:
        tokenizer.chat_template = _processors_template(Path(base))
    return tokenizer


def _processors_template(base: Path) -> str | None:
    """Returns the chat template that some models which also see have in a file of their processor's; None without."""
    file = base / "chat_template.json"
    try:
        found = read_object(file).get("chat_template") if file.is_file() else None
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {file}: damaged ({first_line(error)}); copy the model again") from None
    return found if isinstance(found, str) else None
