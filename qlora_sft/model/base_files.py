"""Reads what is known of a base model without its weights: config.json and the headers of its safetensors files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from qlora_sft.config import ModelConfig
from qlora_sft.errors import ConfigError, first_line
from qlora_sft.json_types import JsonObject, read_object
from qlora_sft.model.hub_fault import hub_fault
from qlora_sft.model.snapshot import Origin, has_weights, origin_of, weight_files
from qlora_sft.text import as_path

# The files from which transformers can make a tokenizer.
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tokenizer_config.json",
)  # fmt: skip

# The quantisations of a config.json that a 16-bit copy can be made of, and what people call them.
METHODS = {"mxfp4": "MXFP4", "fp8": "FP8"}
_MADE_FROM = re.compile(r"^base_model:\s*(?:-\s*)?[\"']?([\w.-]+/[\w.-]+)", re.MULTILINE)


class Header(NamedTuple):
    """Describes one tensor of a safetensors file."""

    dtype: str
    """The type as safetensors names it: BF16, F16, F32, U8."""
    shape: tuple[int, ...]
    nbytes: int


def is_hub_id(path: str) -> bool:
    """Says whether ``model.path`` names a repository of the Hub, and no folder here."""
    return path != "demo" and not as_path(path).is_dir()


def hub_origin(path: str, base: str) -> Origin | None:
    """Returns name and commit of ``base``, the folder of ``model.path``, if that names a repository of the Hub."""
    return origin_of(base) if is_hub_id(path) else None


def check_path(path: str, revision: str | None = None) -> None:
    """Raises `ConfigError` for a path that can be neither a model's folder nor a Hub id. Nothing is downloaded for
    this."""
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
    """Raises ValueError for a config.json with values of other types than its readers expect."""
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


def quantization_of(config: JsonObject) -> JsonObject:
    """Returns how the weights of a model with this config.json are quantised; empty if they are not."""
    found = config.get("quantization_config") or text_config(config).get("quantization_config")
    return found if isinstance(found, dict) else {}


def packed_method(config: JsonObject) -> str | None:
    """Returns the method of `METHODS` by which a model was quantised that can be dequantised here; None for any other.

    MXFP4 is known as gpt-oss has it: other models may store their experts the other way round.
    """
    method = str(quantization_of(config).get("quant_method"))
    if method not in METHODS or (method == "mxfp4" and text_config(config).get("model_type") != "gpt_oss"):
        return None
    return method


def has_experts(config: dict[str, Any]) -> bool:
    """Says whether a config.json describes a mixture of experts.

    Every family has a name of its own for the number of experts, so any key with "expert" and a number above 1 counts.
    """
    counts = (value for key, value in text_config(config).items() if "expert" in key)
    return any(type(count) is int and count > 1 for count in counts)


def has_towers(config: dict[str, Any]) -> bool:
    """Says whether a config.json describes a multimodal model.

    Its language model then has a section of its own, or (Qwen2-VL as published) the tower has one beside it.
    """
    return any(config.get(key) for key in ("text_config", "vision_config", "audio_config", "thinker_config"))


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
    quantized = quantization_of(settings)
    if not quantized or packed_method(settings):
        return
    method = str(quantized.get("quant_method") or "bitsandbytes")
    in_4bit = bool(quantized.get("load_in_4bit") or quantized.get("_load_in_4bit"))
    kind = quantized.get("bnb_4bit_quant_type", "fp4") if in_4bit else "8 bits"
    if method != "bitsandbytes" or kind != "nf4":
        what = f"{method} in {kind}" if method == "bitsandbytes" else method
        raise ConfigError(
            f"model.path: the weights in {base} are quantised with {what}, which cannot be trained here; name "
            f"{_original(base)}, or the same model in bitsandbytes' NF4, in FP8, or (gpt-oss) in MXFP4"
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


def _original(base: str) -> str:
    """Names the model that the quantised one in ``base`` was made from, as its README says, or where to look for it."""
    readme = Path(base) / "README.md"
    found = _MADE_FROM.search(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else None
    if found:
        return f"{found[1]}, from which it was made (it is loaded in NF4)"
    return "the model that was not quantised (it is loaded in NF4; a quantised one's page on the Hub names it)"


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
