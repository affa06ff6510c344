"""Read the training and held-out sources of a configuration, as far as that takes no tokenizer."""

from __future__ import annotations

from typing import NamedTuple

from qlora_sft.config import Config
from qlora_sft.data.dedup import Removed, clean_sources
from qlora_sft.data.sources import Source, read_sources
from qlora_sft.say import Say


class RunSources(NamedTuple):
    """Holds what a run reads: training sources (replay last), held-out sources, and the rows that were removed."""

    train: list[Source]
    held_out: list[Source]
    removed: list[Removed]


def read_data(config: Config, say: Say) -> RunSources:
    """Reads all sources and removes duplicates and contaminated rows from those for training.

    It needs no torch, so a bad file is reported at once. Raises `DataError`.
    """
    data = config.data
    trained = [*data.train, *([data.replay] if data.replay else [])]
    sources = read_sources([*trained, *data.held_out], config.seed, say)
    train_sources, held_out_sources = sources[: len(trained)], sources[len(trained) :]
    removed: list[Removed] = []
    if data.decontaminate or data.deduplicate != "none":
        train_sources, removed = clean_sources(train_sources, data, say)
    return RunSources(train_sources, held_out_sources, removed)
