"""Hugging Face data sets -> rows, from the Arrow files that `datasets` keeps in its cache and memory-maps."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from qlora_sft.config_data import SourceConfig
from qlora_sft.data.files import Rows, without_nulls
from qlora_sft.errors import DataError


def open_dataset(source: SourceConfig, folder: Path | None) -> tuple[str, Any]:
    """Label and rows (iterable) of ``owner/name[:configuration]`` on the Hub, or of a local folder laid out like one.

    A stream is cut after ``max_rows`` rows, which are held in memory. Raises `DataError`.
    """
    import datasets

    name, _, configuration = source.path.partition(":") if folder is None else (str(folder), "", "")
    split = source.split or "train"
    label = f"{source.path}[{split}]"
    if folder is not None and (folder / "state.json").is_file():
        if source.split or source.streaming:
            raise DataError(
                f"{folder}: written by save_to_disk, which has neither splits nor streams; remove those keys"
            )
        return str(folder), datasets.load_from_disk(str(folder))
    try:
        loaded = datasets.load_dataset(
            name, configuration or None, split=split, revision=source.revision, streaming=source.streaming
        )
        return label, list(islice(loaded, source.max_rows)) if source.streaming else loaded
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # datasets.load_dataset raises all of these for a name, a split or a network that is not there.
        raise DataError(f"{label}: {_reason(error)}") from None


def dataset_rows(dataset: Any) -> Rows:
    """Rows of a loaded data set, counted from 1."""
    rows: Iterator[Any] = iter(dataset)
    for number, row in enumerate(rows, start=1):
        yield number, without_nulls(row), None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    if isinstance(error, ValueError) and "onfig name is missing" in text:
        return f"{text}; name it behind a colon: path: owner/name:configuration"
    if isinstance(error, ValueError):
        return f"{text}; check split, and the configuration behind the colon (owner/name:configuration)"
    offline = "without a network, fetch it elsewhere (hf download --repo-type dataset owner/name --local-dir DIR)"
    missing = f"no such file or folder here, and no such data set within reach ({text})"
    return f"{missing}; check the name; {offline} and set path: DIR"
