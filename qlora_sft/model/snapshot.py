"""Find a model of the Hub as the folder that the Hub's own cache keeps of one commit.

A name of the Hub says which repository is meant, not which files: its main branch moves. So a name becomes a folder
once, before anything is read, and everything after that (configuration, tokenizer, weights, code) is read from this
folder by whichever library. What describes a model is fetched at once, its weights only when they are loaded.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from qlora_sft.errors import ConfigError
from qlora_sft.json_types import read_object
from qlora_sft.model.hub_fault import hub_fault

DESCRIPTION = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "README.md"]
INDEX = "model.safetensors.index.json"
# Larger ones are described by the fingerprint of the weights, or by the Hub's own hash.
HASHED_BELOW = 2**26


class Origin(NamedTuple):
    """Names where on the Hub a folder comes from."""

    name: str
    commit: str


def fetch_snapshot(name: str, revision: str | None) -> Path:
    """Returns the folder of ``name`` at ``revision`` (a commit, tag or branch; None: main), without its weights.

    Raises `ConfigError` naming the commits that are here, if this one is not to be had.
    """
    return _fetch(name, revision, DESCRIPTION)


def fetch_weights(base: str) -> None:
    """Fetches the weights of a snapshot; nothing for any other folder. Raises `ConfigError` if they cannot be had."""
    origin, folder = origin_of(base), Path(base)
    if origin is None:
        return
    named = [file.name for file in weight_files(folder)] or ["model.safetensors"]
    for patterns in (named, ["*.safetensors"], ["*.bin"]):
        if not (has_weights(folder) or any(folder.glob("*.bin"))):
            _fetch(*origin, patterns)
    if not (has_weights(folder) or any(folder.glob("*.bin"))):
        raise ConfigError(
            f"model.path: the weights of {origin.name} at commit {origin.commit} are not all here, and were not to be "
            "had from the Hub; fetch them where there is a network (hf download), or name another model"
        )


def origin_of(base: str | Path) -> Origin | None:
    """Returns name and commit of a folder in the Hub's cache; None for any other folder."""
    folder = Path(base)
    kept = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not kept.startswith("models--"):
        return None
    return Origin(kept.removeprefix("models--").replace("--", "/"), folder.name)


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of the model in ``folder``.

    They are those that its index names, else model.safetensors, else all there are. A folder may hold a second copy of
    the weights in other files.

    Raises `ConfigError` for a damaged index.
    """
    index = folder / INDEX
    if index.is_file():
        return [folder / name for name in _named_in(index)]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def _named_in(index: Path) -> list[str]:
    try:
        places = read_object(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ValueError("its weight_map does not say which file each tensor is in")
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {index}: damaged ({error}); copy or download it again") from None
    return sorted(set(places.values()))


def has_weights(folder: Path) -> bool:
    """Says whether all safetensors files of the model in ``folder`` are there."""
    files = weight_files(folder)
    return bool(files) and all(file.is_file() for file in files)


def file_hashes(base: str) -> dict[str, str]:
    """Returns the sha256 of the files that make the model in the folder ``base``, by name.

    A large file has one only where the Hub's cache names it; the fingerprint of the weights covers the others.
    """
    folder = Path(base)
    described = [file for pattern in DESCRIPTION[:-1] for file in folder.glob(pattern)]
    hashes = {file.name: _sha256(file) for file in sorted({*described, *weight_files(folder)}) if file.is_file()}
    return {name: digest for name, digest in hashes.items() if digest}


def _sha256(file: Path) -> str | None:
    blob = file.resolve().name  # the cache keeps large files under their sha256, others under git's own hash
    if file.is_symlink() and len(blob) == 64:
        return blob
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.stat().st_size < HASHED_BELOW else None


def _fetch(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        fault = _unreachable(name, revision, error)
    try:  # of a commit it asks the Hub for the list of files, and does not look into the cache when that fails
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
    except Exception:
        raise fault from None


def _unreachable(name: str, revision: str | None, error: Exception) -> ConfigError:
    here = sorted(path.name for path in _cache_of(name).glob("snapshots/*"))
    at = f" at revision {revision}" if revision else ""
    known = f" (the Hub's cache holds {name} at {', '.join(here)})" if here else ""
    reason = hub_fault(name, revision, error)
    return ConfigError(f"model.path: {name}{at} is neither a folder here nor to be had from the Hub: {reason}{known}")


def _cache_of(name: str) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
