"""Reads the tokenizer of a base as it is, with its chat template, wherever the base keeps that.

transformers (5) makes a tokenizer by the class that tokenizer_config.json or the model's family names, with what this
class knows of white space and numbers in place of what tokenizer.json says. Where the named class is wrong (a Llama 3
with LlamaTokenizerFast, as DeepSeek-R1-Distill-Llama is published; another vocabulary under a Qwen2) texts are split
otherwise than by the tokenizer that the model was trained with, and characters may be lost.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_sft.errors import ConfigError, first_line
from qlora_sft.json_types import read_object
from qlora_sft.model.base_files import check_tokenizer_files
from qlora_sft.say import Say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Classes differ in how they split at white space, numbers, contractions, case, scripts and ends of lines: every kind of
# text stands before every other, with and without white space between them.
_KINDS = ("a", "Ab", "ABC", "1", "12345", "!", "...", "'s", "'LL", "\u00e9", "\u4f60\u597d", "_", "\U0001f600", "x=1;")
_BETWEEN = ("", " ", "  ", "\n", "\n\n", "\r\n", "\t", "   \n ")
PROBE = "".join(f"{one}{white}{other}" for white in _BETWEEN for one in _KINDS for other in _KINDS)


def saved_tokenizer(folder: str | Path, say: Say = lambda _: None) -> PreTrainedTokenizerBase:
    """Reads the tokenizer in ``folder``, which splits texts as its tokenizer.json says, whatever class is named there.

    Raises OSError or ValueError if there is none.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # False, trusted or not: a tokenizer's own code is refused before, and without it transformers would ask on stdin
    # whether to run the model's.
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    file = Path(folder) / "tokenizer.json"
    if not tokenizer.is_fast or not file.is_file():
        return tokenizer
    wanted = _split_by_file(str(file), file.stat().st_mtime_ns, file.stat().st_size)
    if _split(tokenizer) == wanted:
        return tokenizer
    generic = PreTrainedTokenizerFast.from_pretrained(folder)
    if _split(generic) != wanted:
        return tokenizer
    say(
        f"tokenizer: as its tokenizer.json has it; transformers' {type(tokenizer).__name__} would split texts otherwise"
    )
    return generic


def _split(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return tuple(tokenizer(PROBE, add_special_tokens=False).input_ids)


@cache
def _split_by_file(file: str, changed: int, size: int) -> tuple[int, ...]:
    """Returns the ids that the tokenizer.json ``file`` gives the probe; changed, size: of the file, which may be
    another one later."""
    from tokenizers import Tokenizer

    return tuple(Tokenizer.from_file(file).encode(PROBE, add_special_tokens=False).ids)


def read_tokenizer(base: str, say: Say = lambda _: None) -> PreTrainedTokenizerBase:
    """Reads the tokenizer in the folder ``base`` as it is. Raises `ConfigError` if there is none, or a damaged one."""
    if Path(base).is_dir():
        check_tokenizer_files(Path(base))
    try:
        tokenizer = saved_tokenizer(base, say)
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
