"""Finds the base model of a run, and checks that it is still the one on which the adapter was trained."""

from __future__ import annotations

import json
from pathlib import Path

from qlora_sft.errors import RunError, first_line
from qlora_sft.model.fingerprint import fingerprint
from qlora_sft.run.folder import Run


def base_folder(base: str) -> Path:
    """Returns the local folder of the base. A Hub id is looked up in the Hub's own cache, or fetched into it.

    Raises `RunError` if it is neither.
    """
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:
        raise RunError(
            f"the base model {base} is neither a folder here nor to be had from the Hub: {first_line(error)}"
        ) from None


def check_base(run: Run, base: Path) -> None:
    """Raises `RunError` if ``base`` has other weights than those that ``run`` was trained on."""
    trained = run.base_sha256
    # The fingerprint of a folder that lacks a shard means nothing, and the error is clearer where the tensors are read.
    if trained and _is_whole(base) and fingerprint(base) != trained:
        raise RunError(
            f"{base}: these are not the weights that the adapter was trained on (the fingerprint in manifest.json is "
            "another); put the base model of the run there, or train again on this one"
        )


def _is_whole(base: Path) -> bool:
    """Says whether every file of the weights is there."""
    index = base / "model.safetensors.index.json"
    if not index.is_file():
        return (base / "model.safetensors").is_file()
    files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((base / name).is_file() for name in files)
