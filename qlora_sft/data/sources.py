"""Read training data from files, folders, globs and Hugging Face data sets as conversations.

A source is read once to find every fault and the form of its rows, and again in every iteration. Only the numbers of
the rows in use are kept, so a source may be larger than memory.
"""

from __future__ import annotations

import glob
import random
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from qlora_sft.config_data import SourceConfig, source_name
from qlora_sft.data import files
from qlora_sft.data.columns import wrong_columns
from qlora_sft.data.conversation import Conversation
from qlora_sft.data.formats import CURE, RowForm, convert, convert_noting, detect, refuse_preferences
from qlora_sft.data.misread import broken_cell, list_in_a_line
from qlora_sft.data.row_faults import MAX_PROBLEMS, RowFaults
from qlora_sft.data.values import kind
from qlora_sft.errors import DataError
from qlora_sft.say import Say
from qlora_sft.text import as_path


@dataclass(frozen=True)
class SourcePart:
    """Describes one file (or data set) of a source: its label in messages, how to read its rows, and their form."""

    label: str
    read: Callable[[], files.Rows]
    form: RowForm


@dataclass(frozen=True)
class Conversations:
    """Holds the conversations of a source, read anew in every iteration.

    ``chosen`` has the numbers of the rows in use.
    """

    parts: list[SourcePart]
    chosen: array[int]

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[Conversation]:
        wanted = iter(self.chosen)
        following = next(wanted, -1)
        number = 0
        for part in self.parts:
            for line, row, fault in part.read():
                if number == following:
                    if fault is not None:
                        raise DataError(f"{part.label}:{line}: {fault}; the file was changed while it was read")
                    yield {**convert_noting(row, part.form), "file": part.label, "line": line}
                    following = next(wanted, -1)
                number += 1
            if following < 0:
                return

    def without(self, positions: set[int]) -> Conversations:
        """Returns the same without those that come at these positions (counted from 0) when iterating."""
        return replace(self, chosen=array("Q", (n for i, n in enumerate(self.chosen) if i not in positions)))


@dataclass(frozen=True)
class Source:
    """Holds the conversations of one source of the configuration."""

    name: str
    path: Path
    rows: Conversations
    read: int
    """Rows that the source has. ``rows`` are those drawn by ``fraction`` and ``max_rows`` and not removed since."""
    files: list[Path] = field(default_factory=list)
    """Local files that it was read from; none for a data set of the Hub."""
    settings: SourceConfig = field(default_factory=lambda: SourceConfig(""))
    removed: dict[str, list[str]] = field(default_factory=dict)
    """Maps a reason to file:line of the rows that were removed for it."""
    split: bool = False
    """Whether its rows were held out of a training source, and not named as held out."""


def place(conversation: Conversation) -> str:
    """Returns file:line of the row that a conversation was read from."""
    return f"{conversation['file']}:{conversation['line']}"


def read_sources(sources: Sequence[SourceConfig], seed: int, say: Say = lambda _: None) -> list[Source]:
    """Returns every source's conversations, checked, and says what was detected and what is not used.

    Raises one `DataError` for all faulty files.
    """
    result, problems = [], []
    for source in sources:
        try:
            result.append(_read(source, seed, say))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return result


def resolve_path(path: str) -> Path:
    """Returns the path of a source. ``demo:train/fields.jsonl`` names a file of the generated demo data."""
    if path.startswith("demo:"):
        from qlora_sft.demo import data_path

        return data_path() / path.removeprefix("demo:")
    return as_path(path, DataError)


