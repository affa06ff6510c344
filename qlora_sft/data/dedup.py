"""Drop and report rows that occurred before, and rows that give away an evaluation.

Exact duplicates are found by hash, near duplicates by MinHash (Jaccard similarity of word shingles, estimated from 128
minima), contamination by word n-grams in common with evaluation files. The first occurrence stays.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from qlora_sft.config_data import DataConfig, SourceConfig
from qlora_sft.data.conversation import Conversation, Message
from qlora_sft.data.formats import with_thinking
from qlora_sft.data.sources import Source, open_evaluation, place
from qlora_sft.errors import DataError
from qlora_sft.json_types import JsonObject
from qlora_sft.say import Say

SIMILARITY = 0.8
"""Jaccard similarity from which two conversations count as near duplicates."""
SHINGLE = 5
"""Words of the shingles whose sets are compared."""
_PERMUTATIONS = 128
_OF_A_ROW = ("tools", "chat_template_kwargs", "undesired", "whole")
# Kana and Chinese characters: no spaces part the words of what is written in them, so each counts as a word. A word of
# a whole clause would hide that two texts differ in one character.
_NO_SPACES = "\u3041-\u3096\u30a1-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+")


@dataclass(frozen=True)
class Removed:
    """Names one dropped row, why it was dropped, and what it matched (file:line)."""

    source: str
    place: str
    reason: str
    matched: str


def clean_sources(
    sources: list[Source], config: DataConfig, say: Say = lambda _: None
) -> tuple[list[Source], list[Removed]]:
    """Returns the sources without contaminated rows and duplicates, and what was removed.

    Raises `DataError` if nothing of a source is left, or if an evaluation file cannot be read.
    """
    removed: list[Removed] = []
    if config.decontaminate:
        known = evaluation_ngrams(config.decontaminate, config.decontaminate_words, say)
        sources, found = _drop(
            sources, lambda row, _: shared_ngram(row, known, config.decontaminate_words), "contaminated"
        )
        say(
            report(
                found, f"decontaminate: runs of {config.decontaminate_words} words in common with the evaluation files"
            )
        )
        removed += found
    if config.deduplicate != "none":
        sources, found = _drop(sources, exact_finder(), "duplicate")
        say(report(found, "deduplicate (exact): the same text, white space aside"))
        removed += found
    if config.deduplicate == "near":
        sources, found = _drop(sources, near_finder(), "near duplicate")
        say(report(found, f"deduplicate (near): similarity from {SIMILARITY} on, {SHINGLE}-word shingles"))
        removed += found
    return sources, removed


def report(removed: list[Removed], what: str) -> str:
    """Returns a text that says how many rows of which source were dropped, with the first three matches of each."""
    lines = [f"{what}: {len(removed):,} rows dropped"]
    by_source: dict[str, list[Removed]] = {}
    for each in removed:
        by_source.setdefault(each.source, []).append(each)
    for name, rows in by_source.items():
        shown = "; ".join(f"{row.place} = {row.matched}" for row in rows[:3]) + (" ..." if len(rows) > 3 else "")
        lines.append(f"  {name}: {len(rows):,} ({shown})")
    return "\n".join(lines)


def removed_lines(removed: list[Removed]) -> str:
    """Returns all removed rows as JSON Lines."""
    return "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in removed)


# ------------------------------------------------------------------ duplicates


def exact_finder() -> Callable[[Conversation, str], str | None]:
    """Returns a function from a row and its place to the place of the first row with the same text, or None."""
    seen: dict[bytes, str] = {}

    def find(row: Conversation, where: str) -> str | None:
        key = hashlib.sha256(json.dumps(normalised(content(row)), sort_keys=True).encode()).digest()
        if key in seen:  # perhaps with the same place, in a file that two sources have
            return seen[key]
        seen[key] = where
        return None

    return find


def near_finder() -> Callable[[Conversation, str], str | None]:
    """Returns a function from a row and its place to the place of the first similar row, or None.

    Only rows that are kept are compared with, and of those the ones from which the same is learned and masked: what
    one of two similar rows teaches, the other may mask. Raises `DataError` if datasketch is not installed.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise DataError(
            "data.deduplicate=near needs datasketch: pip install 'qlora-sft[dedup]', or set it to exact"
        ) from None
    indices: dict[str, MinHashLSH] = {}
    kept: dict[int, tuple[str, Any]] = {}

    def find(row: Conversation, where: str) -> str | None:
        words = words_of(row)
        shingles = {" ".join(words[i : i + SHINGLE]).encode() for i in range(max(1, len(words) - SHINGLE + 1))}
        sketch = MinHash(num_perm=_PERMUTATIONS, seed=1)
        # Sorted, because a set of texts has another order in every process.
        sketch.update_batch(sorted(shingles))
        index = indices.setdefault(_learned(row), MinHashLSH(threshold=SIMILARITY, num_perm=_PERMUTATIONS))
        # The index returns candidates; the estimate decides, the earliest first.
        for number in sorted(index.query(sketch)):
            if kept[number][1].jaccard(sketch) >= SIMILARITY:
                return kept[number][0]
        index.insert(len(kept), sketch)
        kept[len(kept)] = (where, sketch)
        return None

    return find


# ------------------------------------------------------------------ contamination


