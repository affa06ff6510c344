"""Makes a short text that says which weights a base model has.

With it an adapter is not merged into other weights of the same shape.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qlora_sft.model.base_files import safetensors_header

# Bytes that are read from the middle of each tensor. Fine-tuning changes every tensor, and reading all of them whole
# would take minutes.
SAMPLE = 4096


def fingerprint(base: str | Path) -> str | None:
    """sha256 over name, type, shape and a sample of every tensor, by name: however they are spread over files.

    ``base``: a folder, or the id of a model in the Hub's cache. None if its weights are not in safetensors files here.
    """
    folder = Path(base) if Path(base).is_dir() else _in_cache(str(base))
    tensors: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")) if folder else []:
            header, begin = safetensors_header(file)
            tensors |= {name: (file, begin, entry) for name, entry in header.items()}
        digest = hashlib.sha256()
        for name, (file, begin, entry) in sorted(tensors.items()):
            digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            digest.update(_sample(file, begin, entry["data_offsets"]))
    except (OSError, ValueError, KeyError):
        return None
    return digest.hexdigest() if tensors else None


def _sample(file: Path, begin: int, offsets: list[int]) -> bytes:
    """Returns some bytes from the middle of a tensor."""
    start, stop = offsets
    middle = max(start, (start + stop - SAMPLE) // 2)
    with file.open("rb") as handle:
        handle.seek(begin + middle)
        return handle.read(min(SAMPLE, stop - middle))


def _in_cache(name: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=["*.safetensors"]))
    except Exception:
        return None
