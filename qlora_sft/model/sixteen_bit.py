"""Keeps a copy in 16 bits of a base whose files hold MXFP4 or FP8, on which no adapter can be trained.

The copy is a folder in the user's cache that is used in place of the base's own. Like the snapshot of a Hub model it
has no weights at first: configuration and tokenizer are all that a plan needs. The weights are written when they are
loaded for the first time, file by file, so that what was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

from qlora_sft.atomic import write_json, written_file
from qlora_sft.cache import cache_dir, sole_builder
from qlora_sft.errors import ConfigError, RunError
from qlora_sft.json_types import JsonObject, read_object
from qlora_sft.model.base_files import METHODS, Header, packed_method, quantization_of, read_config, read_headers
from qlora_sft.model.fingerprint import fingerprint
from qlora_sft.model.packed_layout import layout_of
from qlora_sft.model.snapshot import DESCRIPTION, INDEX, origin_of
from qlora_sft.say import Say

# In every copy: where it was made from, and what the files there hold.
NOTE = "dequantized.json"


def copy_of(base: str) -> str:
    """Returns the folder of the 16-bit copy of ``base``, described and perhaps without weights; ``base`` itself if it
    needs none."""
    try:
        settings = read_config(base)
    except ConfigError:  # which is reported where it is read
        return base
    method = packed_method(settings)
    if method is None:
        return base
    folder = _place(Path(base), settings)
    with sole_builder(f"dequantized-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"):
        _describe(Path(base), folder, settings, METHODS[method])
    return str(folder)


def source_of(base: str | Path) -> Path | None:
    """Returns the folder that the 16-bit copy ``base`` is made from; None for any other folder."""
    note = _note(Path(base))
    return Path(str(note["source"])) if note else None


def packed_as(base: str | Path) -> str | None:
    """Returns the format, MXFP4 or FP8, of the files that the 16-bit copy ``base`` is made from; None for any other."""
    note = _note(Path(base))
    return str(note["format"]) if note else None


def headers_of_copy(source: Path) -> dict[str, Header]:
    """Returns the headers that the 16-bit copy of ``source`` has or will have. Raises `ConfigError` if there can be
    none."""
    parts = layout_of(read_headers(str(source)), read_config(str(source)))
    return {part.name: part.header for part in parts}


def write_weights(folder: Path, say: Say) -> None:
    """Writes the weights of the 16-bit copy ``folder``; nothing of those that are there.

    Memory holds slices, and of MXFP4 one expert. Raises `ConfigError` for a source that is not complete, and `RunError`
    if the disk is too small.
    """
    from qlora_sft.model.tensors import read_model, shards_of, write_index, write_shard
    from qlora_sft.model.unpack import unpacked

    source, format_ = source_of(folder), packed_as(folder)
    assert source is not None
    with sole_builder(f"dequantized-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"):
        for left in folder.glob(".*.partial-*"):  # by processes that were killed; nobody else writes here now
            left.unlink()
        stored = read_model(source)
        parts = layout_of(read_headers(str(source)), read_config(str(source)))
        shards = shards_of([unpacked(part, stored) for part in parts], [stored[part.codes].file for part in parts])
        todo = {name: tensors for name, tensors in shards.items() if not (folder / name).is_file()}
        if not todo:
            return
        needed = sum(tensor.nbytes for tensors in todo.values() for tensor in tensors)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise RunError(
                f"{folder}: the 16-bit copy of {source} needs {_size(needed)}, and {_size(free)} are free there. Free "
                "some room, or name another place: QLORA_SFT_CACHE=FOLDER"
            )
        say(
            f"base: no adapter can be trained on weights in {format_}, so they are written in 16 bits, once: "
            f"{_size(needed)} to {folder} ({_size(free)} free)"
        )
        begun = time.monotonic()
        # First the index, by which a folder with some of the files is known to be incomplete.
        write_index(folder, dict(shards))
        for name, tensors in todo.items():
            with written_file(folder / name) as beside:
                write_shard(beside, tensors)
        say(f"base: 16-bit copy of {_size(needed)} written in {time.monotonic() - begun:.0f} s")


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**29 else f"{nbytes / 2**20:.1f} MiB"


def _place(source: Path, settings: JsonObject) -> Path:
    """Returns the copy's folder: of a commit of the Hub one that is named alike, of a folder one for what is in it now.

    Two folders with the same weights have two copies, because they may have different tokenizers.
    """
    root, origin = cache_dir("dequantized"), origin_of(source)
    if origin is not None:
        return root / source.parent.parent.name / "snapshots" / source.name
    facts = [str(source.resolve()), fingerprint(source), quantization_of(settings)]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return root / f"{source.resolve().name}-{key}"


def _describe(source: Path, folder: Path, settings: JsonObject, format_: str) -> None:
    """Gives the copy all but the weights: a config.json of a 16-bit model, and links to the other small files."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_if_new(folder / NOTE, {"source": str(source), "format": format_})
    _write_if_new(folder / "config.json", _in_16_bits(settings))
    found = {file.name: file for pattern in DESCRIPTION for file in source.glob(pattern)}
    wanted = {name: file.absolute() for name, file in found.items() if name not in ("config.json", INDEX, NOTE)}
    for link in folder.iterdir():
        if link.is_symlink() and link.name not in wanted:
            link.unlink()
    for name, file in wanted.items():
        link = folder / name
        if not (link.is_symlink() and link.readlink() == file):
            link.unlink(missing_ok=True)
            link.symlink_to(file)


def _in_16_bits(settings: JsonObject) -> JsonObject:
    """Returns config.json without its quantisation."""
    kept = {key: value for key, value in settings.items() if key != "quantization_config"}
    text: Any = kept.get("text_config")
    if isinstance(text, dict):
        kept["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    return kept


def _write_if_new(file: Path, content: JsonObject) -> None:
    if not file.is_file() or read_object(file) != content:
        write_json(file, content)


def _note(folder: Path) -> JsonObject | None:
    file = folder / NOTE
    return read_object(file) if file.is_file() else None
