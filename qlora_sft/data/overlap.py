"""Find held-out documents that are also trained on: they measure memory, not ability."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from qlora_sft.data.documents import Documents
from qlora_sft.data.render import Rendered


def shared_documents(train: Mapping[str, Sequence[Rendered]], held_out: Mapping[str, Sequence[Rendered]]) -> str:
    """Returns a text that says how many documents of which held-out source are training documents, token by token.

    It is empty if there is none.
    """
    wanted = {name: Counter(_digest(document) for document in documents) for name, documents in held_out.items()}
    of_any = {digest for digests in wanted.values() for digest in digests}
    lengths = {len(document.input_ids) for documents in held_out.values() for document in documents}
    found: dict[bytes, str] = {}
    for name, documents in train.items():
        if not of_any:
            break
        for number in _of_lengths(documents, lengths):
            digest = _digest(documents[number])
            if digest in of_any:
                found.setdefault(digest, name)
    lines = []
    for name, digests in wanted.items():
        same = sum(digests[digest] for digest in digests.keys() & found.keys())
        if same:
            where = ", ".join(sorted({found[digest] for digest in digests.keys() & found.keys()}))
            lines.append(
                f"held-out data: {same:,} of {digests.total():,} documents of {name} are trained on as well (in "
                f"{where}); its loss says nothing about new data. Remove them, e.g. with data.decontaminate"
            )
    return "\n".join(lines)


def seen_before(train: Mapping[str, Documents]) -> dict[str, dict[str, int]]:
    """Returns for each source how many of its documents also occur, token by token, in the sources before it.

    A document that several of them have counts for the first.
    """
    digests = {
        name: np.array([int.from_bytes(_digest(document)[:8]) for document in documents], dtype=np.uint64)
        for name, documents in train.items()
    }
    found: dict[str, dict[str, int]] = {}
    for number, (name, own) in enumerate(digests.items()):
        left = own
        for earlier in list(digests)[:number]:
            same = np.isin(left, digests[earlier])
            if same.any():
                found.setdefault(name, {})[earlier] = int(same.sum())
                left = left[~same]
    return found


def _of_lengths(documents: Sequence[Rendered], lengths: set[int]) -> list[int]:
    """Returns the numbers of the documents that have one of these lengths; the others need not be read."""
    bounds = getattr(documents, "bounds", None)
    if bounds is None:
        return [number for number, document in enumerate(documents) if len(document.input_ids) in lengths]
    found: list[int] = np.flatnonzero(np.isin(np.diff(bounds), list(lengths))).tolist()
    return found


def _digest(document: Rendered) -> bytes:
    return hashlib.sha256(np.array(document.input_ids, dtype=np.int32).tobytes()).digest()[:16]
