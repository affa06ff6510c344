"""Reads a GGUF file back and compares it with its model folder: weights, tokens, template, stop token, rope."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_sft.errors import RunError
from qlora_sft.export.gguf_arrangements import arrangements
from qlora_sft.export.gguf_metadata import bos_first, without_thinking
from qlora_sft.export.gguf_padding import rows_of
from qlora_sft.export.go_template import writes_bos
from qlora_sft.export.imatrix import gguf_names
from qlora_sft.gguf_file import GgufFile, GgufTensor, read_gguf
from qlora_sft.json_types import JsonObject
from qlora_sft.model.base_files import text_config
from qlora_sft.model.base_tokenizer import saved_tokenizer
from qlora_sft.model.tensors import Stored, read_model

# By type of a tensor, the largest relative error (root mean square over the tensor) that is accepted. The errors were
# measured on trained weights and have a margin of about two; a permuted or misplaced tensor has an error of 1.4.
LIMITS = {
    "F64": 0.0, "F32": 1e-6, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 0.02, "Q6_K": 0.05, "Q5": 0.1, "IQ4": 0.2, "Q4": 0.2,
    "Q3": 0.35, "IQ3": 0.4, "Q2": 0.6, "IQ2": 0.6, "IQ1": 0.9, "TQ": 1.0, "MXFP4": 0.25,
}  # fmt: skip


@dataclass(frozen=True)
class CheckedGguf:
    """Says what of a GGUF file was compared with its model."""

    tensors: int
    """How many tensors were compared."""
    unmatched: list[str]
    """The names of the tensors of the model that the file has under no known name."""
    adds_bos: bool
    """Whether llama.cpp and Ollama put bos before a prompt for this file."""
    lost_window: int | None
    """The sliding window of the model's attention, if the file has none: llama.cpp then looks at everything."""


def check_gguf(gguf: Path, model: Path) -> CheckedGguf:
    """Compares a GGUF file with the model folder that it was made from.

    Raises `RunError` that lists the differences.
    """
    try:
        file = read_gguf(gguf)
    except (ValueError, OSError) as error:
        raise RunError(f"{gguf}: cannot be read back ({error})") from None
    fields = file.fields
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    compared, unmatched, faults = _compare_tensors(file, fields["general.architecture"], config, model)
    faults += list(_compare_tokenizer(fields, model)) + list(compare_rope(fields, config))
    rows, tokens = rows_of(file), len(fields.get("tokenizer.ggml.tokens") or [])
    if rows is not None and rows != tokens:
        faults.append(
            f"vocabulary: {tokens:,} tokens for {rows:,} rows of the embedding, which llama.cpp does not load"
        )
    if faults:
        raise RunError(f"{gguf}: the file is not the model in {model}:\n" + "\n".join(faults[:8]))
    return CheckedGguf(compared, unmatched, bos_first(fields), lost_window(fields, config))


def lost_window(fields: Mapping[str, object], config: JsonObject) -> int | None:
    """Returns the sliding window by which the model's layers attend and which the file does not have, if that is so."""
    inner = text_config(config)
    window, kinds = inner.get("sliding_window"), inner.get("layer_types")
    slides = "sliding_attention" in kinds if isinstance(kinds, list) else inner.get("use_sliding_window", True)
    there = any(name.endswith(".attention.sliding_window") for name in fields)
    return window if isinstance(window, int) and slides and not there else None


def _compare_tensors(
    file: GgufFile, architecture: str, config: JsonObject, model: Path
) -> tuple[int, list[str], list[str]]:
    """Returns the number of tensors compared, the names without a counterpart, and the faults."""
    names = gguf_names(architecture, model)
    there = {tensor.name: tensor for tensor in file.tensors}
    compared, unmatched, faults = 0, [], []
    for name, stored in read_model(model).items():
        tensor = there.get(names(name) or "")
        if tensor is None or int(np.prod(tensor.shape)) != int(np.prod(stored.shape)):
            unmatched.append(name)
            continue
        error, limit = _error(tensor, name, stored, text_config(config)), _limit(tensor.tensor_type.name)
        compared += 1
        if not error <= limit:
            faults.append(
                f"{tensor.name}: differs from {name} by {error:.2g} (at most {limit:.2g} as {tensor.tensor_type.name})"
            )
    if not compared:
        faults.append(f"no tensor of architecture {architecture!r} could be matched with the model's")
    return compared, unmatched, faults


