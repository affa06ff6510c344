"""Take rows from Python: lists, data sets, and rows of a file that a function has changed.

The rows are written to the user's cache under the hash of their content, and the configuration names that file. So they
are treated like any file: they may be larger than memory, the manifest has their hash, a run can be resumed by another
process, and export finds them again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from qlora_sft.atomic import written_file
from qlora_sft.cache import cache_dir
from qlora_sft.config import Config
from qlora_sft.config_data import (
    DataConfig,
    ReplayConfig,
    SourceConfig,
    TrainSourceConfig,
    held_out_sources,
    source_name,
)
from qlora_sft.data.files import without_nulls
from qlora_sft.data.sources import open_parts
from qlora_sft.errors import ConfigError, DataError
from qlora_sft.say import Say, tell

RowsOfOne = Iterable[Mapping[str, object]]
"""Rows as a file would have them: a list of dicts, a `datasets.Dataset`, or anything that yields dicts once."""
GivenRows = RowsOfOne | Mapping[str, RowsOfOne]
"""The rows of the only training source, or those of several sources by name."""
Change = Callable[[dict[str, Any]], Mapping[str, object] | None]
"""Takes a row and returns what is read in its place; None leaves it out."""


def with_rows(
    config: Config,
    rows: GivenRows | None = None,
    *,
    map: Mapping[str, str] | None = None,
    say: Say = tell,
) -> Config:
    """Returns the configuration with rows from Python in place of those that its sources name.

    rows: the rows of each source by its name, or those of the only training source. If a training and a held-out source
    have the same name, write ``train.NAME`` or ``held_out.NAME``. All other settings of a source stay as they are.

    map: a function for sources by name, as ``package.module:function``. It gets every row as a dict, whether from a
    file or from ``rows``, and returns the row to read in its place, or None to leave it out.

    Raises `ConfigError` for a name that is not a source, and `DataError` for rows that JSON cannot hold.
    """
    places = _places(config)
    given = {_place(name, places): each for name, each in _by_name(rows, config).items()}
    changes = {_place(name, places): (path, _function(path)) for name, path in (map or {}).items()}
    replaced: dict[str, SourceConfig] = {}
    for place, source in places.items():
        if place not in given and place not in changes:
            continue
        name, (path, change) = source_name(source), changes.get(place, ("", None))
        kept, read = _written(name, given[place] if place in given else _of_file(source), change)
        what = f"rows from Python ({kept:,})" if place in given else f"{source.path} ({kept:,} rows)"
        say(f"{name}: {what}{f', mapped by {path}' if path else ''}, kept in {read}")
        replaced[place] = dataclasses.replace(
            source, path=str(read), name=name, split=None, revision=None, streaming=False
        )
    return dataclasses.replace(config, data=_with_sources(config.data, replaced))


def _places(config: Config) -> dict[str, SourceConfig]:
    """Returns every source of the configuration under ``train.NAME``, ``held_out.NAME`` or ``replay``."""
    data = config.data
    places: dict[str, SourceConfig] = {f"train.{source_name(source)}": source for source in data.train}
    places |= {f"held_out.{source_name(source)}": source for source in held_out_sources(data)}
    return {**places, **({"replay": data.replay} if data.replay else {})}


def _by_name(rows: GivenRows | None, config: Config) -> Mapping[str, RowsOfOne]:
    if rows is None:
        return {}
    if isinstance(rows, Mapping):
        return rows
    if len(config.data.train) != 1:
        names = ", ".join(source_name(source) for source in config.data.train)
        raise ConfigError(f"data: rows without a name, and several training sources; give a dict by name ({names})")
    return {f"train.{source_name(config.data.train[0])}": rows}


def _place(name: str, places: Mapping[str, SourceConfig]) -> str:
    found = [place for place in places if name in (place, place.partition(".")[2])]
    if len(found) != 1:
        of_both = "is the name of two sources" if found else "is the name of no source of the configuration"
        raise ConfigError(f"data: {name!r} {of_both}; take one of {', '.join(found or places)}")
    return found[0]


def _function(path: str) -> Change:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None) if module and name else None
    except ImportError as error:
        raise ConfigError(f"map: {path!r} cannot be imported ({error}); is its folder in PYTHONPATH?") from None
    if not callable(found):
        raise ConfigError(f"map: {path!r} names no function; write it as package.module:function")
    return cast(Change, found)


def _of_file(source: SourceConfig) -> Iterator[Mapping[str, object]]:
    """Yields the rows that the path of a source names. Raises `DataError` at the first that is faulty."""
    for label, read, _ in open_parts(source):
        for line, row, fault in read():
            if fault is not None or not isinstance(row, dict):
                raise DataError(f"{label}:{line}: {fault or 'expected an object with columns'}")
            yield row


def _written(name: str, rows: RowsOfOne, change: Change | None) -> tuple[int, Path]:
    """Writes the rows as JSON Lines under the hash of their content, and returns their number and the file."""
    folder, digest, kept = cache_dir("rows"), hashlib.sha256(), 0
    of_arrow = "datasets" in sys.modules and isinstance(rows, sys.modules["datasets"].Dataset)
    unnamed = folder / f"{os.getpid()}-{name.replace(os.sep, '-')}.jsonl"
    with written_file(unnamed) as beside, open(beside, "wb") as file:
        for number, row in enumerate(rows, start=1):
            line = _line(name, number, without_nulls(row) if of_arrow else row, change)
            if line is not None:
                kept += 1
                digest.update(line)
                file.write(line)
    target = folder / digest.hexdigest()[:32] / unnamed.name.partition("-")[2]
    target.parent.mkdir(exist_ok=True)
    os.replace(unnamed, target)
    return kept, target


def _line(name: str, number: int, row: object, change: Change | None) -> bytes | None:
    """Returns a row as a line of JSON; None if the function leaves it out."""
    if isinstance(row, Mapping) and change is not None:
        row = change(dict(row))
        if row is None:
            return None
    if not isinstance(row, Mapping):
        raise DataError(f"{name}: row {number} is a {type(row).__name__}; expected a dict of columns")
    try:
        return json.dumps(dict(row), ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass") + b"\n"
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name}: row {number} cannot be written as JSON ({error}); make it texts and numbers"
        ) from None


def _with_sources(data: DataConfig, replaced: Mapping[str, SourceConfig]) -> DataConfig:
    """Returns the section with some sources replaced, which keep their kinds."""
    train = [replaced.get(f"train.{source_name(source)}", source) for source in data.train]
    named = [replaced.get(f"held_out.{source_name(source)}", source) for source in held_out_sources(data)]
    return dataclasses.replace(
        data,
        train=cast(list[TrainSourceConfig], train),
        held_out=data.held_out if isinstance(data.held_out, str) else named,
        replay=cast(ReplayConfig | None, replaced.get("replay", data.replay)),
    )
