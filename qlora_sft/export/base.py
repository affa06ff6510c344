"""The base model of a run: where it is now, and whether it is still the one that was trained on."""

from __future__ import annotations

import json
from pathlib import Path

from qlora_sft.errors import RunError, first_line
from qlora_sft.model.fingerprint import fingerprint
from qlora_sft.run.folder import Run


def base_folder(base: str) -> Path:
    """Local folder of the base; a Hub id is looked up in, or fetched into, the Hub's own cache."""
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
    # A folder with a shard missing has no fingerprint to trust; that error is clearer where the tensors are read.
    if trained and _is_whole(base) and fingerprint(base) != trained:
        raise RunError(
            f"{base}: these are not the weights that the adapter was trained on (the fingerprint in manifest.json is "
            "another); put the base model of the run there, or train again on this one"
        )


def _is_whole(base: Path) -> bool:
    index = base / "model.safetensors.index.json"
    if not index.is_file():
        return (base / "model.safetensors").is_file()
    files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((base / name).is_file() for name in files)
