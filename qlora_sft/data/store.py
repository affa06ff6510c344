"""Keep rendered and packed data in the user's cache, under a hash of everything that it depends on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from qlora_sft.atomic import written_folder
from qlora_sft.cache import cache_dir
from qlora_sft.config import Config
from qlora_sft.data.documents import Documents
from qlora_sft.data.files import readable
from qlora_sft.data.ledger import Drop, Note, SourceLedger
from qlora_sft.data.prepare import Prepared
from qlora_sft.data.sequences import CAN_SHARE, Packed, Sharing
from qlora_sft.data.sources import Source
from qlora_sft.data.template import ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IntArray = NDArray[np.int64]
# What renders and encodes beside this code.
_RENDERERS = ("transformers", "tokenizers", "jinja2")


class SplitFacts(TypedDict):
    """Holds what is kept of a split beside its documents."""

    sources: list[str]
    ledger: dict[str, dict[str, Any]]


def fingerprint(
    config: Config,
    sources: list[Source],
    tokenizer: PreTrainedTokenizerBase,
    chat_format: ChatFormat,
    sharing: Sharing = CAN_SHARE,
) -> str | None:
    """Returns a hash of the files' contents, the data settings, the tokenizer, the template, this code and the versions
    of what it renders with, and of whether prefixes are shared.

    None if a source is not made of local files.
    """
    digest = hashlib.sha256()
    settings = (
        asdict(config.data),
        config.training.epochs,
        config.seed,
        chat_format.template,
        chat_format.original,
        sorted(chat_format.stop_token_ids),
        sharing,
        [version(each) for each in _RENDERERS],
    )
    digest.update(json.dumps(settings, sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    # Which of its tokens begins and ends a text is not in there.
    names = [tokenizer.special_tokens_map, getattr(tokenizer, "add_bos_token", False)]
    digest.update(json.dumps(names, sort_keys=True, default=str).encode())
    for code in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(code.read_bytes())
    for source in sources:
        if not source.files:
            return None
        # Which rows are left depends on more than these files: on those of evaluations, for one.
        digest.update(f"{source.name} {source.path} {len(source.rows)}".encode() + source.rows.chosen.tobytes())
        for file in source.files:
            with readable(file), open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:32]


def load(key: str) -> tuple[Prepared, Prepared, Packed, list[str]] | None:
    """Returns the training split, the held-out split, the packed sequences, and what was
    said; None if they are not kept."""
    folder = cache_dir("prepared") / key
    if not folder.is_dir():
        return None
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    splits = [_split(folder / name, facts[name]) for name in ("train", "held_out")]
    sequences = np.load(folder / "sequences.npz")
    packed = Packed(
        _unflat(sequences["values"], sequences["bounds"]), sequences["tokens"].tolist(), facts["shares_prefixes"]
    )
    return splits[0], splits[1], packed, facts["said"]


def save(key: str, train: Prepared, held_out: Prepared, packed: Packed, said: list[str]) -> Path:
    """Keeps them for `load` and returns the folder."""
    folder = cache_dir("prepared") / key
    with written_folder(folder) as beside:
        facts: dict[str, Any] = {"said": said, "shares_prefixes": packed.shares_prefixes}
        for name, split in (("train", train), ("held_out", held_out)):
            for number, rows in enumerate(split.documents.values()):
                for part, values in (("ids", rows.ids), ("weights", rows.weights), ("bounds", rows.bounds)):
                    np.save(beside / f"{name}-{number}-{part}.npy", values)
            facts[name] = {
                "sources": list(split.documents),
                "ledger": {source: asdict(ledger) for source, ledger in split.ledger.items()},
            }
        values, bounds = _flat(packed.sequences)
        tokens = np.array(packed.tokens, dtype=np.int64)
        np.savez(beside / "sequences.npz", values=values, bounds=bounds, tokens=tokens)
        (beside / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def _split(prefix: Path, facts: SplitFacts) -> Prepared:
    """Returns a split whose arrays are mapped and not read: a document is in memory only while it is used."""
    documents = {}
    for number, source in enumerate(facts["sources"]):
        ids, weights, bounds = (
            np.load(f"{prefix}-{number}-{part}.npy", mmap_mode="r") for part in ("ids", "weights", "bounds")
        )
        documents[source] = Documents(source, ids, weights, bounds)
    ledger = {}
    for source, row in facts["ledger"].items():
        dropped = {reason: Drop(**drop) for reason, drop in row["dropped"].items()}
        notes = {what: Note(**note) for what, note in row["notes"].items()}
        drops = {"lost_in": Drop(**row["lost_in"]), "unended": Drop(**row["unended"])}
        ledger[source] = SourceLedger(**{**row, "dropped": dropped, "notes": notes, **drops})
    return Prepared(documents, ledger)


def _flat(rows: list[list[int]]) -> tuple[IntArray, IntArray]:
    """Returns all values one after the other, and the bounds of the lists."""
    bounds = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return np.array([value for row in rows for value in row], dtype=np.int64), bounds


def _unflat(values: IntArray, bounds: IntArray) -> list[list[int]]:
    flat, edges = values.tolist(), bounds.tolist()
    return [flat[a:b] for a, b in pairwise(edges)]
