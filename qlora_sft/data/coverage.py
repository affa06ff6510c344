"""Find characters that a vocabulary cannot represent.

A byte-level vocabulary that lacks some of the 256 bytes drops them in silence; others write their unknown token. Either
way the model never learns what stood there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Lost = dict[str, int]
"""Maps a character to how often it is lost."""


def lost_characters(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Lost:
    """Returns the characters of the texts that no token can represent, and how often they occur; usually none.

    Each character is tried once per vocabulary; afterwards a text costs one pass over it.
    """
    known = _known(tokenizer, len(tokenizer), tokenizer.unk_token_id)
    whole = "".join(texts)
    characters = set(whole)
    for character in characters - known.keys():
        known[character] = _holds(character, tokenizer)
    missing = {character for character in characters if not known[character]}
    return dict(Counter(character for character in whole if character in missing)) if missing else {}


def describe_lost(lost: Lost) -> str:
    """Returns the five most frequent lost characters as text: ``𝕏 (U+1D54F) 3 times, ...``."""
    ranked = sorted(lost.items(), key=lambda item: -item[1])
    shown = [f"{c if c.isprintable() else ''} (U+{ord(c):04X}) {n} times".lstrip() for c, n in ranked[:5]]
    return ", ".join(shown) + (f" and {len(ranked) - 5} more kinds" if len(ranked) > 5 else "")


@lru_cache(maxsize=8)
def _known(tokenizer: PreTrainedTokenizerBase, size: int, unknown: int | None) -> dict[str, bool]:
    """Returns the map from a character to whether the vocabulary has it, which is filled as characters come.

    size, unknown: of the vocabulary as it is now, and its unknown token; the same object may get other tokens later.
    """
    return {}


def _holds(character: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Says whether something of the character is left when it is encoded between two letters.

    If it comes back changed (as another form of a space), that is the tokenizer's normalisation and no loss. If only
    half of its bytes come back, it is lost.
    """
    if character.isascii() and character.isalnum():
        return True
    ids = tokenizer(f"a{character}a", add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        return False
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return "aa" not in back and (character == "�" or "�" not in back)
