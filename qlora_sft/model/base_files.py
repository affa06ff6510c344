"""Reads what is known of a base model without its weights: config.json and the headers of its safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from qlora_sft.config import ModelConfig
from qlora_sft.errors import ConfigError, first_line
from qlora_sft.json_types import read_object
from qlora_sft.model.hub_fault import hub_fault
from qlora_sft.model.snapshot import Origin, fetch_snapshot, has_weights, origin_of, weight_files
from qlora_sft.text import as_path

# The files from which transformers can make a tokenizer.
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tokenizer_config.json",
)  # fmt: skip


class Header(NamedTuple):
    """Describes one tensor of a safetensors file."""

    dtype: str
    """The type as safetensors names it: BF16, F16, F32, U8."""
    shape: tuple[int, ...]
    nbytes: int


def resolve_base(path: str, revision: str | None = None) -> str:
    """Returns the folder of the base: the embedded model for ``demo``, the snapshot at ``revision`` for a Hub id.

    The folder is absolute: a run remembers it, and is opened from other places. A snapshot is fetched here without its
    weights. Raises `ConfigError` if the base cannot be had.
    """
    check_path(path, revision)
    if path == "demo":
        from qlora_sft.demo import base_model_path

        return str(base_model_path())
    if not is_hub_id(path):
        return str(as_path(path).absolute())
    folder = fetch_snapshot(path, revision)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.path: {path} at {folder.name} has no config.json; name a repository that holds a model"
        )
    return str(folder)


def is_hub_id(path: str) -> bool:
    """Says whether ``model.path`` names a repository of the Hub, and no folder here."""
    return path != "demo" and not as_path(path).is_dir()


def hub_origin(path: str, base: str) -> Origin | None:
    """Returns name and commit of ``base``, the folder of ``model.path``, if that names a repository of the Hub."""
    return origin_of(base) if is_hub_id(path) else None


def check_path(path: str, revision: str | None = None) -> None:
    """Raises `ConfigError` for a path that can be neither a model's folder nor a Hub id; nothing is fetched for it."""
    if is_hub_id(path):
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            known = "a Hub id looks like 'name/model'; 'demo' is built in"
            raise ConfigError(f"model.path: {path}: no such folder ({known})")
        return
    if path != "demo" and not (as_path(path) / "config.json").is_file():
        raise ConfigError(
            f"model.path: {as_path(path)} has no config.json; name the folder that holds the model itself"
        )
    if revision:
        raise ConfigError(f"model.revision: only a model of the Hub has revisions, and {path} is a folder; remove it")


def read_config(base: str) -> dict[str, Any]:
    """Returns config.json of the folder ``base``. Raises `ConfigError` for one that is damaged."""
    file = Path(base) / "config.json"
    try:
        config: dict[str, Any] = read_object(file)
        _check_kinds(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {base}: no readable config.json ({error})") from None
    return config


def _check_kinds(config: dict[str, Any]) -> None:
    """Raises ValueError for a config.json with values of other kinds than its readers take for granted."""
    kinds = {"model_type": str, "text_config": dict, "quantization_config": dict}
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        for key, kind in kinds.items():
            value = section.get(key)
            if not isinstance(value, kind | None):
                wanted = "a text" if kind is str else "an object"
                raise ValueError(f"its {key} is {str(value)[:40]!r}, not {wanted}")


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a config.json that describes the language model.

    Models that also see have it in a section of its own.
    """
    inner: dict[str, Any] = config.get("text_config") or config
    return inner


def has_experts(config: dict[str, Any]) -> bool:
    """Says whether a config.json describes a mixture of experts.

    Every family has a name of its own for the number of experts, so any key with "expert" and a number above 1 counts.
    """
    counts = (value for key, value in text_config(config).items() if "expert" in key)
    return any(type(count) is int and count > 1 for count in counts)


def read_headers(base: str) -> dict[str, Header]:
    """Reads type, shape and bytes of every tensor, by name.

    If ``base`` is a snapshot of the Hub without its weights, the headers alone are fetched from there.

    Raises `ConfigError` for a model without safetensors files.
    """
    folder, origin = Path(base), origin_of(base)
    if origin and not has_weights(folder):
        return _headers_of_hub(*origin)
    headers = {name: header for file in weight_files(folder) for name, header in _headers_of_file(file).items()}
    if not headers:
        raise ConfigError(f"model.path: {base} has no safetensors files; their headers say how large the model is")
    return headers


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
    if not isinstance(header, dict):
        raise ValueError("the header is not an object")
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


def _headers_of_hub(name: str, commit: str) -> dict[str, Header]:
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        metadata = get_safetensors_metadata(name, revision=commit)
    except NotASafetensorsRepoError:
        raise ConfigError(f"model.path: {name} has no safetensors files; see how large it is on the Hub") from None
    except Exception as error:
        raise ConfigError(
            f"model.path: the weights of {name} at commit {commit} are not all here, and not to be had from the Hub: "
            f"{hub_fault(name, commit, error)}"
        ) from None
    return {
        name: Header(info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0])
        for file in metadata.files_metadata.values()
        for name, info in file.tensors.items()
    }


# ------------------------------------------------------------------ what the files alone tell of faults


def check_quantization(model: ModelConfig, base: str, settings: dict[str, Any]) -> None:
    """Raises `ConfigError` for a quantised base whose weights an adapter cannot be trained on here."""
    quantized = settings.get("quantization_config") or text_config(settings).get("quantization_config")
    if not quantized:
        return
    method = str(quantized.get("quant_method") or "bitsandbytes")
    in_4bit = bool(quantized.get("load_in_4bit") or quantized.get("_load_in_4bit"))
    kind = quantized.get("bnb_4bit_quant_type", "fp4") if in_4bit else "8 bits"
    if method != "bitsandbytes" or kind != "nf4":
        what = f"{method} in {kind}" if method == "bitsandbytes" else method
        raise ConfigError(
            f"model.path: the weights in {base} are quantised with {what}, which cannot be trained here; name the "
            "model that was not quantised (it is loaded in NF4), or one in bitsandbytes' NF4"
        )
    if has_experts(settings):
        raise ConfigError(
            f"model.path: the experts in {base} are stored in 4 bits one by one, which cannot be trained here; name "
            "the model that was not quantised (it is loaded in NF4)"
        )
    if not model.load_in_4bit:
        raise ConfigError(
            f"model.load_in_4bit: false, but the weights in {base} exist in 4 bits only; name the model that was not "
            "quantised, or set it to true"
        )


def check_tokenizer_files(base: Path) -> None:
    """Raises `ConfigError` if the folder ``base`` has no tokenizer, or one that cannot be read."""
    if not any((base / name).is_file() for name in TOKENIZERS):
        raise ConfigError(f"model.path: no tokenizer in {base}: it has none of {', '.join(TOKENIZERS)}")
    for file in (base / "tokenizer.json", base / "tokenizer_config.json"):
        try:
            if file.is_file():
                read_object(file)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model.path: no tokenizer in {base}: {file.name} is damaged: {first_line(error)}"
            ) from None
