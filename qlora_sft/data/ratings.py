"""Weighs training sources by ratings that somebody gave their rows (``quality: file``).

The file (``ratings``) has one rating per row of the source, in the order of its rows: a number, or an object with one
under ``rating``. The quality of a source is the mean over the rows that are in use, so its share is ``p ~ N * mean``.
Rows of unwanted answers (``label: false``) are not trained, so their ratings do not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from qlora_sft.config import Config
from qlora_sft.config_data import source_name
from qlora_sft.data.conversation import Conversation
from qlora_sft.data.files import read_rows
from qlora_sft.data.row_faults import RowFaults
from qlora_sft.data.sources import Source, place
from qlora_sft.errors import DataError
from qlora_sft.say import Say
from qlora_sft.text import as_path

_SHOWN = 3


def with_file_ratings(config: Config, sources: Sequence[Source], say: Say) -> Config:
    """Returns the configuration with a number in place of every ``quality: file``; itself if there is none.

    Says the quality of each such source, and shows the rows with the lowest and the highest ratings. Raises one
    `DataError` for all that is wrong with the files.
    """
    by_name = {source.name: source for source in sources}
    train, problems = [], []
    for settings in config.data.train:
        if settings.quality == "file" and settings.ratings is not None:
            try:
                source = by_name[source_name(settings)]
                quality, text = _rated(source, _read(settings.ratings, source), settings.ratings)
                say(text)
                settings = replace(settings, quality=quality)
            except DataError as error:
                problems.append(str(error))
        train.append(settings)
    if problems:
        raise DataError("\n".join(problems))
    return replace(config, data=replace(config.data, train=train)) if train != config.data.train else config


def _read(file: str, source: Source) -> list[float]:
    """Reads the ratings of all rows of a source. Raises `DataError` with the lines of what is none."""
    path = as_path(file, DataError)
    if not path.is_file():
        raise DataError(f"{path}: no such file; ratings of {source.name!r} name a file with one per row")
    ratings: list[float] = []
    faults = RowFaults()
    for line, row, fault in read_rows(path):
        rating = _rating(row)
        if fault is None and rating is not None:
            ratings.append(rating)
            continue
        why = f"a rating is a number from 0 on, or an object with one under 'rating', got {str(row)[:60]}"
        faults.add(f"{path}:{line}", fault or why)
        if faults.enough:
            break
    if faults:
        raise DataError("\n".join(faults.lines(str(path))))
    if len(ratings) != source.read:
        raise DataError(
            f"{path}: {len(ratings):,} ratings for the {source.read:,} rows of {source.path}; it has one for each row, "
            "in the same order"
        )
    return ratings


def _rating(row: object) -> float | None:
    """Returns the rating that a row of the file is; cells of tables and lines of text are texts. None if it is none."""
    value = row.get("rating", row.get("text")) if isinstance(row, dict) else row
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        rating = float(value)
    except ValueError:
        return None
    return rating if math.isfinite(rating) and rating >= 0 else None


def _rated(source: Source, ratings: list[float], file: str) -> tuple[float, str]:
    """Returns the mean rating of the rows in use, and what is said of it. Raises `DataError` if all are zero."""
    given = [ratings[number] for number, row in zip(source.rows.chosen, source.rows, strict=True) if _trained(row)]
    if not given:
        raise DataError(f"{source.path}: every row of {source.name!r} in use has label: false; remove the source")
    mean = math.fsum(given) / len(given)
    if mean == 0:
        raise DataError(f"{file}: every row of {source.name!r} in use is rated 0; remove the source")
    order = sorted(range(len(given)), key=given.__getitem__)
    lowest, highest = order[:_SHOWN], order[_SHOWN:][-_SHOWN:][::-1]
    trained = enumerate(filter(_trained, source.rows))
    texts = {number: _told(row) for number, row in trained if number in {*lowest, *highest}}
    lines = [
        f"quality of {source.name}: {mean:.4g} (mean of {len(given):,} ratings from {min(given):g} to {max(given):g} "
        f"in {file})"
    ]
    for what, chosen in (("lowest", lowest), ("highest", highest)):
        lines += [f"  {what}: {given[number]:g}: {texts[number]}" for number in chosen]
    return float(f"{mean:.4g}"), "\n".join(lines)


def _trained(row: Conversation) -> bool:
    return not row.get("undesired")


def _told(row: Conversation) -> str:
    """Returns the place of a row and the beginning of its last answer."""
    text = row["text"] if "text" in row else row["messages"][-1]["content"]
    return f"{place(row)}: {' '.join(text.split())[:100]}"
