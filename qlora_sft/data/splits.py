"""Read the training and held-out sources of a configuration, as far as that takes no tokenizer."""

from __future__ import annotations

from typing import NamedTuple

from qlora_sft.config import Config
from qlora_sft.config_data import held_out_shares, held_out_sources
from qlora_sft.data.dedup import Removed, clean_sources
from qlora_sft.data.sources import Source, read_sources
from qlora_sft.say import Say


class RunSources(NamedTuple):
    """Holds what a run reads: training sources (replay last), held-out sources, and the rows that were removed."""

    train: list[Source]
    held_out: list[Source]
    removed: list[Removed]


def read_data(config: Config, say: Say) -> RunSources:
    """Reads all sources, removes duplicates and contaminated rows from those for training, and splits off what of them
    is held out.

    It needs no torch, so a bad file is reported at once. Raises `DataError`.
    """
    data = config.data
    trained = [*data.train, *([data.replay] if data.replay else [])]
    sources = read_sources([*trained, *held_out_sources(data)], config.seed, say)
    train_sources, held_out = sources[: len(trained)], sources[len(trained) :]
    removed: list[Removed] = []
    if data.decontaminate or data.deduplicate != "none":
        train_sources, removed = clean_sources(train_sources, data, say)
    if shares := held_out_shares(data):
        from qlora_sft.data.split_off import split_off  # which needs numpy

        train_sources, split = split_off(train_sources, shares, config.seed, say)
        held_out = [*held_out, *split]
    return RunSources(train_sources, held_out, removed)


def read_held_out(config: Config) -> list[Source]:
    """Reads the held-out sources alone, without the training sources where they are not needed. Raises `DataError`."""
    if held_out_shares(config.data):
        return read_data(config, lambda _: None).held_out
    return read_sources(held_out_sources(config.data), config.seed)


def read_trained(config: Config) -> list[Source]:
    """Reads the training sources without replay and without what is held out of them. Raises `DataError`."""
    if held_out_shares(config.data):
        return read_data(config, lambda _: None).train[: len(config.data.train)]
    return read_sources(config.data.train, config.seed)
