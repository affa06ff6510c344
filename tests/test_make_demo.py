"""`make demo`, as the README has it, three steps long."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not (ROOT / ".venv" / "installed").exists(), reason="needs the environment that make sets up")
def test_make_demo(tmp_path: Path) -> None:
    """The whole path, three steps long: it runs to the end and leaves what it promises."""
    held_out = " ".join(f"data.held_out.{i}.max_rows=4" for i in range(3))
    run_folder = tmp_path / "demo"
    shortened = f"training.max_steps=3 evaluation.answers=2 evaluation.max_new_tokens=12 {held_out}"
    environment = {**os.environ, "RUN": str(run_folder), "DEMO_ARGS": shortened}
    result = subprocess.run("make demo", shell=True, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    figures = json.loads((run_folder / "demo.json").read_text())
    assert set(figures) == {"loss", "exact_match", "gguf_agreement", "tokens_per_second", "seconds"}
    assert set(figures["loss"]) == set(figures["exact_match"]) == {"fields", "arithmetic", "tools"}
    assert all(set(each) == {"before", "after"} for each in figures["loss"].values())
    # Three steps leave many near ties, so whole answers in 8 bits may part; the export has compared the logits.
    assert figures["gguf_agreement"] > 0
    assert len((run_folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert "It answers:" in result.stderr
    assert result.stdout.strip()


def test_it_says_at_once_what_it_will_do_and_how_long(tmp_path: Path) -> None:
    """Before torch is imported, which alone may take longer than anybody waits for a sign of life."""
    code = (
        "import sys, qlora_sft.demo_run as demo\n"
        "demo.train = lambda config, overwrite: sys.exit('torch' in sys.modules)\n"
        "demo.demo('somewhere', ['training.max_steps=100'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"takes about \d+ minutes on two cores", done.stderr)
    assert "100 steps of LoRA" in done.stderr
    assert "Everything goes into somewhere" in done.stderr
