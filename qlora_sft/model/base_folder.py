"""Finds the folder of a base, whatever names it: the built-in one, a folder, a model of the Hub, one in MXFP4 or FP8.

Whoever reads a base asks here for its folder, for the headers of its weights, and for the weights themselves.
"""

from __future__ import annotations

from pathlib import Path

from qlora_sft.errors import ConfigError
from qlora_sft.model.base_files import Header, check_path, is_hub_id, read_headers
from qlora_sft.model.sixteen_bit import copy_of, headers_of_copy, source_of, write_weights
from qlora_sft.model.snapshot import fetch_snapshot, fetch_weights, has_weights, origin_of
from qlora_sft.say import Say, tell
from qlora_sft.text import as_path


def resolve_base(path: str, revision: str | None = None) -> str:
    """Returns the folder of the base: of ``demo`` the embedded one, of a Hub id that of its snapshot at ``revision``.

    Of a base in MXFP4 or FP8 it is that of its 16-bit copy. The folder is absolute: a run remembers it, and is opened
    from other places. Of a Hub id everything but the weights is fetched. Raises `ConfigError` if it cannot be had.
    """
    check_path(path, revision)
    if path == "demo":
        from qlora_sft.demo import base_model_path

        return str(base_model_path())
    if not is_hub_id(path):
        return copy_of(str(as_path(path).absolute()))
    folder = fetch_snapshot(path, revision)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.path: {path} at {folder.name} has no config.json; name a repository that holds a model"
        )
    return copy_of(str(folder))


def own_folder(base: str) -> str:
    """Returns the folder with the base's own files: of a 16-bit copy the one that it is made from."""
    return str(source_of(base) or base)


def base_headers(base: str) -> dict[str, Header]:
    """Returns type, shape and bytes of every tensor of the base by name, whether its weights are here or not.

    Raises `ConfigError` for a model without safetensors files.
    """
    source = source_of(base)
    return headers_of_copy(source) if source and not has_weights(Path(base)) else read_headers(base)


def fetch_base(base: str, say: Say = tell) -> None:
    """Fetches the weights of the base, and writes those of a 16-bit copy.

    Raises `ConfigError` if they cannot be had.
    """
    source = source_of(base)
    if source is None:
        fetch_weights(base)
    elif not has_weights(Path(base)):
        fetch_weights(str(source))
        write_weights(Path(base), say)


def missing_bytes(base: str) -> tuple[int, int]:
    """Returns the bytes that `fetch_base` will (download, write as a 16-bit copy); 0 for what is there."""
    source = source_of(base)
    if has_weights(Path(base)):
        return 0, 0
    own = own_folder(base)
    absent = origin_of(own) is not None and not has_weights(Path(own))
    download = sum(header.nbytes for header in read_headers(own).values()) if absent else 0
    return download, sum(header.nbytes for header in base_headers(base).values()) if source else 0
