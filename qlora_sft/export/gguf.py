"""A run -> merged model -> GGUF file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qlora_sft.atomic import written_file
from qlora_sft.export.llama_cpp import convert
from qlora_sft.export.merge import merge_run, read_manifest


def export_run(run: str | Path, quant: str = "q8_0", out: str | Path | None = None) -> dict[str, Any]:
    """Writes RUN/gguf/NAME-QUANT.gguf (or ``out``); merges first if that has not been done.

    Errors as in `merge_run`, and `RunError` if the converter fails; then there is no file under the final name.
    """
    run = Path(run)
    read_manifest(run)
    merged = run / "merged"
    if not merged.is_dir():
        merge_run(run)
    target = Path(out) if out else run / "gguf" / f"{_file_name(run)}-{quant}.gguf"
    with written_file(target) as beside:
        convert(merged, beside, quant)
    return {"gguf": str(target), "quant": quant, "bytes": target.stat().st_size}


def _file_name(run: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", run.resolve().name) or "model"
