"""Makes the files into which logits are written, position by position."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from qlora_sft.errors import RunError


def logits_file(file: Path, shape: tuple[int, int]) -> np.memmap:
    """Returns a new mapped file of float32 [tokens, vocabulary].

    Its room is taken at once: to write where a mapped file has none would end the process without a word (SIGBUS).
    Raises `RunError` if there is not enough.
    """
    try:
        rows = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    except OSError as error:
        free, needed = shutil.disk_usage(file.parent).free / 2**20, shape[0] * shape[1] / 2**18
        raise RunError(
            f"{file.parent}: no room for logits, {needed:,.0f} MiB ({error.strerror}; {free:,.0f} MiB are free). Set "
            "TMPDIR to a folder with more, or leave the comparison out with --no-parity"
        ) from None
    return rows
