"""Keep what a run is trained on, for its report: the mixture, and a document of every source with its mask."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_sft.atomic import written_file
from qlora_sft.data.documents import Sizes
from qlora_sft.data.render import Rendered
from qlora_sft.data.show import token_runs
from qlora_sft.json_types import JsonObject
from qlora_sft.markup.text import shortened
from qlora_sft.page.facts import TRAINED_ON
from qlora_sft.training.steps import count_steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_sft.config import Config
    from qlora_sft.run_data import RunData

# Sources of which a document is kept; characters of a stretch of tokens, and stretches of a document.
MOST_SOURCES, CHARACTERS, STRETCHES = 30, 1500, 60


def keep_trained_on(run: Path, config: Config, data: RunData, sizes: Sizes) -> None:
    """Writes ``trained_on.json``. config: with the accumulation settled; sizes: those of the training documents."""
    steps = count_steps(len(data.sequences), config)
    sequences = data.sequences[: steps * config.training.batch_size * config.training.gradient_accumulation]
    shown = list(_first_of_each(sequences, sizes))[:MOST_SOURCES]
    content = {
        "steps": steps,
        "mixture": _mixture(sequences, sizes),
        "documents": [_document(data.documents[index], data.tokenizer) for index in shown],
    }
    with written_file(run / TRAINED_ON) as beside:
        beside.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _mixture(sequences: Sequence[list[int]], sizes: Sizes) -> dict[str, dict[str, int]]:
    """Returns documents, tokens and supervised tokens by source, also of one that the steps do not reach."""
    sums = {name: {"documents": 0, "tokens": 0, "supervised": 0} for name in dict.fromkeys(sizes.source)}
    for index in (index for sequence in sequences for index in sequence):
        of_source = sums[sizes.source[index]]
        of_source["documents"] += 1
        of_source["tokens"] += sizes.tokens[index]
        of_source["supervised"] += sizes.supervised[index]
    return sums


def _first_of_each(sequences: Sequence[list[int]], sizes: Sizes) -> Iterator[int]:
    """Yields the document of every source that is trained on first."""
    first: dict[str, int] = {}
    for index in (index for sequence in sequences for index in sequence):
        first.setdefault(sizes.source[index], index)
    yield from (first[name] for name in dict.fromkeys(sizes.source) if name in first)


def _document(document: Rendered, tokenizer: PreTrainedTokenizerBase) -> JsonObject:
    runs = token_runs(document, tokenizer)
    pieces = [{**asdict(run), "text": shortened(run.text, CHARACTERS)} for run in runs[:STRETCHES]]
    long = len(runs) > STRETCHES or any(len(run.text) > CHARACTERS for run in runs)
    return {
        "source": document.source,
        "tokens": len(document.input_ids),
        "supervised": document.n_supervised,
        "shortened": long,
        "pieces": pieces,
    }
