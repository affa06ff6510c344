"""Chooses the text on which all forms of a model are compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS = 2048
# If there are this many held-out tokens, no others are needed.
ENOUGH = 256
# Tokenizers disagree about prose, digits, code, accents, other scripts, emoji and white space.
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
    """Holds documents as token ids, and the positions in each at which the models are compared.

    In held-out conversations these are the positions that predict a supervised token, which the model has to write.
    Nobody ever sees what it predicts for a user's next token, and near-ties there say nothing about the export.
    """

    documents: list[list[int]]
    positions: list[list[int]]
    origin: str
    """Where the documents come from, as text."""
    supervised_only: bool = False
    """Whether all positions predict text that the model was trained to write. In other text many next tokens are about
    equally likely, so which of them is the likeliest says nothing about the export. The KL divergence still does."""

    @property
    def tokens(self) -> int:
        """Returns the number of positions."""
        return sum(map(len, self.positions))


def read_probe(run: Path, tokenizer: PreTrainedTokenizerBase, tokens: int = TOKENS) -> Probe:
    """Chooses ``tokens`` positions, if there are as many, from held-out rows, the run's samples, or a fixed text."""
    held_out, why = _held_out(run)
    fixed = [_whole(tokenizer.encode(text, add_special_tokens=False)) for text in FIXED_TEXT]
    if sum(len(positions) for _, positions in held_out) >= ENOUGH:
        return replace(_first(held_out, tokens, "supervised tokens of the run's held-out rows"), supervised_only=True)
    if held_out:
        return _first([*held_out, *fixed], tokens, "supervised tokens of the run's few held-out rows, and a fixed text")
    samples = run / "samples.jsonl"
    lines = samples.read_text(encoding="utf-8").splitlines() if samples.is_file() else []
    prompts = [json.loads(line)["prompt_ids"] for line in lines]
    if prompts:
        return _first([_whole(ids) for ids in prompts], tokens, f"the run's held-out prompts ({why})")
    return _first(fixed, tokens, f"a fixed text ({why})")


def _whole(ids: list[int]) -> tuple[list[int], list[int]]:
    """Returns a document with all of its positions."""
    return ids, list(range(len(ids)))


def _held_out(run: Path) -> tuple[list[tuple[list[int], list[int]]], str]:
    """Returns ids and positions of the held-out rows, sources in turn; or no rows and the reason why."""
    from qlora_sft.config_data import held_out_shares, held_out_sources
    from qlora_sft.errors import QloraSftError, first_line
    from qlora_sft.run.folder import Run
    from qlora_sft.run_data import saved_text

    try:
        config = Run.open(run).config
        if not (held_out_sources(config.data) or held_out_shares(config.data)):
            return [], "the run has no held-out data"
        prepared = saved_text(run).held_out(config)
    except (QloraSftError, OSError) as error:
        return [], f"the held-out data cannot be read: {first_line(error)}"
    by_source = [
        # The token at a position predicts the next one.
        [(row.input_ids, [i - 1 for i, weight in enumerate(row.weights) if weight > 0 and i]) for row in rows]
        for rows in prepared.documents.values()
    ]
    return [pair for group in zip_longest(*by_source) for pair in group if pair], ""


def _first(rows: Sequence[tuple[list[int], list[int]]], tokens: int, origin: str) -> Probe:
    """Takes documents until there are ``tokens`` positions. The last document is cut after the last position."""
    chosen = Probe([], [], origin)
    for ids, positions in rows:
        left = tokens - chosen.tokens
        if left <= 0:
            break
        counted = positions[:left]
        if counted:
            chosen.documents.append(list(ids[: counted[-1] + 1]))
            chosen.positions.append(counted)
    return chosen
