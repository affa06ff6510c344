"""Find the places of downloaded and derived files: the user's cache folder, never the current one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def cache_dir(*parts: str) -> Path:
    """Returns a folder below the user's cache, and creates it if it is missing."""
    folder = cache_root().joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_root() -> Path:
    """Returns the user's cache: ``$QLORA_SFT_CACHE``, or ``$XDG_CACHE_HOME/qlora_sft``, or ``~/.cache/qlora_sft``.

    A user of whom the system knows no home, as in a container with a number for a user, has it in the folder of
    temporary files.
    """
    if root := os.environ.get("QLORA_SFT_CACHE"):
        return Path(root).expanduser()
    if others := os.environ.get("XDG_CACHE_HOME"):
        return Path(others).expanduser() / "qlora_sft"
    try:
        return Path.home() / ".cache" / "qlora_sft"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"qlora_sft-{os.getuid()}"


def scratch_file() -> IO[bytes]:
    """Opens a nameless file in the cache that is deleted when it is closed.

    It is not in /tmp, which is memory on many machines.
    """
    return tempfile.TemporaryFile(dir=cache_dir("scratch"))


@contextmanager
def sole_builder(name: str) -> Iterator[None]:
    """Keeps other processes from building ``name`` in the cache meanwhile.

    If two runs start at once, one downloads and the other waits.
    """
    from filelock import FileLock

    with FileLock(cache_dir("locks") / f"{name}.lock"):
        yield