def evaluation_ngrams(paths: list[str], length: int, say: Say = lambda _: None) -> dict[int, str]:
    """Returns the hash of every n-gram of ``length`` words in the evaluation files, with file:line of its first
    occurrence.

    The rows may have any form; every text in them counts. Texts shorter than an n-gram cannot be recognised, and are
    counted and printed. Raises `DataError`.
    """
    known: dict[int, str] = {}
    for label, read, _ in (part for path in paths for part in open_evaluation(path)):
        texts = short = 0
        for line, row, fault in read():
            if fault is not None:
                raise DataError(f"{label}:{line}: {fault}")
            for ngrams in (set(_ngrams(text, length)) for text in _texts(row)):
                texts += 1
                short += not ngrams
                for ngram in ngrams:
                    known.setdefault(ngram, f"{label}:{line}")
        say(f"decontaminate: {label}: {texts:,} texts, {short:,} of them shorter than {length} words and not compared")
    return known


def shared_ngram(row: Conversation, known: dict[int, str], length: int) -> str | None:
    """Returns file:line of the evaluation row that the first shared n-gram comes from; system prompts do not count."""
    for text in _spoken(row):
        for ngram in _ngrams(text, length):
            if ngram in known:
                return known[ngram]
    return None


def _ngrams(text: str, length: int) -> Iterator[int]:
    words = list(_words(text))
    for start in range(len(words) - length + 1):
        # Python's own hash of texts differs from process to process, which is no matter within one.
        yield hash(tuple(words[start : start + length]))


# ------------------------------------------------------------------ texts


def _drop(
    sources: list[Source], find: Callable[[Conversation, str], str | None], reason: str
) -> tuple[list[Source], list[Removed]]:
    left, removed = [], []
    for source in sources:
        positions, found = set(), []
        for position, row in enumerate(source.rows):
            where = place(row)
            matched = find(_as_trained(row, source.settings), where)
            if matched is not None:
                positions.add(position)
                found.append(Removed(source.name, where, reason, matched))
        if len(positions) == len(source.rows):
            cure = f"remove the source, or what it repeats ({found[0].place} = {found[0].matched})"
            raise DataError(f"{source.path}: every row of {source.name!r} is dropped ({reason}); {cure}")
        if positions:
            places = {reason: [each.place for each in found]}
            source = replace(source, rows=source.rows.without(positions), removed={**source.removed, **places})
        left.append(source)
        removed += found
    return left, removed


def content(row: Conversation) -> JsonObject:
    """Returns what is learned from a row, without its place and its weight.

    What is not learned from it counts, too: another row with the same text may be the one that teaches a turn.
    """
    if "text" in row:
        return {"text": row["text"]}
    keys = ("role", "content", "parts", "reasoning", "tool_calls", "name")
    messages: list[JsonObject] = [
        {
            **{key: value for key, value in message.items() if key in keys},
            **({"masked": True} if masked(message) else {}),
        }
        for message in row["messages"]
    ]
    return {"messages": messages, **{key: value for key, value in row.items() if key in _OF_A_ROW}}


def _as_trained(row: Conversation, settings: SourceConfig) -> Conversation:
    """Returns the row with what its source says of it: in which mode it answers, and which of its turns are learned."""
    row = with_thinking(row, settings.thinking)
    if "text" in row or settings.supervise in ("assistant", "turns"):
        return row
    if settings.supervise == "all":
        return {**row, "whole": True}
    messages = row["messages"]
    last = max((number for number, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    silent: list[Message] = [
        {**message, "train": False} if message["role"] == "assistant" and number != last else message
        for number, message in enumerate(messages)
    ]
    return {**row, "messages": silent}


def masked(message: Message) -> bool:
    """Says whether a row asks for this turn not to be learned."""
    return message.get("train") is False or message.get("weight") == 0


def _learned(row: Conversation) -> str:
    """Returns a text that says which turns of a row are learned, which are masked, and which have code of their own.

    Rows without a masked turn, code or an unwanted answer are all alike here, however many turns they have.
    """
    turns = [
        (number, masked(message), [part["type"] for part in message.get("parts", [])])
        for number, message in enumerate(row.get("messages", []))
        if masked(message) or "parts" in message
    ]
    return json.dumps([turns, bool(row.get("undesired")), bool(row.get("whole"))])


def _spoken(row: Conversation) -> Iterator[str]:
    """Yields what is said in a row.

    System prompts and tool descriptions are left out. Many rows share them, and short questions with different answers
    would look alike.
    """
    if "text" in row:
        yield row["text"]
    for message in row.get("messages", []):
        if message["role"] != "system":
            calls = [call["function"]["arguments"] for call in message.get("tool_calls", [])]
            yield from _texts([message["content"], message.get("reasoning", ""), calls])


def words_of(row: Conversation) -> list[str]:
    """Returns the words of what is said in a row, system prompts aside."""
    return [word for text in _spoken(row) for word in _words(text)]


def normalised(value: object) -> object:
    """Returns ``value`` with equal texts for what differs in white space and composition of characters only."""
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFC", value).split())
    if isinstance(value, list):
        return [normalised(item) for item in value]
    return {key: normalised(item) for key, item in value.items()} if isinstance(value, dict) else value


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _words(text: str) -> Iterator[str]:
    return (match.group() for match in _WORD.finditer(unicodedata.normalize("NFKC", text).casefold()))
