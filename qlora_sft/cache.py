"""Where downloaded and derived files live: the user's cache folder, never the current one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def cache_dir(*parts: str) -> Path:
    """Folder below the user's cache, created on demand.

    ``QLORA_SFT_CACHE`` overrides; otherwise ``$XDG_CACHE_HOME/qlora_sft`` or ``~/.cache/qlora_sft``.
    """
    root = os.environ.get("QLORA_SFT_CACHE")
    if root:
        base = Path(root).expanduser()
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qlora_sft"
    folder = base.joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def scratch_file() -> IO[bytes]:
    """A file without a name, which goes when it is closed; in the cache, because /tmp is memory on many machines."""
    return tempfile.TemporaryFile(dir=cache_dir("scratch"))


@contextmanager
def sole_builder(name: str) -> Iterator[None]:
    """Within it no other process builds ``name`` in the cache: of two runs started at once one downloads, one waits."""
    from filelock import FileLock

    with FileLock(cache_dir("locks") / f"{name}.lock"):
        yield
