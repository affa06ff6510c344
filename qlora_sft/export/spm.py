"""Rebuilds ``tokenizer.model`` from ``tokenizer.json`` for vocabularies that come from SentencePiece.

llama.cpp's converter reads the vocabularies of Gemma, Phi-3, Llama 2 and early Mistral from ``tokenizer.model`` only.
transformers no longer writes that file, and the base's own lacks the tokens that were added in training. Its content is
in ``tokenizer.json``: the pieces, and the order of the merges, which SentencePiece keeps as scores.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NotRequired, TypedDict

# The values of SentencePiece's enumeration ModelProto.SentencePiece.Type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
# This score is below that of every merge.
NEVER_MERGED = -1e9


class AddedToken(TypedDict):
    """Holds a token that ``tokenizer.json`` lists beside the vocabulary."""

    id: int
    content: str
    lstrip: bool
    normalized: bool
    rstrip: bool
    single_word: bool
    special: bool


class BpeModel(TypedDict):
    """Holds the section ``model`` of ``tokenizer.json``."""

    type: str
    byte_fallback: NotRequired[bool]
    unk_token: NotRequired[str | None]
    vocab: dict[str, int]
    merges: list[str | list[str]]


class TokenizerJson(TypedDict):
    """Holds what ``tokenizer.json`` says that ``tokenizer.model`` needs."""

    model: BpeModel
    added_tokens: list[AddedToken]
    normalizer: NotRequired[object]


def is_sentencepiece(tokenizer_json: TokenizerJson) -> bool:
    """Says whether this is a BPE vocabulary with byte fallback, which transformers makes of SentencePiece's BPE."""
    model = tokenizer_json["model"]
    return bool(model["type"] == "BPE" and model.get("byte_fallback"))


def write_spm(folder: Path, tokenizer_json: TokenizerJson) -> None:
    """Writes ``folder``/tokenizer.model, and the added tokens into ``folder``/tokenizer_config.json."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2

    model = proto.ModelProto()
    added = {token["id"]: token for token in tokenizer_json["added_tokens"]}
    scores = _scores(tokenizer_json["model"]["merges"])
    unknown = tokenizer_json["model"].get("unk_token")
    vocabulary = tokenizer_json["model"]["vocab"]
    # Gemma 2's tokenizer.json has, for example, a tab where its tokenizer.model has the token of that byte.
    bytes_in_disguise = {chr(i): f"<0x{i:02X}>" for i in range(128) if f"<0x{i:02X}>" not in vocabulary}
    for text, number in sorted(vocabulary.items(), key=lambda item: item[1]):
        text = bytes_in_disguise.get(text, text)
        kind = _kind(text, added.get(number), unknown)
        model.pieces.add(piece=text, score=scores.get(text, NEVER_MERGED), type=kind)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(model.pieces)
    for name, kinds in (("unk", UNKNOWN), ("bos", None), ("eos", None), ("pad", None)):
        at = next((i for i, piece in enumerate(model.pieces) if piece.type == kinds), -1)
        setattr(model.trainer_spec, f"{name}_id", at)
    model.normalizer_spec.add_dummy_prefix = "Prepend" in json.dumps(tokenizer_json.get("normalizer"))
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text(encoding="utf-8"))
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    entries: dict[int, dict[str, object]] = {number: {**token} for number, token in added.items()}
    content["added_tokens_decoder"] = {number: {key: token[key] for key in keys} for number, token in entries.items()}
    settings.unlink()
    settings.write_text(json.dumps(content), encoding="utf-8")


def _kind(text: str, added: AddedToken | None, unknown: str | None) -> int:
    """Returns SentencePiece's type of a piece."""
    if text == unknown:
        return UNKNOWN
    if added is not None:
        return CONTROL if added["special"] else USER_DEFINED
    return BYTE if _is_byte(text) else NORMAL


def _is_byte(text: str) -> bool:
    return re.fullmatch("<0x[0-9A-F]{2}>", text) is not None


def _scores(merges: list[str | list[str]]) -> dict[str, float]:
    """Returns, by text, minus the rank of the first merge that makes it, as SentencePiece merges the highest first."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        text = "".join(merge) if isinstance(merge, list) else merge.replace(" ", "")
        scores.setdefault(text, -float(rank))
    return scores
