"""Write beside, then rename: a reader sees the old content or the new, never half of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_sft.errors import RunError


@contextmanager
def written_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``target``; on success it takes the place of ``target``.

    On any error the folder beside is removed and ``target`` stays as it was. A full disk becomes
    a `RunError` that says how much room is left and where.
    """
    target = Path(target)
    beside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    made = [folder for folder in target.parents if not folder.exists()]
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        yield beside
        _replace_folder(beside, target)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        _remove_empty(made)
        raise disk_error(error, target) or error from None


@contextmanager
def written_file(target: Path) -> Iterator[Path]:
    """Like `written_folder`, for one file. Folders that had to be made for it go with it."""
    target = Path(target)
    beside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        os.replace(beside, target)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        _remove_empty(made)
        raise disk_error(error, target) or error from None


def write_json(file: Path, content: object) -> None:
    """Indented JSON, written beside and renamed."""
    with written_file(file) as beside:
        beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _remove_empty(folders: list[Path]) -> None:
    """Removes those of the folders, the innermost first, that hold nothing."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _replace_folder(beside: Path, target: Path) -> None:
    """os.replace cannot overwrite a folder that has content, so the old one is moved away first."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        os.replace(target, old)
    os.replace(beside, target)
    shutil.rmtree(old, ignore_errors=True)


def path_error(error: BaseException) -> RunError | None:
    """A `RunError` that names the path if ``error`` is about one (no permission, no such folder, name too long)."""
    if not isinstance(error, OSError) or not error.filename or not error.strerror:
        return None
    # Of a renaming, the second is the name that was asked for.
    return RunError(f"{error.filename2 or error.filename}: {error.strerror}; check the path and its permissions")


def disk_error(error: BaseException, target: Path | None = None) -> RunError | None:
    """A `RunError` with the cure if ``error`` means that the disk is full, else None.

    safetensors reports a full disk as its own exception type with the errno in the text.
    """
    text = str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not full and "No space left on device" not in text and "os error 28" not in text:
        return None
    cure = "Free some room or choose another folder with output=..., then run the same command again."
    if target is None:
        return RunError(f"the disk is full ({text}). {cure}")
    parent = next(p for p in [target.parent, *target.parent.parents] if p.exists())
    free = shutil.disk_usage(parent).free / 2**20
    return RunError(
        f"{target}: the disk is full ({free:.0f} MiB left on {parent}). Nothing was written under that name. {cure}"
    )
