"""Read the training and held-out sources of a configuration, as far as that takes no tokenizer."""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

from qlora_sft.config import Config, load_config
from qlora_sft.config_data import held_out_shares, held_out_sources
from qlora_sft.data.conversation import Conversation
from qlora_sft.data.dedup import Removed, clean_sources, content, normalised
from qlora_sft.data.sources import Source, read_sources
from qlora_sft.errors import ConfigError, DataError
from qlora_sft.say import Say
from qlora_sft.text import as_path

RECIPE = "config.yaml"


class RunSources(NamedTuple):
    """Holds what a run reads: training sources (replay last), held-out sources, and the rows that were removed."""

    train: list[Source]
    held_out: list[Source]
    removed: list[Removed]


def read_data(config: Config, say: Say) -> RunSources:
    """Reads all sources, removes duplicates and contaminated rows from those for training, and splits off what of them
    is held out.

    It needs no torch, so a bad file is reported at once. It says which held-out rows an adapter that the run goes on
    from was trained on. Raises `DataError`.
    """
    sources = _read(config, say)
    if sources.held_out and (warning := trained_before(config, sources.held_out)):
        say(f"warning: {warning}")
    return sources


def trained_before(config: Config, held_out: list[Source]) -> str:
    """Returns a text that says how many held-out rows the runs behind ``lora.from`` were trained on; empty if none was,
    or if ``lora.from`` is the adapter of no run that is here."""
    digests = [_digest(row) for source in held_out for row in source.rows]
    seen: set[bytes] = set()
    began, last = config, ""
    while began.lora.from_ and began.lora.from_ != last:
        last = began.lora.from_
        folder = as_path(last)
        file = next((each for each in (folder / RECIPE, folder.parent / RECIPE) if each.is_file()), None)
        if file is None:
            break
        try:
            began = load_config(file)
            seen.update(_digest(row) for source in _read(began, lambda _: None).train for row in source.rows)
        except (ConfigError, DataError, OSError) as error:
            return f"held-out data: what {last} was trained on cannot be read again, and may have these rows: {error}"
    count = sum(digest in seen for digest in digests)
    if not count:
        return ""
    return (
        f"held-out data: {count:,} of {len(digests):,} rows were trained on by {config.lora.from_} or before; "
        "their loss says nothing about new data. Take its data, seed and data.held_out, or name held-out files"
    )


def _digest(row: Conversation) -> bytes:
    text = json.dumps(normalised(content(row)), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _read(config: Config, say: Say) -> RunSources:
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
        return _read(config, lambda _: None).held_out
    return read_sources(held_out_sources(config.data), config.seed)


def read_trained(config: Config) -> list[Source]:
    """Reads the training sources without replay and without what is held out of them. Raises `DataError`."""
    if held_out_shares(config.data):
        return _read(config, lambda _: None).train[: len(config.data.train)]
    return read_sources(config.data.train, config.seed)