def open_parts(
    source: SourceConfig, say: Say = lambda _: None
) -> list[tuple[str, Callable[[], files.Rows], Path | None]]:
    """Returns label, reader and (if it is one) file of everything that a source's path names. Raises `DataError`."""
    path = resolve_path(source.path)
    if path.is_file():
        _refuse_dataset_keys(source, "file")
        return [_file_part(path)]
    dataset_folder = path if path.is_dir() and (source.split or (path / "state.json").is_file()) else None
    if dataset_folder or _is_hub_name(source.path):
        from qlora_sft.data.hub import dataset_rows, open_dataset

        label, dataset = open_dataset(source, dataset_folder)
        return [(label, lambda: dataset_rows(dataset), None)]
    _refuse_dataset_keys(source, "folder or glob")
    if path.is_dir():
        return _all_files(path, sorted(path.rglob("*")), say)
    if glob.has_magic(str(path)):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise DataError(f"{path}: no file matches; check the pattern and the folder you are in")
        return _all_files(path, found, say)
    raise DataError(_no_such_file(path))


def open_evaluation(path: str) -> list[tuple[str, Callable[[], files.Rows], Path | None]]:
    """Opens a set that must not be trained on, as `open_parts` does.

    A data set of the Hub is read in the split in brackets (``owner/name[test]``), or in all but ``train``.
    """
    named = re.fullmatch(r"([\w.-]+/[\w.-]+(?::[\w.-]+)?)\[([\w.-]+)\]", path)
    if named and not glob.glob(path):
        return open_parts(SourceConfig(named[1], split=named[2]))
    if not _is_hub_name(path):
        return open_parts(SourceConfig(path))
    from qlora_sft.data.hub import dataset_rows, open_splits

    return [(label, partial(dataset_rows, rows), None) for label, rows in open_splits(SourceConfig(path))]


def _is_hub_name(path: str) -> bool:
    """Says whether ``path`` names a data set of the Hub. A name with the ending of a file is a file that is missing."""
    named = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", path) and files.kind_of(Path(path)) not in files.READERS
    return bool(named) and not resolve_path(path).exists()


# ------------------------------------------------------------------ reading and checking


def _read(source: SourceConfig, seed: int, say: Say) -> Source:
    name = source_name(source)
    opened = open_parts(source, say)
    parts: list[SourcePart] = []
    problems: list[str] = []
    found: dict[str, list[str]] = {}
    unused: dict[str, str] = {}
    total = 0
    seen: set[str] = set()
    for label, read, file in opened:
        try:
            form, count, faults = _scan(label, read, source, unused, seen)
        except DataError as error:  # the file as a whole
            form, count, faults = None, 0, [str(error)]
        problems += faults
        if form is not None:
            parts.append(SourcePart(label, read, form))
            found.setdefault(_description(form, source, file), []).append(label)
            total += count
    problems = wrong_columns(source, [part.form for part in parts], seen) + problems
    if problems:
        more = len(problems) - MAX_PROBLEMS - 1
        rest = [f"{source.path}: {more} more faults in its other files"] if more > 0 else []
        raise DataError("\n".join(problems[: MAX_PROBLEMS + 1] + rest))
    if not total:
        raise DataError(
            f"{source.path}: the file has no conversations; expected one row per conversation, e.g. with 'messages'"
        )
    for description, labels in found.items():
        say(f"{name}: {description} in {labels[0]}" + (f" and {len(labels) - 1} more files" if len(labels) > 1 else ""))
    if unused:
        listed = ", ".join(f"{what} (first in {where})" for what, where in unused.items())
        say(f"{name}: not used: {listed}; map columns with columns: if they hold something to learn")
    rows = Conversations(parts, _draw(source, name, total, seed))
    paths = [file for _, _, file in opened if file is not None]
    return Source(name, Path(source.path), rows, total, paths, source)


def _scan(
    label: str, read: Callable[[], files.Rows], source: SourceConfig, unused: dict[str, str], seen: set[str]
) -> tuple[RowForm | None, int, list[str]]:
    """Returns form, number of rows and faults of one file.

    ``unused`` is filled with what first went unused where, ``seen`` with the columns of all rows.
    """
    form = None if source.format == "auto" else RowForm(source.format, source.columns or {}, _tags(source))
    first, count, faults = 0, 0, RowFaults()
    for line, row, fault in read():
        count += 1
        if fault is None:
            try:
                seen.update(row if isinstance(row, dict) else ())
                form, first = _settle_form(row, line, form, first, source)
                before: set[str] = set()
                convert(row, form, before)
                for what in sorted(before - unused.keys()):
                    unused[what] = f"{label}:{line}"
            except DataError as error:
                fault = str(error)
        if fault is not None:
            faults.add(f"{label}:{line}", fault)
        if faults.enough:
            break
    return form, count, faults.lines(label)


