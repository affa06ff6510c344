"""Reads and writes safetensors files in slices, so that no model and no whole tensor has to fit in memory.

safetensors' own reader maps the file, so that every page it has touched counts as resident. Its writer wants all
tensors of a file at once. Both take too much memory for a merge that should need less than one shard.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora_sft.errors import ConfigError, RunError
from qlora_sft.model.base_files import safetensors_header
from qlora_sft.model.snapshot import INDEX, weight_files

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# One file of this size holds most small models, and both FAT32 and the hubs that want smaller files accept it.
SHARD_BYTES = 4 * 10**9
# The number of elements in memory at a time: 8 MiB in float32.
SLICE = 2**21


@dataclass(frozen=True)
class Stored:
    """Locates one tensor in a safetensors file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Reads the rows [start:stop) of the tensor, shape [stop - start, ...], without mapping the file."""
        width = math.prod(self.shape[1:])
        buffer = bytearray((stop - start) * width * self.dtype.itemsize)
        with self.file.open("rb") as file:
            file.seek(self.offset + start * width * self.dtype.itemsize)
            if file.readinto(buffer) != len(buffer):
                raise RunError(f"{self.file}: ends early; the file is incomplete, copy or download it again")
        if not buffer:
            return torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        return torch.frombuffer(buffer, dtype=self.dtype).reshape(stop - start, *self.shape[1:])

    def whole(self) -> torch.Tensor:
        """Reads the whole tensor, which should be a small one."""
        if not self.shape:
            return Stored(self.file, self.dtype, (1,), self.offset).rows(0, 1).reshape(())
        return self.rows(0, self.shape[0])


def read_header(file: Path) -> dict[str, Stored]:
    """Returns the tensors of one file by name, in the order in which they are stored.

    Raises `RunError` for a damaged or truncated file.
    """
    try:
        header, begin = safetensors_header(file)
        tensors = {
            name: Stored(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), begin + entry["data_offsets"][0])
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        }
        end = max((begin + entry["data_offsets"][1] for entry in header.values()), default=begin)
        if end > file.stat().st_size:
            raise ValueError(f"{end:,} bytes expected, {file.stat().st_size:,} found")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file}: not a whole safetensors file ({error}); copy or download it again") from None
    return tensors


def read_model(folder: Path) -> dict[str, Stored]:
    """Returns the tensors of a model folder by name, shard after shard.

    Raises `RunError` if a shard is missing, or the list of them is damaged.
    """
    try:
        files = [file.name for file in weight_files(folder)] if (folder / INDEX).is_file() else ["model.safetensors"]
    except ConfigError as error:
        raise RunError(str(error)) from None
    tensors: dict[str, Stored] = {}
    for name in files:
        if not (folder / name).is_file():
            raise RunError(f"{folder}: {name} is missing; the base model is incomplete, copy or download it again")
        tensors.update(read_header(folder / name))
    return tensors


@dataclass(frozen=True)
class Planned:
    """Describes a tensor to be written. Its type and shape are known at once; its content comes in slices of rows."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    slices: Callable[[], Iterator[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def row_ranges(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields ranges of rows that hold about `SLICE` elements each.

    Every range but the last has a multiple of 64 rows, so that a range never cuts a block of NF4, whatever the width.
    """
    width = max(1, math.prod(shape[1:]))
    step = max(64, SLICE // width // 64 * 64)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def copied(name: str, stored: Stored) -> Planned:
    """Plans a tensor that is written as it is read."""
    if not stored.shape:
        return Planned(name, stored.dtype, (), lambda: iter([stored.whole()]))
    return Planned(name, stored.dtype, stored.shape, lambda: (stored.rows(a, b) for a, b in row_ranges(stored.shape)))


def shards_of(tensors: Sequence[Planned], files: Sequence[Path]) -> dict[str, list[Planned]]:
    """Returns the tensors by file name.

    A new file begins where ``files``, those that the tensors come from, have one, and where one would grow beyond
    `SHARD_BYTES`.
    """
    groups: list[list[Planned]] = []
    size, last = 0, None
    for tensor, file in zip(tensors, files, strict=True):
        if file != last or size + tensor.nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size, last = size + tensor.nbytes, file
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_shard(file: Path, tensors: Sequence[Planned]) -> None:
    """Writes the header and then every tensor slice by slice. The file is on the disk when this returns."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            written = 0
            for part in tensor.slices():
                written += handle.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if written != tensor.nbytes:
                raise RunError(
                    f"{tensor.name}: {written:,} bytes came instead of {tensor.nbytes:,}; please report this"
                )
        handle.flush()
        os.fsync(handle.fileno())


def write_index(folder: Path, shards: dict[str, Sequence[Planned]]) -> None:
    """Writes ``model.safetensors.index.json``, unless there is only one shard, which needs none."""
    if len(shards) == 1:
        return
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
    content = {
        "metadata": {"total_size": total},
        "weight_map": {tensor.name: file for file, tensors in shards.items() for tensor in tensors},
    }
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
