"""Read paths and text files that people write, with errors that name the file and the cure."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from qlora_sft.errors import ConfigError, DataError


def as_path(text: str, error: type[ConfigError | DataError] = ConfigError) -> Path:
    """Returns the path with ``~`` expanded. Raises ``error`` for a text that cannot be a path."""
    try:
        path = Path(text).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            path.lstat()
    except (OSError, ValueError, RuntimeError) as fault:
        why = fault.strerror if isinstance(fault, OSError) else fault
        shown = repr(text if len(text) <= 80 else text[:77] + "...")
        raise error(f"{shown} cannot be a file or folder: {why}") from None
    return path


def read_text(path: Path) -> str:
    """Returns the text in ``path`` without a byte order mark. Raises `ConfigError`."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wide = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
        line = raw.count(b"\n", 0, error.start) + 1
        where = "it is UTF-16" if wide else f"byte 0x{raw[error.start]:02x} in line {line}"
        raise ConfigError(f"{path}: not UTF-8 text; re-save it as UTF-8 ({where})") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ConfigError(f"{path}: not UTF-8 text; re-save it as UTF-8 (a zero byte in line {line})")
    return text
