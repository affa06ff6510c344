"""Training and held-out sources of a configuration, as far as they can be had without a tokenizer."""

from __future__ import annotations

from qlora_sft.config import Config
from qlora_sft.data.dedup import Removed, clean_sources
from qlora_sft.data.sources import Source, read_sources
from qlora_sft.say import Say


def read_data(config: Config, say: Say) -> tuple[list[Source], list[Source], list[Removed]]:
    """Training sources (replay last) without duplicates and contaminated rows, held-out sources, what was removed.

    Needs no torch, so a bad file is reported at once.
    """
    data = config.data
    trained = [*data.train, *([data.replay] if data.replay else [])]
    sources = read_sources([*trained, *data.held_out], config.seed, say)
    train_sources, held_out_sources = sources[: len(trained)], sources[len(trained) :]
    removed: list[Removed] = []
    if data.decontaminate or data.deduplicate != "none":
        train_sources, removed = clean_sources(train_sources, data, say)
    return train_sources, held_out_sources, removed
