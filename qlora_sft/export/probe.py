"""The text that every form of a model is asked about, to see whether they are one model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

TOKENS = 2048
# Held-out tokens from which on no others are needed.
ENOUGH = 256
# Prose, digits, code, accents, other scripts, emoji, white space: what tokenizers disagree about.
FIXED_TEXT = (
    "The river had risen two metres in the night, and by seven o'clock the lower road was under water. Nobody in the "
    "village remembered such a spring. The baker, who had opened at 05:30 as always, sold 214 loaves before noon.",
    "def mean(values: list[float]) -> float:\n    if not values:\n        raise ValueError('empty')\n"
    "    return sum(values) / len(values)\n\n\nprint(mean([1.5, 2.25, 1e-3, 1000000]))\n",
    '{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}  \t  trailing spaces   \n\n\n',
    "Le café était fermé; die Straße war naß; el niño comió; 東京は今日も雨です。 Привет, мир! 👩‍🚀🎉 naïve façade",
    "If 3 apples cost 1.20 and 7 pears cost 4.55, then 12 apples and 2 pears cost 4.80 + 1.30 = 6.10. Don't round: "
    "12,345.678 exactly, not 12345.678. We'll see. I'D SAY SO.",
)


@dataclass(frozen=True)
class Probe:
    """Documents as token ids, the positions in each at which the models are compared, and where they come from.

    Of held-out conversations those that predict a supervised token count: what the model has to write. What it
    thinks of a user's next word is never seen by anybody, and near-ties there say nothing about the export.
    """

    documents: list[list[int]]
    positions: list[list[int]]
    origin: str
    own_words: bool = False
    """Whether all positions are of text that the model was trained to write. Of other text it knows little, many next
    tokens are about as likely, and which comes first says nothing about the export; the KL divergence still does."""

    @property
    def tokens(self) -> int:
        return sum(map(len, self.positions))


def read_probe(run: Path, tokenizer: Any, tokens: int = TOKENS) -> Probe:
    """At least ``tokens`` positions if there are as many: held-out rows of the run, its samples, or a fixed text."""
    held_out, why = _held_out(run)
    fixed = [_whole(tokenizer.encode(text, add_special_tokens=False)) for text in FIXED_TEXT]
    if sum(len(positions) for _, positions in held_out) >= ENOUGH:
        return replace(_first(held_out, tokens, "supervised tokens of the run's held-out rows"), own_words=True)
    if held_out:
        return _first([*held_out, *fixed], tokens, "supervised tokens of the run's few held-out rows, and a fixed text")
    samples = run / "samples.jsonl"
    lines = samples.read_text(encoding="utf-8").splitlines() if samples.is_file() else []
    prompts = [json.loads(line)["prompt_ids"] for line in lines]
    if prompts:
        return _first([_whole(ids) for ids in prompts], tokens, f"the run's held-out prompts ({why})")
    return _first(fixed, tokens, f"a fixed text ({why})")


def _whole(ids: list[int]) -> tuple[list[int], list[int]]:
    return ids, list(range(len(ids)))


def _held_out(run: Path) -> tuple[list[tuple[list[int], list[int]]], str]:
    """(ids, positions) of the held-out rows, sources in turn; or none and why."""
    from qlora_sft.errors import QloraSftError, first_line
    from qlora_sft.run.folder import Run
    from qlora_sft.run_data import saved_text

    try:
        config = Run.open(run).config
        if not config.data.held_out:
            return [], "the run has no held-out data"
        prepared = saved_text(run).render(config, config.data.held_out)
    except (QloraSftError, OSError) as error:
        return [], f"the held-out data cannot be read: {first_line(error)}"
    by_source = [
        # The token at a position predicts the next one.
        [(row.input_ids, [i - 1 for i, weight in enumerate(row.weights) if weight > 0 and i]) for row in rows]
        for rows in prepared.documents.values()
    ]
    return [pair for group in zip_longest(*by_source) for pair in group if pair], ""


def _first(rows: Sequence[tuple[list[int], list[int]]], tokens: int, origin: str) -> Probe:
    """Whole documents until there are ``tokens`` positions; the last one is cut after the position that fills it."""
    chosen = Probe([], [], origin)
    for ids, positions in rows:
        room = tokens - chosen.tokens
        if room <= 0:
            break
        counted = positions[:room]
        if counted:
            chosen.documents.append(list(ids[: counted[-1] + 1]))
            chosen.positions.append(counted)
    return chosen
