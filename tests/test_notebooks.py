"""The notebooks, run cell by cell on a tiny model: they must not rot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
# Shown to nobody here; what would be is kept.
STUB = "class HTML(str): pass\ndef display(shown): assert 'srcdoc' in shown and 'supervised' in shown"


def cells(notebook: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_kept(notebook: Path) -> None:
    assert cells(notebook)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(notebook))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(notebook: Path, tmp_path: Path, tiny_model: Path) -> None:
    code = "\n\n".join("".join(cell["source"]) for cell in cells(notebook))
    small = ["training.max_steps=1", "evaluation.answers=1", "evaluation.max_new_tokens=4", f"model.path={tiny_model}"]
    small += [f"data.train.{number}.max_rows=20" for number in range(3)]
    small += [f"data.held_out.{number}.max_rows=2" for number in range(3)]
    small += ["evaluation.tasks.0.max_rows=2", "evaluation.tasks.0.max_new_tokens=4"]
    settings = '["output=runs/notebook"]'
    assert code.count(settings) == 1
    (tmp_path / "IPython").mkdir()
    (tmp_path / "IPython" / "__init__.py").touch()
    (tmp_path / "IPython" / "display.py").write_text(STUB)
    script = tmp_path / "notebook.py"
    script.write_text(code.replace(settings, repr([*small, "output=runs/notebook"])))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "backend: unsloth" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"IPython", "notebook.py", "runs"}
    run = tmp_path / "runs" / "notebook"
    assert (run / "gguf" / "notebook-q8_0.gguf").is_file()
    assert (run / "evaluation" / "arithmetic.json").is_file()
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
