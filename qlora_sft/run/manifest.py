"""Write down what a run was made of: versions, machine, data, choices with their reasons, results."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qlora_sft.atomic import write_json
from qlora_sft.config import Config
from qlora_sft.data.files import readable
from qlora_sft.data.ledger import SourceLedger
from qlora_sft.json_types import JsonObject
from qlora_sft.run.report import RunReport
from qlora_sft.strict import as_tree

PACKAGES = (
    "qlora-sft torch transformers trl peft bitsandbytes unsloth unsloth_zoo triton datasets accelerate tokenizers"
).split()


def versions() -> dict[str, str]:
    """Returns the installed version of every package that shapes the result; absent ones are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe_data(ledger: dict[str, SourceLedger]) -> JsonObject:
    """Returns the ledger of every source with the sha256 of its files, one after the
    other (None for a data set of the Hub)."""
    return {name: {**asdict(row), "share": row.share, "sha256": _sha256(row.files)} for name, row in ledger.items()}


def _sha256(files: list[str]) -> str | None:
    digest = hashlib.sha256()
    for file in files:
        with readable(file), open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest() if files else None


def write_manifest(file: Path, config: Config, data: JsonObject, report: RunReport) -> None:
    """Writes ``manifest.json``; with it a run is finished. data: what `describe_data` returned before the training."""
    facts = {"data": data, "report": report.to_json()}
    manifest = {"config": as_tree(config), "versions": versions(), "machine": platform.platform(), **facts}
    write_json(file, manifest)