def _settle_form(row: object, line: int, form: RowForm | None, first: int, source: SourceConfig) -> tuple[RowForm, int]:
    """Returns the form of the file and the line that settled it.

    Raises `DataError` if the row has no form or another one.
    """
    if why := list_in_a_line(row):
        raise DataError(why)
    if not isinstance(row, dict):
        raise DataError(f"expected an object with columns (e.g. 'messages'), got {kind(row)}")
    if source.format != "auto" and form is not None:
        return form, line
    own = detect(row, source.columns)
    own = own and replace(own, think_tags=_tags(source))
    if own is None and (broken := broken_cell(row, source.columns)):
        raise DataError(broken)
    if own is None:
        refuse_preferences(row, set())
        found = ", ".join(map(repr, row)) or "no columns"
        known = "messages, ShareGPT, Alpaca, prompt/completion or text"
        raise DataError(f"expected a row in one of the known forms ({known}), found {found}; {CURE}")
    if form is not None and own != form:
        raise DataError(
            f"this row is {own.describe()}, but line {first} is {form.describe()}; "
            "a file holds one form: split it in two"
        )
    return own, first or line


def _tags(source: SourceConfig) -> bool:
    return source.think_tags == "reasoning"


def _description(form: RowForm, source: SourceConfig, file: Path | None) -> str:
    verb = "detected" if source.format == "auto" else "configured"
    layout = ""
    if file is not None and files.kind_of(file) == ".txt":
        layout = f", documents separated by {files.text_layout(file)}"
    elif file is None or files.kind_of(file) == ".parquet":
        layout = ", empty fields taken for absent ones"
    return f"{verb} {form.describe()}{layout}"


def _draw(source: SourceConfig, name: str, total: int, seed: int) -> array[int]:
    """Returns the numbers of the rows to use, in the order of the file.

    They are the same for the same seed, name and number of rows.
    """
    wanted = max(1, round(total * source.fraction))
    if source.max_rows is not None:
        wanted = min(wanted, source.max_rows)
    if wanted >= total:
        return array("Q", range(total))
    return array("Q", sorted(random.Random(f"rows {seed} {name}").sample(range(total), wanted)))


# ------------------------------------------------------------------ paths


def _file_part(path: Path) -> tuple[str, Callable[[], files.Rows], Path | None]:
    return str(path), lambda: files.read_rows(path), path


def _all_files(path: Path, found: list[Path], say: Say) -> list[tuple[str, Callable[[], files.Rows], Path | None]]:
    plain = [file for file in found if file.is_file() and not file.name.startswith(".")]
    usable = [file for file in plain if files.kind_of(file) in files.READERS]
    if not usable:
        raise DataError(f"{path}: none of its {len(plain)} files is {', '.join(files.READERS)}")
    skipped = [file.name for file in plain if file not in set(usable)]
    if skipped:
        say(f"{path}: {len(skipped)} files of other kinds are left out: {', '.join(skipped[:3])}")
    return [_file_part(file) for file in usable]


def _refuse_dataset_keys(source: SourceConfig, what: str) -> None:
    keys = [key for key in ("split", "revision", "streaming") if getattr(source, key)]
    if keys:
        raise DataError(
            f"{source.path}: a {what} has no {' or '.join(keys)}; remove it, or name a Hugging Face data set"
        )


def _no_such_file(path: Path) -> str:
    return f"{path}: no such file{_similar_file(path)}. Check data sources in the configuration."


def _similar_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent} either)"
    close = get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1, cutoff=0.5)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""
