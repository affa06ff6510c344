"""Read Hugging Face data sets as rows.

They are read from the Arrow files that `datasets` keeps in its cache and memory-maps; a stream is read from a file of
our own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from qlora_sft.cache import scratch_file
from qlora_sft.config_data import SourceConfig
from qlora_sft.data.files import Rows, without_nulls
from qlora_sft.errors import DataError

DatasetRows = Iterable[object]
"""The rows of a data set, to be iterated over as often as wanted."""
Loaded = TypeVar("Loaded")


def open_dataset(source: SourceConfig, folder: Path | None) -> tuple[str, DatasetRows]:
    """Returns label and rows of ``owner/name[:configuration]`` on the Hub, or of a local folder laid out like one.

    The first ``max_rows`` rows of a stream are written to disk as they come. Raises `DataError`.
    """
    import datasets

    split = source.split or "train"
    label = f"{source.path}[{split}]"
    if folder is not None and (folder / "state.json").is_file():
        if source.split or source.streaming:
            raise DataError(
                f"{folder}: written by save_to_disk, which has neither splits nor streams; remove those keys"
            )
        return str(folder), datasets.load_from_disk(str(folder))

    def load() -> DatasetRows:
        loaded: DatasetRows = _load(source, folder, split)
        return _Stored(islice(loaded, source.max_rows)) if source.streaming else loaded

    return label, _reached(load, label, source)


def open_splits(source: SourceConfig) -> list[tuple[str, DatasetRows]]:
    """Returns label and rows of every split of a data set of the Hub but ``train``, or of that if there is no other."""
    splits = _reached(lambda: _load(source, None, None), source.path, source)
    chosen = [name for name in splits if name != "train"] or list(splits)
    return [(f"{source.path}[{name}]", splits[name]) for name in chosen]


def dataset_rows(dataset: DatasetRows) -> Rows:
    """Yields the rows of a loaded data set, counted from 1."""
    for number, row in enumerate(dataset, start=1):
        yield number, without_nulls(row), None


class _Stored:
    """Stores rows that come only once, so that they can be iterated over repeatedly, from
    a file and not from memory."""

    def __init__(self, rows: DatasetRows):
        self._file = scratch_file()
        self._starts = [0]
        for row in rows:
            # Dates and the like are columns that nothing is learned from.
            self._file.write(json.dumps(row, default=str).encode() + b"\n")
            self._starts.append(self._file.tell())

    def __iter__(self) -> Iterator[object]:
        for start in self._starts[:-1]:
            self._file.seek(start)  # another iteration may be under way
            yield json.loads(self._file.readline())


def _load(source: SourceConfig, folder: Path | None, split: str | None) -> Any:
    import datasets

    name, _, configuration = source.path.partition(":") if folder is None else (str(folder), "", "")
    return datasets.load_dataset(
        name, configuration or None, split=split, revision=source.revision, streaming=source.streaming
    )


def _reached(load: Callable[[], Loaded], label: str, source: SourceConfig) -> Loaded:
    import datasets
    import huggingface_hub.errors

    try:
        return load()
    except (OSError, ValueError, datasets.exceptions.DatasetsError, huggingface_hub.errors.HfHubHTTPError) as error:
        # All of these are raised for a name, a split or a network that is not there.
        raise DataError(f"{label}: {_reason(error, source)}") from None


def _reason(error: Exception, source: SourceConfig) -> str:
    """Returns what went wrong and what to do, judged by the message of `datasets` 4, which is quoted in brackets."""
    said = " ".join(str(error).split())[:300]
    name, _, configuration = source.path.partition(":")
    if "onfig name is missing" in said:
        return f"it has several configurations; name one behind a colon: path: {name}:CONFIGURATION ({said})"
    if "BuilderConfig" in said:
        return f"it has no configuration {configuration!r}; choose another behind the colon ({said})"
    if "Unknown split" in said or "Bad split" in said:
        return f"it has no split {source.split or 'train'!r}; set split: to one that it has ({said})"
    if "Revision" in said:
        return f"it has no revision {source.revision!r}; check revision: (a commit, tag or branch) ({said})"
    if "gated" in said:
        return (
            f"it is gated: accept its terms at https://huggingface.co/datasets/{name}, then log in (hf auth login, or "
            f"set HF_TOKEN) ({said})"
        )
    if "doesn't exist on the Hub or cannot be accessed" in said:
        return f"the Hub has no such data set, or it is private: check owner/name, or log in (hf auth login) ({said})"
    if isinstance(error, ValueError):
        return f"{said}; check split:, and the configuration behind the colon (owner/name:CONFIGURATION)"
    offline = "without a network, fetch it elsewhere (hf download --repo-type dataset owner/name --local-dir DIR)"
    missing = f"no such file or folder here, and no such data set within reach ({said})"
    return f"{missing}; check the name and the network; {offline} and set path: DIR"
