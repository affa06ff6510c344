"""Write beside the target, then rename: a reader sees the old content or the new, never half of it."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_sft.cache import cache_root
from qlora_sft.errors import RunError


@contextmanager
def written_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``target``, which takes the place of ``target`` on success.

    On any error the new folder is removed and ``target`` stays as it was. A full disk raises a `RunError` that says how
    much space is left and where.
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
    """Yields the path of a file beside ``target``, which takes the place of ``target`` on success.

    On any error the new file is removed, and so are the folders that were made for it. A full disk raises a `RunError`,
    as in `written_folder`.
    """
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


class GrowingFile:
    """Adds texts to a file. What could not be written, of a full disk say, waits for the next addition; never is half
    of a text in the file with another behind it."""

    def __init__(self, file: Path):
        self.file = file
        self._waiting = b""

    def add(self, text: str) -> OSError | None:
        """Writes what is waiting and ``text``. Returns the error if that was not possible, else None."""
        self._waiting += text.encode("utf-8")
        if not self._waiting:
            return None
        try:
            with self.file.open("ab", buffering=0) as opened:
                size, left = opened.tell(), memoryview(self._waiting)
                try:
                    while left:
                        left = left[opened.write(left) :]
                except OSError:
                    with suppress(OSError):
                        opened.truncate(size)
                    raise
        except OSError as error:
            return error
        self._waiting = b""
        return None


def write_json(file: Path, content: object) -> None:
    """Writes ``content`` as indented JSON beside ``file`` and renames it."""
    with written_file(file) as beside:
        beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def remove_leftovers(target: Path) -> None:
    """Removes what killed processes left beside ``target``. That of processes that still run stays."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*-*"):
        found = re.match(r"\.[a-z]+-(\d+)(\.|$)", path.name.removeprefix(f".{target.name}"))
        if found and int(found[1]) != os.getpid() and not _alive(int(found[1])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    """Says whether there is a process with this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _remove_empty(folders: list[Path]) -> None:
    """Removes the folders that are empty, the innermost first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _replace_folder(beside: Path, target: Path) -> None:
    """Moves the old folder away before the new one takes its place, because os.replace
    cannot overwrite a full folder."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        os.replace(target, old)
    os.replace(beside, target)
    shutil.rmtree(old, ignore_errors=True)


def path_error(error: BaseException) -> RunError | None:
    """Returns a `RunError` that names the path if ``error`` is about one, else None.

    Such errors are a missing permission, a missing folder, or a name that is too long.
    """
    if not isinstance(error, OSError) or not error.filename or not error.strerror:
        return None
    # The second name of a failed renaming is the one that was asked for.
    path = error.filename2 or error.filename
    cure = "check the path and its permissions"
    # The folders above it are made as well, so a fault may name one of them.
    if isinstance(path, str) and (Path(path).is_relative_to(cache_root()) or cache_root().is_relative_to(path)):
        cure = "QLORA_SFT_CACHE=FOLDER before the command puts the cache elsewhere (XDG_CACHE_HOME: of all programs)"
    return RunError(f"{path}: {error.strerror}; {cure}")


def disk_error(error: BaseException, target: Path | None = None) -> RunError | None:
    """Returns a `RunError` with the cure if ``error`` means that the disk is full, else None.

    safetensors reports a full disk by an exception of its own, with the errno in the text.
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
