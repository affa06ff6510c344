"""Reads GGUF files: what they say of themselves, and their tensors.

``gguf.GGUFReader`` makes five arrays of every token and every merge, which takes many seconds for the vocabulary of any
model of today; here it is a fraction of one.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType

MAGIC, VERSIONS = b"GGUF", (2, 3)
# The numbers that a value's type has in the file; those of numbers as `struct` writes them.
STRING, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """Holds one tensor as it is stored, which `gguf.quants.dequantize` takes."""

    name: str
    tensor_type: GGMLQuantizationType
    shape: tuple[int, ...]
    """The sizes as the file has them, the fastest first; torch counts them the other way round."""
    data: np.ndarray
    """Bytes [..., bytes of a row], mapped from the file."""


@dataclass(frozen=True)
class GgufFile:
    """Holds the metadata of a file, and its tensors in the order of the file."""

    fields: dict[str, Any]
    offsets: dict[str, int]
    """Where in the file the value of each field begins."""
    tensors: list[GgufTensor]


class _Cursor:
    """Walks through the bytes of a file; raises ValueError beyond their end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def integers(self, kind: str, count: int = 1) -> tuple[int, ...]:
        """Returns the next integers; kind: their type, as `struct` writes it."""
        return cast(tuple[int, ...], self.numbers(kind, count))

    def numbers(self, kind: str, count: int = 1) -> tuple[object, ...]:
        """Returns the next numbers or truth values; kind: their type, as `struct` writes it."""
        form = f"<{count}{kind}"
        try:
            found = struct.unpack_from(form, self.data, self.at)
        except (struct.error, OverflowError, MemoryError) as error:
            raise ValueError(f"it ends at byte {len(self.data):,} within its metadata ({error})") from None
        self.at += struct.calcsize(form)
        return found

    def text(self) -> str:
        (length,) = self.integers("Q")
        end = self.at + length
        if end > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data):,} within a text of its metadata")
        found = self.data[self.at : end].decode("utf-8")
        self.at = end
        return found

    def value(self, kind: int) -> object:
        """Returns the next value; kind: the number of its type in the file. An array becomes a list."""
        if kind in NUMBERS:
            return self.numbers(NUMBERS[kind])[0]
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"a value has the type {kind}, which is unknown")
        inner, count = self.integers("I")[0], self.integers("Q")[0]
        if inner in NUMBERS:
            return list(self.numbers(NUMBERS[inner], count))
        return [self.value(inner) for _ in range(count)]


def read_gguf(path: Path) -> GgufFile:
    """Reads the metadata of a file and maps its tensors. Raises ValueError or OSError if it is damaged."""
    with path.open("rb") as file:
        cursor = _Cursor(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if cursor.data[:4] != MAGIC:
        raise ValueError("it does not begin with GGUF")
    cursor.at = 4
    (version,) = cursor.integers("I")
    if version not in VERSIONS:
        raise ValueError(f"it is of version {version}; known are {' and '.join(map(str, VERSIONS))}")
    tensors, count = cursor.integers("Q", 2)
    fields: dict[str, Any] = {}
    offsets: dict[str, int] = {}
    for _ in range(count):
        name, kind = cursor.text(), cursor.integers("I")[0]
        offsets[name] = cursor.at
        fields[name] = cursor.value(kind)
    return GgufFile(fields, offsets, _tensors(cursor, tensors, fields.get("general.alignment", ALIGNMENT)))


def _tensors(cursor: _Cursor, count: int, alignment: int) -> list[GgufTensor]:
    """Returns the tensors that are described from the cursor on."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    described = []
    for _ in range(count):
        name, dimensions = cursor.text(), cursor.integers("I")[0]
        sizes, (kind,), (offset,) = cursor.integers("Q", dimensions), cursor.integers("I"), cursor.integers("Q")
        if not sizes or kind not in GGML_QUANT_SIZES:
            raise ValueError(f"the tensor {name!r} has {dimensions} dimensions and the type {kind}")
        described.append((name, GGMLQuantizationType(kind), sizes, offset))
    begin = -(-cursor.at // alignment) * alignment
    tensors = []
    for name, kind, shape, offset in described:
        block, size = GGML_QUANT_SIZES[kind]
        rows = (*shape[:0:-1], shape[0] // block * size)
        data = np.frombuffer(cursor.data, np.uint8, int(np.prod(rows)), begin + offset).reshape(rows)
        tensors.append(GgufTensor(name, kind, shape, data))
    return tensors
