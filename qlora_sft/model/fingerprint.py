"""Makes a short text that identifies the weights of a base model.

It keeps an adapter from being merged into other weights of the same shape.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qlora_sft.errors import ConfigError
from qlora_sft.model.base_files import safetensors_header
from qlora_sft.model.snapshot import weight_files

# Bytes that are read from the middle of each tensor. Fine-tuning changes every tensor, and reading all of them whole
# would take minutes.
SAMPLE = 4096


def fingerprint(base: str | Path) -> str | None:
    """Returns a sha256 over name, type, shape and a sample of every tensor of the model in the folder ``base``.

    Tensors are taken in the order of their names, so it does not matter how they are spread over files. Returns None if
    the weights are not, or not all, in safetensors files there.
    """
    tensors: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    try:
        for file in weight_files(Path(base)):
            header, begin = safetensors_header(file)
            tensors |= {name: (file, begin, entry) for name, entry in header.items()}
        digest = hashlib.sha256()
        for name, (file, begin, entry) in sorted(tensors.items()):
            digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            digest.update(_sample(file, begin, entry["data_offsets"]))
    except (ConfigError, OSError, ValueError, KeyError):
        return None
    return digest.hexdigest() if tensors else None


def _sample(file: Path, begin: int, offsets: list[int]) -> bytes:
    """Returns some bytes from the middle of a tensor."""
    start, stop = offsets
    middle = max(start, (start + stop - SAMPLE) // 2)
    with file.open("rb") as handle:
        handle.seek(begin + middle)
        return handle.read(min(SAMPLE, stop - middle))
