"""Where downloaded and derived files live: the user's cache folder, never the current one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


@contextmanager
def sole_builder(name: str) -> Iterator[None]:
    """Within it no other process builds ``name`` in the cache: of two runs started at once one downloads, one waits."""
    from filelock import FileLock

    with FileLock(cache_dir("locks") / f"{name}.lock"):
        yield
