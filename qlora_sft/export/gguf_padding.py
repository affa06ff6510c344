"""Takes out of a GGUF the tokens that the converter adds to fill the vocabulary up to a round number.

For Mamba hybrids (Granite 4, Nemotron-H) the converter lists tokens up to a multiple of 8, for which the model has no
rows. llama.cpp does not load such a file. Rows for them cannot be made up either: a token whose row is zero wins where
all others have logits below zero.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_sft.gguf_file import GgufFile, read_gguf

if TYPE_CHECKING:
    from gguf import ReaderField

EMBEDDING = "token_embd.weight"
TOKENS = "tokenizer.ggml.tokens"
# The lists with one entry for each token.
LISTS = (TOKENS, "tokenizer.ggml.token_type", "tokenizer.ggml.scores")
# The metadata begin behind the magic number, the version, and the number of tensors; the number of fields stands there.
COUNT_AT, FIELDS_AT = 16, 24
# In front of the items of a list: length and text of its name; its type, that of its items, and their number.
LIST_HEAD = 5
# A field with a name of n characters and one byte as its value takes n + FRAME bytes: length, name, type and value.
FRAME, ONE_BYTE = 13, 0
FILLER = "pad"


def rows_of(file: GgufFile) -> int | None:
    """Returns how many rows the embedding of a file has; None if it has none under llama.cpp's name."""
    return next((tensor.shape[-1] for tensor in file.tensors if tensor.name == EMBEDDING), None)


def drop_padding(gguf: Path) -> int:
    """Cuts the lists of tokens in a file to the rows of its embedding, and returns how many tokens went.

    Only tokens that stand for nothing are taken out. The tensors stay where they are: a field without a meaning fills
    the gap.
    """
    from gguf import GGUFReader

    there = read_gguf(gguf)
    rows, names = rows_of(there), there.fields.get(TOKENS) or []
    if rows is None or len(names) <= rows or not all(name.startswith("[PAD") for name in names[rows:]):
        return 0
    # gguf's own reader takes seconds, and knows where every part of a field begins.
    fields = [field for name, field in GGUFReader(str(gguf)).fields.items() if not name.startswith("GGUF.")]
    end = max(field.offset + _size(field) for field in fields)
    with gguf.open("r+b") as file:
        before = file.read(end)
        kept = b"".join(_kept(field, before, rows) for field in sorted(fields, key=lambda each: each.offset))
        gap = end - FIELDS_AT - len(kept)
        name = FILLER.ljust(gap - FRAME, "_").encode()
        filler = struct.pack("<Q", len(name)) + name + struct.pack("<IB", ONE_BYTE, 0)
        file.seek(COUNT_AT)
        file.write(struct.pack("<Q", len(fields) + 1))
        file.seek(FIELDS_AT)
        file.write(kept + filler)
    return len(names) - rows


def _size(field: ReaderField) -> int:
    return sum(int(part.nbytes) for part in field.parts)


def _kept(field: ReaderField, file: bytes, rows: int) -> bytes:
    """Returns the bytes of a field; of a list of tokens, only those of its first ``rows`` items."""
    whole = file[field.offset : field.offset + _size(field)]
    if field.name.endswith(".vocab_size"):
        return whole[:-4] + struct.pack("<I", rows)
    if field.name not in LISTS:
        return whole
    behind = field.data[rows]
    # The text of a token has its length in front.
    first = behind - 1 if field.name == TOKENS else behind
    head = sum(int(part.nbytes) for part in field.parts[: LIST_HEAD - 1])
    items = sum(int(part.nbytes) for part in field.parts[LIST_HEAD:first])
    begin = head + int(field.parts[LIST_HEAD - 1].nbytes)
    return whole[:head] + struct.pack("<Q", rows) + whole[begin : begin + items]
