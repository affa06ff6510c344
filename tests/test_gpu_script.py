"""Everything that is to be measured on a GPU can at least be walked through without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import peak_parts
import pytest
from tests_support import with_unsloth

ROOT = Path(__file__).parents[1]


@with_unsloth
@pytest.mark.slow
def test_the_script_of_all_gpu_measurements_runs_dry(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", str(tmp_path), "--dry-run"], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {
        "parts.txt",
        "backends.jsonl",
        "layers.jsonl",
        "max_context.jsonl",
        "prefixes.jsonl",
        "attention.jsonl",
    } <= names
    rows = [json.loads(line) for line in (tmp_path / "backends.jsonl").read_text().splitlines()]
    assert [row["provider"] for row in rows] == ["transformers", "unsloth"]
    assert rows[0]["losses"] == pytest.approx(rows[1]["losses"], abs=1e-3)
    assert all(row["adapter_types"] == ["torch.float32"] for row in rows)
    assert all(not row["beside_the_report_on_stdout"] for row in rows)


def test_what_was_alive_at_the_peak_is_found_again() -> None:
    """Two tensors of one place are there together, a larger one alone, and one that was there before is let go."""

    def event(action: str, address: int, size: int, line: int = 0) -> dict[str, object]:
        frames = [{"filename": "/x/qlora_sft/model/a.py", "line": line, "name": "f"}]
        return {"action": action, "addr": address, "size": size, "frames": frames}

    events = [
        event("free_completed", 9, 1000),
        event("alloc", 1, 60, 7), event("alloc", 2, 50, 7), event("free_completed", 1, 60),
        event("alloc", 3, 40, 8), event("free_completed", 2, 50), event("free_completed", 3, 40),
        event("alloc", 1, 100, 9), event("free_completed", 1, 100),
    ]  # fmt: skip
    peak, alive = peak_parts.live_at_peak(events)
    assert peak == 110
    assert alive == [("a.py:7 f", 110)]
