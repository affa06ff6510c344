"""Finds the llama.cpp that is installed: its library, its quantizer, its version. Fetches and builds nothing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from qlora_sft.cache import cache_dir
from qlora_sft.errors import RunError

PINNED = "llama_cpp_python-0.3.36"
# The commit of llama.cpp that the pinned sdist carries, as its changelog says.
PINNED_COMMIT = "0c1e57098"
BUILT = f"{PINNED}-quantize"
UNKNOWN = "unknown version"
Library = TypeVar("Library")


@dataclass(frozen=True)
class LlamaTool:
    """Describes a program of llama.cpp: where it was found, and which version it is."""

    path: Path
    found: str
    version: str


def llama_libraries() -> list[Path]:
    """Returns the libraries that have llama.cpp's C interface, the preferred one first."""
    folders = (
        [configured() / part for part in ("build/bin", "build/src", "lib", "bin", ".")]
        if configured() != Path()
        else []
    )
    package = package_folder("llama_cpp")
    if package:
        folders.append(package / "lib")
    names = ("libllama.so", "libllama.dylib", "llama.dll")
    found = [folder / name for folder in folders for name in names if (folder / name).is_file()]
    ours = package_folder("xllamacpp")
    return found + (sorted(ours.glob("xllamacpp*.so")) + sorted(ours.glob("xllamacpp*.pyd")) if ours else [])


def loaded(load: Callable[[], Library]) -> Library:
    """Returns what ``load`` returns, which loads a library of llama.cpp.

    It is linked with OpenMP's, libgomp, which a bare system has not; the one that torch brings will do. Raises
    `RunError` if there is none.
    """
    try:
        return load()
    except (ImportError, OSError) as error:
        if "libgomp" not in str(error):
            raise
    importlib.import_module("torch")
    try:
        return load()
    except (ImportError, OSError) as error:
        raise RunError(f"llama.cpp cannot be loaded ({error}): apt install libgomp1") from None


def configured() -> Path:
    """Returns the folder that ``LLAMA_CPP_DIR`` names, or an empty path if it is not set."""
    value = os.environ.get("LLAMA_CPP_DIR")
    return Path(value).expanduser() if value else Path()


def package_folder(name: str) -> Path | None:
    """Returns the folder of an installed package without importing it, or None."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def package_version(name: str) -> str | None:
    """Returns the version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def find_quantizer() -> LlamaTool | None:
    """Finds ``llama-quantize`` in LLAMA_CPP_DIR, on PATH, or where it was built earlier.

    Returns None if it is nowhere.
    """
    if configured() != Path():
        for part in ("build/bin", "bin", "."):
            program = configured() / part / "llama-quantize"
            if os.access(program, os.X_OK):
                return LlamaTool(program, f"LLAMA_CPP_DIR={configured()}", program_version(program))
    on_path = shutil.which("llama-quantize")
    if on_path:
        return LlamaTool(Path(on_path), "PATH", program_version(Path(on_path)))
    built = cache_dir("tools") / BUILT / "llama-quantize"
    if os.access(built, os.X_OK):
        return LlamaTool(built, "built earlier from the pinned sources", f"llama.cpp {PINNED_COMMIT} ({PINNED})")
    return None


def program_version(program: Path) -> str:
    """Returns in one line what the program says about its version."""
    try:
        result = subprocess.run([str(program), "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return UNKNOWN
    lines = [line for line in (result.stdout + result.stderr).splitlines() if "version" in line]
    return f"llama.cpp {lines[0].strip()}" if lines else UNKNOWN


def threads() -> int:
    """Returns how many threads llama.cpp shall use: OMP_NUM_THREADS, or one per core that this process may use.

    Its threads wait for each other in a busy loop, so more threads than free cores take a multiple of the time.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted):
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
