"""Reads what is known of a base model without its weights: config.json and the headers of its safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from qlora_sft.errors import ConfigError, first_line
from qlora_sft.text import as_path


class Header(NamedTuple):
    """Describes one tensor of a safetensors file."""

    dtype: str
    """The type as safetensors names it: BF16, F16, F32, U8."""
    shape: tuple[int, ...]
    nbytes: int


def resolve_base(path: str) -> str:
    """``demo`` -> the embedded model's folder; a folder or Hub id as it is. Raises `ConfigError` if it cannot be."""
    if path == "demo":
        from qlora_sft.demo import base_model_path

        return str(base_model_path())
    folder = as_path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.path: {folder} has no config.json; name the folder that holds the model itself")
        return str(folder)
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ConfigError(f"model.path: {path}: no such folder (a Hub id looks like 'name/model'; 'demo' is built in)")
    return path


def read_config(base: str) -> dict[str, Any]:
    """config.json of a folder or of a Hub id (only this file is fetched). Raises `ConfigError`."""
    file = Path(base) / "config.json"
    if not Path(base).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(base, "config.json"))
        except Exception as error:
            raise _unreachable(base, error) from None
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {base}: no readable config.json ({error})") from None
    return config


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a config.json that describes the language model.

    Models that also see have it in a section of its own.
    """
    inner: dict[str, Any] = config.get("text_config") or config
    return inner


def has_experts(config: dict[str, Any]) -> bool:
    """Whether a config.json describes a mixture of experts: every family has a name of its own for their number."""
    counts = (value for key, value in text_config(config).items() if "expert" in key)
    return any(type(count) is int and count > 1 for count in counts)


def read_headers(base: str) -> dict[str, Header]:
    """Name -> type, shape and bytes of every tensor; of a Hub id only the first kilobytes of its files are fetched.

    Raises `ConfigError` for a model without safetensors files.
    """
    folder = Path(base) if Path(base).is_dir() else _cached(base)
    if folder is None:
        return _headers_of_hub(base)
    headers = {name: header for file in _files(folder) for name, header in _headers_of_file(file).items()}
    if not headers:
        raise ConfigError(f"model.path: {base} has no safetensors files; their headers say how large the model is")
    return headers


def _files(folder: Path) -> list[Path]:
    """The files that the index names, or all there are: a folder may hold a second copy in other files."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def safetensors_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Returns (dtype, shape and data_offsets of every tensor by name, position in the file where the data begin).

    The file begins with 8 bytes, the length of the JSON that follows. Raises OSError or ValueError if it is no
    safetensors file.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size - 8:
            raise ValueError("the header is longer than the file")
        header: dict[str, dict[str, Any]] = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _headers_of_file(file: Path) -> dict[str, Header]:
    try:
        header, _ = safetensors_header(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {file}: not a safetensors file ({error})") from None
    return {
        name: Header(entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _cached(base: str) -> Path | None:
    """Folder of a Hub model whose weights were fetched before."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(base, local_files_only=True))
    except Exception:
        return None
    files = _files(folder)
    return folder if files and all(file.is_file() for file in files) else None


def _headers_of_hub(base: str) -> dict[str, Header]:
    from huggingface_hub import get_safetensors_metadata

    try:
        metadata = get_safetensors_metadata(base)
    except Exception as error:
        raise _unreachable(base, error) from None
    return {
        name: Header(info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0])
        for file in metadata.files_metadata.values()
        for name, info in file.tensors.items()
    }


def _unreachable(base: str, error: Exception) -> ConfigError:
    return ConfigError(f"model.path: {base} is neither a folder here nor to be had from the Hub: {first_line(error)}")
