"""Characters that a vocabulary cannot hold: a byte-level one that lacks some of the 256 bytes drops them without a
word, others write their unknown token. Either way the model never learns what stood there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Lost = dict[str, int]
"""Character -> how often it is lost."""


def lost_characters(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Lost:
    """Which characters of the texts no token can spell, and how often they stand there; usually none.

    Each character is tried once per tokenizer; afterwards a text costs one pass over it.
    """
    known = _known(tokenizer)
    whole = "".join(texts)
    characters = set(whole)
    for character in characters - known.keys():
        known[character] = _holds(character, tokenizer)
    missing = {character for character in characters if not known[character]}
    return dict(Counter(character for character in whole if character in missing)) if missing else {}


def describe_lost(lost: Lost) -> str:
    """``𝕏 (U+1D54F) 3 times, ...``: the five most frequent."""
    ranked = sorted(lost.items(), key=lambda item: -item[1])
    shown = [f"{c if c.isprintable() else ''} (U+{ord(c):04X}) {n} times".lstrip() for c, n in ranked[:5]]
    return ", ".join(shown) + (f" and {len(ranked) - 5} more kinds" if len(ranked) > 5 else "")


@lru_cache(maxsize=8)
def _known(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Character -> whether the vocabulary holds it; filled as they come."""
    return {}


def _holds(character: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether something of it is left between two letters. That it comes back changed (another form of a space) is the
    tokenizer's normalisation, and no loss; half of its bytes is one."""
    if character.isascii() and character.isalnum():
        return True
    ids = tokenizer(f"a{character}a", add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        return False
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return "aa" not in back and (character == "�" or "�" not in back)
