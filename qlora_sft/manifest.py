"""What a run was made of: versions, machine, data, choices with their reasons, results."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qlora_sft.atomic import written_file
from qlora_sft.config import Config
from qlora_sft.data.ledger import SourceLedger
from qlora_sft.errors import ConfigError

PACKAGES = (
    "qlora-sft torch transformers trl peft bitsandbytes unsloth unsloth_zoo triton datasets accelerate tokenizers"
).split()


def versions() -> dict[str, str]:
    """Installed version of every package that shapes the result; absent ones are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe_data(ledger: dict[str, SourceLedger]) -> dict[str, Any]:
    """The ledger of every source, with the sha256 of its files behind one another (None for a data set of the Hub)."""
    return {name: {**asdict(row), "share": row.share, "sha256": _sha256(row.files)} for name, row in ledger.items()}


def _sha256(files: list[str]) -> str | None:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest() if files else None


def write_manifest(file: Path, config: Config, **facts: Any) -> None:
    manifest = {"config": asdict(config), "versions": versions(), "machine": platform.platform(), **facts}
    write_json(file, manifest)


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest of a finished run. Raises `ConfigError` if there is none."""
    file = run / "manifest.json"
    if not file.is_file():
        raise ConfigError(f"{run}: not the folder of a finished run (it has no manifest.json); train one first")
    manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return manifest


def write_json(file: Path, content: Any) -> None:
    """Indented JSON, written beside and renamed."""
    with written_file(file) as beside:
        beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