def _limit(kind: str) -> float:
    """Returns the largest error that is accepted for tensors of this type."""
    known = [name for name in LIMITS if kind.startswith(name)]
    return LIMITS[max(known, key=len)] if known else 1.0


def _error(tensor: GgufTensor, name: str, stored: Stored, config: JsonObject) -> float:
    """Returns the relative error, for the best of the rearrangements that llama.cpp's converter makes."""
    from gguf.quants import dequantize

    written = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(-1)
    original = stored.whole().float().numpy()
    norm = float(np.linalg.norm(original)) or 1.0
    errors = []
    for candidate in arrangements(name, original, config):
        errors.append(float(np.linalg.norm(written - candidate.reshape(-1))) / norm)
        if errors[-1] <= _limit(tensor.tensor_type.name):
            break
    return min(errors)


def _compare_tokenizer(fields: Mapping[str, Any], model: Path) -> Iterator[str]:
    """Yields the faults of tokens, stop token, chat template, bos token and merges."""
    tokenizer = saved_tokenizer(model)
    tokens = fields.get("tokenizer.ggml.tokens") or []
    ours = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    wrong = [i for i, token in enumerate(ours) if i >= len(tokens) or tokens[i] != token]
    # Some converters spell SentencePiece's byte tokens and unused slots differently. Control tokens may never differ.
    special = set(tokenizer.all_special_ids)
    if len(wrong) > len(ours) // 100 or special & set(wrong):
        yield f"tokens: {len(wrong)} of {len(ours)} differ (first: id {wrong[0]}, {ours[wrong[0]]!r})"
    if fields.get("tokenizer.ggml.eos_token_id") != tokenizer.eos_token_id:
        yield f"stop token: {fields.get('tokenizer.ggml.eos_token_id')} instead of {tokenizer.eos_token_id}"
    right = (tokenizer.chat_template, without_thinking(tokenizer))
    if tokenizer.chat_template and fields.get("tokenizer.chat_template") not in right:
        yield "chat template: not the one that was trained"
    if bos_first(fields) and tokenizer.chat_template and not writes_bos(tokenizer):
        yield "bos token: put before every prompt, which the trained template does not do"
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges") if tokenizer.is_fast else None
    written = fields.get("tokenizer.ggml.merges")
    if merges and written and [" ".join(m) if isinstance(m, list) else m for m in merges] != written:
        yield f"merges: {len(written):,} in the file, {len(merges):,} in the tokenizer, or in another order"


def compare_rope(fields: Mapping[str, Any], settings: JsonObject) -> Iterator[str]:
    """Yields the faults of the rope settings and of the context length.

    fields: the metadata of the GGUF file. settings: the model's config.json.
    """
    architecture, config = fields["general.architecture"], text_config(settings)
    rope = config.get("rope_parameters") or {}
    # Where every type of layer has a set of its own, the file has that of layers without a window under this name.
    rope = rope.get("full_attention") or rope
    theta = rope.get("rope_theta", config.get("rope_theta"))
    written = fields.get(f"{architecture}.rope.freq_base")
    if theta is not None and written is not None and abs(written - theta) > 1e-3 * theta:
        yield f"rope: base {written} in the file, {theta} in the model"
    kind = rope.get("rope_type", "default")
    scaled = fields.get(f"{architecture}.rope.scaling.type")
    if kind in ("linear", "yarn") and scaled != kind:
        yield f"rope: scaling {scaled} in the file, {kind} in the model"
    length = config.get("max_position_embeddings")
    kind, positions = config.get("model_type"), config.get("position_embedding_type")
    if kind == "nemotron_h" or (kind == "granitemoehybrid" and positions != "rope"):
        length = None  # without positions there is no limit; the converter writes 2**20
    if length and fields.get(f"{architecture}.context_length") not in (None, length):
        yield f"context: {fields[f'{architecture}.context_length']} in the file, {length} in the model"
